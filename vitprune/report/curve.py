"""Accuracy against pruning ratio, for several criteria and compensations over shared statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vitprune.data import Batches
from vitprune.discovery.criteria import REGISTRY, score_neurons
from vitprune.discovery.discover import Discovery
from vitprune.discovery.moments import measure_moments
from vitprune.evaluation.accuracy import Accuracy, compare, evaluate
from vitprune.feed_forward import find_feed_forwards
from vitprune.files import atomic_file
from vitprune.pruning.prune import apply_plan, plan_pruning


@dataclass(frozen=True)
class CurvePoint:
    """Accuracy of one pruned model.

    Attributes:
        criterion: how neurons were ranked.
        allocation: ``uniform`` or ``global``.
        compensation: ``none``, ``bias`` or ``ridge``.
        pruning_ratio: share of FFN neurons removed, in [0, 1).
        top1: accuracy on the evaluation images, in [0, 1].
        top1_interval: its 95 % interval.
        p_value: of the paired comparison with the dense model.
    """

    criterion: str
    allocation: str
    compensation: str
    pruning_ratio: float
    top1: float
    top1_interval: tuple[float, float]
    p_value: float


def measure_curve(
    model: nn.Module,
    calibration: Batches,
    evaluation: Batches,
    *,
    ratios: Sequence[float],
    criteria: Sequence[str],
    allocations: Sequence[str],
    compensations: Sequence[str],
    found: Discovery | None = None,
    seed: int = 0,
    track: Callable[[Sequence[Any]], Iterable[Any]] = iter,
) -> tuple[Accuracy, list[CurvePoint]]:
    """Prune at every combination and evaluate; scores and moments are measured once.

    Args:
        model: timm Vision Transformer in eval mode.
        calibration: images and labels that scores and compensation come from; readable more than once.
        evaluation: other images and labels; readable more than once.
        ratios: shares of FFN neurons to remove, each in [0, 1).
        criteria: keys of ``CRITERIA``.
        allocations: keys of ``ALLOCATIONS``.
        compensations: keys of ``COMPENSATIONS``.
        found: a discovery on this model, for criterion ``jas``.
        seed: of criterion ``random``.
        track: wraps the list of (criterion, allocation, ratio), for progress.

    Returns:
        The dense model's accuracy, and one point per combination.
    """
    dense = evaluate(model, evaluation)
    moments = None
    if set(compensations) - {"none"} or any("moments" in REGISTRY[criterion].needs for criterion in criteria):
        moments = measure_moments(model, find_feed_forwards(model), calibration)
    scores_of: dict[str, dict[str, Tensor]] = {}
    points = []
    for criterion, allocation, ratio in track(list(product(criteria, allocations, ratios))):
        if criterion not in scores_of:
            scores_of[criterion] = score_neurons(
                model, criterion, batches=calibration, found=found, moments=moments, seed=seed
            )
        plan = plan_pruning(
            model, scores_of[criterion], pruning_ratio=ratio, criterion=criterion, allocation=allocation
        )
        for compensation in compensations:
            accuracy = evaluate(apply_plan(model, plan, compensation=compensation, moments=moments), evaluation)
            p_value = compare(dense, accuracy).p_value
            measured = (plan.pruning_ratio, accuracy.top1, accuracy.top1_interval, p_value)
            points.append(CurvePoint(criterion, allocation, compensation, *measured))
    return dense, points


def render_curve(dense_top1: float, points: Sequence[CurvePoint], path: str | Path, *, title: str) -> None:
    """Draw top-1 accuracy against pruning ratio with 95 % intervals and write it as PNG or SVG.

    Colours are the criterion's (Okabe-Ito, safe for colour-blind readers), line styles the compensation's, markers the
    allocation's.
    """
    from matplotlib.figure import Figure

    colours = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
    styles = {"ridge": "-", "bias": "--", "none": ":"}
    lines: dict[tuple[str, str, str], list[CurvePoint]] = {}
    for point in points:
        lines.setdefault((point.criterion, point.allocation, point.compensation), []).append(point)
    several_allocations = len({key[1] for key in lines}) > 1
    criteria = list(dict.fromkeys(key[0] for key in lines))
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.axhline(100 * dense_top1, color="black", linewidth=1, label="dense")
    for (criterion, allocation, compensation), of_line in lines.items():
        of_line = sorted(of_line, key=lambda point: point.pruning_ratio)
        axes.errorbar(
            [100 * point.pruning_ratio for point in of_line],
            [100 * point.top1 for point in of_line],
            yerr=[
                [100 * (point.top1 - point.top1_interval[0]) for point in of_line],
                [100 * (point.top1_interval[1] - point.top1) for point in of_line],
            ],
            label=f"{criterion}, {compensation}" + (f", {allocation}" if several_allocations else ""),
            color=colours[criteria.index(criterion) % len(colours)],
            linestyle=styles[compensation],
            marker="o" if allocation == "global" else "s",
            markersize=3.5,
            capsize=2,
            linewidth=1.5,
        )
    axes.set_xlabel("FFN neurons removed (%)")
    axes.set_ylabel("top-1 accuracy (%)")
    lowest, highest = min(point.top1_interval[0] for point in points), max(point.top1_interval[1] for point in points)
    axes.set_ylim(max(0, 100 * lowest - 3), min(100, 100 * max(highest, dense_top1) + 3))
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8, title="criterion, compensation", title_fontsize=8)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=150, metadata={"Date": None} if str(path).endswith(".svg") else None)
