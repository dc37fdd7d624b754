"""Decide a plan in several steps, each on what the pruning so far has made of the model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vitprune.calibration.criteria import REGISTRY as CRITERIA
from vitprune.calibration.criteria import Scores
from vitprune.errors import VitpruneError
from vitprune.options import DEFAULT_FLOOR
from vitprune.progress import IMAGES, Track, in_step
from vitprune.pruning.allocate import allocate
from vitprune.pruning.apply import remove_neurons
from vitprune.pruning.compensations import REGISTRY as COMPENSATIONS
from vitprune.pruning.plan import Plan, plan_from_widths
from vitprune.pruning.session import Session
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
    """How units are ranked and what happens between two rankings; the same at every stop.

    Attributes:
        criterion: key of ``CRITERIA``.
        allocation: key of ``ALLOCATIONS``.
        bridge: compensation between stops: ``none``, ``bias`` or ``ridge``.
        round_to: every width is a multiple of it.
        floor: share of its dense units that ``global`` leaves to each group at least.
        widths: group name -> units that it keeps in the end, where that is decided already.
    """

    criterion: str
    allocation: str
    bridge: str
    round_to: int = 1
    floor: float = DEFAULT_FLOOR
    widths: Mapping[str, int] | None = None

    def stops(self, target: Target, step: float) -> list[float]:
        """Return the shares of a target at which this criterion's scores are measured anew; see ``list_stops``."""
        return list_stops(target.share, step if needs_steps(self.criterion) else 1.0)


# What the loops of a pruning take, in passes of a ranking over all images (DeiT-Tiny and 1,000 images on a CPU).
WORK = {"rank neurons": 0.05, "compensate": 2.2, "distill": 20.0, "layers": 1.0, "candidates": 2.0}


def list_work(
    criterion: str, share: float, step: float, compensation: str, *, of_parts: bool, num_models: int = 1
) -> list[tuple[str, float]]:
    """Return the loops of a pruning in their order and what each takes, as ``expect_work`` takes them.

    Args:
        criterion: key of ``CRITERIA``.
        share: what is to go in the end, in [0, 1].
        step: as ``list_stops`` takes it.
        compensation: key of ``COMPENSATIONS``.
        of_parts: whether widths of attention, and layers, are decided beforehand.
        num_models: that are compensated, one after another.

    Raises:
        VitpruneError: as ``list_stops`` does.

    >>> [name for name, _work in list_work("obs", 0.5, 1, "sequential", of_parts=False)]
    ['images', 'rank neurons', 'compensate', 'images']
    """
    stops = list_stops(share, step)
    ranking = [(IMAGES, 1.0), ("rank neurons", WORK["rank neurons"])]
    decided = [(name, WORK[name]) for name in ("layers", "layers", "candidates")]
    num_rankings = len(stops) if needs_steps(criterion) else 1
    work = [*(ranking + decided if of_parts else []), *ranking * num_rankings]
    compensated = []
    if COMPENSATIONS[compensation].by_block:
        compensated += [("compensate", WORK["compensate"]), (IMAGES, 0.0)]  # which it reads when it begins
    if compensation == "distill":
        compensated += [(IMAGES, 0.0), ("distill", WORK["distill"])]
    return work + compensated * num_models


@dataclass(frozen=True)
class Stage:
    """Where a schedule stands.

    Attributes:
        number: stops passed.
        kept: group name -> indices of the dense model's units that are left (int64).
        scores: of these units, measured on the model as pruned so far.
    """

    number: int
    kept: Mapping[str, Tensor]
    scores: Mapping[str, Tensor]


def needs_steps(criterion: str) -> bool:
    """Tell whether a criterion's scores change as the model is pruned: those of images do."""
    return bool({"statistics", "batches"} & set(CRITERIA[criterion].needs))


def walk(session: Session, target: Target, schedule: Schedule, *, step: float) -> Iterator[Stage]:
    """Yield where a schedule stands at the dense model and after each step but the last, which ``finish`` takes.

    In each step a share goes, the model is compensated, and what is left is measured and scored. The steps only find
    out which units stay; compensating the dense model for the whole plan comes after.

    Args:
        session: of the dense model, which stays as it is.
        target: what the model may cost.
        schedule: how to rank and what to do between stops.
        step: share of what the units cost that goes between two measurements, in (0, 1]; 1 measures once, as do
            criteria that look at no images.

    Raises:
        VitpruneError: if an argument is out of range, a group would be left empty, or images are missing.
    """
    stops = schedule.stops(target, step)
    current, stage = session, first_stage(session, schedule, track=in_step(session.track, 1, len(stops)))
    yield stage
    for number, share in enumerate(stops[:-1], 2):
        track = in_step(session.track, number, len(stops))
        current, stage = advance(current, stage, target.partly(share), schedule, track=track)
        yield stage


def first_stage(
    session: Session, schedule: Schedule, *, scores: Scores | None = None, track: Track | None = None
) -> Stage:
    """Score the dense model of a session; ``scores`` where they are there already. ``track`` in place of its own."""
    kept = {group.name: torch.arange(group.num_units) for group in session.groups}
    return Stage(0, kept, session.score(schedule.criterion, track) if scores is None else scores)


def advance(
    current: Session, stage: Stage, target: Target, schedule: Schedule, *, track: Track | None = None
) -> tuple[Session, Stage]:
    """Prune the current model down to a target, compensate it, and score what is left.

    Returns:
        The session of the smaller model, and where the schedule stands now.
    """
    inner = _decide(stage, target, schedule)
    bridge = COMPENSATIONS[schedule.bridge]
    smaller = remove_neurons(bridge.apply(current, inner), inner)
    following = Session(
        smaller,
        current.batches,
        wanted=CRITERIA[schedule.criterion].statistics | bridge.statistics,
        ridge=current.ridge,
        # Signs are drawn anew at each stop, or one draw would decide them all.
        seed=current.seed + 1,
        track=current.track,
    )
    kept = {name: index[inner.keep[name]] for name, index in stage.kept.items()}
    return following, Stage(stage.number + 1, kept, following.score(schedule.criterion, track))


def finish(session: Session, stage: Stage, target: Target, schedule: Schedule) -> Plan:
    """Return the plan, without facts, that meets the target from here.

    Args:
        session: of the dense model.
        stage: where the schedule stands.
        target: what the model may cost; at most what the stage has left.
        schedule: how the stage was ranked.
    """
    inner = _decide(stage, target, schedule)
    keep = {}
    for group in session.groups:
        keep[group.name] = torch.zeros(group.num_units, dtype=torch.bool)
        keep[group.name][stage.kept[group.name][inner.keep[group.name]]] = True
    return Plan(keep)


def _decide(stage: Stage, target: Target, schedule: Schedule) -> Plan:
    if schedule.widths is not None:
        return plan_from_widths(stage.scores, _on_the_way(stage, target, schedule))
    widths = allocate(
        stage.scores,
        target,
        allocation=schedule.allocation,
        across_ffns=CRITERIA[schedule.criterion].across_ffns,
        round_to=schedule.round_to,
        floor=schedule.floor,
    )
    return plan_from_widths(stage.scores, widths)


def _on_the_way(stage: Stage, target: Target, schedule: Schedule) -> dict[str, int]:
    """Return the widths at which a target stands on the straight way to those that were decided."""
    whole = target.dense - target.predict(schedule.widths)
    share = min(1.0, (target.dense - target.limit) / whole) if whole > 0 else 0.0
    result = {}
    for name, width in schedule.widths.items():
        dense, left = len(target.costs[name]) - 1, len(stage.scores[name])
        # Of equal shares, 768 * (1 - 0.9) is 76.79999999999998 in floating point.
        asked = math.floor((dense - share * (dense - width)) / schedule.round_to + 1e-9) * schedule.round_to
        result[name] = left if share == 0 else min(left, max(asked, schedule.round_to))
    return result
