"""Write a pruned twin back as torchvision's own model: what it is built with, and its state dict."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from vitprune.entry import entry
from vitprune.twins.of_torchvision import rename_swin, rename_torchvision
from vitprune.twins.to_transformers import check_equal_widths, check_shapes, find_origin
from vitprune.views import data_config
from vitprune.wrappers import TORCHVISION


@entry
def as_torchvision(model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return how torchvision builds a model that came from there, pruned or not, and its state dict.

    ``torchvision.models.VisionTransformer(**arguments)``, or ``SwinTransformer``, then loads the state.

    Args:
        model: twin of a ViT or Swin of torchvision: each FFN of one width (of one multiple of its block's), all else of
            its shape.

    Returns:
        Arguments, and names -> tensors.

    Raises:
        VitpruneError: if it came from elsewhere, or torchvision has no such model; it says why.

    >>> import timm
    >>> as_torchvision(timm.create_model("vit_tiny_patch16_224", depth=1))
    Traceback (most recent call last):
        ...
    vitprune.errors.VitpruneError: VisionTransformer was not loaded from torchvision, which names its parts
    """
    twin = find_origin(model, TORCHVISION)
    check_shapes(model, TORCHVISION)
    width, dim = check_equal_widths(model, TORCHVISION)
    is_vit = twin["class"] == "VisionTransformer"
    if is_vit:
        arguments: dict[str, Any] = {
            "image_size": data_config(model)["input_size"][1],
            "patch_size": model.patch_embed.patch_size[0],
            "num_layers": len(model.blocks),
            "num_heads": model.blocks[0].attn.num_heads,
            "hidden_dim": model.embed_dim,
            "mlp_dim": width,
            "num_classes": model.num_classes,
        }
    else:
        blocks = [stage.blocks for stage in model.layers]
        arguments = {
            "patch_size": list(model.patch_embed.patch_size),
            "embed_dim": model.embed_dim,
            "depths": [len(stage) for stage in blocks],
            "num_heads": [stage[0].attn.num_heads for stage in blocks],
            # Where a window would be larger than the map, timm makes it smaller.
            "window_size": list(max(block.attn.window_size for stage in blocks for block in stage)),
            "mlp_ratio": width / dim,
            "num_classes": model.num_classes,
        }
    named = model.state_dict()
    at = {name: torch.tensor(place) for place, name in enumerate(twin["names"])}
    places = rename_torchvision(at) if is_vit else rename_swin(at)
    state = {twin["names"][int(place)]: named[ours].detach().cpu().clone() for ours, place in places.items()}
    if not is_vit:  # tables of indices, the same for all windows of a size
        index = model.layers[0].blocks[0].attn.relative_position_index.flatten().cpu()
        state |= {name: index.clone() for name in twin["names"] if re.search(r"relative_position_index$", name)}
    return arguments, state
