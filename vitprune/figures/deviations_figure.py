"""Picture: how removing and doubling path neurons moves the true class's probability, by method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from vitprune.errors import VitpruneError
from vitprune.figures.style import (
    PAGE,
    check_values,
    method_colours,
    new_figure,
    order_methods,
    plain_numbers,
    styled,
)
from vitprune.options import TOKENS, check_choice

FACTORS = {0: "removed", 2: "doubled"}
# Above this many classes a cloud of points would hide its box.
MAX_POINTS = 60
# Percent. One class that the clean model hardly knew may grow a thousandfold: its axis is logarithmic beyond 100.
EXTREME = 500
Deviations = Mapping[str, Mapping[tuple[str, float], Sequence[float]]]


@styled
def draw_deviations(deviations: Deviations, *, title: str = "") -> Figure:
    """Draw boxes over classes: a row of panels per token scope, one panel for removal and one for doubling.

    Boxes reach from the first to the third quartile, whiskers to the last class within 1.5 times that; the line is the
    median. The axis is logarithmic beyond 100 % where a class changes by more than 500 %.

    Args:
        deviations: token scope (``cls``, ``patch``, ``all``) -> (method, factor) -> deviation of each class, ratio to
            clean - 1, in [-1, inf); factor 0 removes, 2 doubles.
        title: above the picture.

    Raises:
        VitpruneError: if there are none, one is not finite, or a scope or factor is unknown.
    """
    values = {}
    for tokens, of_scope in deviations.items():
        check_choice("tokens", tokens, TOKENS)
        for (method, factor), each in of_scope.items():
            if factor not in FACTORS:
                raise VitpruneError(f"deviations: factor must be 0 (removed) or 2 (doubled), got {factor:g}")
            values[tokens, method, factor] = 100 * check_values(each, f"deviations of {method}, {FACTORS[factor]}")
    if not values:
        raise VitpruneError("deviations: nothing to draw")
    methods = order_methods([method for _tokens, method, _factor in values])
    factors = [factor for factor in FACTORS if any(key[2] == factor for key in values)]
    scopes = [tokens for tokens in TOKENS if tokens in deviations]
    colours = method_colours(methods)
    figure = new_figure(PAGE, 1.1 + len(scopes) * (0.4 + 0.24 * len(methods)), title=title)
    panels = figure.subplots(len(scopes), len(factors), sharex="col", sharey=True, squeeze=False)
    for column, factor in enumerate(factors):
        largest = max(np.abs(each).max() for key, each in values.items() if key[2] == factor)
        for row, tokens in enumerate(scopes):
            panel = panels[row, column]
            own = [values.get((tokens, method, factor)) for method in methods]
            _draw_boxes(panel, own, [colours[method] for method in methods])
            panel.axvline(0, color="black", linewidth=0.8)
            panel.set_title(f"path neurons {FACTORS[factor]}, {TOKENS[tokens]}")
        unit = " (%)"
        if largest > EXTREME:
            panels[0, column].set_xscale("symlog", linthresh=100)
            plain_numbers(panels[0, column])
            unit = "\n(%, logarithmic beyond 100)"
        panels[-1, column].set_xlabel(f"change of the probability of the true class{unit}")
    panels[0, 0].set_yticks(range(len(methods)), methods)
    panels[0, 0].set_ylim(len(methods) - 0.4, -0.6)
    counts = sorted({len(each) for each in values.values()})
    classes = f"n = {counts[0]}" if len(counts) == 1 else f"n = {counts[0]} to {counts[-1]}"
    handles = [
        Line2D([], [], linestyle="", marker="o", markersize=2.2, color="0.3", label=f"a class ({classes})"),
        Patch(facecolor="0.75", edgecolor="0.3", label="quartiles, with the median"),
        Line2D([], [], color="0.3", linewidth=0.8, label="classes within 1.5 times their distance"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


def _draw_boxes(axes, groups: Sequence[np.ndarray | None], colours: Sequence[str]) -> None:
    for place, (values, colour) in enumerate(zip(groups, colours, strict=True)):
        if values is None:
            continue
        few = len(values) <= MAX_POINTS
        axes.boxplot(
            [values],
            positions=[place],
            widths=0.6,
            orientation="horizontal",
            patch_artist=True,
            showfliers=not few,
            manage_ticks=False,
            boxprops={"facecolor": colour, "alpha": 0.35, "linewidth": 0.8},
            medianprops={"color": "black", "linewidth": 1.5},
            whiskerprops={"linewidth": 0.8},
            capprops={"linewidth": 0.8},
            flierprops={"marker": "o", "markersize": 2, "markeredgewidth": 0.4},
        )
        if few:
            beside = place + np.linspace(-0.2, 0.2, len(values)) if len(values) > 1 else [place]
            axes.plot(values, beside, "o", markersize=2.2, markeredgewidth=0, color=colour)
    axes.grid(axis="x")
