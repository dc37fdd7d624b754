"""Accuracy against size, for many ways to prune over shared statistics; resumable."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from torch import nn

from vitprune.calibration.criteria import Scores, check_needs
from vitprune.data import Batches, hash_images
from vitprune.discovery.discover import Discovery
from vitprune.entry import entry
from vitprune.errors import VitpruneError
from vitprune.evaluation.accuracy import (
    Accuracy,
    accuracy_as_json,
    accuracy_from_json,
    compare,
    drop_bound,
    evaluate,
)
from vitprune.files import read_json, write_json
from vitprune.models.macs import measure_sizes
from vitprune.models.units import find_groups
from vitprune.options import ALLOCATIONS, CRITERIA, DEFAULT_STEP, DENSE, check_choice
from vitprune.progress import Track, untracked
from vitprune.pruning.compensations import REGISTRY as COMPENSATIONS
from vitprune.pruning.compensations import check_compensation, needed_statistics
from vitprune.pruning.plan import Plan
from vitprune.pruning.prune import apply_in
from vitprune.pruning.schedule import Schedule, Stage, advance, finish, first_stage, list_stops, needs_steps
from vitprune.pruning.session import Session
from vitprune.pruning.target import Target, target_neurons
from vitprune.seen_images import check_unseen, files_of
from vitprune.sharing import told_by_first

SEARCH_GRID, SEARCH_PRECISION = 0.1, 0.01


@dataclass(frozen=True)
class CurvePoint:
    """Accuracy and size of one pruned model, beside the dense model.

    Attributes:
        criterion: how neurons were ranked; ``dense`` for the dense model.
        allocation: ``uniform`` or ``global``.
        compensation: key of ``COMPENSATIONS``.
        step: share that went between two rankings.
        pruning_ratio: share of FFN neurons removed, in [0, 1).
        num_parameters: of the pruned model.
        macs: multiply-accumulates of one image.
        size_bytes: of the weights, as stored.
        top1: accuracy on the evaluation images, in [0, 1].
        top1_low: lower end of its 95 % Wilson interval.
        top1_high: upper end.
        drop: top-1 of the dense model minus this one's.
        drop_bound: 95 % upper bound of the drop, paired.
        p_value: of the paired comparison with the dense model (McNemar).
        num_images: evaluated.
    """

    criterion: str
    allocation: str
    compensation: str
    step: float
    pruning_ratio: float
    num_parameters: int
    macs: int
    size_bytes: int
    top1: float
    top1_low: float
    top1_high: float
    drop: float
    drop_bound: float
    p_value: float
    num_images: int


@dataclass(frozen=True)
class Curve:
    """What to prune and how, and where finished points are kept.

    Attributes:
        criteria: keys of ``CRITERIA``.
        allocations: keys of ``ALLOCATIONS``.
        compensations: keys of ``COMPENSATIONS``.
        step: share that goes between two rankings, in (0, 1]; 1 ranks once.
        seed: of everything drawn at random.
        folder: where finished points are written and found again; None keeps them in memory alone.
    """

    criteria: Sequence[str]
    allocations: Sequence[str]
    compensations: Sequence[str]
    step: float = DEFAULT_STEP
    seed: int = 0
    folder: Path | None = None

    def schedule(self, criterion: str, allocation: str, compensation: str) -> Schedule:
        """Return the schedule of one combination."""
        return Schedule(criterion, allocation, COMPENSATIONS[compensation].bridge)


@entry
def measure_curve(
    model: nn.Module,
    calibration: Batches,
    evaluation: Batches,
    curve: Curve,
    *,
    ratios: Sequence[float],
    found: Discovery | None = None,
    scores: Mapping[str, Scores] | None = None,
    track: Track = untracked,
) -> list[CurvePoint]:
    """Prune at every combination of ratio, criterion, allocation and compensation, and evaluate.

    Statistics of the dense model are measured once for all criteria, and schedules of several steps are walked once for
    all ratios.

    Args:
        model: timm Vision Transformer in eval mode.
        calibration: images and labels that scores and compensation come from; readable more than once.
        evaluation: other images and labels; readable more than once.
        curve: what to combine.
        ratios: shares of FFN neurons to remove, each in [0, 1).
        found: a discovery on this model, for criterion ``jas``.
        scores: criterion -> scores of the dense model, for criteria that were computed elsewhere; used in one step.
        track: wraps (points, description), for progress.

    Returns:
        The dense model's point first, then one per combination.

    Raises:
        VitpruneError: if an argument is out of range or images are missing.
    """
    _check(model, curve, calibration, evaluation, found)
    targets = [target_neurons(model, ratio) for ratio in sorted(set(ratios))]
    course = _Course(model, calibration, evaluation, curve, found)
    points = [course.dense_point()]
    combinations = list(product(curve.criteria, curve.allocations, targets))
    walks: dict[tuple[str, str, str], _Walk] = {}
    for criterion, allocation, target in track(combinations, "curve"):
        for compensation in curve.compensations:
            schedule = curve.schedule(criterion, allocation, compensation)
            key = (criterion, allocation, schedule.bridge)
            if key not in walks:
                # Combinations come criterion by criterion: the models of an earlier one are not needed again.
                walks = {known: walk for known, walk in walks.items() if known[:2] == key[:2]}
                walks[key] = _Walk(course, schedule, (scores or {}).get(criterion))
            points.append(course.point(walks[key], compensation, target))
    return points


@entry
def find_largest_ratio(
    model: nn.Module,
    calibration: Batches,
    evaluation: Batches,
    curve: Curve,
    *,
    max_drop: float,
    found: Discovery | None = None,
    track: Track = untracked,
) -> tuple[float, list[CurvePoint]]:
    """Find the largest pruning ratio whose accuracy loss stays below a budget at 95 % confidence.

    Ratios 0.1, 0.2 .. are tried until one fails; bisection then narrows the last step down to 0.01. The first
    criterion, allocation and compensation of ``curve`` are used. Every ratio tried is tested at 95 % by itself, so the
    answer leans on the same images a few times: check it on others before relying on it.

    Args:
        model: timm Vision Transformer in eval mode.
        calibration: images and labels that scores and compensation come from; readable more than once.
        evaluation: other images and labels; readable more than once.
        curve: how to prune.
        found: a discovery on this model, for criterion ``jas``.
        track: wraps (points, description), for progress.
        max_drop: of top-1, in (0, 1); the 95 % paired upper bound of the drop must not exceed it.

    Returns:
        The ratio (0 where even 0.01 fails), and the points tried, the dense model's first.

    Raises:
        VitpruneError: if an argument is out of range.
    """
    if not 0 < max_drop < 1:
        raise VitpruneError(f"max_drop must be in (0, 1), got {max_drop}")
    _check(model, curve, calibration, evaluation, found)
    course = _Course(model, calibration, evaluation, curve, found)
    compensation = curve.compensations[0]
    walk = _Walk(course, curve.schedule(curve.criteria[0], curve.allocations[0], compensation))
    points = [course.dense_point()]

    def holds(ratio: float) -> bool:
        points.append(course.point(walk, compensation, target_neurons(model, ratio)))
        return points[-1].drop_bound <= max_drop

    low, high = 0, round(1 / SEARCH_PRECISION)
    for tenth in track(range(1, round(1 / SEARCH_GRID)), "find the largest ratio"):
        if not holds(round(tenth * SEARCH_GRID, 6)):
            high = round(tenth * SEARCH_GRID / SEARCH_PRECISION)
            break
        low = round(tenth * SEARCH_GRID / SEARCH_PRECISION)
    while high - low > 1 and high < round(1 / SEARCH_PRECISION):
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle * SEARCH_PRECISION) else (low, middle)
    return round(low * SEARCH_PRECISION, 6), points


def _check(model: nn.Module, curve: Curve, calibration: Batches, evaluation: Batches, found: Discovery | None) -> None:
    for criterion in curve.criteria:
        check_choice("criterion", criterion, CRITERIA)
        check_needs(model, criterion, batches=calibration, found=found)
    for allocation in curve.allocations:
        check_choice("allocation", allocation, ALLOCATIONS)
    for compensation in curve.compensations:
        check_compensation(compensation, has_images=calibration is not None)
    list_stops(0.5, curve.step)
    images, calibrated = files_of(evaluation), files_of(calibration)
    if images is not None and calibrated is not None:
        check_unseen(images, hash_images(calibrated))


class _Course:
    """What all points of a curve share; finished points are read back rather than measured again."""

    def __init__(
        self, model: nn.Module, calibration: Batches, evaluation: Batches, curve: Curve, found: Discovery | None
    ) -> None:
        self.evaluation, self.curve = evaluation, curve
        wanted = needed_statistics(criteria=curve.criteria, compensations=curve.compensations, bridged=True)
        self.session = Session(model, calibration, found=found, wanted=wanted, seed=curve.seed)
        self.dense, self.size = self._evaluated(DENSE, lambda: model)

    def dense_point(self) -> CurvePoint:
        return self._point((DENSE, "", "none"), 1.0, 0.0, self.dense, self.size)

    def point(self, walk: _Walk, compensation: str, target: Target) -> CurvePoint:
        schedule = walk.schedule
        name = f"{schedule.criterion}-{schedule.allocation}-{compensation}-{target.share:.6f}"
        accuracy, size = self._evaluated(
            name, lambda: apply_in(self.session, walk.plan(target), compensation=compensation)
        )
        ratio = size["pruning_ratio"]
        return self._point((schedule.criterion, schedule.allocation, compensation), walk.step, ratio, accuracy, size)

    def _point(
        self, names: tuple[str, str, str], step: float, ratio: float, accuracy: Accuracy, size: Mapping[str, Any]
    ):
        return CurvePoint(
            *names,
            step=step,
            pruning_ratio=ratio,
            num_parameters=size["num_parameters"],
            macs=size["macs"],
            size_bytes=size["size_bytes"],
            top1=accuracy.top1,
            top1_low=accuracy.top1_interval[0],
            top1_high=accuracy.top1_interval[1],
            drop=self.dense.top1 - accuracy.top1,
            drop_bound=drop_bound(self.dense, accuracy),
            p_value=compare(self.dense, accuracy).p_value,
            num_images=accuracy.num_images,
        )

    def _evaluated(self, name: str, make: Callable[[], nn.Module]) -> tuple[Accuracy, Mapping[str, Any]]:
        path = None if self.curve.folder is None else self.curve.folder / f"{name}.json"
        finished = path is not None and path.is_file()
        content = told_by_first(read_json(path, kind="curve point") if finished else None)
        if content is not None:
            return accuracy_from_json(content["accuracy"]), content["size"]
        pruned = make()
        accuracy = evaluate(pruned, self.evaluation)
        neurons, dense = (
            sum(group.num_units for group in groups) for groups in (find_groups(pruned), self.session.groups)
        )
        size = {**asdict(measure_sizes(pruned)), "pruning_ratio": 1 - neurons / dense}
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            content = {"kind": "curve point", "version": 1, "accuracy": accuracy_as_json(accuracy), "size": size}
            write_json(path, content)
        return accuracy, size


class _Walk:
    """A schedule walked once for rising ratios, one stop after another."""

    def __init__(self, course: _Course, schedule: Schedule, scores: Scores | None = None) -> None:
        self.session, self.schedule, self.scores = course.session, schedule, scores
        self.step = course.curve.step if needs_steps(schedule.criterion) and scores is None else 1.0
        self.current = self.session
        self.stage: Stage | None = None

    def plan(self, target: Target) -> Plan:
        stops = list_stops(target.share, self.step)
        if self.stage is None or self.stage.number > len(stops) - 1:
            self.current = self.session
            self.stage = first_stage(self.session, self.schedule, scores=self.scores)
        while self.stage.number < len(stops) - 1:
            part = target.partly(stops[self.stage.number])
            self.current, self.stage = advance(self.current, self.stage, part, self.schedule)
        return finish(self.session, self.stage, target, self.schedule)


def parse_ratios(texts: Sequence[str]) -> list[float]:
    """Read ratios and ranges FIRST:LAST:STEP, both ends included.

    Raises:
        VitpruneError: naming the text that is neither, or a number outside [0, 1).

    >>> parse_ratios(["0.05", "0.1:0.3:0.1"])
    [0.05, 0.1, 0.2, 0.3]
    """
    ratios = parse_numbers("ratios", texts)
    bad = [ratio for ratio in ratios if not 0 <= ratio < 1]
    if bad:
        raise VitpruneError(f"ratios must be in [0, 1), got {bad[0]}")
    return ratios


def parse_numbers(what: str, texts: Sequence[str]) -> list[float]:
    """Read numbers and ranges FIRST:LAST:STEP, both ends included; ascending, each once.

    Args:
        what: they are, for messages.
        texts: one number or range each.

    Raises:
        VitpruneError: naming the text that is neither.

    >>> parse_numbers("speedups", ["3", "1.25:1.75:0.25"])
    [1.25, 1.5, 1.75, 3.0]
    """
    numbers: list[float] = []
    for text in texts:
        try:
            parts = [float(part) for part in text.split(":")]
        except ValueError as error:
            raise VitpruneError(f"{what}: '{text}' is no number and no FIRST:LAST:STEP") from error
        if len(parts) == 1:
            numbers.append(parts[0])
        elif len(parts) == 3 and parts[2] > 0 and parts[0] <= parts[1]:
            numbers += list(_count_up(*parts))
        else:
            raise VitpruneError(f"{what}: '{text}' is no number and no FIRST:LAST:STEP")
    return sorted(set(numbers))


def _count_up(first: float, last: float, step: float) -> Iterator[float]:
    for number in range(int((last - first) / step + 1e-9) + 1):
        yield round(first + number * step, 12)
