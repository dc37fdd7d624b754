"""Twins of torchvision's vision models: vit_b_16 and its relatives, Swin."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vitprune.errors import VitpruneError
from vitprune.twins.twin import IMAGENET, Rules, State, Twin, count_blocks, rename

_LAYER = r"encoder\.layers\.encoder_layer_(\d+)\."
_BLOCK = r"blocks.\1."
_VITS: Rules = (
    (r"class_token", "cls_token"),
    (r"conv_proj\.(weight|bias)", r"patch_embed.proj.\1"),
    (r"encoder\.pos_embedding", "pos_embed"),
    (_LAYER + r"ln_([12])\.(weight|bias)", _BLOCK + r"norm\2.\3"),
    (_LAYER + r"self_attention\.in_proj_(weight|bias)", _BLOCK + r"attn.qkv.\2"),
    (_LAYER + r"self_attention\.out_proj\.(weight|bias)", _BLOCK + r"attn.proj.\2"),
    (_LAYER + r"mlp\.(?:0|linear_1)\.(weight|bias)", _BLOCK + r"mlp.fc1.\2"),
    (_LAYER + r"mlp\.(?:3|linear_2)\.(weight|bias)", _BLOCK + r"mlp.fc2.\2"),
    (r"encoder\.ln\.(weight|bias)", r"norm.\1"),
    (r"heads\.head\.(weight|bias)", r"head.\1"),
)
# Features 1, 3, 5, 7 are stages of blocks, and those between merge patches.
_SWINS: Rules = (
    (r"features\.0\.0\.(weight|bias)", r"patch_embed.proj.\1"),
    (r"features\.0\.2\.(weight|bias)", r"patch_embed.norm.\1"),
    (r"features\.(\d+)\.(\d+)\.(norm[12])\.(weight|bias)", r"stage.\1.\2.\3.\4"),
    (r"features\.(\d+)\.(\d+)\.attn\.(qkv|proj)\.(weight|bias)", r"stage.\1.\2.attn.\3.\4"),
    (r"features\.(\d+)\.(\d+)\.attn\.relative_position_bias_table", r"stage.\1.\2.attn.relative_position_bias_table"),
    (r"features\.\d+\.\d+\.attn\.relative_position_index", None),
    (r"features\.(\d+)\.(\d+)\.mlp\.0\.(weight|bias)", r"stage.\1.\2.mlp.fc1.\3"),
    (r"features\.(\d+)\.(\d+)\.mlp\.3\.(weight|bias)", r"stage.\1.\2.mlp.fc2.\3"),
    (r"features\.(\d+)\.(reduction|norm)\.(weight|bias)", r"merge.\1.\2.\3"),
    (r"norm\.(weight|bias)", r"norm.\1"),
    (r"head\.(weight|bias)", r"head.fc.\1"),
)
_TRANSFORM = {**IMAGENET, "crop_pct": 224 / 256, "crop_mode": "center", "interpolation": "bilinear"}


def twin_of_torchvision(facts: Mapping[str, Any], state: State, *, source: str = "the model") -> Twin:
    """Return the twin of a ViT or Swin of torchvision.

    Args:
        facts: what its tensors do not tell, from ``read_torchvision``.
        state: its tensors.
        source: what it is, for messages.

    Raises:
        VitpruneError: if it has something that timm's model has not.
    """
    build = _vit if "class_token" in state else _swin
    return build(facts, state, source)


def read_torchvision(model: Any) -> dict[str, Any]:
    """Return what the tensors of a torchvision model do not tell.

    Raises:
        VitpruneError: if it is neither a ViT nor a Swin.
    """
    kind = type(model).__name__
    if kind == "VisionTransformer":
        return {"img_size": model.image_size, "num_heads": model.encoder.layers[0].num_heads}
    blocks = [module for module in model.modules() if type(module).__name__ == "SwinTransformerBlock"]
    if kind != "SwinTransformer" or not blocks:
        raise VitpruneError(
            f"{kind} of torchvision has no twin in timm here; VisionTransformer and SwinTransformer (not V2) have"
        )
    stages = [stage for stage in model.features if stage and type(stage).__name__ == "Sequential"]
    stages = [stage for stage in stages if type(stage[0]).__name__ == "SwinTransformerBlock"]
    return {
        "num_heads": tuple(stage[0].attn.num_heads for stage in stages),
        "depths": tuple(len(stage) for stage in stages),
        "window_size": blocks[0].attn.window_size[0],
    }


def rename_torchvision(state: State) -> dict[str, Tensor]:
    """Return a ViT's tensors by timm's names.

    >>> import torch
    >>> list(rename_torchvision({"encoder.ln.bias": torch.ones(1)}))
    ['norm.bias']
    """
    return rename(state, _VITS, "the state dict")


def _vit(facts: Mapping[str, Any], state: State, source: str) -> Twin:
    named = rename(state, _VITS, source)
    patches = named["patch_embed.proj.weight"]
    size = int(facts["img_size"])
    arguments = {
        "img_size": size,
        "patch_size": patches.shape[2],
        "embed_dim": patches.shape[0],
        "depth": count_blocks(named),
        "num_heads": facts["num_heads"],
        "mlp_ratio": named["blocks.0.mlp.fc1.weight"].shape[0] / patches.shape[0],
        "num_classes": len(named["head.weight"]) if "head.weight" in named else 0,
    }
    return Twin(
        "vit_base_patch16_224", arguments, named, source, {**_TRANSFORM, "input_size": (3, size, size)}, norm_eps=1e-6
    )


def rename_swin(state: State, source: str = "the state dict") -> dict[str, Tensor]:
    """Return a Swin's tensors by timm's names.

    >>> import torch
    >>> list(rename_swin({"features.2.norm.bias": torch.ones(1), "features.3.0.mlp.0.bias": torch.ones(1)}))
    ['layers.1.downsample.norm.bias', 'layers.1.blocks.0.mlp.fc1.bias']
    """
    named = {}
    for name, value in rename(state, _SWINS, source).items():
        match = re.match(r"(stage|merge)\.(\d+)\.(.*)", name)
        if match is None:
            named[name] = value
        elif match[1] == "stage":
            stage, (block, _dot, rest) = (int(match[2]) - 1) // 2, match[3].partition(".")
            named[f"layers.{stage}.blocks.{block}.{rest}"] = value
        else:
            named[f"layers.{int(match[2]) // 2}.downsample.{match[3]}"] = value
    return named


def _swin(facts: Mapping[str, Any], state: State, source: str) -> Twin:
    named = rename_swin(state, source)
    patches = named["patch_embed.proj.weight"]
    first = named["layers.0.blocks.0.mlp.fc1.weight"]
    arguments = {
        "img_size": 224,
        "patch_size": patches.shape[2],
        "embed_dim": patches.shape[0],
        "depths": facts["depths"],
        "num_heads": facts["num_heads"],
        "window_size": facts["window_size"],
        "mlp_ratio": first.shape[0] / first.shape[1],
        "num_classes": len(named["head.fc.weight"]) if "head.fc.weight" in named else 0,
    }
    transform = {**_TRANSFORM, "interpolation": "bicubic", "crop_pct": 224 / 232, "input_size": (3, 224, 224)}
    return Twin("swin_tiny_patch4_window7_224", arguments, named, source, transform, norm_eps=1e-5)
