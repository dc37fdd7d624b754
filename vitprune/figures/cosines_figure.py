"""Picture: how near embeddings of two models are, image by image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from vitprune.figures.style import COLOURS, PAGE, check_values, new_figure, styled


@styled
def draw_cosines(cosines: Sequence[float], *, title: str = "") -> Figure:
    """Draw how many images have which cosine; lines mark their mean and what nine of ten have at least.

    Args:
        cosines: of each image, at least one, in [-1, 1].
        title: above the picture.

    Raises:
        VitpruneError: if there are none, or one is not finite.
    """
    values = check_values(cosines, "cosines")
    figure = new_figure(PAGE, 2.4, title=title)
    axes = figure.subplots()
    axes.hist(values, bins=min(40, max(5, len(values) // 5)), color=COLOURS[0])
    marks = {"mean": (values.mean(), "-"), "nine of ten have more": (np.quantile(values, 0.1), "--")}
    for label, (place, style) in marks.items():
        axes.axvline(place, color="black", linestyle=style, linewidth=1.2, label=f"{label}: {place:.3f}")
    axes.set_xlabel("cosine of an image's two embeddings")
    axes.set_ylabel("images")
    axes.legend(loc="upper left")
    axes.grid(axis="y")
    return figure
