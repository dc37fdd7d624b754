"""Choose how much of a target merging tokens takes, before units take the rest.

Fewer tokens make every unit cheaper, so this is decided first: for some shares of the way, the schedule that changes
answers least is found, the units that must go beside it are decided on the unmerged model, and whole candidates are
compared on images that nothing was fitted to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from vitprune.calibration.layer_losses import mean_divergence
from vitprune.data import Batches, on_device, take_evenly
from vitprune.errors import VitpruneError
from vitprune.models.attention import QK, VO, split_attention
from vitprune.models.merge_schedule import choose_schedules
from vitprune.models.merging import set_merging
from vitprune.models.units import FFN, find_groups
from vitprune.options import TARGETS
from vitprune.progress import Track, untracked
from vitprune.pruning.decide import TOKENS
from vitprune.pruning.decide_parts import keep_back, multiple_of, propose
from vitprune.pruning.meters import MACS, Meter
from vitprune.pruning.rank_parts import Worth, rank_parts
from vitprune.pruning.target import Target
from vitprune.pruning.turn import Turned, turn_attention

# How many of the calibration images it is decided on; what goes is decided anew on more of them.
NUM_IMAGES = 256
# Of these, how many schedules are compared on.
NUM_SCHEDULE_IMAGES = 96
# Shares of the way, on a logarithmic scale, that merging goes; units go the rest.
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Mixed:
    """One mixture of merging and units that was tried.

    Attributes:
        share: what merging alone leaves, at most, as a share of what the dense model costs.
        schedule: tokens that disappear in each block; None where none do.
        loss: KL(dense || candidate) on images kept back, nats per image, everything refitted at once.
        cost: of the candidate, in what the target is told in.
    """

    share: float
    schedule: tuple[int, ...] | None
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
    """Measure, on some of the images, what every unit of a model is worth; arguments as in ``choose_merging``."""
    fitted, kept_back = keep_back(batches, NUM_IMAGES)
    if not parts:
        return Weighed(fitted, kept_back)
    turned = turn_attention(model, fitted, parts, ridge=ridge, seed=seed)
    worth = rank_parts(turned, fitted, parts, kept_back, ridge=ridge, seed=seed, track=track)
    return Weighed(fitted, kept_back, turned, worth)


@torch.no_grad()
def choose_merging(
    model: nn.Module,
    batches: Batches,
    target: Target,
    parts: Sequence[str],
    *,
    ridge: float,
    seed: int = 0,
    meter: Meter = MACS,
    weighed: Weighed | None = None,
    track: Track = untracked,
    **options: Any,
) -> list[Mixed]:
    """Try mixtures of merging and of units that meet a target.

    Args:
        model: timm Vision Transformer in eval mode with a classifier, whose tokens do not merge.
        batches: calibration images and labels, readable more than once.
        target: of what ``meter`` measures.
        parts: of units that may go, from ``check_parts``; none where merging is to meet the target alone.
        ridge: λ of what stands in.
        seed: of everything drawn at random.
        meter: what the target is told in.
        weighed: from ``weigh`` with these arguments, where it is there already.
        track: wraps (items, description) of long loops, for progress.
        options: ``allocation``, ``round_to`` and ``floor``, as ``decide_parts`` takes them.

    Returns:
        What was tried, the best first.

    Raises:
        VitpruneError: if the target is of something else than the meter measures, or cannot be met.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=3, embed_dim=24, img_size=64).eval()
    >>> batches = [(torch.randn(2, 3, 64, 64), torch.zeros(2, dtype=torch.int64)) for _ in range(2)]
    >>> target = MACS.target(model, 0.9)
    >>> [mixed.schedule is None for mixed in choose_merging(model, batches, target, [], ridge=1e-3)]
    [False]
    """
    if target.kind != meter.kind:
        raise VitpruneError(
            f"part tokens saves {TARGETS[meter.kind]}; for a target of {TARGETS[target.kind]} name a schedule "
            "(set_merging)"
        )
    share = target.limit / meter.count(model)
    weighed = weighed or weigh(model, batches, parts, ridge=ridge, seed=seed, track=track)
    shares = [share**way for way in (SHARES if parts else (1.0,))]
    found = choose_schedules(
        model,
        take_evenly(weighed.fitted, NUM_SCHEDULE_IMAGES),
        [each for each in shares if each < 1],
        share_of=None if meter.share_of is None else meter.share_of(model),
        track=track,
    )
    schedules = [None] * (len(shares) - len(found)) + list(found)
    mixtures = [pair for pair in zip(shares, schedules, strict=True) if pair[0] == 1 or pair[1] is not None]
    images = [each for each, _labels in on_device(model, weighed.kept_back)]
    reason = "no schedule goes that far"
    make = make_candidates(model, target, parts, weighed, meter=meter, ridge=ridge, **options)
    tried = []
    for left, schedule in track(mixtures, "mixtures"):
        try:
            candidate = make(schedule)
        except VitpruneError as error:
            reason = str(error)  # units cannot go that far beside so little merging
            continue
        loss = mean_divergence(model, candidate, images)
        tried.append(Mixed(left, schedule, loss, meter.count(candidate)))
    if not tried:
        raise VitpruneError(f"neither merging nor units can meet the target; {reason}")
    return sorted(tried, key=lambda each: each.loss)


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
    """Return what makes the candidate of a schedule that meets a target, refitted at once; as in ``choose_merging``."""
    if not parts:
        return partial(set_merging, model)
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


def merge_first(
    model: nn.Module, batches: Batches, target: Target, parts: Sequence[str], *, meter: Meter = MACS, **options: Any
) -> tuple[nn.Module, Target, tuple[str, ...]]:
    """Let tokens merge as far as that is the best part of the way to a target.

    Args:
        model: as in ``choose_merging``, as is all else.
        batches: calibration images and labels, readable more than once.
        target: of what ``meter`` measures.
        parts: that may go, with ``tokens`` or without.
        meter: what the target is told in.
        options: as ``choose_merging`` takes them.

    Returns:
        The model whose tokens merge, or the model itself; what is left of the target, for its units; and which parts
        go beside tokens.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=3, embed_dim=24, img_size=64).eval()
    >>> batches = [(torch.randn(2, 3, 64, 64), torch.zeros(2, dtype=torch.int64)) for _ in range(2)]
    >>> merged, _target, parts = merge_first(model, batches, MACS.target(model, 0.8), ["tokens"], ridge=1e-3)
    >>> MACS.count(merged) <= 0.8 * MACS.count(model), parts
    (True, ('ffn',))
    """
    units = tuple(part for part in parts if part != TOKENS)
    schedule = choose_merging(model, batches, target, units, meter=meter, **options)[0].schedule
    return go_on(model, schedule, target, units, meter)


def go_on(
    model: nn.Module, schedule: Sequence[int] | None, target: Target, units: Sequence[str], meter: Meter = MACS
) -> tuple[nn.Module, Target, tuple[str, ...]]:
    """Return what is left to do once a schedule is chosen; as ``merge_first`` returns it.

    Args:
        model: whose tokens do not merge.
        schedule: tokens that disappear in each block; None where none do.
        target: of the whole way.
        units: kinds of units that may go.
        meter: what the target is told in.
    """
    shaped = model if schedule is None else set_merging(model, schedule)
    cost = meter.count(shaped)
    if cost <= target.limit or not units:
        return shaped, replace(meter.target(shaped, cost), limit=max(target.limit, cost)), (FFN,)
    if tuple(units) == (FFN,):
        return shaped, meter.target(shaped, target.limit), tuple(units)
    return shaped, meter.target(split_attention(shaped), target.limit, kinds=[FFN, QK, VO]), tuple(units)
