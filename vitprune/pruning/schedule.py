"""Decide a plan in several steps, each on what the pruning so far has made of the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitprune.calibration.criteria import REGISTRY, Scores, check_needs, score_neurons
from vitprune.calibration.statistics import MOMENTS, Statistics, measure_statistics
from vitprune.data import Batches
from vitprune.discovery.discover import Discovery
from vitprune.errors import VitpruneError
from vitprune.models.units import find_feed_forwards
from vitprune.options import DEFAULT_FLOOR, DEFAULT_RIDGE, DEFAULT_STEP
from vitprune.progress import Track, untracked
from vitprune.pruning.allocate import allocate
from vitprune.pruning.apply import remove_neurons
from vitprune.pruning.compensate import compensate
from vitprune.pruning.plan import Plan, plan_from_widths
from vitprune.pruning.target import Target


def list_stops(share: float, step: float) -> list[float]:
    """Return the shares at which scores are measured anew: multiples of ``step`` below ``share``, then ``share``.

    Args:
        share: what is to go in the end, in [0, 1].
        step: in (0, 1].

    Raises:
        VitpruneError: if ``step`` is out of range.

    >>> list_stops(0.35, 0.1)
    [0.1, 0.2, 0.3, 0.35]
    """
    if not 0 < step <= 1:
        raise VitpruneError(f"step must be in (0, 1], got {step}")
    below = []
    while (len(below) + 1) * step < share - 1e-9:
        below.append(round((len(below) + 1) * step, 12))
    return [*below, share]


@dataclass(frozen=True)
class Schedule:
    """How neurons are ranked and what happens between two rankings; the same at every stop.

    Attributes:
        criterion: key of ``CRITERIA``.
        allocation: key of ``ALLOCATIONS``.
        bridge: compensation between stops: ``none``, ``bias`` or ``ridge``.
        round_to: every width is a multiple of it.
        floor: share of its dense neurons that ``global`` leaves to each FFN at least.
        ridge: λ of the compensation and of ``obs``, relative to the mean variance of the hidden neurons.
        seed: of random scores and of the estimate of the Fisher information.
    """

    criterion: str
    allocation: str
    bridge: str
    round_to: int = 1
    floor: float = DEFAULT_FLOOR
    ridge: float = DEFAULT_RIDGE
    seed: int = 0


@dataclass(frozen=True)
class Stage:
    """Where a schedule stands.

    Attributes:
        number: stops passed.
        kept: FFN name -> indices of the dense model's neurons that are left (int64).
        scores: of these neurons, measured on the model as pruned so far.
        statistics: measured there as well.
    """

    number: int
    kept: Mapping[str, Tensor]
    scores: Mapping[str, Tensor]
    statistics: Mapping[str, Statistics]


def plan_in_steps(
    model: nn.Module,
    target: Target,
    schedule: Schedule,
    *,
    batches: Batches | None,
    found: Discovery | None = None,
    step: float = DEFAULT_STEP,
    wanted: frozenset[str] = frozenset(),
    track: Track = untracked,
) -> tuple[Plan, Mapping[str, Statistics]]:
    """Remove a share, compensate, measure and score what is left, and go on until the target is met.

    The steps only find out which neurons stay; compensating the dense model for the whole plan comes after. Criteria
    that look at no images need one step.

    Args:
        model: timm Vision Transformer in eval mode; stays as it is.
        target: what the model may cost.
        schedule: how to rank and what to do between stops.
        batches: calibration images and labels; read once per step.
        found: a discovery on this model, for criterion ``jas``.
        step: share of what the FFN neurons cost that goes between two measurements, in (0, 1]; 1 measures once.
        wanted: further statistics of the dense model to measure on the way.
        track: wraps (items, description) of long loops, for progress.

    Returns:
        The plan, without facts, and the statistics of the dense model.

    Raises:
        VitpruneError: if an argument is out of range, an FFN would be left empty, or images are missing.
    """
    dense_statistics = None
    stages = walk(model, target, schedule, batches=batches, found=found, step=step, wanted=wanted, track=track)
    for stage in stages:
        dense_statistics = stage.statistics if dense_statistics is None else dense_statistics
    return finish(model, stage, target, schedule), dense_statistics


def walk(
    model: nn.Module,
    target: Target,
    schedule: Schedule,
    *,
    batches: Batches | None,
    found: Discovery | None = None,
    step: float = DEFAULT_STEP,
    wanted: frozenset[str] = frozenset(),
    track: Track = untracked,
) -> Iterator[Stage]:
    """Yield where a schedule stands at the dense model and after each step but the last, which ``finish`` takes.

    Arguments and errors are those of ``plan_in_steps``.
    """
    stops = list_stops(target.share, step if needs_steps(schedule.criterion) else 1.0)
    several = len(stops) > 1
    stage = first_stage(model, schedule, batches=batches, found=found, bridged=several, wanted=wanted, track=track)
    current = model
    yield stage
    for share in stops[:-1]:
        current, stage = advance(current, stage, target.partly(share), schedule, batches=batches, track=track)
        yield stage


def needs_steps(criterion: str) -> bool:
    """Tell whether a criterion's scores change as the model is pruned: those of images do."""
    return bool({"statistics", "batches"} & set(REGISTRY[criterion].needs))


def first_stage(
    model: nn.Module,
    schedule: Schedule,
    *,
    batches: Batches | None,
    found: Discovery | None = None,
    bridged: bool,
    wanted: frozenset[str] = frozenset(),
    statistics: Mapping[str, Statistics] | None = None,
    scores: Scores | None = None,
    track: Track = untracked,
) -> Stage:
    """Score the dense model.

    Args:
        model: the dense model.
        schedule: how to rank.
        batches: calibration images and labels.
        found: a discovery on this model, for criterion ``jas``.
        bridged: whether ``advance`` will follow; it compensates with ``moments``.
        wanted: further statistics to measure.
        statistics: of the dense model, with all of that, where they are there already.
        scores: of the dense model, where they are there already.
        track: wraps (items, description) of long loops, for progress.
    """
    kept = {ffn.name: torch.arange(ffn.num_neurons) for ffn in find_feed_forwards(model)}
    if statistics is None:
        statistics = _measure(model, schedule, batches, number=0, bridged=bridged, wanted=wanted)
    if scores is None:
        check_needs(model, schedule.criterion, batches=batches, found=found)
        scores = _score(model, schedule, batches, found, statistics, track)
    return Stage(0, kept, scores, statistics)


def advance(
    current: nn.Module,
    stage: Stage,
    target: Target,
    schedule: Schedule,
    *,
    batches: Batches | None,
    track: Track = untracked,
) -> tuple[nn.Module, Stage]:
    """Prune the current model down to a target, compensate it, and score what is left.

    Returns:
        The smaller model, and where the schedule stands now.
    """
    inner = _decide(stage, target, schedule)
    bridged_model = compensate(current, inner, stage.statistics, compensation=schedule.bridge, ridge=schedule.ridge)
    current = remove_neurons(bridged_model, inner)
    kept = {name: index[inner.keep[name]] for name, index in stage.kept.items()}
    number = stage.number + 1
    statistics = _measure(current, schedule, batches, number=number, bridged=True)
    return current, Stage(number, kept, _score(current, schedule, batches, None, statistics, track), statistics)


def finish(model: nn.Module, stage: Stage, target: Target, schedule: Schedule) -> Plan:
    """Return the plan, without facts, that meets the target from here.

    Args:
        model: the dense model.
        stage: where the schedule stands.
        target: what the model may cost; at most what the stage has left.
        schedule: how the stage was ranked.
    """
    inner = _decide(stage, target, schedule)
    keep = {}
    for ffn in find_feed_forwards(model):
        keep[ffn.name] = torch.zeros(ffn.num_neurons, dtype=torch.bool)
        keep[ffn.name][stage.kept[ffn.name][inner.keep[ffn.name]]] = True
    return Plan(keep)


def bridge_of(compensation: str) -> str:
    """Return the compensation between steps that comes nearest to a final one."""
    return compensation if compensation in ("none", "bias") else "ridge"


def _decide(stage: Stage, target: Target, schedule: Schedule) -> Plan:
    widths = allocate(
        stage.scores,
        target,
        allocation=schedule.allocation,
        across_ffns=REGISTRY[schedule.criterion].across_ffns,
        round_to=schedule.round_to,
        floor=schedule.floor,
    )
    return plan_from_widths(stage.scores, widths, {})


def _measure(model, schedule: Schedule, batches, *, number: int, bridged: bool, wanted=frozenset()):
    measured = REGISTRY[schedule.criterion].statistics | wanted
    if bridged and schedule.bridge != "none":
        measured |= {MOMENTS}
    if not measured:
        return {}
    if batches is None:
        raise VitpruneError("compensation needs calibration images; pass --data DIR")
    # Signs are drawn anew at each stop, or one draw would decide them all.
    return measure_statistics(model, find_feed_forwards(model), batches, measured, seed=schedule.seed + number)


def _score(model, schedule: Schedule, batches, found, statistics, track):
    return score_neurons(
        model,
        schedule.criterion,
        batches=batches,
        found=found,
        statistics=statistics or None,
        ridge=schedule.ridge,
        seed=schedule.seed,
        track=track,
    )
