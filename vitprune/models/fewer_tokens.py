"""How a model gets by with fewer tokens: smaller images, tokens that merge, or both."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from vitprune.models.image_size import set_image_size
from vitprune.models.merging import set_merging


@dataclass(frozen=True)
class FewerTokens:
    """A way to fewer tokens; without arguments, none.

    Attributes:
        image_size: height and width in pixels; None: the model's own.
        schedule: tokens that disappear in each block; None where none do.
    """

    image_size: tuple[int, int] | None = None
    schedule: tuple[int, ...] | None = None


def reduce_tokens(model: nn.Module, fewer: FewerTokens) -> nn.Module:
    """Return a model that goes this way; the model itself where there is nothing to do.

    Args:
        model: timm Vision Transformer, whose tokens do not merge.
        fewer: the way.

    Raises:
        VitpruneError: if the model cannot.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=2).eval()
    >>> reduce_tokens(model, FewerTokens(image_size=(160, 160), schedule=(20, 0))).pos_embed.shape
    torch.Size([1, 101, 192])
    """
    if fewer.image_size is not None:
        model = set_image_size(model, fewer.image_size)
    return model if fewer.schedule is None else set_merging(model, fewer.schedule)
