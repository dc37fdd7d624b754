"""Choose how much of a target fewer tokens take, of smaller images or merged, before units take the rest.

Fewer tokens make every unit cheaper, so this is decided first: for some sizes of the images and some shares of the way,
the schedule that changes answers least is found, the units that must go beside it are decided on the unmerged model,
and whole candidates are compared on images that nothing was fitted to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vitprune.answer_loss import AnswerLoss, answer_loss
from vitprune.answers import ask
from vitprune.data import Batches, on_device, take_evenly
from vitprune.errors import VitpruneError
from vitprune.images.resized_batches import resize_images
from vitprune.models.attention import QK, VO, split_attention
from vitprune.models.fewer_tokens import FewerTokens, reduce_tokens
from vitprune.models.image_size import set_image_size, smaller_sizes
from vitprune.models.merge_schedule import choose_schedules
from vitprune.models.merging import set_merging
from vitprune.models.units import FFN, find_groups
from vitprune.options import TARGETS
from vitprune.progress import Track, untracked
from vitprune.pruning.decide import OUTER, PIXELS, TOKENS
from vitprune.pruning.decide_parts import keep_back, multiple_of, propose
from vitprune.pruning.meters import MACS, Meter
from vitprune.pruning.rank_parts import Worth, rank_parts
from vitprune.pruning.target import ROUNDING, Target
from vitprune.pruning.turn import Turned, turn_attention
from vitprune.sharing import mean_of_all

# How many of the calibration images it is decided on; what goes is decided anew on more of them.
NUM_IMAGES = 256
# Of these, how many schedules are compared on.
NUM_SCHEDULE_IMAGES = 96
# At most so many blocks merge; as few as will do.
MAX_MERGES = 5
# Shares of the way, on a logarithmic scale, that merging goes; units go the rest.
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Mixed:
    """One mixture of fewer tokens and units that was tried.

    Attributes:
        share: what merging alone leaves, at most, as a share of what the model costs at this image size.
        fewer: image size and schedule.
        loss: KL(dense || candidate) on images kept back, nats per image, everything refitted at once.
        cost: of the candidate, in what the target is told in.
    """

    share: float
    fewer: FewerTokens
    loss: float
    cost: float


@dataclass(frozen=True)
class Weighed:
    """What it takes to propose candidates for any target.

    Attributes:
        fitted: images that it was measured on.
        kept_back: images to try candidates on.
        turned: the model with its attention in order; None where no units may go.
        worth: what every unit and layer is worth; None likewise.
    """

    fitted: Batches
    kept_back: Batches
    turned: Turned | None = None
    worth: Worth | None = None

    def at_size(self, size: tuple[int, int] | None) -> Weighed:
        """Return it for smaller images: what units are worth is taken to be the same."""
        if size is None:
            return self
        turned = None if self.turned is None else replace(self.turned, model=set_image_size(self.turned.model, size))
        fitted, kept_back = (
            [(resize_images(images, size), labels) for images, labels in each] for each in (self.fitted, self.kept_back)
        )
        return replace(self, fitted=fitted, kept_back=kept_back, turned=turned)


@dataclass(frozen=True)
class Judged:
    """Images that candidates are judged on, with the dense model's answers.

    Attributes:
        images: batches [B, channels, height, width], on the model's device.
        dense: what its answers to each batch are compared with.
        loss: how they are compared.
    """

    images: tuple[Tensor, ...]
    dense: tuple[Tensor, ...]
    loss: AnswerLoss

    @torch.no_grad()
    def loss_of(self, candidate: Callable[[Tensor], Tensor], size: tuple[int, int] | None = None) -> float:
        """Return the mean over images of how far answers are from the dense ones; ``candidate`` reads ``size``."""
        asked = partial(ask, candidate) if isinstance(candidate, nn.Module) else candidate
        losses = [
            self.loss.diverge(dense, asked(images if size is None else resize_images(images, size)))
            for images, dense in zip(self.images, self.dense, strict=True)
        ]
        return mean_of_all(torch.cat(losses))


@torch.no_grad()
def ask_dense(model: nn.Module, batches: Batches) -> Judged:
    """Return images with a model's answers, to judge candidates by.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=5).eval()
    >>> ask_dense(model, [(torch.randn(2, 3, 32, 32), torch.zeros(2))]).loss_of(model) < 1e-6
    True
    """
    images = tuple(each for each, _labels in on_device(model, batches))
    loss = answer_loss(model)
    return Judged(images, tuple(loss.refer(ask(model, each)) for each in images), loss)


@torch.no_grad()
def weigh(
    model: nn.Module,
    batches: Batches,
    parts: Sequence[str],
    *,
    ridge: float,
    seed: int = 0,
    track: Track = untracked,
) -> Weighed:
    """Measure, on some of the images, what every unit of a model is worth; as in ``reduce_tokens_first``."""
    fitted, kept_back = keep_back(batches, NUM_IMAGES)
    units = [part for part in parts if part not in OUTER]
    if not units:
        return Weighed(fitted, kept_back)
    turned = turn_attention(model, fitted, units, ridge=ridge, seed=seed)
    worth = rank_parts(turned, fitted, units, kept_back, ridge=ridge, seed=seed, track=track)
    return Weighed(fitted, kept_back, turned, worth)


@torch.no_grad()
def choose_tokens(
    model: nn.Module,
    target: Target,
    parts: Sequence[str],
    weighed: Weighed,
    *,
    ridge: float,
    meter: Meter = MACS,
    track: Track = untracked,
    **options: Any,
) -> list[Mixed]:
    """Try mixtures of smaller images, of merging, and of units that meet a target.

    Smaller images are tried where they alone lose less than the best mixture of those before.

    Args:
        model: timm Vision Transformer in eval mode with a classifier, whose tokens do not merge.
        target: of what ``meter`` measures.
        parts: that may go, from ``check_parts``; ``tokens`` or ``pixels`` among them.
        weighed: from ``weigh``, for the units among the parts.
        ridge: λ of what stands in.
        meter: what the target is told in.
        track: wraps (items, description) of long loops, for progress.
        options: ``allocation``, ``round_to`` and ``floor``, as ``decide_parts`` takes them.

    Returns:
        What was tried, the best first.

    Raises:
        VitpruneError: if the target is of something else than the meter measures, or cannot be met.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=3, embed_dim=24, img_size=64).eval()
    >>> batches = [(torch.randn(2, 3, 64, 64), torch.zeros(2, dtype=torch.int64)) for _ in range(2)]
    >>> target, weighed = MACS.target(model, 0.9), weigh(model, batches, ["tokens"], ridge=1e-3)
    >>> [mixed.fewer.schedule is None for mixed in choose_tokens(model, target, ["tokens"], weighed, ridge=1e-3)]
    [False]
    """
    _check_kind(target, parts, meter)
    judged = ask_dense(model, weighed.kept_back)
    tried: list[Mixed] = []
    reason = "no schedule goes that far"
    for size in (None, *(smaller_sizes(model) if PIXELS in parts else ())):
        sized = reduce_tokens(model, FewerTokens(size))
        if size is not None and judged.loss_of(sized, size) >= min((each.loss for each in tried), default=math.inf):
            break  # and still smaller ones lose more
        at_size = weighed.at_size(size)
        make = make_candidates(sized, target, parts, at_size, meter=meter, ridge=ridge, **options)
        said = partial(_say_size, track, size)
        known = next((each.fewer.schedule for each in tried if each.fewer.schedule), None)
        for left, schedule in said(_mixtures(sized, target, parts, at_size, meter, known, said), "mixtures"):
            try:
                candidate = make(schedule)
            except VitpruneError as error:
                reason = str(error)  # units cannot go that far beside so few merges
                continue
            cost = meter.count(candidate)
            if cost > target.limit * (1 + ROUNDING):
                reason = "still smaller images are not looked at"
                continue
            tried.append(Mixed(left, FewerTokens(size, schedule), judged.loss_of(candidate, size), cost))
    if not tried:
        raise VitpruneError(f"neither fewer tokens nor units can meet the target; {reason}")
    return sorted(tried, key=lambda each: each.loss)


def _check_kind(target: Target, parts: Sequence[str], meter: Meter) -> None:
    if target.kind != meter.kind:
        part = TOKENS if TOKENS in parts else PIXELS
        raise VitpruneError(
            f"part {part} saves {TARGETS[meter.kind]}; for a target of {TARGETS[target.kind]} name "
            + ("a schedule (set_merging)" if part == TOKENS else "a size (set_image_size)")
        )


def _say_size(track: Track, size: tuple[int, int] | None, items: Any, description: str) -> Any:
    return track(items, description if size is None else f"{description} at {size[0]} x {size[1]} px")


def _mixtures(
    model: nn.Module,
    target: Target,
    parts: Sequence[str],
    weighed: Weighed,
    meter: Meter,
    known: Sequence[int] | None,
    track: Track,
) -> list[tuple[float, tuple[int, ...] | None]]:
    """Return what merging leaves at most, and the schedule that does, for some shares of the way to a target."""
    units = [part for part in parts if part not in OUTER]
    share = target.limit / meter.count(model)
    shares = [share**way for way in (SHARES if units else (1.0,))]
    if TOKENS not in parts or share >= 1:
        return [(1.0, None)]
    found = choose_schedules(
        model,
        take_evenly(weighed.fitted, NUM_SCHEDULE_IMAGES),
        [each for each in shares if each < 1],
        share_of=None if meter.share_of is None else meter.share_of(model),
        max_merges=MAX_MERGES,
        start=known,
        track=track,
    )
    schedules = [None] * (len(shares) - len(found)) + list(found)
    return [pair for pair in zip(shares, schedules, strict=True) if pair[0] == 1 or pair[1] is not None]


def make_candidates(
    model: nn.Module,
    target: Target,
    parts: Sequence[str],
    weighed: Weighed,
    *,
    meter: Meter = MACS,
    ridge: float,
    round_to: int = 1,
    **options: Any,
) -> Callable[[Sequence[int] | None], nn.Module]:
    """Return what makes the candidate of a schedule that meets a target, refitted at once.

    Args:
        model: as in ``choose_tokens``, as is all else, at the image size of the candidates.
        target: of what ``meter`` measures.
        parts: that may go.
        weighed: at this image size.
        meter: what the target is told in.
        ridge: λ of what stands in.
        round_to: every FFN's width is a multiple of it.
        options: ``allocation`` and ``floor``.
    """
    parts = [part for part in parts if part not in OUTER]
    if not parts:
        return lambda schedule: reduce_tokens(model, FewerTokens(schedule=schedule))
    turned, worth = weighed.turned, weighed.worth
    split = split_attention(model)
    multiples = {
        group.name: round_to if group.kind == FFN else multiple_of(group.num_units)
        for group in find_groups(split, [FFN, QK, VO])
    }

    def make(schedule: Sequence[int] | None) -> nn.Module:
        shaped = split if schedule is None else set_merging(split, schedule)
        if meter.count(shaped) <= target.limit:
            return shaped
        # Tokens are matched by the keys of attention, which must not go as a whole there.
        merging = {f"blocks.{block}.attn" for block, r in enumerate(schedule or ()) if r}
        of_others = replace(worth, stand_ins=[each for each in worth.stand_ins if each.layer not in merging])
        within = meter.target(shaped, target.limit, kinds=[FFN, QK, VO])
        trial = propose(turned, parts, of_others, within, shaped, ridge=ridge, round_to=multiples, **options)
        narrow = trial.model(trial.decide(trial.factors))
        return narrow if schedule is None else set_merging(narrow, schedule)

    return make


def reduce_tokens_first(
    model: nn.Module,
    batches: Batches,
    target: Target,
    parts: Sequence[str],
    *,
    ridge: float,
    seed: int = 0,
    track: Track = untracked,
    **options: Any,
) -> tuple[nn.Module, Target, tuple[str, ...]]:
    """Let images shrink and tokens merge as far as that is the best part of the way to a target of MACs.

    Args:
        model: as in ``choose_tokens``, as is all else.
        batches: calibration images and labels, readable more than once.
        target: of multiply-accumulates.
        parts: that may go, with ``tokens`` and ``pixels`` or without.
        ridge: λ of what stands in.
        seed: of everything drawn at random.
        track: wraps (items, description) of long loops, for progress.
        options: as ``choose_tokens`` takes them.

    Returns:
        The model with fewer tokens, or the model itself; what is left of the target, for its units; and which parts
        go beside them.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=3, embed_dim=24, img_size=64).eval()
    >>> batches = [(torch.randn(2, 3, 64, 64), torch.zeros(2, dtype=torch.int64)) for _ in range(2)]
    >>> merged, _target, parts = reduce_tokens_first(model, batches, MACS.target(model, 0.8), ["tokens"], ridge=1e-3)
    >>> MACS.count(merged) <= 0.8 * MACS.count(model), parts
    (True, ('ffn',))
    """
    _check_kind(target, parts, MACS)
    weighed = weigh(model, batches, parts, ridge=ridge, seed=seed, track=track)
    best = choose_tokens(model, target, parts, weighed, ridge=ridge, track=track, **options)[0]
    return go_on(model, best.fewer, target, parts)


def go_on(
    model: nn.Module, fewer: FewerTokens, target: Target, parts: Sequence[str], meter: Meter = MACS
) -> tuple[nn.Module, Target, tuple[str, ...]]:
    """Return what is left to do once it is chosen how tokens become fewer; as ``reduce_tokens_first`` returns it.

    Args:
        model: whose tokens do not merge.
        fewer: what was chosen.
        target: of the whole way.
        parts: that may go.
        meter: what the target is told in.
    """
    units = tuple(part for part in parts if part not in OUTER)
    shaped = reduce_tokens(model, fewer)
    cost = meter.count(shaped)
    if cost <= target.limit or not units:
        return shaped, replace(meter.target(shaped, cost), limit=max(target.limit, cost)), (FFN,)
    if units == (FFN,):
        return shaped, meter.target(shaped, target.limit), units
    return shaped, meter.target(split_attention(shaped), target.limit, kinds=[FFN, QK, VO]), units
