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
from vitprune.models.macs import count_macs
from vitprune.models.merge_schedule import choose_schedules
from vitprune.models.merging import set_merging
from vitprune.models.units import FFN, find_groups
from vitprune.progress import Track, untracked
from vitprune.pruning.decide import TOKENS
from vitprune.pruning.decide_parts import keep_back, multiple_of, propose
from vitprune.pruning.rank_parts import rank_parts
from vitprune.pruning.target import Target, target_macs
from vitprune.pruning.turn import turn_attention

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
        macs_share: multiply-accumulates that merging alone leaves, at most, as a share of those of the dense model.
        schedule: tokens that disappear in each block; None where none do.
        loss: KL(dense || candidate) on images kept back, nats per image, everything refitted at once.
    """

    macs_share: float
    schedule: tuple[int, ...] | None
    loss: float


@torch.no_grad()
def choose_merging(
    model: nn.Module,
    batches: Batches,
    target: Target,
    parts: Sequence[str],
    *,
    ridge: float,
    seed: int = 0,
    track: Track = untracked,
    **options: Any,
) -> list[Mixed]:
    """Try mixtures of merging and of units that meet a target.

    Args:
        model: timm Vision Transformer in eval mode with a classifier, whose tokens do not merge.
        batches: calibration images and labels, readable more than once.
        target: of multiply-accumulates.
        parts: of units that may go, from ``check_parts``; none where merging is to meet the target alone.
        ridge: λ of what stands in.
        seed: of everything drawn at random.
        track: wraps (items, description) of long loops, for progress.
        options: ``allocation``, ``round_to`` and ``floor``, as ``decide_parts`` takes them.

    Returns:
        What was tried, the best first.

    Raises:
        VitpruneError: if the target is none of multiply-accumulates, or cannot be met.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=3, embed_dim=24, img_size=64).eval()
    >>> batches = [(torch.randn(2, 3, 64, 64), torch.zeros(2, dtype=torch.int64)) for _ in range(2)]
    >>> target = target_macs(model, 0.9 * count_macs(model))
    >>> [mixed.schedule is None for mixed in choose_merging(model, batches, target, [], ridge=1e-3)]
    [False]
    """
    if target.kind != "macs":
        raise VitpruneError("part tokens saves multiply-accumulates; for another target name a schedule (set_merging)")
    share = target.limit / count_macs(model)
    fitted, kept_back = keep_back(batches, NUM_IMAGES)
    shares = [share**way for way in (SHARES if parts else (1.0,))]
    found = choose_schedules(
        model, take_evenly(fitted, NUM_SCHEDULE_IMAGES), [each for each in shares if each < 1], track=track
    )
    schedules = [None] * (len(shares) - len(found)) + list(found)
    mixtures = [pair for pair in zip(shares, schedules, strict=True) if pair[0] == 1 or pair[1] is not None]
    images = [each for each, _labels in on_device(model, kept_back)]
    reason = "no schedule goes that far"
    make = partial(set_merging, model)
    if parts:
        make = _make_candidates(model, fitted, kept_back, target, parts, ridge=ridge, seed=seed, track=track, **options)
    tried = []
    for macs_share, schedule in track(mixtures, "mixtures"):
        try:
            candidate = make(schedule)
        except VitpruneError as error:
            reason = str(error)  # units cannot go that far beside so little merging
            continue
        tried.append(Mixed(macs_share, schedule, mean_divergence(model, candidate, images)))
    if not tried:
        raise VitpruneError(f"neither merging nor units can meet the target; {reason}")
    return sorted(tried, key=lambda each: each.loss)


def _make_candidates(
    model: nn.Module,
    fitted: Batches,
    kept_back: Batches,
    target: Target,
    parts: Sequence[str],
    *,
    ridge: float,
    seed: int,
    track: Track,
    round_to: int,
    **options: Any,
) -> Callable[[Sequence[int] | None], nn.Module]:
    """Return what makes the candidate of a schedule, refitted at once."""
    turned = turn_attention(model, fitted, parts, ridge=ridge, seed=seed)
    worth = rank_parts(turned, fitted, parts, kept_back, ridge=ridge, seed=seed, track=track)
    split = split_attention(model)
    multiples = {
        group.name: round_to if group.kind == FFN else multiple_of(group.num_units)
        for group in find_groups(split, [FFN, QK, VO])
    }

    def make(schedule: Sequence[int] | None) -> nn.Module:
        shaped = split if schedule is None else set_merging(split, schedule)
        if count_macs(shaped) <= target.limit:
            return shaped
        # Tokens are matched by the keys of attention, which must not go as a whole there.
        merging = {f"blocks.{block}.attn" for block, r in enumerate(schedule or ()) if r}
        of_others = replace(worth, stand_ins=[each for each in worth.stand_ins if each.layer not in merging])
        within = target_macs(shaped, target.limit, kinds=[FFN, QK, VO])
        trial = propose(turned, parts, of_others, within, shaped, ridge=ridge, round_to=multiples, **options)
        narrow = trial.model(trial.decide(trial.factors))
        return narrow if schedule is None else set_merging(narrow, schedule)

    return make


def merge_first(
    model: nn.Module, batches: Batches, target: Target, parts: Sequence[str], **options: Any
) -> tuple[nn.Module, Target, tuple[str, ...]]:
    """Let tokens merge as far as that is the best part of the way to a target.

    Args:
        model: as in ``choose_merging``, as is all else.
        batches: calibration images and labels, readable more than once.
        target: of multiply-accumulates.
        parts: that may go, with ``tokens`` or without.
        options: as ``choose_merging`` takes them.

    Returns:
        The model whose tokens merge, or the model itself; what is left of the target, for its units; and which parts
        go beside tokens.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=3, embed_dim=24, img_size=64).eval()
    >>> batches = [(torch.randn(2, 3, 64, 64), torch.zeros(2, dtype=torch.int64)) for _ in range(2)]
    >>> merged, _target, parts = merge_first(model, batches, target_macs(model, 0.8), ["tokens"], ridge=1e-3)
    >>> count_macs(merged) <= 0.8 * count_macs(model), parts
    (True, ('ffn',))
    """
    units = tuple(part for part in parts if part != TOKENS)
    schedule = choose_merging(model, batches, target, units, **options)[0].schedule
    shaped = model if schedule is None else set_merging(model, schedule)
    macs = count_macs(shaped)
    if macs <= target.limit:
        return shaped, replace(target_macs(shaped, macs, total=macs), limit=target.limit), (FFN,)
    if units == (FFN,):
        return shaped, target_macs(shaped, target.limit, total=macs), units
    return shaped, target_macs(split_attention(shaped), target.limit, total=macs, kinds=[FFN, QK, VO]), units
