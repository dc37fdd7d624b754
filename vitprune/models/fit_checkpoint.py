"""A model for a checkpoint: of the timm name that is given, with what the file tells of its own."""

from __future__ import annotations

import inspect
import sys
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import is_model, model_entrypoint
from torch import Tensor, nn

from vitprune.errors import VitpruneError, VitpruneNote
from vitprune.models.build import find_mismatch, fit_widths, name_few
from vitprune.models.checkpoint_file import Checkpoint, first_line, read_checkpoint
from vitprune.models.checkpoint_layout import count_kinds, find_state
from vitprune.models.foreign_file import explain_file
from vitprune.models.shape_facts import fold_class_position, infer_arguments
from vitprune.models.transform import read_told, tell_transform
from vitprune.twins.find_twin import rename_checkpoint

# Of a model's body: without them its answers would be others.
_TOKENS = frozenset({"cls_token", "dist_token", "reg_token", "register_tokens", "pos_embed", "norm_pre", "rel_pos"})
_LAYOUTS = {
    "encoder_layer_0.": "the names are torchvision's",
    ".attention.attention.query.": "the names are transformers'",
    "lora_": "it holds LoRA adapters, which must be merged into the weights first",
}
_FAILURES = (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


def load_checkpoint(
    name: str,
    path: Path,
    *,
    key: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    image_size: tuple[int, int] | None = None,
) -> nn.Module:
    """Build a timm model with the weights of a file.

    What the file tells overrides what the name says: image and patch size, channels, depth, widths, biases, tokens,
    classes and pooling by the shapes; how images are prepared by the arguments of the training script.

    Args:
        name: timm name.
        path: .safetensors, what ``torch.save`` wrote, or the .npz of google-research ViT.
        key: which of several sets of weights.
        model_args: what the model was created with beside the name; overrides the file.
        image_size: of the images it was trained on, where shapes leave several grids.

    Raises:
        VitpruneError: if there is no such file, it is no plain state dict, or does not fit.

    >>> import tempfile
    >>> tuned = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=64, num_classes=3)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     torch.save({"net": {"module.encoder." + k: v for k, v in tuned.state_dict().items()}}, f"{folder}/a.pth")
    ...     load_checkpoint("vit_tiny_patch16_224", Path(folder) / "a.pth").pos_embed.shape
    torch.Size([1, 17, 192])
    """
    source = f"checkpoint {path}"
    if path.suffix == ".npz":
        return _load_npz(name, path, dict(model_args or {}), image_size)
    checkpoint = read_checkpoint(path)
    renamed = rename_checkpoint(checkpoint.tensors)
    if renamed is not None:
        checkpoint = replace(checkpoint, tensors=renamed)
    said = dict(model_args or {})
    name = _match_distillation(name, checkpoint)
    reference = _build_reference(name)
    told = read_told(checkpoint.arguments, source)
    found = find_state(checkpoint.tensors, reference.state_dict().keys(), source, key)
    state, others = (dict(checkpoint.tensors), []) if found is None else (dict(found.state), list(found.others))
    state = fold_class_position(state)
    asked = {"name": name, "source": source, "said": said, "told": told.model_args, "image_size": image_size}
    arguments = infer_arguments(reference, state, **asked)
    model = _create(name, arguments, source)
    problem = _find_problem(model, state)
    if problem:
        filtered = _filter(name, state, model)
        if filtered is not None:
            arguments = infer_arguments(reference, filtered, **asked)
            model = _create(name, arguments, source)
            filtered = _filter(name, state, model)
        if filtered is None or _find_problem(model, filtered):
            problem = find_mismatch(reference if found is None else model, state) or problem
            raise VitpruneError(f"{source} does not fit {name}: {problem}{_name_layout(checkpoint)}")
        state = filtered
    own = model.state_dict()
    for bias in (key for key in own if key in _zero_biases(model, state)):
        state[bias] = torch.zeros_like(own[bias])
    others += [key for key in state if key not in own]
    model.load_state_dict({key: state[key] for key in own})
    model.model_args = arguments
    _say_what_is_left(source, others, model, checkpoint)
    return tell_transform(model, told.transform)


def refill(model: nn.Module, path: Path, *, key: str | None = None) -> nn.Module:
    """Give a model, in place, the weights of a file: a pruned model's that was trained elsewhere, in any layout.

    Args:
        model: of the shapes that the file has.
        path: .safetensors, or what ``torch.save`` wrote.
        key: which of several sets of weights.

    Returns:
        The model.

    Raises:
        VitpruneError: if there is no such file, it is no plain state dict, or its weights are not this model's.

    >>> import tempfile
    >>> model, trained = (timm.create_model("vit_tiny_patch16_224", depth=1, mlp_ratio=2) for _ in range(2))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     torch.save({"state_dict": {"model." + k: v for k, v in trained.state_dict().items()}}, f"{folder}/a.ckpt")
    ...     bool((refill(model, Path(folder) / "a.ckpt").head.weight == trained.head.weight).all())
    True
    """
    source, own = f"checkpoint {path}", model.state_dict()
    checkpoint = read_checkpoint(path)
    found = find_state(checkpoint.tensors, own.keys(), source, key)
    state = dict(checkpoint.tensors) if found is None else found.state
    problem = find_mismatch(model, {name: value for name, value in state.items() if name in own})
    if problem:
        raise VitpruneError(
            f"{source} does not fit the model of the folder: {problem}{_name_layout(checkpoint)}; it takes weights of "
            "this pruned model, trained"
        )
    others = [name for name in state if name not in own] + ([] if found is None else list(found.others))
    if others:
        told = f"{source}: left out {count_kinds(others)} tensors that are not of the model"
        warnings.warn(told, VitpruneNote, stacklevel=3)
    model.load_state_dict({name: state[name] for name in own})
    return model


def _build_reference(name: str) -> nn.Module:
    """Build a model of a name that has shapes and no numbers."""
    with torch.device("meta"):
        return timm.create_model(name)


def _create(name: str, arguments: Mapping[str, Any], source: str) -> nn.Module:
    try:
        return timm.create_model(name, **arguments)
    except _FAILURES as error:
        told = ", ".join(f"{key}={value}" for key, value in arguments.items())
        raise VitpruneError(
            f"{source} does not fit {name}: with {told} there is no model ({first_line(error)})"
        ) from error


def _match_distillation(name: str, checkpoint: Checkpoint) -> str:
    """Return the name with or without a distillation token, as the file has one or not."""
    has_token = any(key.split(".")[-1] == "dist_token" for key in checkpoint.tensors)
    family, _, _tag = name.partition(".")
    is_distilled = "_distilled" in family
    if has_token == is_distilled:
        return name
    if is_distilled:
        other = family.replace("_distilled", "")
    else:
        other = next(
            (each for each in (_distilled(family), _distilled("deit_tiny_patch16_224")) if is_model(each)), family
        )
    warnings.warn(
        f"the checkpoint has {'a' if has_token else 'no'} distillation token: it is built as {other}, not as {name}",
        VitpruneNote,
        stacklevel=2,
    )
    return other


def _distilled(family: str) -> str:
    return family.replace("_patch", "_distilled_patch").replace("vit_", "deit_", 1 if family.startswith("vit_") else 0)


def _filter(name: str, state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor] | None:
    """Return a state dict of another layout in timm's names; None where timm does not know the layout."""
    convert = getattr(sys.modules[model_entrypoint(name.partition(".")[0]).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return None
    adapts = "adapt_layer_scale" in inspect.signature(convert).parameters
    try:
        return dict(convert(dict(state), model, **({"adapt_layer_scale": True} if adapts else {})))
    except _FAILURES:
        return None


def _name_layout(checkpoint: Checkpoint) -> str:
    """Say whose names a checkpoint has, where they are well known."""
    for piece, whose in _LAYOUTS.items():
        if any(piece in key for key in checkpoint.tensors):
            return f" ({whose}: convert it to timm's names, or take timm's version of the model)"
    return ""


def _find_problem(model: nn.Module, state: Mapping[str, Tensor]) -> str | None:
    """Say why a model would not answer as the state dict's; tensors of heads, losses and decoders do not matter."""
    fit_widths(model, {key: tuple(value.shape) for key, value in state.items()})
    own = model.state_dict()
    bodies = {key.partition(".")[0] for key in own} - _names_of_heads(model) | _TOKENS
    needed = {key: value for key, value in state.items() if key in own or key.partition(".")[0] in bodies}
    needed |= {key: own[key] for key in _zero_biases(model, state)}
    return find_mismatch(model, needed)


def _zero_biases(model: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Return biases of the classifier that the file does not have, which are zero then."""
    biases = [f"{head}.bias" for head in _names_of_heads(model)]
    return [key for key in biases if key not in state and key.replace("bias", "weight") in state]


def _names_of_heads(model: nn.Module) -> set[str]:
    classifier = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    classifier = (classifier,) if isinstance(classifier, str) else classifier
    return {name.partition(".")[0] for name in classifier} | {"head", "head_dist"}


def _say_what_is_left(source: str, others: list[str], model: nn.Module, checkpoint: Checkpoint) -> None:
    said = []
    if others:
        said.append(f"left out {count_kinds(others)} tensors that are not of the model")
    if model.model_args.get("num_classes") == 0:
        said.append("it has no classifier, so the model is an encoder without classes")
    own_name = checkpoint.architecture
    if own_name and is_model(own_name.partition(".")[0]):
        family = model.pretrained_cfg.get("architecture")
        if family and own_name.partition(".")[0] != family:
            said.append(f"it says that it is of {own_name}")
    if said:
        warnings.warn(f"{source}: {'; '.join(said)}", VitpruneNote, stacklevel=3)


def _load_npz(name: str, path: Path, model_args: dict[str, Any], image_size: tuple[int, int] | None) -> nn.Module:
    import numpy as np

    if not path.is_file():
        raise VitpruneError(f"checkpoint {path}: no such file")
    try:
        with zipfile.ZipFile(path), np.load(path, allow_pickle=False) as arrays:
            head = next((arrays[key] for key in arrays.files if key.endswith("head/bias")), None)
            table = next((arrays[key].shape for key in arrays.files if key.endswith("pos_embedding")), None)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        reason = explain_file(path) or first_line(error)
        raise VitpruneError(f"checkpoint {path} is not a plain .npz of arrays: it {reason}") from error
    if head is None:
        raise VitpruneError(f"checkpoint {path} has no 'head/bias': not a google-research ViT with a classifier")
    sized = {} if image_size is None else {"img_size": image_size}
    arguments = {"num_classes": len(head), **sized, **model_args}
    model = _create(name, arguments, f"checkpoint {path}")
    if not hasattr(model, "load_pretrained"):
        raise VitpruneError(f"{name} cannot read .npz checkpoints: it is no google-research ViT")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)  # whatever the file leaves untouched stays visible
    try:
        model.load_pretrained(str(path))
    except _FAILURES as error:
        raise VitpruneError(f"checkpoint {path} does not fit {name}: {first_line(error)}") from error
    missing = [key for key, parameter in model.named_parameters() if parameter.isnan().any()]
    if missing:
        raise VitpruneError(f"checkpoint {path} does not fit {name}: nothing in the file for {name_few(missing)}")
    if table is not None and model.pos_embed is not None and table[1] != model.pos_embed.shape[1]:
        warnings.warn(
            f"checkpoint {path}: its position table of {table[1]} rows is resampled to the "
            f"{model.pos_embed.shape[1]} of {name}; to keep it say the size of its images with `image_size`",
            VitpruneNote,
            stacklevel=3,
        )
    model.model_args = arguments
    return model
