"""Picture: accuracy against speed or size, with the front of what nothing else beats in both."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox
from numpy.typing import ArrayLike

from vitprune.errors import VitpruneError
from vitprune.figures.style import COLOURS, MIDDLE, check_values, new_figure, shorten, styled
from vitprune.options import check_choice

# Where the name of a point may stand: how far away, in points, and on which side (right is 1, above is 1).
DISTANCES = (5, 14, 24, 36)
SIDES = ((1, 0), (0, 1), (-1, 0), (0, -1), (0.7, 0.7), (-0.7, 0.7), (0.7, -0.7), (-0.7, -0.7))


@dataclass(frozen=True)
class Quantity:
    """What accuracy is drawn against.

    Attributes:
        label: of the axis, with the unit.
        scale: units of the axis per unit of the values.
        higher_is_better: True for speed, False for cost.
    """

    label: str
    scale: float
    higher_is_better: bool


QUANTITIES: Mapping[str, Quantity] = {
    "speedup": Quantity("speed-up over the dense model (×)", 1, True),
    "images_per_second": Quantity("images per second", 1, True),
    "median_ms": Quantity("latency (ms)", 1, False),
    "num_parameters": Quantity("parameters (millions)", 1e-6, False),
    "macs": Quantity("multiply-accumulates per image (billions)", 1e-9, False),
    "size_bytes": Quantity("file size (MB)", 1e-6, False),
}


@dataclass(frozen=True)
class FrontPoint:
    """One model in a picture of accuracy against speed or size.

    Attributes:
        name: of the model.
        top1: accuracy, in [0, 1].
        top1_low, top1_high: its 95 % interval.
        value: speed or size, in the unit of the quantity: ratio, images/s, ms, count or bytes.
        low, high: its 95 % interval; None where it is exact.
    """

    name: str
    top1: float
    top1_low: float
    top1_high: float
    value: float
    low: float | None = None
    high: float | None = None


def pareto_front(points: Sequence[FrontPoint], *, higher_is_better: bool) -> list[int]:
    """Return the places of the points that no other point beats, in ascending order of their value.

    A point is beaten by one at least as good in both and better in one; of equal points the first counts.

    >>> points = [FrontPoint("a", 0.7, 0.6, 0.8, 1.0), FrontPoint("b", 0.6, 0.5, 0.7, 0.5)]
    >>> pareto_front(points, higher_is_better=True), pareto_front(points, higher_is_better=False)
    ([0], [1, 0])
    """
    sign = -1 if higher_is_better else 1
    front: list[int] = []
    for place in sorted(range(len(points)), key=lambda place: (sign * points[place].value, -points[place].top1)):
        if not front or points[place].top1 > points[front[-1]].top1:
            front.append(place)
    return front[::-1] if higher_is_better else front


@styled
def draw_front(points: Sequence[FrontPoint], *, quantity: str, title: str = "") -> Figure:
    """Draw top-1 against speed or size: models with intervals, and the front as steps.

    Filled points lie on the front. The line is the best accuracy to be had at that speed or size.

    Args:
        points: at least one.
        quantity: key of ``QUANTITIES``: what ``value`` is.
        title: above the picture.

    Raises:
        VitpruneError: if there is none, a number is not finite, or an interval does not hold its value.
    """
    check_choice("quantity", quantity, QUANTITIES)
    what = QUANTITIES[quantity]

    def read(values: Iterable[float], name: str, scale: float) -> np.ndarray:
        return scale * check_values(list(values), f"front: {name}")

    x = read((point.value for point in points), quantity, what.scale)
    low = read((point.value if point.low is None else point.low for point in points), quantity, what.scale)
    high = read((point.value if point.high is None else point.high for point in points), quantity, what.scale)
    y = read((point.top1 for point in points), "top1", 100)
    bottom = read((point.top1_low for point in points), "top1_low", 100)
    top = read((point.top1_high for point in points), "top1_high", 100)
    across, up = np.stack([x - low, high - x]), np.stack([y - bottom, top - y])
    # An interval may end at its value, and rounding then put it on either side.
    wrong = np.flatnonzero(((across < -1e-9 * np.abs(x)) | (up < -1e-9)).any(0))
    if len(wrong):
        raise VitpruneError(f"front: an interval of '{points[wrong[0]].name}' does not hold its value")
    front = pareto_front(points, higher_is_better=what.higher_is_better)
    behind = [place for place in range(len(points)) if place not in front]
    figure = new_figure(MIDDLE, 3.4, title=title)
    axes = figure.subplots()
    corners = _corners(x[front], y[front], higher_is_better=what.higher_is_better)
    axes.plot(*corners.T, color=COLOURS[0], linewidth=1.2, label="best to be had")
    axes.errorbar(x, y, xerr=across.clip(0), yerr=up.clip(0), fmt="none", ecolor="0.6", elinewidth=0.8)
    axes.plot(x[front], y[front], "o", color=COLOURS[0], markersize=5, label="on the front", zorder=4)
    if behind:
        hollow = {"color": "0.35", "markerfacecolor": "white", "markersize": 5}
        axes.plot(x[behind], y[behind], "o", label="beaten", zorder=3, **hollow)
    axes.set_xlabel(what.label)
    axes.set_ylabel("top-1 accuracy (%)")
    axes.margins(0.12)
    axes.grid()
    figure.legend(loc="outside lower center", ncols=3)
    lines = [((low[place], y[place]), (high[place], y[place])) for place in range(len(points))]
    lines += [((x[place], bottom[place]), (x[place], top[place])) for place in range(len(points))]
    lines += list(pairwise(corners))
    _label(axes, np.stack([x, y], 1)[front + behind], [points[place].name for place in front + behind], lines)
    return figure


def _corners(x: np.ndarray, y: np.ndarray, *, higher_is_better: bool) -> np.ndarray:
    """Return the corners [2n - 1, 2] of the steps: the best accuracy at least that fast, or at most that large."""
    corners = np.repeat(np.stack([x, y], 1), 2, axis=0)
    if higher_is_better:
        corners[1:-1:2, 1] = y[1:]
    else:
        corners[1:-1:2, 0] = x[1:]
    return corners[:-1]


def _label(axes: Axes, points: np.ndarray, names: Sequence[str], lines: Sequence[ArrayLike]) -> None:
    """Write names beside points, each where it hides least of what stands there; far ones get a thin line.

    Args:
        axes: with everything else drawn.
        points: [n, 2], in data units.
        names: n of them; the first choose first.
        lines: ends [2, 2] of level or upright lines, in data units, to keep clear of.
    """
    figure = axes.get_figure()
    figure.draw_without_rendering()  # the layout has to stand
    to_pixels, unit = axes.transData, figure.dpi / 72
    inside = axes.get_window_extent()
    middles = to_pixels.transform(points)
    taken = [Bbox([middle - 3.5 * unit, middle + 3.5 * unit]) for middle in middles]
    taken += [Bbox(np.sort(to_pixels.transform(ends), axis=0)).padded(unit) for ends in lines]
    labels: list[Bbox] = []
    for point, middle, name in zip(points, middles, names, strict=True):
        text = axes.text(*point, shorten(name, 30), fontsize=7)
        size = text.get_window_extent().size
        text.remove()
        costs = {}
        for distance, sides in product(DISTANCES, SIDES):
            box, leader = _place(middle, size, distance * unit, sides, unit)
            outside = size.prod() - _overlap(box, inside)
            hidden = sum(_overlap(box, other) for other in taken) + 5 * sum(_overlap(box, other) for other in labels)
            crossed = sum(label.contains(*spot) for label in labels for spot in leader)
            costs[distance, sides] = 10 * outside + hidden + (20 * crossed + distance) * unit**2
        distance, (across, up) = min(costs, key=costs.get)
        box, leader = _place(middle, size, distance * unit, (across, up), unit)
        labels.append(box)
        taken += [Bbox([spot - unit, spot + unit]) for spot in leader]
        axes.annotate(
            shorten(name, 30),
            point,
            xytext=(distance * across, distance * up),
            textcoords="offset points",
            ha=("right", "center", "left")[int(np.sign(across)) + 1],
            va=("top", "center", "bottom")[int(np.sign(up)) + 1],
            fontsize=7,
            arrowprops={"arrowstyle": "-", "linewidth": 0.5, "color": "0.4", "shrinkA": 0} if leader else None,
            in_layout=False,
            zorder=5,
        )


def _place(
    middle: np.ndarray, size: np.ndarray, away: float, sides: tuple[float, float], unit: float
) -> tuple[Bbox, list[np.ndarray]]:
    """Return the box of a text beside a point, and spots along the line between them, none where they are close."""
    towards = np.array(sides)
    low = middle + away * towards + size * (np.sign(towards) - 1) / 2
    lengths = np.arange(4 * unit, away, 2 * unit) if away > DISTANCES[0] * unit else []
    return Bbox([low, low + size]), [middle + length * towards for length in lengths]


def _overlap(first: Bbox, second: Bbox) -> float:
    common = Bbox.intersection(first, second)
    return 0.0 if common is None else common.width * common.height
