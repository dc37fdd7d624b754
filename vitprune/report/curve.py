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


def render_curve(points: Sequence[CurvePoint], path: str | Path, *, title: str) -> None:
    """Draw top-1 accuracy against pruning ratio with 95 % intervals and write it as PNG or SVG.

    Colours are the criterion's (Okabe-Ito and others safe for colour-blind readers), line styles the compensation's,
    markers the allocation's.

    Args:
        points: the dense model's, drawn as a line, and at least one other.
        path: file to write.
        title: above the picture.
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
    several_allocations = len({key[1] for key in lines}) > 1
    criteria = list(dict.fromkeys(key[0] for key in lines))
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.axhline(100 * dense_top1, color="black", linewidth=1, label="dense")
    for (criterion, allocation, compensation, step), of_line in lines.items():
        of_line = sorted(of_line, key=lambda point: point.pruning_ratio)
        axes.errorbar(
            [100 * point.pruning_ratio for point in of_line],
            [100 * point.top1 for point in of_line],
            yerr=[
                [100 * (point.top1 - point.top1_low) for point in of_line],
                [100 * (point.top1_high - point.top1) for point in of_line],
            ],
            label=f"{criterion}, {compensation}"
            + (f", {allocation}" if several_allocations else "")
            + (", in steps" if step < 1 else ""),
            color=colours[criteria.index(criterion) % len(colours)],
            linestyle=styles.get(compensation, "-"),
            marker="D" if compensation == "distill" else "o" if allocation == "global" else "s",
            markersize=3.5,
            capsize=2,
            linewidth=1.5,
        )
    axes.set_xlabel("FFN neurons removed (%)")
    axes.set_ylabel("top-1 accuracy (%)")
    lowest, highest = min(point.top1_low for point in points), max(point.top1_high for point in points)
    axes.set_ylim(max(0, 100 * lowest - 3), min(100, 100 * max(highest, dense_top1) + 3))
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8, title="criterion, compensation", title_fontsize=8)
    # The salt makes the names inside an SVG file the same each time.
    with atomic_file(path) as temporary, rc_context({"svg.hashsalt": "vitprune"}):
        figure.savefig(temporary, dpi=150, metadata={"Date": None} if str(path).endswith(".svg") else None)
