"""Models that answer only some of their classes."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn

from vitprune.data import label_names_of
from vitprune.entry import entry
from vitprune.errors import VitpruneError


@entry
def keep_classes(model: nn.Module, classes: Sequence[int], *, label_names: Sequence[str] | None = None) -> nn.Module:
    """Return a copy whose classifier answers only some of the classes.

    Args:
        model: timm model with a classifier; stays as it is.
        classes: class indices to keep, each once; output i of the result is class ``classes[i]``.
        label_names: what the kept classes are called (folder names of their images), recorded as ``label_names``;
            None: what the model calls them.

    Raises:
        VitpruneError: if the classifier is not linear, or a class is unknown, doubled or the only one.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=1)
    >>> keep_classes(model, [7, 3], label_names=["cock", "shark"]).head.out_features
    2
    """
    num_classes = getattr(model, "num_classes", 0)
    unknown = [index for index in classes if not 0 <= index < num_classes]
    if unknown:
        raise VitpruneError(f"class {unknown[0]} cannot be kept: the model has {num_classes}")
    if len(set(classes)) < max(2, len(classes)):
        raise VitpruneError(f"keep at least two different classes, each once; got {list(classes)}")
    result = copy.deepcopy(model)
    heads = result.get_classifier()
    heads = heads if isinstance(heads, tuple | list) else (heads,)
    for name, module in list(result.named_modules()):
        if any(module is head for head in heads):
            if not isinstance(module, nn.Linear):
                raise VitpruneError(
                    f"{name}: only linear classifiers can be reduced, this is a {type(module).__name__}"
                )
            result.set_submodule(name, _keep_rows(module, list(classes)))
        if getattr(module, "num_classes", None) == num_classes:
            module.num_classes = len(classes)
    result.model_args = {**(getattr(model, "model_args", None) or {}), "num_classes": len(classes)}
    known = label_names_of(model)
    if label_names is None and len(known) == num_classes:
        label_names = [known[index] for index in classes]
    if label_names is not None:
        result.label_names = tuple(label_names)
    return result


@entry
def new_classifier(model: nn.Module, label_names: Sequence[str], *, seed: int = 0) -> nn.Module:
    """Return a copy with a fresh classifier for other classes, to be trained.

    Args:
        model: timm model; stays as it is.
        label_names: what the classes are called, in order; recorded as ``label_names``.
        seed: of its weights.

    Raises:
        VitpruneError: if there are fewer than two classes, or the model cannot have another classifier.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=1)
    >>> new_classifier(model, ["cat", "dog"]).head.out_features
    2
    """
    if len(set(label_names)) < max(2, len(label_names)):
        raise VitpruneError(f"a classifier needs at least two different classes, each once; got {list(label_names)}")
    if not hasattr(model, "reset_classifier"):
        raise VitpruneError(f"{type(model).__name__} has no classifier that can be replaced")
    result = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        result.reset_classifier(len(label_names))
    parameter = next(model.parameters())
    result.to(device=parameter.device, dtype=parameter.dtype).train(model.training)
    result.model_args = {**(getattr(model, "model_args", None) or {}), "num_classes": len(label_names)}
    result.label_names = tuple(label_names)
    return result


def _keep_rows(linear: nn.Linear, rows: list[int]) -> nn.Linear:
    weight, bias = linear.weight, linear.bias
    kept = nn.Linear(linear.in_features, len(rows), bias=bias is not None, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        kept.weight.copy_(weight[rows])
        if bias is not None:
            kept.bias.copy_(bias[rows])
    return kept.train(linear.training).requires_grad_(weight.requires_grad)
