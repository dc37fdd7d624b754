"""What a user can have without this package's budget: fewer pixels, merging alone, neurons alone, plain ridge."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from torch import nn

from vitprune.data import Batches
from vitprune.errors import VitpruneError
from vitprune.models.image_size import set_image_size, smaller_sizes
from vitprune.models.merge_schedule import parse_schedule
from vitprune.models.merging import set_merging
from vitprune.options import DEFAULT_RIDGE
from vitprune.progress import Track, untracked
from vitprune.pruning.plan import Plan
from vitprune.pruning.prune import prune
from vitprune.views import num_patches

# Of the patches: what is gone at the end, in equal steps.
MERGED = (0.5, 0.8, 0.98)
# Of FFN neurons, and of query/key dimensions and neurons.
RATIOS = (0.25, 0.5)


@dataclass(frozen=True)
class Alternative:
    """A simpler way to be faster.

    Attributes:
        lever: key of ``LEVERS``: what kind of way.
        name: which one of it.
        make: makes the model, and its plan where it has one.

    Raises:
        VitpruneError: from ``make``, if the model cannot be changed in that way.
    """

    lever: str
    name: str
    make: Callable[[], tuple[nn.Module, Plan | None]]


def list_alternatives(
    model: nn.Module, batches: Batches, *, ridge: float = DEFAULT_RIDGE, seed: int = 0, track: Track = untracked
) -> Iterator[Alternative]:
    """Yield ways to be faster that ask less of a user than a budget over everything.

    Args:
        model: timm Vision Transformer in eval mode.
        batches: calibration images and labels, readable more than once.
        ridge: λ of what stands in for units.
        seed: of everything drawn at random.
        track: wraps (items, description) of long loops, for progress.

    Source:
        Merging in equal steps: Bolya et al., Token Merging, ICLR 2023. Query/key dimensions and neurons by variance,
        with ridge regression: CORP.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=4).eval()
    >>> [alternative.name for alternative in list_alternatives(model, [])][3:6]
    ['160 px', '128 px', '24 tokens in every block']
    """
    for size in smaller_sizes(model):
        name = f"{size[0]} px" if size[0] == size[1] else f"{size[0]} x {size[1]} px"
        yield Alternative("pixels", name, partial(_resize, model, size))
    for share in MERGED:
        r = int(share * num_patches(model) / len(model.blocks))
        yield Alternative("merging", f"{r} tokens in every block", partial(_merge, model, r))
    for lever, options in (
        ("neurons", {"parts": ["ffn"]}),
        (
            "variance",
            {"parts": ["ffn", "qk"], "criterion": "variance", "allocation": "uniform", "compensate": "ridge"},
        ),
    ):
        for ratio in RATIOS:
            options = {**options, "ridge": ridge, "seed": seed, "track": track}
            yield Alternative(
                lever, f"{ratio:.0%} of the units", partial(prune, model, batches, ratio=ratio, **options)
            )


def _resize(model: nn.Module, size: tuple[int, int]) -> tuple[nn.Module, None]:
    return set_image_size(model, size), None


def _merge(model: nn.Module, r: int) -> tuple[nn.Module, None]:
    if r < 1:
        raise VitpruneError("too few patches to merge one in every block")
    return set_merging(model, parse_schedule(f"constant:{r}", model)), None
