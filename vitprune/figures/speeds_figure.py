"""Picture: what every speed costs, beside what is to be had without a budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from vitprune.errors import VitpruneError
from vitprune.figures.style import COLOURS, MARKERS, PAGE, check_values, new_figure, styled
from vitprune.options import BUDGET, DENSE, LEVERS


@styled
def draw_speeds(rows: Sequence[Any], *, title: str = "") -> Figure:
    """Draw top-1 against speed-up: a line for each format of what was pruned for a speed, marks for all else.

    Marks of 8 bits are filled, of float32 hollow.

    Args:
        rows: ``FrontRow`` values, at least one.
        title: above the picture.

    Raises:
        VitpruneError: if there is none, or a number is not finite.
    """
    if not rows:
        raise VitpruneError("front: no rows to draw")
    check_values([value for row in rows for value in (row.speedup, row.top1)], "front: speed-up and top-1")
    formats = list(dict.fromkeys((row.backend, row.precision) for row in rows))
    levers = [lever for lever in LEVERS if any(row.lever == lever for row in rows)]
    several = len({backend for backend, _precision in formats}) > 1
    figure = new_figure(PAGE, 4.2, title=title)
    axes = figure.subplots()
    for place, lever in enumerate(levers):
        colour, marker = ("black", "*") if lever == DENSE else (COLOURS[place - 1], MARKERS[place - 1])
        for backend, precision in formats:
            of_line = [row for row in rows if (row.lever, row.backend, row.precision) == (lever, backend, precision)]
            if not of_line:
                continue
            x = np.array([row.speedup for row in of_line])
            y = 100 * np.array([row.top1 for row in of_line])
            across = np.array(
                [[max(row.speedup - row.speedup_low, 0), max(row.speedup_high - row.speedup, 0)] for row in of_line]
            )
            label = ", ".join([LEVERS[lever], *([backend] if several else []), precision])
            is_ours = lever == BUDGET
            axes.errorbar(
                x,
                y,
                xerr=across.T,
                fmt=marker,
                color=colour,
                ecolor="0.7",
                elinewidth=0.6,
                markersize=8 if marker == "*" else 6 if is_ours else 4.5,
                markerfacecolor="white" if precision == "float32" else colour,
                linestyle=("--" if precision == "float32" else "-") if is_ours else "none",
                linewidth=1.4,
                label=label,
                zorder=4 if is_ours else 3,
            )
            if is_ours:
                # One interval for the eye: those of the other points are as wide.
                axes.fill_between(
                    x,
                    [100 * row.top1_low for row in of_line],
                    [100 * row.top1_high for row in of_line],
                    color=colour,
                    alpha=0.08,
                    linewidth=0,
                )
    axes.set_xlabel("speed-up over the dense float32 model (×), measured in one run")
    axes.set_ylabel("top-1 accuracy (%)")
    lowest = min((row.top1_low for row in rows if row.lever in (BUDGET, DENSE)), default=0)
    shown = [row for row in rows if row.top1 >= lowest - 0.05]
    axes.set_ylim(100 * min(lowest, *(row.top1 for row in shown)) - 1, None)
    # What is not shown would only make room.
    axes.set_xlim(min(row.speedup for row in shown) - 0.2, 1.02 * max(row.speedup_high for row in shown))
    hidden = len(rows) - len(shown)
    if hidden:
        axes.annotate(f"{hidden} below the picture", (0.01, 0.01), xycoords="axes fraction", fontsize=7, color="0.35")
    axes.grid()
    figure.legend(loc="outside lower center", ncols=2)
    return figure
