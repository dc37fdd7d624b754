"""Picture: which neurons lie on the paths of a class, FFN by FFN."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from vitprune.discovery.discover import Discovery, class_paths
from vitprune.errors import VitpruneError
from vitprune.figures.style import COLOURS, COLUMN, PAGE, label_blocks, new_figure, shorten, styled

# Fewer images than this show no density.
MIN_IMAGES = 5
# More points than this make an SVG file of many megabytes.
MAX_VECTOR_POINTS = 5000


@styled
def draw_violins(found: Discovery, classes: Mapping[int, str], *, title: str = "") -> Figure:
    """Draw the neurons on the paths of each class: a panel per class, a violin per FFN, a point per image and neuron.

    All K neurons of an image count. Neurons have no natural order: a violin shows whether the images of a class agree,
    not that neighbouring neurons do the same thing. With fewer than 5 images of a class its points stand alone.

    Args:
        found: paths of images.
        classes: class index -> name, in the order of the panels.
        title: above the picture.

    Raises:
        VitpruneError: if ``classes`` is empty, or one has no image in ``found``.

    Source:
        arXiv:2503.09046, figure of the neurons of a class; the points and the class's path are ours.
    """
    if not classes:
        raise VitpruneError("violins: no classes to draw")
    absent = [index for index in classes if index not in found.classes]
    if absent:
        raise VitpruneError(f"violins: class {absent[0]} ({classes[absent[0]]}) has no image in the run")
    paths = class_paths(found)
    narrow = len(found.layers) <= 16
    num_columns = 2 if len(classes) > 3 and narrow else 1
    num_rows = math.ceil(len(classes) / num_columns)
    width = COLUMN if narrow and num_columns == 1 else PAGE
    figure = new_figure(width, (0.8 if width == PAGE else 1.1) + 1.2 * num_rows, title=title)
    panels = figure.subplots(num_rows, num_columns, sharex=True, sharey=True, squeeze=False)
    for panel, (place, (index, name)) in zip(panels.flat, enumerate(classes.items()), strict=False):
        neurons_ILK = found.neurons[found.labels == index].numpy()
        _draw_class(panel, neurons_ILK, paths[index].numpy(), COLOURS[place % len(COLOURS)])
        num_images = len(neurons_ILK)
        panel.set_title(f"{shorten(name, 28)} ({num_images} image{'s' if num_images > 1 else ''})")
    for panel in panels.flat[len(classes) :]:
        panel.remove()
    for column in range(num_columns):
        lowest = panels[(len(classes) - 1 - column) // num_columns, column]
        lowest.tick_params(labelbottom=True)
        label_blocks(lowest, found.layers, width=(width - 0.8) / num_columns)
    largest = max(scores.shape[1] for scores in found.class_scores.values())
    panels[0, 0].set_ylim(-0.03 * largest, 1.03 * largest)
    figure.supylabel("neuron index", fontsize=8)
    handles = [
        Line2D([], [], color="0.3", marker="o", markersize=2.8, linestyle="", label="neuron on the path of an image"),
        Line2D([], [], color="black", linewidth=1, label="path of the class (most frequent)"),
    ]
    if any(int((found.labels == index).sum()) >= MIN_IMAGES for index in classes):
        handles.insert(1, Patch(facecolor="0.75", edgecolor="0.5", label="density over images"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3 if width == PAGE else 1)
    return figure


def _draw_class(panel, neurons_ILK: np.ndarray, path_LK: np.ndarray, colour: str) -> None:
    num_images, num_ffns, top_k = neurons_ILK.shape
    if num_images >= MIN_IMAGES:
        columns = [neurons_ILK[:, layer].ravel() for layer in range(num_ffns)]
        bodies = panel.violinplot(columns, range(num_ffns), widths=0.85, showextrema=False)["bodies"]
        for body in bodies:
            body.set(facecolor=colour, edgecolor=colour, alpha=0.3, linewidth=0.5)
    # Beside each other, so that images that agree show as a row.
    beside = np.linspace(-0.3, 0.3, num_images) if num_images > 1 else np.zeros(1)
    places = np.arange(num_ffns)[None, :, None] + beside[:, None, None]
    panel.plot(
        np.broadcast_to(places, neurons_ILK.shape).ravel(),
        neurons_ILK.ravel(),
        linestyle="",
        marker="o",
        markersize=2.8 if num_images <= 50 else 1.5,
        markeredgewidth=0.3 if num_images <= 50 else 0,
        markeredgecolor="white",
        color=colour,
        zorder=3,
        rasterized=neurons_ILK.size > MAX_VECTOR_POINTS,
    )
    layers = np.repeat(np.arange(num_ffns), top_k)
    panel.hlines(path_LK.ravel(), layers - 0.46, layers + 0.46, color="black", linewidth=1)
    panel.grid(axis="y")
