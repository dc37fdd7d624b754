"""Picture: how many neurons of each FFN ever lie on a path."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from vitprune.errors import VitpruneError
from vitprune.figures.style import (
    COLOURS,
    COLUMN,
    PAGE,
    check_values,
    label_blocks,
    new_figure,
    styled,
)


@styled
def draw_utilisation(
    ffns: Sequence[str],
    num_neurons: Sequence[int],
    *,
    num_used: Sequence[int],
    effective: Sequence[float],
    title: str = "",
) -> Figure:
    """Draw distinct neurons (bars) and the effective number of neurons (line) of each FFN, as shares of its neurons.

    Args:
        ffns: L FFN names.
        num_neurons: L widths H.
        num_used: L counts of distinct neurons on paths, in [0, H].
        effective: L effective numbers, such as exp of the entropy of the visits; in [0, H].
        title: above the picture.

    Raises:
        VitpruneError: if there is no FFN, the lengths differ, or a count exceeds its FFN.
    """
    widths = check_values(num_neurons, "utilisation: num_neurons")
    used, effective = check_values(num_used, "utilisation: num_used"), check_values(effective, "utilisation: effective")
    if not len(ffns) == len(widths) == len(used) == len(effective):
        raise VitpruneError(
            f"utilisation: {len(ffns)} FFNs, but {len(widths)} widths, {len(used)} counts and {len(effective)} "
            "effective numbers"
        )
    beyond = np.flatnonzero((used > widths) | (effective > widths))
    if len(beyond):
        raise VitpruneError(f"utilisation: {ffns[beyond[0]]} has {widths[beyond[0]]:.0f} neurons, fewer than are used")
    width = COLUMN if len(ffns) <= 14 else PAGE
    figure = new_figure(width, 2.5, title=title)
    axes = figure.subplots()
    places = np.arange(len(ffns))
    bars = axes.bar(places, 100 * used / widths, 0.8, color=COLOURS[5], label="distinct neurons on paths")
    [line] = axes.plot(places, 100 * effective / widths, color="black", marker="o", markersize=3)
    line.set_label("effective number (by entropy)")
    axes.set_ylabel("share of neurons (%)")
    axes.set_xlim(-0.6, len(ffns) - 0.4)
    axes.set_ylim(bottom=0)
    axes.grid(axis="y")
    label_blocks(axes, ffns, width=width - 1)
    if len(set(widths)) == 1:
        other = axes.secondary_yaxis(
            "right", functions=(lambda share: share * widths[0] / 100, lambda count: 100 * count / widths[0])
        )
        other.set_ylabel(f"neurons (of {widths[0]:.0f})")
        other.spines["right"].set_visible(True)
    figure.legend(handles=[bars, line], loc="outside lower center", ncols=1 if width == COLUMN else 2)
    return figure
