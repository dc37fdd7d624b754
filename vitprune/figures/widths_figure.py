"""Picture: how many neurons of each FFN plans keep."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from vitprune.errors import VitpruneError
from vitprune.figures.style import (
    COLOURS,
    COLUMN,
    HATCHES,
    MARKERS,
    PAGE,
    label_blocks,
    new_figure,
    styled,
)

# FFN name -> neurons kept, neurons of the dense model.
Widths = Mapping[str, tuple[int, int]]
# Bars of more plans would be too thin to tell apart.
MAX_BARS = 3


@styled
def draw_widths(plans: Mapping[str, Widths], *, title: str = "") -> Figure:
    """Draw the neurons that each plan keeps, FFN by FFN, below the dense model's: bars, or lines for many plans.

    Args:
        plans: name of a plan -> FFN name -> (kept, dense); the same FFNs and dense widths in each.
        title: above the picture.

    Raises:
        VitpruneError: if there is no plan or FFN, or plans are not of the same model.
    """
    first_name, first = next(iter(plans.items()), ("", {}))
    if not first:
        raise VitpruneError("kept width: no plan to draw")
    ffns = list(first)
    dense = [of_ffn[1] for of_ffn in first.values()]
    for name, plan in plans.items():
        if {ffn: of_ffn[1] for ffn, of_ffn in plan.items()} != dict(zip(ffns, dense, strict=True)):
            raise VitpruneError(f"kept width: plans '{first_name}' and '{name}' are not of the same dense model")
        beyond = [ffn for ffn, (kept, whole) in plan.items() if not 0 <= kept <= whole]
        if beyond:
            raise VitpruneError(
                f"kept width: '{name}' keeps {plan[beyond[0]][0]} of {plan[beyond[0]][1]} in {beyond[0]}"
            )
    width = COLUMN if len(ffns) * min(len(plans), MAX_BARS) <= 24 else PAGE
    figure = new_figure(width, 2.2 + 0.12 * len(plans), title=title)
    axes = figure.subplots()
    places = np.arange(len(ffns))
    axes.stairs(dense, np.arange(len(ffns) + 1) - 0.5, color="black", linestyle="--", baseline=None, label="dense")
    for number, (name, plan) in enumerate(plans.items()):
        kept = [plan[ffn][0] for ffn in ffns]
        label = f"{name} (keeps {sum(kept) / max(1, sum(dense)):.1%})"
        colour = COLOURS[number % len(COLOURS)]
        if len(plans) <= MAX_BARS:
            thickness = 0.8 / len(plans)
            beside = (number + 0.5) * thickness - 0.4
            axes.bar(
                places + beside, kept, thickness, color=colour, edgecolor="white", hatch=HATCHES[number], label=label
            )
        else:
            axes.plot(places, kept, color=colour, marker=MARKERS[number % len(MARKERS)], label=label)
    axes.set_ylabel("neurons kept")
    axes.set_xlim(-0.6, len(ffns) - 0.4)
    axes.set_ylim(0, 1.05 * max(dense))
    axes.grid(axis="y")
    label_blocks(axes, ffns, width=width - 0.8)
    figure.legend(loc="outside lower center", ncols=1 if width == COLUMN else 3)
    return figure
