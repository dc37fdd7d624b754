"""Picture: which layers of the class paths feed which."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from vitprune.errors import VitpruneError
from vitprune.figures.style import MIDDLE, name_blocks, new_figure, styled


@styled
def draw_edges(layers: Sequence[str], strength: Sequence[Sequence[float]], *, title: str = "") -> Figure:
    """Draw the mean size of an edge from one layer (row) to another (column).

    Args:
        layers: L names.
        strength: [L][L], not negative; 0 but above the diagonal.
        title: above the picture.

    Raises:
        VitpruneError: if there are fewer than two layers, or the matrix is of another size.
    """
    values = np.asarray(strength, dtype=float)
    if len(layers) < 2 or values.shape != (len(layers), len(layers)):
        raise VitpruneError(f"edges: needs two layers and a square of their number, got {values.shape}")
    figure = new_figure(MIDDLE, 0.8 * MIDDLE, title=title)
    axes = figure.subplots()
    shown = np.ma.masked_where(np.tril(np.ones_like(values, dtype=bool)), values)
    image = axes.imshow(shown, cmap="Blues", vmin=0)
    names = name_blocks(layers)
    step = 1 if len(names) <= 14 else 2
    axes.set_xticks(range(0, len(names), step), names[::step], rotation=90 if len(names) > 14 else 0)
    axes.set_yticks(range(0, len(names), step), names[::step])
    explained = " (a: its attention)" if any(name.endswith("a") for name in names) else ""
    axes.set_xlabel(f"to block{explained}")
    axes.set_ylabel("from block")
    figure.colorbar(image, ax=axes, label="mean size of an edge", shrink=0.8)
    return figure
