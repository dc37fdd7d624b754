"""Picture: what is left of the true class's probability when all but the best neurons are masked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from vitprune.errors import VitpruneError
from vitprune.figures.style import MIDDLE, PAGE, new_figure, styled
from vitprune.options import CLEAN, ONE_PLAN, ORACLE, TOKENS

KINDS = {ORACLE: "mask of the image's true class (oracle)", ONE_PLAN: "one mask for all images"}


@styled
def draw_topk_mask(rows: Sequence[Any], *, title: str = "") -> Figure:
    """Draw the mean probability of the true class: panels by mask and tokens, groups by K, bars by share masked.

    Args:
        rows: from ``measure_topk_mask``; the clean model's, and at least one other.
        title: above the picture.

    Raises:
        VitpruneError: if the clean row or all others are missing.

    Source:
        arXiv:2503.09046, figure of top-K pruning.
    """
    clean = next((row for row in rows if row.mask == CLEAN), None)
    masked = [row for row in rows if row.mask != CLEAN]
    if clean is None or not masked:
        raise VitpruneError("top-K mask: needs the clean model's row and at least one masked row")
    kinds = [kind for kind in KINDS if any(row.mask == kind for row in masked)]
    scopes = [tokens for tokens in TOKENS if any(row.tokens == tokens for row in masked)]
    top_ks = sorted({row.top_k for row in masked})
    shares = sorted({row.mask_share for row in masked})
    figure = new_figure(PAGE if len(kinds) > 1 else MIDDLE, 0.8 + 1.6 * len(scopes), title=title)
    panels = figure.subplots(len(scopes), len(kinds), sharex=True, sharey=True, squeeze=False)
    # From light to dark, so that the order of the shares also reads in grey.
    colours = colormaps["Blues"](np.linspace(0.25, 1, len(shares)))
    thickness = 0.84 / len(shares)
    for (row_of, column), panel in np.ndenumerate(panels):
        own = [row for row in masked if (row.tokens, row.mask) == (scopes[row_of], kinds[column])]
        for number, (share, colour) in enumerate(zip(shares, colours, strict=True)):
            bars = {row.top_k: 100 * row.probability for row in own if row.mask_share == share}
            places = [top_ks.index(top_k) + (number + 0.5) * thickness - 0.42 for top_k in bars]
            panel.bar(
                places,
                list(bars.values()),
                thickness,
                color=colour,
                edgecolor="black",
                linewidth=0.4,
                label=f"{share:.0%}",
            )
        panel.axhline(100 * clean.probability, color="black", linestyle="--", linewidth=1, label="clean model")
        panel.set_title(f"{KINDS[kinds[column]]}, {TOKENS[scopes[row_of]]}")
        panel.grid(axis="y")
    panels[0, 0].set_xticks(range(len(top_ks)), [str(top_k) for top_k in top_ks])
    for panel in panels[-1]:
        panel.set_xlabel("K, neurons per FFN that are never masked")
    for panel in panels[:, 0]:
        panel.set_ylabel("mean probability\nof the true class (%)")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    shown = dict(zip(labels, handles, strict=True))
    shown["clean model"] = shown.pop("clean model")
    masked_share = "share of the other neurons masked"
    figure.legend(shown.values(), shown, loc="outside lower center", ncols=len(shown), title=masked_share)
    return figure
