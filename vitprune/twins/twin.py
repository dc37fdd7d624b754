"""A twin: the timm model that computes what a model of another library computes, with its weights.

Everything that can be done to a timm model can then be done to it, and the weights can be written back. Nothing of the
other library is imported: names of tensors and a description say all.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from timm.data import ImageNetInfo
from torch import Tensor, nn

from vitprune.errors import VitpruneError, VitpruneNote

State = Mapping[str, Tensor]
# Pattern of a whole name -> timm's name for it; None: of no use for answers.
Rules = Sequence[tuple[str, str | None]]

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
HALVES = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
CLIP = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
# Words of other libraries for activation functions -> timm's.
_ACTIVATIONS = {
    "gelu": None,  # the default of every family here
    "gelu_python": None,
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


@dataclass(frozen=True)
class Twin:
    """What it takes to build a twin.

    Attributes:
        architecture: timm name.
        arguments: of timm's ``create_model``; JSON values.
        state: timm's names -> tensors.
        source: the class that it is a twin of, for messages.
        transform: how images are prepared, in the words of timm's ``pretrained_cfg``.
        norm_eps: of every LayerNorm; None: as timm has it.
        label_names: of its classes; empty where nothing tells.
        projection: numbers of the embedding after a linear map without bias; None: there is no such map.
        notes: what of the model is left out, for people.
    """

    architecture: str
    arguments: Mapping[str, Any]
    state: State
    source: str
    transform: Mapping[str, Any] = field(default_factory=dict)
    norm_eps: float | None = None
    label_names: tuple[str, ...] = ()
    projection: int | None = None
    notes: tuple[str, ...] = ()


def build_twin(twin: Twin) -> nn.Module:
    """Build the timm model.

    Returns:
        In eval mode.

    Raises:
        VitpruneError: if the weights do not fit it.
    """
    try:
        model = timm.create_model(twin.architecture, **twin.arguments)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise VitpruneError(f"{twin.source}: timm's {twin.architecture} cannot be as it is ({error})") from error
    set_norm_eps(model, twin.norm_eps)
    if twin.projection is not None:
        add_projection(model, twin.projection)
    dtypes = {value.dtype for value in twin.state.values() if value.is_floating_point()}
    if len(dtypes) == 1:
        model.to(*dtypes)
    own, state = model.state_dict(), dict(twin.state)
    for name, value in own.items():
        if name in state and state[name].shape != value.shape:
            raise VitpruneError(
                f"{twin.source}: {name} is {list(state[name].shape)}, and {list(value.shape)} in timm's "
                f"{twin.architecture} of this description"
            )
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or extra:
        told = [f"it lacks {missing[0]} ({len(missing)})"] if missing else []
        told += [f"it has {extra[0]} ({len(extra)})"] if extra else []
        raise VitpruneError(f"{twin.source} is no {twin.architecture} of timm: {'; '.join(told)}")
    model.load_state_dict({name: value.detach().clone() for name, value in state.items()})
    model.model_args = {"num_classes": model.num_classes, **twin.arguments}
    model.pretrained_cfg = {
        **model.pretrained_cfg,
        **dict.fromkeys(("url", "hf_hub_id", "hf_hub_filename", "tag", "license", "origin_url", "paper_ids"), None),
        **twin.transform,
        "num_classes": model.num_classes,
    }
    if twin.label_names and len(twin.label_names) == model.num_classes:
        model.label_names = twin.label_names
    if twin.notes:
        warnings.warn(f"{twin.source}: {'; '.join(twin.notes)}", VitpruneNote, stacklevel=3)
    return model.eval()


def set_norm_eps(model: nn.Module, eps: float | None) -> None:
    """Give every LayerNorm of a model this ε, and note it as ``norm_eps``; None leaves them as they are.

    >>> model = timm.create_model("vit_tiny_patch16_224", depth=1)
    >>> set_norm_eps(model, 1e-12)
    >>> model.norm.eps
    1e-12
    """
    if eps is None:
        return
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = eps
    model.norm_eps = eps


def add_projection(model: nn.Module, width: int) -> None:
    """Give an encoder a linear map without bias after its pooling, where classifiers have theirs.

    >>> model = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=0)
    >>> add_projection(model, 64)
    >>> model.head.weight.shape, model.num_classes
    (torch.Size([64, 192]), 0)
    """
    parameter = next(model.parameters())
    model.head = nn.Linear(model.num_features, width, bias=False).to(parameter)


def rename(state: State, rules: Rules, source: str) -> dict[str, Tensor]:
    r"""Return tensors by timm's names, queries, keys and values still apart.

    Args:
        state: by the names of another library.
        rules: the first pattern that matches a whole name decides.
        source: of the tensors, for the message.

    Raises:
        VitpruneError: naming the first tensor that no rule knows: without it answers would be others.

    >>> rename({"encoder.layer.3.norm1.bias": torch.ones(1)}, [(r"encoder.layer.(.*)", r"blocks.\1")], "it").keys()
    dict_keys(['blocks.3.norm1.bias'])
    """
    compiled = [(re.compile(pattern), name) for pattern, name in rules]
    result = {}
    for key, value in state.items():
        match, name = next(((m, name) for pattern, name in compiled if (m := pattern.fullmatch(key))), (None, None))
        if match is None:
            raise VitpruneError(f"{source} has a tensor that no timm model has: {key} {list(value.shape)}")
        if name is not None:
            result[match.expand(name)] = value
    return result


def join_queries(state: State) -> dict[str, Tensor]:
    """Return a state with ``attn.qkv`` in place of ``attn.q``, ``attn.k`` and ``attn.v``; biases that lack are zero.

    >>> parts = {f"attn.{name}.weight": torch.ones(2, 2) for name in "qkv"} | {"attn.q.bias": torch.ones(2)}
    >>> join_queries(parts)["attn.qkv.bias"].tolist()
    [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    """
    result = {name: value for name, value in state.items() if not re.search(r"attn\.[qkv]\.(weight|bias)$", name)}
    for name in state:
        prefix = name.removesuffix("q.weight")
        if not name.endswith("attn.q.weight"):
            continue
        result[f"{prefix}qkv.weight"] = torch.cat([state[f"{prefix}{part}.weight"] for part in "qkv"])
        if any(f"{prefix}{part}.bias" in state for part in "qkv"):
            zeros = torch.zeros_like(state[name][:, 0])
            result[f"{prefix}qkv.bias"] = torch.cat([state.get(f"{prefix}{part}.bias", zeros) for part in "qkv"])
    return result


def activation(word: str, source: str) -> dict[str, str]:
    """Return timm's argument for an activation function.

    Raises:
        VitpruneError: if timm's models do not have it.

    >>> activation("gelu_pytorch_tanh", "it"), activation("gelu", "it")
    ({'act_layer': 'gelu_tanh'}, {})
    """
    if word not in _ACTIVATIONS:
        raise VitpruneError(f"{source}: activation function {word} is none that a timm twin has")
    found = _ACTIVATIONS[word]
    return {} if found is None else {"act_layer": found}


def count_blocks(state: State) -> int:
    """Return how many blocks a state has, by timm's names.

    >>> count_blocks({"blocks.0.norm1.bias": torch.ones(1), "blocks.11.norm1.bias": torch.ones(1)})
    12
    """
    return 1 + max(int(match[1]) for name in state if (match := re.match(r"blocks\.(\d+)\.", name)))


def name_labels(id2label: Mapping[Any, str] | None) -> tuple[str, ...]:
    """Return what classes are called, in order; empty where they are numbers, or ImageNet's, which is known without.

    >>> name_labels({"0": "cat", "1": "dog"}), name_labels({0: "LABEL_0", 1: "LABEL_1"})
    (('cat', 'dog'), ())
    """
    names = {int(index): str(name) for index, name in (id2label or {}).items()}
    ordered = [names.get(index, "") for index in range(len(names))]
    if not all(ordered) or len(set(ordered)) < len(ordered) or all(re.fullmatch(r"LABEL_\d+", n) for n in ordered):
        return ()
    if len(ordered) == 1000:
        known = ImageNetInfo("imagenet-1k").label_descriptions()
        same = sum(_first(one) == _first(other) for one, other in zip(ordered, known, strict=True))
        if same > 900:
            return ()
    return tuple(ordered)


def _first(name: str) -> str:
    return name.split(",")[0].strip().lower()
