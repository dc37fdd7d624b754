"""Write a pruned twin back as the library's own model, where the library can express it.

Which tensor was called what is known from when the twin was made, so the way back is the way there, name by name; and
the way there is gone once more to prove that nothing got lost.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vitprune.entry import entry
from vitprune.errors import VitpruneError
from vitprune.files import atomic_folder
from vitprune.twins.of_transformers import WITH_TEXT, rename_transformers, twin_of_transformers
from vitprune.twins.twin import State
from vitprune.views import data_config
from vitprune.wrappers import TRANSFORMERS

Named = dict[str, Tensor]
CONFIG_FILE, WEIGHTS_FILE, PROCESSOR_FILE = "config.json", "model.safetensors", "preprocessor_config.json"
TRANSFORMERS_FILES = frozenset({CONFIG_FILE, WEIGHTS_FILE, PROCESSOR_FILE})
_FILTERS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}


@entry
def save_transformers(model: nn.Module, folder: str | Path) -> None:
    """Write a model that came from transformers as that library reads it; all or nothing.

    Args:
        model: twin of a model of transformers, pruned or not: each FFN of one width, all else of its shape.
        folder: for ``config.json``, ``model.safetensors`` and ``preprocessor_config.json``; replaced if it exists.

    Raises:
        VitpruneError: if it came from elsewhere, or transformers has no such model; it says why.

    >>> import timm
    >>> save_transformers(timm.create_model("vit_tiny_patch16_224", depth=1), "folder")
    Traceback (most recent call last):
        ...
    vitprune.errors.VitpruneError: VisionTransformer was not loaded from transformers, which names its parts
    """
    config, state = as_transformers(model)
    with atomic_folder(folder) as temporary:
        (temporary / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
        save_file(state, temporary / WEIGHTS_FILE, metadata={"format": "pt"})
        (temporary / PROCESSOR_FILE).write_text(json.dumps(describe_processor(model), indent=2) + "\n")


def as_transformers(model: nn.Module) -> tuple[dict[str, Any], Named]:
    """Return description and tensors of a twin as transformers has them.

    Args:
        model: as for ``save_transformers``.

    Raises:
        VitpruneError: as ``save_transformers`` does.
    """
    twin = find_origin(model, TRANSFORMERS)
    config = dict(twin["config"])
    kind = config["model_type"]
    inner = dict(config["vision_config"]) if kind in WITH_TEXT else config
    kind = WITH_TEXT.get(kind, kind)
    if any(name.startswith("text_") for name in twin["names"]):
        raise VitpruneError("it came from a model of images and text; load its vision model alone to write it back")
    check_shapes(model, TRANSFORMERS)
    if inner is not config:
        config["vision_config"] = inner
    _describe_widths(model, kind, inner)
    size = tuple(data_config(model)["input_size"][1:])
    inner["image_size"] = size[0] if size[0] == size[1] else list(size)
    if "head.weight" in model.state_dict() or "head.fc.weight" in model.state_dict():
        names = getattr(model, "label_names", None)
        count = model.num_classes
        if count and count != len(config.get("id2label") or {}):
            names = names or [f"LABEL_{index}" for index in range(count)]
            config["id2label"] = {str(index): name for index, name in enumerate(names)}
            config["label2id"] = {name: index for index, name in enumerate(names)}
            config["num_labels"] = count
    named = _UNDO.get(kind, lambda _model, state: state)(model, _split_queries(model.state_dict()))
    places = rename_transformers(kind, {name: torch.tensor(at) for at, name in enumerate(twin["names"])})
    state: Named = {}
    for ours, at in places.items():
        if ours not in named:
            raise VitpruneError(f"nothing of the model stands for {twin['names'][int(at)]}; it cannot be written back")
        state[twin["names"][int(at)]] = named[ours].detach().cpu().clone().contiguous()
    again = twin_of_transformers(config, state)
    own = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    lost = [name for name in own if name not in again.state or not torch.equal(again.state[name], own[name])]
    if lost or len(again.state) != len(own):
        raise VitpruneError(f"what was written back would not be the same model ({(lost or sorted(again.state))[0]})")
    return config, state


def describe_processor(model: nn.Module) -> dict[str, Any]:
    """Return how a model's images are prepared, as ``preprocessor_config.json`` says it.

    >>> import timm
    >>> told = describe_processor(timm.create_model("vit_tiny_patch16_224", depth=1))
    >>> told["size"], told["crop_size"]
    ({'shortest_edge': 248}, {'height': 224, 'width': 224})
    """
    config, known = data_config(model), (getattr(model, "twin", None) or {}).get("processor") or {}
    _channels, height, width = config["input_size"]
    fed = {"height": height, "width": width}
    crops = config["crop_pct"] != 1 or config.get("crop_mode") != "squash"
    resized = {"shortest_edge": int(min(height, width) / config["crop_pct"])} if crops else fed
    return {
        "image_processor_type": known.get("image_processor_type", "ViTImageProcessor"),
        **known,
        "do_resize": True,
        "size": resized,
        "do_center_crop": crops,
        "crop_size": fed,
        "resample": _FILTERS[config["interpolation"]],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config["mean"]),
        "image_std": list(config["std"]),
    }


def find_origin(model: nn.Module, library: str) -> Mapping[str, Any]:
    """Return what a twin knows of the model that it was made of.

    Raises:
        VitpruneError: if it is no twin of a model of this library.
    """
    twin = getattr(model, "twin", None) or {}
    if twin.get("library") != library:
        raise VitpruneError(f"{type(model).__name__} was not loaded from {library}, which names its parts")
    return twin


def check_shapes(model: nn.Module, library: str) -> None:
    """Refuse what no model of another library has: attention of other widths, layers that are gone, merging tokens.

    Raises:
        VitpruneError: naming the module.
    """
    for name, module in model.named_modules():
        kind = type(module).__name__
        if kind in ("SplitAttention", "Bias", "TokenMap"):
            raise VitpruneError(f"{name} is a {kind}, which {library} has not; prune FFN neurons alone (`parts`)")
        if getattr(module, "merge", None) is not None:
            raise VitpruneError(f"tokens merge in {name}, which {library} cannot")


def check_equal_widths(model: nn.Module, library: str) -> tuple[int, int]:
    """Return how many neurons the first FFN keeps and how wide its block is, after checking that all keep that share.

    Raises:
        VitpruneError: if they do not.
    """
    widths = {
        name: (module.in_features, module.out_features)
        for name, module in model.named_modules()
        if name.endswith("mlp.fc2") and isinstance(module, nn.Linear)
    }
    pooling = widths.pop("attn_pool.mlp.fc2", None)
    if pooling is not None and pooling not in widths.values():
        raise VitpruneError(f"its pooling has an FFN that stays as wide as it was; {library} has one width for all")
    if len({width / dim for width, dim in widths.values()}) > 1:
        hidden = sorted({width for width, _dim in widths.values()})
        raise VitpruneError(
            f"FFNs keep {hidden[0]} to {hidden[-1]} neurons, and {library} has one width for all; prune with "
            "`allocation` uniform"
        )
    return next(iter(widths.values()))


def _describe_widths(model: nn.Module, kind: str, config: dict[str, Any]) -> None:
    """Write how wide FFNs are into a description.

    Raises:
        VitpruneError: if transformers has no word for it.
    """
    width, dim = check_equal_widths(model, TRANSFORMERS)
    if kind in ("dinov2", "dinov2_with_registers"):
        fitting = [each for each in range(1, 65) if _dinov2_width(dim, each, config.get("use_swiglu_ffn")) == width]
        if not fitting:
            raise VitpruneError(
                f"FFNs keep {width} neurons, and DINOv2 of transformers has whole multiples of {dim} only; choose a "
                "`ratio` that leaves one"
            )
        config["mlp_ratio"] = fitting[0]
    elif kind == "swin":
        config["mlp_ratio"] = width / dim
    else:
        config["intermediate_size"] = width


def _dinov2_width(dim: int, ratio: int, gated: bool | None) -> int:
    width = int(dim * ratio)
    return (int(width * 2 / 3) + 7) // 8 * 8 if gated else width


def _split_queries(state: State) -> Named:
    result: Named = {}
    for name, value in state.items():
        match = re.fullmatch(r"(.*attn\.)qkv\.(weight|bias)", name)
        if match is None:
            result[name] = value
            continue
        for part, piece in zip("qkv", value.chunk(3), strict=True):
            result[f"{match[1]}{part}.{match[2]}"] = piece
    for name in [key for key in result if re.search(r"attn\.[qv]_bias$", key)]:
        result[re.sub(r"\.([qv])_bias$", r".\1.bias", name)] = result.pop(name)
    return result


def _undo_vit(_model: nn.Module, named: Named) -> Named:
    if "dist_token" in named:
        named["reg_token"] = named.pop("dist_token")
    return named


def _undo_dinov2(model: nn.Module, named: Named) -> Named:
    if "reg_token" in named:  # the class token holds its position already
        named["pos_embed"] = torch.cat([torch.zeros_like(named["cls_token"]), named["pos_embed"]], dim=1)
    if any(".mlp.gate_proj." in name for name in model.twin["names"]):
        for name in [key for key in named if re.search(r"\.mlp\.fc1\.", key)]:
            gate, up = named[name].chunk(2)
            named[name], named[name.replace(".fc1.", ".gate.")] = up, gate
    return named


def _undo_dinov3(_model: nn.Module, named: Named) -> Named:
    result = {}
    for name, value in named.items():
        name = re.sub(r"\.gamma_(\d)$", r".ls\1.gamma", name)
        result[name.replace(".fc1_g.", ".gate.").replace(".fc1_x.", ".fc1.")] = value
    for name in [key for key in result if key.endswith("attn.q.bias")]:
        result.setdefault(name.replace(".q.", ".k."), torch.zeros_like(result[name]))
    return result


def _undo_clip(_model: nn.Module, named: Named) -> Named:
    named["cls_token"] = named["cls_token"].flatten()
    return {**named, "pos_embed": named["pos_embed"][0]}


def _undo_siglip(_model: nn.Module, named: Named) -> Named:
    for kind in ("weight", "bias"):
        parts = [named.pop(f"attn_pool.{part}.{kind}", None) for part in ("q", "kv")]
        if parts[0] is not None:
            named[f"attn_pool.in.{kind}"] = torch.cat(parts)
    return {**named, "pos_embed": named["pos_embed"][0]}


def _undo_swin(_model: nn.Module, named: Named) -> Named:
    pattern = re.compile(r"layers\.(\d+)\.downsample\.(.*)")
    return {
        (f"downsample.{int(match[1]) - 1}.{match[2]}" if (match := pattern.fullmatch(name)) else name): value
        for name, value in named.items()
    }


_UNDO: Mapping[str, Callable[[nn.Module, Named], Named]] = {
    "vit": _undo_vit,
    "deit": _undo_vit,
    "dinov2": _undo_dinov2,
    "dinov2_with_registers": _undo_dinov2,
    "dinov3_vit": _undo_dinov3,
    "clip_vision_model": _undo_clip,
    "siglip_vision_model": _undo_siglip,
    "swin": _undo_swin,
}
