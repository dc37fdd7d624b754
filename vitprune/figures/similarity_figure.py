"""Picture: how alike the paths of classes are, as a heat map beside the tree of their clustering."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy.typing import ArrayLike
from scipy.cluster.hierarchy import is_valid_linkage, leaves_list

from vitprune.errors import VitpruneError
from vitprune.figures.style import PAGE, SEQUENTIAL, check_values, new_figure, shorten, styled

# Rows that can be named, and cells that can hold a number, at 7 points on the width of a page.
MAX_NAMES, MAX_TEXTS = 48, 12
# Stems of more leaves than this run together.
MAX_STEMS = 200


@styled
def draw_similarity(
    matrix: ArrayLike,
    linkage: ArrayLike,
    *,
    names: Sequence[str],
    title: str = "",
) -> Figure:
    """Draw class-by-class similarities in the order of a hierarchical clustering, its tree on top.

    Up to 48 classes are named, of more every n-th; up to 12 have their numbers in the cells. A diagonal of ones stays
    blank, and the colours span the other cells.

    Args:
        matrix: [C, C], symmetric, C at least 2.
        linkage: [C - 1, 4], as SciPy's ``linkage`` returns it.
        names: of the C classes.
        title: above the picture.

    Raises:
        VitpruneError: if the shapes do not fit, or a value is not finite.
    """
    matrix = check_values(matrix, "similarity")
    num_classes = len(matrix)
    if num_classes < 2 or matrix.shape != (num_classes, num_classes) or len(names) != num_classes:
        raise VitpruneError(
            f"similarity needs [C, C] values and C names of at least 2 classes, got {list(matrix.shape)} and "
            f"{len(names)} names"
        )
    linkage = check_values(linkage, "similarity: linkage")
    if not is_valid_linkage(linkage) or len(linkage) != num_classes - 1:
        raise VitpruneError(f"similarity: linkage {list(linkage.shape)} is no clustering of {num_classes} classes")
    order = leaves_list(linkage)
    shown = matrix[np.ix_(order, order)].copy()
    diagonal = np.eye(num_classes, dtype=bool)
    if np.allclose(shown[diagonal], 1, rtol=0, atol=1e-6):
        shown[diagonal] = np.nan
    low, high = np.nanmin(shown), np.nanmax(shown)
    # One value alone has no scale of its own.
    norm = Normalize(low, high) if high - low > 1e-9 else Normalize(min(0, low), max(1, high))
    labels = [shorten(names[place]) for place in order]
    # Inches of a side of the heat map, and of the longest name.
    side, margin = min(5.1, max(2.2, 0.36 * num_classes)), 0.065 * max(map(len, labels))
    tree_height = max(0.7, 0.2 * side)
    upright = 72 * side / num_classes > 4.5 * max(map(len, labels))
    below = 0.2 if num_classes > MAX_TEXTS or upright else margin
    figure = new_figure(min(PAGE, side + margin + 0.9), side + tree_height + below + 0.3, title=title)
    figure.get_layout_engine().set(h_pad=0.02, hspace=0)
    tree, heat = figure.subplots(2, 1, sharex=True, height_ratios=(tree_height, side))
    _draw_tree(tree, linkage, order)
    colours = colormaps[SEQUENTIAL].with_extremes(bad="0.92")
    image = heat.imshow(shown, cmap=colours, norm=norm, aspect="auto", interpolation="nearest")
    bar = figure.colorbar(image, ax=heat, label="cosine similarity", fraction=0.05, pad=0.02, aspect=30)
    bar.outline.set_visible(False)
    heat.spines[:].set_visible(False)
    heat.tick_params(length=0 if num_classes <= MAX_NAMES else 2)
    step = math.ceil(num_classes / MAX_NAMES)
    heat.set_yticks(range(0, num_classes, step), labels[::step])
    if num_classes <= MAX_TEXTS:
        heat.set_xticks(range(num_classes), labels, rotation=0 if upright else 90)
    else:
        heat.set_xticks([])
        named = "in the same order" if step == 1 else f"one in {step} is named"
        heat.set_xlabel(f"{num_classes:,} classes, {named}")
    if num_classes <= MAX_TEXTS:
        for (row, column), value in np.ndenumerate(shown):
            text = "1" if np.isnan(value) else f"{value:.2f}"
            dark = not np.isnan(value) and norm(value) < 0.6
            heat.text(column, row, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")
    return figure


def _draw_tree(axes, linkage: np.ndarray, order: np.ndarray) -> None:
    """Draw the merges over leaves at 0, 1, ..; SciPy's own drawing recurses, and fails where 1,000 classes chain."""
    num_leaves = len(order)
    middles, heights = np.empty(2 * num_leaves - 1), np.zeros(2 * num_leaves - 1)
    middles[order] = np.arange(num_leaves)
    lowest, highest = linkage[:, 2].min(), linkage[:, 2].max()
    # The stems below the first merge say nothing.
    many = num_leaves > MAX_STEMS
    below = (0.05 if many else 0.3) * (highest - lowest)
    bottom = max(0.0, lowest - below) if lowest < highest else 0.0
    branches = []
    for node, (left, right, height, _count) in enumerate(linkage, start=num_leaves):
        ends = [int(left), int(right)]
        (start, stop), lows = middles[ends], heights[ends]
        for side in range(2):
            if many and ends[side] < num_leaves:
                lows[side] = height - 0.03 * (highest - bottom)
        branches.append([(start, lows[0]), (start, height), (stop, height), (stop, lows[1])])
        middles[node], heights[node] = (start + stop) / 2, height
    axes.add_collection(LineCollection(branches, colors="black", linewidths=0.3 if many else 0.7))
    axes.set_ylim(bottom, highest + 0.05 * (highest - bottom) if highest > bottom else bottom + 1)
    axes.set_ylabel("distance")
    axes.tick_params(bottom=False, labelbottom=False)
    axes.spines["bottom"].set_visible(False)
