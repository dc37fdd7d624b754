"""Picture: the images that excite a neuron most."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike
from PIL import Image

from vitprune.figures.style import COLUMN, PAGE, check_values, new_figure, shorten, styled, write_number

NUM_COLUMNS = 6
# Enough for print at the width of a sixth of a page.
THUMBNAIL = 320
# The picture, what to call it (class or file), and the activation or score.
TopImage = tuple[Image.Image | ArrayLike, str, float]


@styled
def draw_top_images(images: Sequence[TopImage], *, title: str = "") -> Figure:
    """Draw images in the order given, each with its name and value below.

    Args:
        images: picture (PIL image, or array [height, width] or [height, width, 3] as matplotlib takes it: uint8, or
            float in [0, 1]), name, value.
        title: above the picture.

    Raises:
        VitpruneError: if there are none, or a value is not finite.
    """
    values = check_values([value for _picture, _name, value in images], "top images")
    num_columns = min(NUM_COLUMNS, len(images))
    num_rows = math.ceil(len(images) / num_columns)
    side = PAGE / NUM_COLUMNS
    # A single image still has room for a title.
    width = max(num_columns * side, COLUMN)
    figure = new_figure(width, num_rows * (side + 0.3) + (0.2 if title else 0), title=title)
    panels = figure.subplots(num_rows, num_columns, squeeze=False)
    for panel in panels.flat:
        panel.set_axis_off()
    for panel, (picture, name, _value), value in zip(panels.flat, images, values, strict=False):
        panel.imshow(_thumbnail(picture), cmap="gray", interpolation="antialiased")
        panel.text(
            0.5,
            -0.04,
            f"{shorten(name, 22)}\nactivation {write_number(value)}",
            transform=panel.transAxes,
            ha="center",
            va="top",
            fontsize=7,
        )
    return figure


def _thumbnail(picture: Image.Image | ArrayLike) -> np.ndarray:
    if not isinstance(picture, Image.Image):
        return np.asarray(picture)
    small = picture.copy() if picture.mode == "L" else picture.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    return np.asarray(small)
