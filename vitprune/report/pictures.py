"""Figures on their way into a page, each as an image of its own."""

from __future__ import annotations

import io
import re
import tempfile
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from vitprune.errors import VitpruneError
from vitprune.figures.style import DOTS_PER_INCH, save_figure
from vitprune.report.page_blocks import Picture
from vitprune.report.thumbnails import embed

# Pixels: as wide as the page's column of text, at more than the density of a plain screen.
SCREEN_WIDTH = 1400
CSS_PIXELS_PER_INCH = 96


def embed_svg(content: str, *, id: str, caption: str) -> Picture:
    """Make a picture of an SVG file's text.

    Raises:
        VitpruneError: if it does not say how large it is, as matplotlib's do.
    """
    head = content[: content.find(">", content.find("<svg"))]
    sizes = [re.search(rf'\b{side}="([\d.]+)(pt|px|)"', head) for side in ("width", "height")]
    if not all(sizes):
        raise VitpruneError(f"{id}: not an SVG picture with a width and a height")
    width, height = (round(float(size[1]) * (CSS_PIXELS_PER_INCH / 72 if size[2] == "pt" else 1)) for size in sizes)
    return Picture(id, embed(content.encode(), "image/svg+xml"), width, height, caption)


def read_svg(path: Path, *, id: str, caption: str) -> Picture:
    """Make a picture of an SVG file.

    Raises:
        VitpruneError: if it is not there.
    """
    if not path.is_file():
        raise VitpruneError(f"{path.parent} has no {path.name}; write it again")
    return embed_svg(path.read_text(), id=id, caption=caption)


def read_photos(path: Path, *, id: str, caption: str) -> Picture:
    """Make a picture of a PNG file that shows photos: as JPEG, of a width for screens.

    Raises:
        VitpruneError: if it is not there.
    """
    if not path.is_file():
        raise VitpruneError(f"{path.parent} has no {path.name}; write it again")
    with Image.open(path) as image:
        scale, printed = min(1.0, SCREEN_WIDTH / image.width), image.size
        size = (round(image.width * scale), round(image.height * scale))
        small = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=85, optimize=True)
    # As large as it is printed, whatever its pixels.
    shown = tuple(round(side * CSS_PIXELS_PER_INCH / DOTS_PER_INCH) for side in printed)
    return Picture(id, embed(stream.getvalue(), "image/jpeg"), *shown, caption)


def embed_figure(figure: Figure, *, id: str, caption: str) -> Picture:
    """Make a picture of a figure that was just drawn."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figure.svg"
        save_figure(figure, path)
        return embed_svg(path.read_text(), id=id, caption=caption)
