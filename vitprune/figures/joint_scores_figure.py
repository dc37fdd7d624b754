"""Picture: the joint attribution score of the paths that each method finds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from vitprune.errors import VitpruneError
from vitprune.figures.style import (
    MIDDLE,
    check_values,
    method_colours,
    new_figure,
    order_methods,
    plain_numbers,
    styled,
    write_number,
)
from vitprune.intervals import Interval, mean_interval

# Methods whose medians differ by more need a logarithmic axis.
MAGNITUDES = 30


@styled
def draw_joint_scores(
    scores: Mapping[str, Sequence[float]], *, intervals: Mapping[str, Interval] | None = None, title: str = ""
) -> Figure:
    """Draw the joint attribution score by method: the mean with its 95 % interval over a box of all images.

    Boxes reach from the first to the third quartile, whiskers from the 5th to the 95th percentile. The axis is
    logarithmic where all values are positive and methods differ by more than a factor of 30.

    Args:
        scores: method -> joint score of each image; at least one.
        intervals: method -> mean to mark with its interval, such as over classes; None: over the images, as if they
            were independent.
        title: above the picture.

    Raises:
        VitpruneError: if there are none, one is not finite, or a method has no interval.
    """
    if not scores:
        raise VitpruneError("joint scores: nothing to draw")
    values = {method: check_values(scores[method], f"joint scores of {method}") for method in order_methods([*scores])}
    colours = method_colours([*values])
    figure = new_figure(MIDDLE, 0.8 + 0.3 * len(values), title=title)
    axes = figure.subplots()
    intervals = {method: mean_interval(each) for method, each in values.items()} if intervals is None else intervals
    missing = [method for method in values if method not in intervals]
    if missing:
        raise VitpruneError(f"joint scores: no interval for {missing[0]}")
    ends = {method: [end for end in (each.low, each.high) if end is not None] for method, each in intervals.items()}
    # An interval may reach below zero where no value does.
    reached = [np.append(each, [intervals[method].mean, *ends[method]]) for method, each in values.items()]
    logarithmic = _spans_magnitudes(reached)
    if logarithmic:
        axes.set_xscale("log")
        plain_numbers(axes)
    texts = []
    for place, (method, each) in enumerate(values.items()):
        axes.boxplot(
            [each],
            positions=[place],
            widths=0.62,
            whis=(5, 95),
            orientation="horizontal",
            patch_artist=True,
            showfliers=False,
            manage_ticks=False,
            boxprops={"facecolor": colours[method], "alpha": 0.35, "linewidth": 0.8},
            medianprops={"color": colours[method], "linewidth": 1.2},
            whiskerprops={"linewidth": 0.8},
            capprops={"linewidth": 0.8},
        )
        mean, interval = intervals[method].mean, ""
        if ends[method]:
            axes.plot(ends[method], [place, place], color="black", linewidth=1.8, solid_capstyle="butt", zorder=4)
            interval = f" [{', '.join(map(write_number, ends[method]))}]"
        axes.plot(mean, place, "D", color="black", markersize=4, markeredgecolor="white", zorder=5)
        texts.append(write_number(mean) + interval)
    if not logarithmic:
        axes.axvline(0, color="black", linewidth=0.8)
    axes.grid(axis="x")
    axes.set_xlabel("joint attribution score of a path" + (" (logarithmic)" if logarithmic else ""))
    axes.set_yticks(range(len(values)), values)
    axes.set_ylim(len(values) - 0.4, -0.6)
    beside = axes.secondary_yaxis("right")
    beside.set_yticks(range(len(values)), texts)
    beside.tick_params(length=0)
    beside.spines["right"].set_visible(False)
    counts = sorted({len(each) for each in values.values()})
    count = f"n = {counts[0]}" if len(counts) == 1 else f"n = {counts[0]} to {counts[-1]}"
    handles = [
        Line2D([], [], color="black", marker="D", markersize=4, linewidth=1.8, label="mean, 95 % interval"),
        Patch(facecolor="0.75", edgecolor="black", linewidth=0.8, label=f"quartiles, 5th to 95th percentile ({count})"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return figure


def _spans_magnitudes(groups: Sequence[np.ndarray]) -> bool:
    if min(group.min() for group in groups) <= 0:
        return False
    sizes = [float(np.median(group)) for group in groups]
    return max(sizes) > MAGNITUDES * min(sizes)
