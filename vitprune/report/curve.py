"""Pictures and tables of accuracy against size."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

from vitprune.evaluation.curve import CurvePoint
from vitprune.files import atomic_file


def write_table(points: Sequence[CurvePoint], path: str | Path) -> None:
    """Write the points to a CSV file, one row each, in the order given."""
    with atomic_file(path) as temporary, temporary.open("w", newline="") as stream:
        table = csv.DictWriter(stream, [field.name for field in fields(CurvePoint)], lineterminator="\n")
        table.writeheader()
        table.writerows(map(asdict, points))


def render_curve(points: Sequence[CurvePoint], path: str | Path, *, title: str, max_drop: float | None = None) -> None:
    """Draw top-1 accuracy against pruning ratio with 95 % intervals and write it as PNG or SVG.

    Colours are the criterion's (Okabe-Ito and others safe for colour-blind readers), line styles the compensation's,
    markers the allocation's.

    Args:
        points: the dense model's, drawn as a line, and at least one other.
        path: file to write.
        title: above the picture.
        max_drop: draw this budget of top-1 below the dense line.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    colours = (
        "#0072B2",
        "#D55E00",
        "#009E73",
        "#CC79A7",
        "#E69F00",
        "#56B4E9",
        "#000000",
        "#7F7F7F",
        "#882255",
        "#999933",
    )
    styles = {"none": ":", "bias": "-.", "ridge": "--", "sequential-ffn": (0, (6, 1))}
    dense_top1 = next(point.top1 for point in points if point.criterion == "dense")
    points = [point for point in points if point.criterion != "dense"]
    lines: dict[tuple[str, str, str, float], list[CurvePoint]] = {}
    for point in points:
        lines.setdefault((point.criterion, point.allocation, point.compensation, point.step), []).append(point)
    named = [position for position in range(3) if len({key[position] for key in lines}) > 1] or [0]
    criteria = list(dict.fromkeys(key[0] for key in lines))
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.axhline(100 * dense_top1, color="black", linewidth=1, label="dense")
    if max_drop is not None:
        axes.axhline(100 * (dense_top1 - max_drop), color="black", linewidth=1, linestyle=":", label="budget")
    for place, (key, of_line) in enumerate(lines.items()):
        criterion, allocation, compensation, step = key
        of_line = sorted(of_line, key=lambda point: point.pruning_ratio)
        ratios = [100 * point.pruning_ratio for point in of_line]
        colour = colours[criteria.index(criterion) % len(colours)]
        axes.plot(
            ratios,
            [100 * point.top1 for point in of_line],
            label=", ".join(key[position] for position in named) + (", in steps" if step < 1 else ""),
            color=colour,
            linestyle=styles.get(compensation, "-"),
            marker="D" if compensation == "distill" else "o" if allocation == "global" else "s",
            markersize=3.5,
            linewidth=1.5,
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
    lowest = min(lowest, dense_top1 - (max_drop or 0))
    axes.set_ylim(max(0, 100 * lowest - 3), min(100, 100 * max(highest, dense_top1) + 3))
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    legend_title = ", ".join(("criterion", "allocation", "compensation")[position] for position in named)
    figure.legend(loc="outside right upper", fontsize=8, title=legend_title, title_fontsize=8, handlelength=3)
    # The salt makes the names inside an SVG file the same each time.
    with atomic_file(path) as temporary, rc_context({"svg.hashsalt": "vitprune"}):
        figure.savefig(temporary, dpi=150, metadata={"Date": None} if str(path).endswith(".svg") else None)
