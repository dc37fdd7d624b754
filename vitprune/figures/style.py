"""One look for all pictures: sizes for print, colours safe for colour-blind readers, files that repeat exactly."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from vitprune.errors import VitpruneError
from vitprune.files import atomic_file
from vitprune.options import METHODS

# Inches: one column of a paper (8.5 cm), one and a half, and the width of its text (17.5 cm).
COLUMN, MIDDLE, PAGE = 3.35, 5.0, 6.9
# Okabe-Ito, then three that stay apart from them.
COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
    "#7F7F7F",
    "#882255",
    "#999933",
)
GREY = "#999999"
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p")
HATCHES = ("", "////", "....", "\\\\\\\\", "xxxx", "----")
# Lightness alone orders it, so that it also reads in grey.
SEQUENTIAL = "cividis"
STYLE = {
    "font.size": 8,
    "figure.titlesize": 9,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.title_fontsize": 7,
    "legend.frameon": False,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "grid.linewidth": 0.5,
    "grid.alpha": 0.3,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "hatch.linewidth": 0.5,
    # The salt makes the names inside an SVG file the same each time.
    "svg.hashsalt": "vitprune",
}
DOTS_PER_INCH = 300
_SUFFIXES = (".png", ".svg")

# Decorates a function that draws; settings are back as they were when it returns.
styled = rc_context(STYLE)


def new_figure(width: float, height: float, *, title: str = "") -> Figure:
    """Return an empty figure of that many inches that makes room for what stands outside the axes."""
    figure = Figure(figsize=(width, height), layout="constrained")
    if title:
        figure.suptitle(title)
    return figure


@styled
def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG (300 dots per inch) or SVG, whichever ``path`` ends in; the same figure, the same bytes.

    Raises:
        VitpruneError: if ``path`` ends in something else.
    """
    suffix = Path(path).suffix
    if suffix not in _SUFFIXES:
        raise VitpruneError(f"{path}: pictures are written as {' or '.join(_SUFFIXES)}, not as '{suffix}'")
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=DOTS_PER_INCH, metadata={"Date": None} if suffix == ".svg" else None)


def check_values(values: ArrayLike, what: str) -> np.ndarray:
    """Return numbers to be drawn as float64, of any shape.

    Raises:
        VitpruneError: if there are none, or one is not finite: a picture would leave it out without a word.
    """
    array = np.asarray(values, dtype=np.float64)
    if not array.size:
        raise VitpruneError(f"{what}: nothing to draw")
    if not np.isfinite(array).all():
        wrong = int((~np.isfinite(array)).sum())
        raise VitpruneError(f"{what}: {wrong} of {array.size} values are not finite; leave them out")
    return array


def method_colours(methods: Sequence[str]) -> dict[str, str]:
    """Give each way to find paths its colour, the same in every picture.

    >>> method_colours(["activation", "jas"]) == method_colours(["jas", "activation"])
    True
    """
    ordered = list(dict.fromkeys([*METHODS, *methods]))
    return {method: COLOURS[ordered.index(method) % len(COLOURS)] for method in methods}


def order_methods(methods: Sequence[str]) -> list[str]:
    """Put ways to find paths in the order of ``METHODS``, unknown ones last.

    >>> order_methods(["random", "activation", "jas", "activation"])
    ['jas', 'activation', 'random']
    """
    known = [*METHODS]
    return sorted(dict.fromkeys(methods), key=lambda method: known.index(method) if method in known else len(known))


def shorten(name: str, length: int = 24) -> str:
    """Cut a name that is longer than ``length`` characters.

    >>> shorten("cassette player", 9)
    'cassette…'
    """
    return name if len(name) <= length else name[: length - 1].rstrip() + "…"


def write_number(value: float) -> str:
    """Write three digits, with a minus sign as long as the plus sign's.

    >>> write_number(-0.0012345)
    '−0.00123'
    """
    return f"{value:.3g}".replace("-", "−")


def name_blocks(ffns: Sequence[str]) -> list[str]:
    """Return what an axis calls layers: the numbers in their names where those tell them apart, else the names.

    Attention beside the FFN of its block has an ``a`` behind its number.

    >>> name_blocks(["blocks.0.mlp", "blocks.1.mlp"]), name_blocks(["layers.0.blocks.1.mlp", "layers.1.blocks.1.mlp"])
    (['0', '1'], ['0.1', '1.1'])
    >>> name_blocks(["blocks.0.attn", "blocks.0.mlp"])
    ['0a', '0']
    """
    numbers = [".".join(re.findall(r"\d+", name)) for name in ffns]
    if len(set(numbers)) < len(ffns):
        numbers = [number + ("a" if name.endswith(".attn") else "") for number, name in zip(numbers, ffns, strict=True)]
    return numbers if all(numbers) and len(set(numbers)) == len(ffns) else list(ffns)


def label_blocks(axes: Axes, ffns: Sequence[str], *, width: float) -> None:
    """Write FFNs, at 0, 1, .., under an axis of ``width`` inches: as many as stand there side by side."""
    names = name_blocks(ffns)
    points_per_name = 5 * max(map(len, names)) + 3
    step = math.ceil(points_per_name * len(names) / (72 * width))
    axes.set_xticks(range(0, len(names), step), names[::step])
    axes.set_xlabel("block (a: its attention)" if any(name.endswith("a") for name in names) else "block")


def plain_numbers(axes: Axes) -> None:
    """Write the numbers of a logarithmic x axis out: as powers they would have exponents too small to read."""
    axes.xaxis.set_major_formatter(lambda value, _position: f"{value:g}".replace("-", "−"))
