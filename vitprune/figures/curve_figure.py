"""Picture: accuracy against the share of neurons removed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from vitprune.errors import VitpruneError
from vitprune.figures.style import COLOURS, MARKERS, PAGE, new_figure, styled
from vitprune.options import DENSE

LINES = {
    "none": ":",
    "bias": "-.",
    "ridge": "--",
    "sequential-ffn": (0, (6, 1)),
    "distill": (0, (4, 1, 1, 1, 1, 1)),
}


@styled
def draw_curve(points: Sequence[Any], *, title: str = "", max_drop: float | None = None) -> Figure:
    """Draw top-1 accuracy against pruning ratio with 95 % intervals.

    Colours and markers are the criterion's, line styles the compensation's; markers are hollow for uniform allocation.

    Args:
        points: ``CurvePoint``: the dense model's, drawn as a line, and at least one other.
        title: above the picture.
        max_drop: draw this budget of top-1 below the dense line.

    Raises:
        VitpruneError: if the dense point or all others are missing.
    """
    dense = next((point for point in points if point.criterion == DENSE), None)
    points = [point for point in points if point.criterion != DENSE]
    if dense is None or not points:
        raise VitpruneError("curve: needs the dense model's point and at least one other")
    lines: dict[tuple[str, str, str, float], list[Any]] = {}
    for point in points:
        lines.setdefault((point.criterion, point.allocation, point.compensation, point.step), []).append(point)
    named = [position for position in range(3) if len({key[position] for key in lines}) > 1] or [0]
    criteria = list(dict.fromkeys(key[0] for key in lines))
    figure = new_figure(PAGE, 3.5)
    axes = figure.subplots()
    axes.set_title(title, fontsize=9)
    axes.axhline(100 * dense.top1, color="black", linewidth=1, label="dense")
    if max_drop is not None:
        axes.axhline(100 * (dense.top1 - max_drop), color="black", linewidth=1, linestyle=":", label="budget")
    for place, (key, of_line) in enumerate(lines.items()):
        criterion, allocation, compensation, step = key
        of_line = sorted(of_line, key=lambda point: point.pruning_ratio)
        ratios = [100 * point.pruning_ratio for point in of_line]
        colour = COLOURS[criteria.index(criterion) % len(COLOURS)]
        axes.plot(
            ratios,
            [100 * point.top1 for point in of_line],
            label=", ".join(key[position] for position in named) + (", in steps" if step < 1 else ""),
            color=colour,
            linestyle=LINES.get(compensation, "-"),
            marker=MARKERS[criteria.index(criterion) % len(MARKERS)],
            markerfacecolor=colour if allocation == "global" else "white",
        )
        # Beside each other, or the intervals of one ratio would hide one another.
        beside = min(0.3, 1.5 / len(lines)) * (place - (len(lines) - 1) / 2)
        axes.vlines(
            [ratio + beside for ratio in ratios],
            [100 * point.top1_low for point in of_line],
            [100 * point.top1_high for point in of_line],
            color=colour,
            linewidth=1,
            alpha=0.6,
        )
    axes.set_xlabel("FFN neurons removed (%)")
    axes.set_ylabel("top-1 accuracy (%)")
    lowest, highest = min(point.top1_low for point in points), max(point.top1_high for point in points)
    lowest = min(lowest, dense.top1 - (max_drop or 0))
    axes.set_ylim(max(0, 100 * lowest - 3), min(100, 100 * max(highest, dense.top1) + 3))
    axes.grid()
    legend_title = ", ".join(("criterion", "allocation", "compensation")[position] for position in named)
    figure.legend(loc="outside right upper", title=legend_title, handlelength=3)
    return figure
