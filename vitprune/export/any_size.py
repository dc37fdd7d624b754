"""Files that take images of any height and width: which models can, and whether a file keeps the promise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from vitprune.answers import ask, shape_like
from vitprune.errors import VitpruneError
from vitprune.views import data_config, has_classifier

MAX_PATCHES = 512
_TOLERANCE = {"rtol": 1e-3, "atol": 1e-4}


def any_size_dims(model: nn.Module) -> dict[int, Any]:
    """Return what ``torch.export`` is told of the height and width of images: any number of whole patches, at least 2.

    Args:
        model: that timm built with ``dynamic_img_size``.

    Raises:
        VitpruneError: if a model takes images of one size.

    >>> import timm
    >>> any_size_dims(timm.create_model("vit_tiny_patch16_224", depth=1))
    Traceback (most recent call last):
        ...
    vitprune.errors.VitpruneError: VisionTransformer takes images of one size; build it with `model_args` \
dynamic_img_size=True, if timm has that for it, or leave `dynamic_size` out
    """
    patch = getattr(model.patch_embed, "patch_size", None) if hasattr(model, "patch_embed") else None
    if patch is None or not getattr(model, "dynamic_img_size", False):
        raise VitpruneError(
            f"{type(model).__name__} takes images of one size; build it with `model_args` dynamic_img_size=True, "
            "if timm has that for it, or leave `dynamic_size` out"
        )
    return {
        2: patch[0] * Dim("rows", min=2, max=MAX_PATCHES),
        3: patch[1] * Dim("columns", min=2, max=MAX_PATCHES),
    }


def example_size(model: nn.Module, *, dynamic_size: bool) -> tuple[int, int, int]:
    """Return [channels, height, width] of the images that a model is traced with.

    >>> import timm
    >>> example_size(timm.create_model("vit_tiny_patch16_224", depth=1), dynamic_size=True)
    (3, 224, 240)
    """
    channels, height, width = data_config(model)["input_size"]
    if dynamic_size:
        width += model.patch_embed.patch_size[1]  # of two different lengths, so that none is taken for the other
    return channels, height, width


@torch.no_grad()
def check_other_sizes(model: nn.Module, written: Callable[[Tensor], Any], *, what: str) -> None:
    """Refuse a file that does not answer as the model at other heights and widths.

    Args:
        model: the torch model.
        written: the file, opened.
        what: it is, for messages.

    Raises:
        VitpruneError: if it cannot take such images, or answers otherwise.
    """
    channels, height, width = data_config(model)["input_size"]
    patch = model.patch_embed.patch_size
    rows, columns = height // patch[0], width // patch[1]
    generator = torch.Generator().manual_seed(0)
    # Fewer and more patches, and an odd number of them: tokens that merge are parted in two.
    for grid in ((max(2, rows - 2), columns + 1), (rows + 3, columns), (rows // 2 * 2 + 3, columns // 2 * 2 + 1)):
        size = grid[0] * patch[0], grid[1] * patch[1]
        images = torch.randn((1, channels, *size), generator=generator)
        try:
            got = written(images)
        except Exception as error:  # whatever the runtime raises
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise VitpruneError(
                f"{type(model).__name__} is bound to the size that it was traced at ({reason}); leave `dynamic_size` "
                "out"
            ) from error
        expected = ask(model, images)
        got = got if has_classifier(model) else shape_like(model, got)
        if not isinstance(got, Tensor) or not torch.allclose(got, expected, **_TOLERANCE):
            raise VitpruneError(f"{what} answers otherwise than torch to images of {size[0]} x {size[1]} pixels")
