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

# Of the height and width: which smaller images are looked at.
SMALLER = (13 / 14, 6 / 7, 11 / 14, 5 / 7, 4 / 7)


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
    patch_size = check_image_size(model)
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


def check_image_size(model: nn.Module) -> tuple[int, int]:
    """Return the height and width of a patch, after checking that a model's images may be of another size.

    Raises:
        VitpruneError: if timm cannot give it another one.

    >>> import timm
    >>> check_image_size(timm.create_model("vit_tiny_patch16_224", depth=1))
    (16, 16)
    """
    patch_size = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if not hasattr(model, "set_input_size") or patch_size is None:
        raise VitpruneError(f"{type(model).__name__} cannot be resized: timm has no way to give it another image size")
    return to_2tuple(patch_size)


def smaller_sizes(model: nn.Module) -> list[tuple[int, int]]:
    """Return height and width of smaller images, in whole patches, the largest first.

    >>> import timm
    >>> smaller_sizes(timm.create_model("vit_tiny_patch16_224", depth=1))
    [(208, 208), (192, 192), (176, 176), (160, 160), (128, 128)]
    """
    patch_size = check_image_size(model)
    own = tuple(data_config(model)["input_size"][1:])
    sizes = [
        tuple(max(1, round(share * pixels / patch)) * patch for pixels, patch in zip(own, patch_size, strict=True))
        for share in SMALLER
    ]
    return [size for size in dict.fromkeys(sizes) if size != own]


def _nearest(pixels: int, patch: int) -> int:
    return max(1, round(pixels / patch)) * patch


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
