"""Write a pruned twin back as an image tower of open_clip: its configuration, and its state dict."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vitprune.entry import entry
from vitprune.twins.of_open_clip import rename_open_clip
from vitprune.twins.to_transformers import check_equal_widths, check_shapes, find_origin
from vitprune.views import data_config
from vitprune.wrappers import OPEN_CLIP


@entry
def as_open_clip(model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return how open_clip builds an image tower that came from there, pruned or not, and its state dict.

    The first is ``vision_cfg`` of a model's configuration, beside the embedding's width, which stays; the second is
    for ``model.visual.load_state_dict``.

    Args:
        model: twin of an image tower of open_clip: each FFN of one width, all else of its shape.

    Returns:
        Configuration, and names -> tensors.

    Raises:
        VitpruneError: if it came from elsewhere, or open_clip has no such model; it says why.

    >>> import timm
    >>> as_open_clip(timm.create_model("vit_tiny_patch16_224", depth=1))
    Traceback (most recent call last):
        ...
    vitprune.errors.VitpruneError: VisionTransformer was not loaded from open_clip, which names its parts
    """
    twin = find_origin(model, OPEN_CLIP)
    check_shapes(model, OPEN_CLIP)
    width, dim = check_equal_widths(model, OPEN_CLIP)
    height, breadth = data_config(model)["input_size"][1:]
    config = {
        **twin["config"],
        "image_size": height if height == breadth else [height, breadth],
        "patch_size": model.patch_embed.patch_size[0],
        "width": dim,
        "layers": len(model.blocks),
        "head_width": dim // model.blocks[0].attn.num_heads,
        "mlp_ratio": width / dim,
    }
    named = dict(model.state_dict())
    named["cls_token"], named["pos_embed"] = named["cls_token"].flatten(), named["pos_embed"][0]
    if "head.weight" in named:
        named["projection"] = named.pop("head.weight").T
    places = rename_open_clip({name: torch.tensor(place) for place, name in enumerate(twin["names"])})
    state = {
        twin["names"][int(place)]: named[ours].detach().cpu().clone().contiguous() for ours, place in places.items()
    }
    return config, state
