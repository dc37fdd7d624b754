"""Twins of the image towers of open_clip."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vitprune.errors import VitpruneError
from vitprune.twins.twin import CLIP, Rules, State, Twin, activation, count_blocks, rename

_LAYER = r"transformer\.resblocks\.(\d+)\."
_BLOCK = r"blocks.\1."
_TOWER: Rules = (
    (r"class_embedding", "cls_token"),
    (r"positional_embedding", "pos_embed"),
    (r"proj", "projection"),
    (r"conv1\.weight", "patch_embed.proj.weight"),
    (r"ln_pre\.(weight|bias)", r"norm_pre.\1"),
    (r"ln_post\.(weight|bias)", r"norm.\1"),
    (_LAYER + r"ln_([12])\.(weight|bias)", _BLOCK + r"norm\2.\3"),
    (_LAYER + r"attn\.in_proj_(weight|bias)", _BLOCK + r"attn.qkv.\2"),
    (_LAYER + r"attn\.out_proj\.(weight|bias)", _BLOCK + r"attn.proj.\2"),
    (_LAYER + r"ls_([12])\.gamma", _BLOCK + r"ls\2.gamma"),
    (_LAYER + r"mlp\.c_fc\.(weight|bias)", _BLOCK + r"mlp.fc1.\2"),
    (_LAYER + r"mlp\.c_proj\.(weight|bias)", _BLOCK + r"mlp.fc2.\2"),
)


def read_open_clip(visual: Any) -> dict[str, Any]:
    """Return what the tensors of an image tower do not tell.

    Args:
        visual: ``model.visual`` of open_clip.

    Raises:
        VitpruneError: if it pools or norms in a way that timm's model does not.
    """
    kind = type(visual).__name__
    if kind != "VisionTransformer":
        raise VitpruneError(f"{kind} of open_clip has no twin in timm here; VisionTransformer has")
    if getattr(visual, "attn_pool", None) is not None or getattr(visual, "pool_type", "tok") != "tok":
        raise VitpruneError(f"{kind} of open_clip: its pooling has no twin; the class token's has")
    if getattr(visual, "final_ln_after_pool", False):
        raise VitpruneError(f"{kind} of open_clip: it norms after pooling, which has no twin")
    block = visual.transformer.resblocks[0]
    act = type(block.mlp.gelu).__name__
    return {
        "img_size": tuple(visual.image_size),
        "num_heads": block.attn.num_heads,
        "act": {"QuickGELU": "quick_gelu", "GELU": "gelu"}.get(act, act),
        "eps": visual.ln_post.eps,
        "mean": getattr(visual, "image_mean", None),
        "std": getattr(visual, "image_std", None),
    }


def rename_open_clip(state: State, source: str = "the state dict") -> dict[str, Tensor]:
    """Return a tower's tensors by timm's names, their shapes as they are.

    >>> import torch
    >>> list(rename_open_clip({"ln_post.bias": torch.ones(1)}))
    ['norm.bias']
    """
    return rename(state, _TOWER, source)


def twin_of_open_clip(facts: Mapping[str, Any], state: State, *, source: str = "the model") -> Twin:
    """Return the twin of an image tower of open_clip.

    Args:
        facts: from ``read_open_clip``.
        state: tensors of the tower.
        source: what it is, for messages.

    Raises:
        VitpruneError: if it has something that timm's model has not.
    """
    named = rename_open_clip(state, source)
    patches = named["patch_embed.proj.weight"]
    named["cls_token"], named["pos_embed"] = named["cls_token"].view(1, 1, -1), named["pos_embed"].unsqueeze(0)
    projection = named.pop("projection", None)
    if projection is not None:
        named["head.weight"] = projection.T
    arguments = {
        "img_size": facts["img_size"],
        "patch_size": patches.shape[2],
        "embed_dim": patches.shape[0],
        "depth": count_blocks(named),
        "num_heads": facts["num_heads"],
        "mlp_ratio": named["blocks.0.mlp.fc1.weight"].shape[0] / patches.shape[0],
        "num_classes": 0,
        "pre_norm": "norm_pre.weight" in named,
        **({"init_values": 1e-5} if "blocks.0.ls1.gamma" in named else {}),
        **activation(facts["act"], source),
    }
    transform = {
        "mean": tuple(facts["mean"] or CLIP["mean"]),
        "std": tuple(facts["std"] or CLIP["std"]),
        "crop_pct": 1.0,
        "crop_mode": "center",
        "interpolation": "bicubic",
        "input_size": (3, *facts["img_size"]),
    }
    return Twin(
        "vit_base_patch16_clip_224",
        arguments,
        named,
        source,
        transform,
        facts["eps"],
        projection=None if projection is None else projection.shape[1],
    )
