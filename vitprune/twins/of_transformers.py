"""Twins of transformers' vision models: ViT, DeiT, DINOv2, DINOv3, BEiT, SigLIP, CLIP, Swin.

Names of tensors are read as files have them and as the modules of transformers 5 have them.

Letters: N tokens, D embedding width.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vitprune.errors import VitpruneError
from vitprune.twins.twin import (
    CLIP,
    HALVES,
    IMAGENET,
    Rules,
    State,
    Twin,
    activation,
    count_blocks,
    join_queries,
    name_labels,
    rename,
)

Config = Mapping[str, Any]

_PREFIX = r"(?:vit\.|deit\.|dinov2\.|dinov2_with_registers\.|beit\.|dinov3_vit\.|swin\.|base_model\.)?"
_LAYER = _PREFIX + r"(?:encoder\.|model\.)?layers?\.(\d+)\."
_BLOCK = r"blocks.\1."
_STEM: Rules = (
    (_PREFIX + r"embeddings\.cls_token", "cls_token"),
    (_PREFIX + r"embeddings\.(?:register_tokens|distillation_token)", "reg_token"),
    (_PREFIX + r"embeddings\.mask_token", None),
    (_PREFIX + r"embeddings\.position_embeddings", "pos_embed"),
    (_PREFIX + r"embeddings\.patch_embeddings\.(?:projection\.)?(weight|bias)", r"patch_embed.proj.\1"),
    (_PREFIX + r"layernorm\.(weight|bias)", r"norm.\1"),
    (_PREFIX + r"norm\.(weight|bias)", r"norm.\1"),
    (_PREFIX + r"pooler\.dense\.(weight|bias)", None),
    (r"(?:cls_)?classifier\.(weight|bias)", r"head.\1"),
    (r"distillation_classifier\.(weight|bias)", r"head_dist.\1"),
)
_BLOCKS: Rules = (
    (_LAYER + r"attention\.(?:attention\.)?(q|k|v)(?:uery|ey|alue|_proj)\.(weight|bias)", _BLOCK + r"attn.\2.\3"),
    (_LAYER + r"attention\.(?:output\.dense|o_proj)\.(weight|bias)", _BLOCK + r"attn.proj.\2"),
    (
        _LAYER + r"(?:attention\.(?:attention\.)?)?relative_position_bias\.relative_position_bias_table",
        _BLOCK + "attn.relative_position_bias_table",
    ),
    (_LAYER + r".*relative_position_index", None),
    (_LAYER + r"(?:layernorm_before|norm1)\.(weight|bias)", _BLOCK + r"norm1.\2"),
    (_LAYER + r"(?:layernorm_after|norm2)\.(weight|bias)", _BLOCK + r"norm2.\2"),
    (_LAYER + r"(?:intermediate\.dense|mlp\.fc1|mlp\.weights_in|mlp\.up_proj)\.(weight|bias)", _BLOCK + r"mlp.fc1.\2"),
    (_LAYER + r"(?:output\.dense|mlp\.fc2|mlp\.weights_out|mlp\.down_proj)\.(weight|bias)", _BLOCK + r"mlp.fc2.\2"),
    (_LAYER + r"mlp\.gate_proj\.(weight|bias)", _BLOCK + r"mlp.gate.\2"),
    (_LAYER + r"layer_scale(\d)\.lambda1", _BLOCK + r"ls\2.gamma"),
    (_LAYER + r"lambda_(\d)", _BLOCK + r"gamma_\2"),
)
_TOWER = r"(?:vision_model\.)?"
_CLIP_LAYER = _TOWER + r"encoder\.layers\.(\d+)\."
_TOWERS: Rules = (
    (_TOWER + r"embeddings\.class_embedding", "cls_token"),
    (_TOWER + r"embeddings\.patch_embedding\.(weight|bias)", r"patch_embed.proj.\1"),
    (_TOWER + r"embeddings\.position_embedding\.weight", "pos_embed"),
    (_TOWER + r"embeddings\.position_ids", None),
    (_TOWER + r"pre_layrnorm\.(weight|bias)", r"norm_pre.\1"),
    (_TOWER + r"post_layernorm\.(weight|bias)", r"norm.\1"),
    (_CLIP_LAYER + r"self_attn\.(q|k|v)_proj\.(weight|bias)", _BLOCK + r"attn.\2.\3"),
    (_CLIP_LAYER + r"self_attn\.out_proj\.(weight|bias)", _BLOCK + r"attn.proj.\2"),
    (_CLIP_LAYER + r"layer_norm([12])\.(weight|bias)", _BLOCK + r"norm\2.\3"),
    (_CLIP_LAYER + r"mlp\.fc([12])\.(weight|bias)", _BLOCK + r"mlp.fc\2.\3"),
    (_TOWER + r"head\.probe", "attn_pool.latent"),
    (_TOWER + r"head\.attention\.in_proj_(weight|bias)", r"attn_pool.in.\1"),
    (_TOWER + r"head\.attention\.out_proj\.(weight|bias)", r"attn_pool.proj.\1"),
    (_TOWER + r"head\.layernorm\.(weight|bias)", r"attn_pool.norm.\1"),
    (_TOWER + r"head\.mlp\.fc([12])\.(weight|bias)", r"attn_pool.mlp.fc\1.\2"),
    (r"visual_projection\.weight", "head.weight"),
    (r"classifier\.(weight|bias)", r"head.\1"),
    (r"text_.*|logit_scale|logit_bias", None),
)
_STAGE = r"(?:swin\.)?encoder\.layers\.(\d+)\."
_SWIN_BLOCK = _STAGE + r"blocks\.(\d+)\."
_TO_SWIN = r"layers.\1.blocks.\2."
_SWINS: Rules = (
    (r"(?:swin\.)?embeddings\.patch_embeddings\.projection\.(weight|bias)", r"patch_embed.proj.\1"),
    (r"(?:swin\.)?embeddings\.norm\.(weight|bias)", r"patch_embed.norm.\1"),
    (r"(?:swin\.)?embeddings\.mask_token", None),
    (
        _SWIN_BLOCK + r"attention\.(?:self\.)?(q|k|v)(?:uery|ey|alue|_proj)\.(weight|bias)",
        _TO_SWIN + r"attn.\3.\4",
    ),
    (_SWIN_BLOCK + r"attention\.(?:output\.dense|o_proj)\.(weight|bias)", _TO_SWIN + r"attn.proj.\3"),
    (
        _SWIN_BLOCK + r"attention\.(?:self\.|relative_position_bias\.)relative_position_bias_table",
        _TO_SWIN + "attn.relative_position_bias_table",
    ),
    (_SWIN_BLOCK + r".*relative_position_index", None),
    (_SWIN_BLOCK + r"layernorm_before\.(weight|bias)", _TO_SWIN + r"norm1.\3"),
    (_SWIN_BLOCK + r"layernorm_after\.(weight|bias)", _TO_SWIN + r"norm2.\3"),
    (_SWIN_BLOCK + r"(?:intermediate\.dense|mlp\.fc1)\.(weight|bias)", _TO_SWIN + r"mlp.fc1.\3"),
    (_SWIN_BLOCK + r"(?:output\.dense|mlp\.fc2)\.(weight|bias)", _TO_SWIN + r"mlp.fc2.\3"),
    (_STAGE + r"downsample\.(reduction|norm)\.(weight|bias)", r"downsample.\1.\2.\3"),
    (r"(?:swin\.)?layernorm\.(weight|bias)", r"norm.\1"),
    (r"classifier\.(weight|bias)", r"head.fc.\1"),
)
# PIL's numbers of filters, as descriptions of preprocessing have them.
_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
_RESIZED = {"crop_pct": 1.0, "crop_mode": "squash"}


def twin_of_transformers(
    config: Config, state: State, *, processor: Config | None = None, source: str = "the model"
) -> Twin:
    """Return the twin of a vision model of transformers.

    Args:
        config: its ``config.json``, or ``model.config.to_dict()``.
        state: its tensors.
        processor: its ``preprocessor_config.json``; None: images are taken to be prepared as for most of its family.
        source: what it is, for messages.

    Raises:
        VitpruneError: if it is of no family that has a twin, or has something that timm's model has not.
    """
    kind = str(config.get("model_type"))
    if kind not in FAMILIES:
        raise VitpruneError(
            f"{source} is a {kind} of transformers, for which there is no twin; there are twins of "
            f"{', '.join(sorted(FAMILIES))}"
        )
    if kind in WITH_TEXT:
        outer = {key: config.get(key) for key in ("projection_dim", "id2label")}
        config = {**config.get("vision_config", {}), **outer}
        kind = WITH_TEXT[kind]
    twin = FAMILIES[kind](_Described(config, source), dict(state))
    if processor is None:
        notes = ("nothing tells how its images are prepared; what is usual for its family is taken", *twin.notes)
        return replace(twin, notes=notes)
    twin = replace(twin, transform=read_processor(processor, twin.transform))
    return _at_size(twin, anti_alias=kind == "dinov2_with_registers") if kind.startswith("dinov2") else twin


def _at_size(twin: Twin, *, anti_alias: bool) -> Twin:
    """Return a twin for images of the size that they are prepared in, which need not be that of its positions."""
    size, own = twin.transform["input_size"][1:], twin.arguments["img_size"]
    if tuple(size) == tuple(own):
        return twin
    patch = twin.arguments["patch_size"]
    grids = [tuple(pixels // patch for pixels in pair) for pair in (own, size)]
    table = twin.state["pos_embed"]
    table = resample_positions(table, *grids, table.shape[1] - math.prod(grids[0]), anti_alias=anti_alias)
    return replace(
        twin, arguments={**twin.arguments, "img_size": tuple(size)}, state={**twin.state, "pos_embed": table}
    )


class _Described:
    """A description, and what its family takes where it says nothing."""

    def __init__(self, config: Config, source: str) -> None:
        self.config, self.source = config, source

    def get(self, name: str, usual: Any) -> Any:
        value = self.config.get(name)
        return usual if value is None else value

    def pair(self, name: str, usual: int) -> tuple[int, int]:
        value = self.get(name, usual)
        return (value, value) if isinstance(value, int) else (int(value[0]), int(value[-1]))


def _plain(described: _Described, state: State, *, heads: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return arguments and state of a row of equal blocks."""
    named = rename(state, (*_STEM, *_BLOCKS), described.source)
    width = named["patch_embed.proj.weight"].shape[0]
    arguments = {
        "img_size": described.pair("image_size", 224),
        "patch_size": tuple(named["patch_embed.proj.weight"].shape[2:]),
        "in_chans": named["patch_embed.proj.weight"].shape[1],
        "embed_dim": width,
        "depth": count_blocks(named),
        "num_heads": described.get("num_attention_heads", heads),
        "mlp_ratio": named["blocks.0.mlp.fc1.weight"].shape[0] / width,
        "num_classes": len(named["head.weight"]) if "head.weight" in named else 0,
        **activation(described.get("hidden_act", "gelu"), described.source),
    }
    arguments["patch_size"] = _square(arguments["patch_size"])
    return arguments, named


def _square(pair: Sequence[int]) -> int | tuple[int, ...]:
    return pair[0] if len(set(pair)) == 1 else tuple(pair)


def _vit(described: _Described, state: State) -> Twin:
    arguments, named = _plain(described, state, heads=12)
    notes = ("its pooler, which no answer reads, is left out",) if any(".pooler." in f".{key}" for key in state) else ()
    arguments["qkv_bias"] = "blocks.0.attn.q.bias" in named
    architecture, transform = "vit_base_patch16_224", {**HALVES, **_RESIZED, "interpolation": "bilinear"}
    if "reg_token" in named:  # DeiT's distillation token, which stands before the patches in any case
        transform = {**IMAGENET, "crop_pct": 224 / 256, "crop_mode": "center", "interpolation": "bicubic"}
        if "head_dist.weight" in named:
            architecture = "deit_base_distilled_patch16_224"
            named["dist_token"] = named.pop("reg_token")
        else:
            arguments["reg_tokens"] = 1
    return Twin(
        architecture,
        arguments,
        join_queries(named),
        described.source,
        _of_size(transform, arguments["img_size"]),
        described.get("layer_norm_eps", 1e-12),
        name_labels(described.config.get("id2label")),
        notes=notes,
    )


def _dinov2(described: _Described, state: State) -> Twin:
    heads = [key for key in state if key.startswith("classifier.")]
    arguments, named = _plain(described, {key: value for key, value in state.items() if key not in heads}, heads=12)
    notes = ()
    if heads:
        notes = ("its classifier reads class token and mean of the patches, which timm has no head for: an encoder",)
    for name in [key for key in named if ".mlp.gate." in key]:
        # Gate and value in one, as files have them.
        joined = name.replace(".gate.", ".fc1.")
        named[joined] = torch.cat([named.pop(name), named[joined]])
    gated = named["blocks.0.mlp.fc1.weight"].shape[0] != named["blocks.0.mlp.fc2.weight"].shape[1]
    arguments["mlp_ratio"] = named["blocks.0.mlp.fc1.weight"].shape[0] / arguments["embed_dim"]
    architecture = "vit_giant_patch14_dinov2" if gated else "vit_small_patch14_dinov2"
    if "reg_token" in named:
        architecture = architecture.replace("_dinov2", "_reg4_dinov2")
        arguments["reg_tokens"] = named["reg_token"].shape[1]
        # timm adds no positions to the tokens in front.
        named["cls_token"] = named["cls_token"] + named["pos_embed"][:, :1]
        named["pos_embed"] = named["pos_embed"][:, 1:]
    arguments |= {"qkv_bias": "blocks.0.attn.q.bias" in named, "num_classes": 0}
    return Twin(
        architecture,
        arguments,
        join_queries(named),
        described.source,
        _of_size(
            {**IMAGENET, "crop_pct": 224 / 256, "crop_mode": "center", "interpolation": "bicubic"},
            arguments["img_size"],
        ),
        described.get("layer_norm_eps", 1e-6),
        notes=notes,
    )


def _dinov3(described: _Described, state: State) -> Twin:
    arguments, named = _plain(described, state, heads=6)
    gated = "blocks.0.mlp.gate.weight" in named
    for name in [key for key in named if ".mlp.gate." in key]:
        named[name.replace(".gate.", ".fc1_g.")] = named.pop(name)
    named = {
        (name.replace(".fc1.", ".fc1_x.") if gated else name)
        .replace(".ls1.gamma", ".gamma_1")
        .replace(".ls2.gamma", ".gamma_2"): value
        for name, value in named.items()
    }
    # timm keeps the biases of queries and values apart, and keys have none.
    has_bias = "blocks.0.attn.q.bias" in named
    key_biases = [name for name in named if name.endswith("attn.k.bias")]
    if any(bool(named.pop(name).any()) for name in key_biases):
        raise VitpruneError(f"{described.source}: its keys have biases, which timm's model has not")
    for name in [key for key in named if re.search(r"attn\.[qv]\.bias$", key)]:
        named[re.sub(r"\.([qv])\.bias$", r".\1_bias", name)] = named.pop(name)
    arguments |= {
        "num_reg_tokens": named["reg_token"].shape[1],
        "rope_temperature": described.get("rope_theta", 100.0),
        "global_pool": "token",
    }
    wanted = "silu" if gated else None
    if arguments.pop("act_layer", None) != wanted:
        raise VitpruneError(f"{described.source}: timm's model has another activation function than this one")
    kind = "small_plus" if gated else "small"
    return Twin(
        f"vit_{kind}_patch16_dinov3{'_qkvb' if has_bias else ''}",
        arguments,
        join_queries(named),
        described.source,
        _of_size({**IMAGENET, **_RESIZED, "interpolation": "bilinear"}, arguments["img_size"]),
        described.get("layer_norm_eps", 1e-5),
    )


def _beit(described: _Described, state: State) -> Twin:
    shared = [key for key in state if re.search(r"encoder\.relative_position_bias", key)]
    if shared:
        raise VitpruneError(f"{described.source}: one table of relative positions for all blocks has no twin yet")
    pooler = {key: value for key, value in state.items() if "pooler.layernorm" in key}
    rest = {key: value for key, value in state.items() if key not in pooler and not key.startswith("lm_head")}
    arguments, named = _plain(described, rest, heads=12)
    for key, value in pooler.items():
        named[f"fc_norm.{key.rpartition('.')[2]}"] = value
    named = {name: value for name, value in named.items() if not (pooler and name.startswith("norm."))}
    table = "blocks.0.attn.relative_position_bias_table" in named
    has_bias = "blocks.0.attn.q.bias" in named
    for name in [key for key in named if re.search(r"attn\.[qv]\.bias$", key)]:
        named[re.sub(r"\.([qv])\.bias$", r".\1_bias", name)] = named.pop(name)
    arguments |= {
        "use_abs_pos_emb": "pos_embed" in named,
        "use_rel_pos_bias": table,
        "qkv_bias": has_bias,
        "init_values": 0.1 if "blocks.0.gamma_1" in named else None,
        "global_pool": "avg" if pooler else "token",
    }
    if arguments.pop("act_layer", None) is not None:
        raise VitpruneError(f"{described.source}: timm's model has another activation function than this one")
    return Twin(
        "beit_base_patch16_224",
        arguments,
        join_queries(named),
        described.source,
        _of_size({**HALVES, **_RESIZED, "interpolation": "bicubic"}, arguments["img_size"]),
        described.get("layer_norm_eps", 1e-12),
        name_labels(described.config.get("id2label")),
    )


def _tower(described: _Described, state: State, *, heads: int, act: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return arguments and state of an image tower of a model of images and text."""
    named = rename(state, _TOWERS, described.source)
    width = named["patch_embed.proj.weight"].shape[0]
    patch = named["patch_embed.proj.weight"].shape[2:]
    arguments = {
        "img_size": described.pair("image_size", 224),
        "patch_size": _square(patch),
        "in_chans": named["patch_embed.proj.weight"].shape[1],
        "embed_dim": width,
        "depth": count_blocks(named),
        "num_heads": described.get("num_attention_heads", heads),
        "mlp_ratio": named["blocks.0.mlp.fc1.weight"].shape[0] / width,
        "num_classes": 0,
        **activation(described.get("hidden_act", act), described.source),
    }
    named["pos_embed"] = named["pos_embed"].unsqueeze(0)
    return arguments, named


def _clip(described: _Described, state: State) -> Twin:
    if any(name.startswith("classifier.") for name in state):
        raise VitpruneError(f"{described.source}: its classifier reads tokens that are not normed, which has no twin")
    arguments, named = _tower(described, state, heads=12, act="quick_gelu")
    named["cls_token"] = named["cls_token"].view(1, 1, -1)
    projection = len(named["head.weight"]) if "head.weight" in named else None
    return Twin(
        "vit_base_patch16_clip_224",
        arguments,
        join_queries(named),
        described.source,
        _of_size({**CLIP, "crop_pct": 1.0, "crop_mode": "center", "interpolation": "bicubic"}, arguments["img_size"]),
        described.get("layer_norm_eps", 1e-5),
        projection=projection,
    )


def _siglip(described: _Described, state: State) -> Twin:
    arguments, named = _tower(described, state, heads=12, act="gelu_pytorch_tanh")
    labels: tuple[str, ...] = ()
    if "head.weight" in named:  # its classifier reads the mean of the tokens
        named = {name: value for name, value in named.items() if not name.startswith("attn_pool.")}
        arguments |= {"num_classes": len(named["head.weight"]), "global_pool": "avg", "fc_norm": False}
        labels = name_labels(described.config.get("id2label"))
    elif "attn_pool.latent" not in named:
        raise VitpruneError(f"{described.source}: it has no pooling, which timm's model has")
    else:
        width = arguments["embed_dim"]
        for kind in ("weight", "bias"):
            joined = named.pop(f"attn_pool.in.{kind}")
            named[f"attn_pool.q.{kind}"], named[f"attn_pool.kv.{kind}"] = joined[:width], joined[width:]
    return Twin(
        "vit_base_patch16_siglip_224",
        arguments,
        join_queries(named),
        described.source,
        _of_size({**HALVES, **_RESIZED, "interpolation": "bicubic"}, arguments["img_size"]),
        described.get("layer_norm_eps", 1e-6),
        labels,
    )


def _swin(described: _Described, state: State) -> Twin:
    named = rename(state, _SWINS, described.source)
    # timm merges patches before a stage, not after the one before it.
    for name in [key for key in named if key.startswith("downsample.")]:
        _kind, stage, rest = name.split(".", 2)
        named[f"layers.{int(stage) + 1}.downsample.{rest}"] = named.pop(name)
    depths = described.get("depths", (2, 2, 6, 2))
    arguments = {
        "img_size": described.pair("image_size", 224),
        "patch_size": described.get("patch_size", 4),
        "in_chans": named["patch_embed.proj.weight"].shape[1],
        "embed_dim": named["patch_embed.proj.weight"].shape[0],
        "depths": tuple(depths),
        "num_heads": tuple(described.get("num_heads", (3, 6, 12, 24))),
        "window_size": described.get("window_size", 7),
        "mlp_ratio": described.get("mlp_ratio", 4.0),
        "num_classes": len(named["head.fc.weight"]) if "head.fc.weight" in named else 0,
    }
    if activation(described.get("hidden_act", "gelu"), described.source):
        raise VitpruneError(f"{described.source}: timm's model has another activation function than this one")
    return Twin(
        "swin_tiny_patch4_window7_224",
        arguments,
        join_queries(named),
        described.source,
        _of_size({**IMAGENET, **_RESIZED, "interpolation": "bicubic"}, arguments["img_size"]),
        described.get("layer_norm_eps", 1e-5),
        name_labels(described.config.get("id2label")),
    )


FAMILIES: Mapping[str, Callable[[_Described, State], Twin]] = {
    "vit": _vit,
    "deit": _vit,
    "dinov2": _dinov2,
    "dinov2_with_registers": _dinov2,
    "dinov3_vit": _dinov3,
    "beit": _beit,
    "siglip_vision_model": _siglip,
    "siglip": _siglip,
    "clip_vision_model": _clip,
    "clip": _clip,
    "swin": _swin,
}
WITH_TEXT: Mapping[str, str] = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}


def rename_transformers(kind: str, state: State) -> dict[str, Tensor]:
    """Return tensors of a family by timm's names, as they are before anything else is changed; others are left out.

    Args:
        kind: ``model_type`` of its description.
        state: by transformers' names.

    >>> rename_transformers("vit", {"vit.layernorm.bias": torch.ones(1)})
    {'norm.bias': tensor([1.])}
    """
    if kind == "beit":
        state = {key.replace("pooler.layernorm", "layernorm"): value for key, value in state.items()}
        named = rename(state, (*_STEM, *_BLOCKS), kind)
        return {re.sub(r"^norm\.", "fc_norm.", name): value for name, value in named.items()}
    towers = kind in ("clip_vision_model", "siglip_vision_model")
    return rename(state, _TOWERS if towers else _SWINS if kind == "swin" else (*_STEM, *_BLOCKS), kind)


def _of_size(transform: Mapping[str, Any], size: Sequence[int]) -> dict[str, Any]:
    return {**transform, "input_size": (3, *size)}


def read_processor(processor: Config, usual: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a ``preprocessor_config.json`` says, in the words of timm's ``pretrained_cfg``.

    Args:
        processor: that file's content.
        usual: what is taken where it says nothing.

    >>> told = {"size": {"shortest_edge": 256}, "crop_size": 224, "resample": 3, "image_mean": [0.5] * 3}
    >>> read_processor(told, {"input_size": (3, 224, 224)})["crop_pct"]
    0.875
    """
    result = dict(usual)
    size, crop = processor.get("size"), processor.get("crop_size")
    crops = bool(processor.get("do_center_crop", crop is not None)) and crop is not None
    fed = _pair(crop) if crops else _pair(size)
    if fed is not None:
        result["input_size"] = (result["input_size"][0], *fed)
    shortest = size.get("shortest_edge") if isinstance(size, Mapping) else (size if isinstance(size, int) else None)
    if crops and fed is not None:
        height = shortest or (_pair(size) or fed)[0]
        result |= {"crop_pct": fed[0] / height, "crop_mode": "center" if shortest else "squash"}
    elif fed is not None:
        result |= {"crop_pct": 1.0, "crop_mode": "squash"}
    if processor.get("resample") in _FILTERS:
        result["interpolation"] = _FILTERS[processor["resample"]]
    if processor.get("do_normalize", True):
        for ours, theirs in (("mean", "image_mean"), ("std", "image_std")):
            if processor.get(theirs) is not None:
                result[ours] = tuple(processor[theirs])
    else:
        result |= {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    if processor.get("do_rescale", True) and abs(processor.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-3:
        raise VitpruneError(
            f"images are scaled by {processor['rescale_factor']} there, and pixels are in [0, 1] here; say mean and "
            "std of such pixels"
        )
    return result


def _pair(size: Any) -> tuple[int, int] | None:
    if isinstance(size, int):
        return size, size
    if isinstance(size, Mapping):
        if "height" in size and "width" in size:
            return int(size["height"]), int(size["width"])
        if "shortest_edge" in size:
            return int(size["shortest_edge"]), int(size["shortest_edge"])
    return None


def resample_positions(
    pos_embed_1ND: Tensor, old: Sequence[int], new: Sequence[int], num_prefix: int, *, anti_alias: bool = False
) -> Tensor:
    """Return position embeddings of another grid, interpolated as transformers does it.

    >>> resample_positions(torch.zeros(1, 10, 4), (3, 3), (2, 2), 1).shape
    torch.Size([1, 5, 4])
    """
    prefix, grid = pos_embed_1ND[:, :num_prefix], pos_embed_1ND[:, num_prefix:]
    grid = grid.reshape(1, *old, -1).permute(0, 3, 1, 2).float()
    grid = F.interpolate(grid, size=tuple(new), mode="bicubic", align_corners=False, antialias=anti_alias)
    return torch.cat([prefix, grid.flatten(2).transpose(1, 2).to(prefix.dtype)], dim=1)
