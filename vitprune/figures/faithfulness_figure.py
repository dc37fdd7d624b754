"""Picture: what the best neurons carry by themselves, and what is left without them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from vitprune.errors import VitpruneError
from vitprune.figures.style import COLOURS, MARKERS, PAGE, new_figure, styled
from vitprune.options import TOKENS

SIDES = {"kept": "only the best kept", "removed": "only the best ablated"}
# Solid by class, dashed by image, dotted for all alike.
DASHES = {"class": "-", "image": "--", "all": ":"}


@styled
def draw_faithfulness(rows: Sequence[Any], *, title: str = "") -> Figure:
    """Draw the mean probability of the true class against the share of neurons: a row of panels per ablation.

    Args:
        rows: from ``measure_faithfulness``.
        title: above the picture.

    Raises:
        VitpruneError: if there are none, or more methods than colours.
    """
    if not rows:
        raise VitpruneError("faithfulness: no rows to draw")
    methods = list(dict.fromkeys(row.method for row in rows))
    if len(methods) > len(COLOURS):
        raise VitpruneError(f"faithfulness: {len(methods)} methods cannot be told apart, at most {len(COLOURS)}")
    settings = list(dict.fromkeys((row.tokens, row.ablation) for row in rows))
    figure = new_figure(PAGE, 0.9 + 1.9 * len(settings), title=title)
    panels = figure.subplots(len(settings), len(SIDES), sharex=True, sharey=True, squeeze=False)
    lines = {}
    for (row_of, column), panel in np.ndenumerate(panels):
        tokens, ablation = settings[row_of]
        side = list(SIDES)[column]
        own = [row for row in rows if (row.tokens, row.ablation) == (tokens, ablation)]
        for row in own:
            place = methods.index(row.method)
            inner = slice(1, -1)
            (line,) = panel.plot(
                [100 * share for share in row.shares[inner]],
                [100 * value for value in getattr(row, side)[inner]],
                color=COLOURS[place],
                marker=MARKERS[place],
                markersize=3,
                linewidth=1,
                linestyle=DASHES[row.ranked],
            )
            lines[f"{row.method} ({'each image' if row.ranked == 'image' else row.ranked})"] = line
        ends = {"undisturbed": own[0].kept[-1], "all ablated": own[0].kept[0]}
        for (name, value), look in zip(ends.items(), ("--", ":"), strict=True):
            lines.setdefault(name, panel.axhline(100 * value, color="black", linestyle=look, linewidth=0.8))
            panel.axhline(100 * value, color="black", linestyle=look, linewidth=0.8)
        panel.set_title(f"{SIDES[side]}: {ablation}, {TOKENS[tokens]}")
        panel.set_xscale("log")
        panel.grid(axis="y")
    for panel in panels[-1]:
        panel.set_xlabel("share of the neurons of every layer (%)")
        panel.xaxis.set_major_formatter(lambda value, _position: f"{value:g}")
    for panel in panels[:, 0]:
        panel.set_ylabel("mean probability\nof the true class (%)")
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=4)
    return figure
