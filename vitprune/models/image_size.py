"""Other image sizes: position embeddings resampled once, and the transform with them."""

from __future__ import annotations

import copy

import torch
from timm.layers import to_2tuple
from torch import nn

from vitprune.entry import entry
from vitprune.errors import VitpruneError
from vitprune.models.merging import check_schedule, describe_merging
from vitprune.views import data_config


@entry
@torch.no_grad()
def set_image_size(model: nn.Module, size: int | tuple[int, int]) -> nn.Module:
    """Return a copy that takes images of another size, with fewer patches where they are smaller.

    Its ``data_config`` and what ``save`` writes of it follow.

    Args:
        model: timm Vision Transformer.
        size: height and width in pixels, or both in one; multiples of the patch size.

    Raises:
        VitpruneError: if the patches do not divide the size, the tokens that a model merges are too many for it, or
            timm cannot resize the model.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=1)
    >>> set_image_size(model, 160).pos_embed.shape
    torch.Size([1, 101, 192])
    """
    height, width = to_2tuple(size)
    name = type(model).__name__
    patch_embed = getattr(model, "patch_embed", None)
    patch_size = getattr(patch_embed, "patch_size", None)
    if not hasattr(model, "set_input_size") or patch_size is None:
        raise VitpruneError(f"{name} cannot be resized: timm has no way to give it another image size")
    patch_size = to_2tuple(patch_size)
    if any(pixels < 1 or pixels % patch for pixels, patch in zip((height, width), patch_size, strict=True)):
        raise VitpruneError(
            f"images of {height} x {width} pixels are no whole patches of {patch_size[0]} x {patch_size[1]}; "
            f"try {_nearest(height, patch_size[0])} x {_nearest(width, patch_size[1])}"
        )
    result = copy.deepcopy(model)
    try:
        result.set_input_size(img_size=(height, width))
        result.model_args = {**(getattr(model, "model_args", None) or {}), "img_size": (height, width)}
        schedule = describe_merging(result)
        if schedule:
            check_schedule(result, schedule)
        parameter = next(result.parameters())
        image = torch.zeros(1, *data_config(result)["input_size"], device=parameter.device, dtype=parameter.dtype)
        copy.deepcopy(result).eval()(image)
    except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise VitpruneError(f"{name} cannot take images of {height} x {width} pixels ({_first_line(error)})") from error
    return result


def _nearest(pixels: int, patch: int) -> int:
    return max(1, round(pixels / patch)) * patch


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
