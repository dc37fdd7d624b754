"""Picture: the paths of several classes side by side, and the neurons that they share.

Letters: L layers, K nodes per layer, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Outline
from scipy.cluster.hierarchy import leaves_list
from scipy.cluster.hierarchy import linkage as cluster
from scipy.spatial.distance import pdist

from vitprune.errors import VitpruneError
from vitprune.figures.style import COLOURS, MARKERS, PAGE, label_blocks, new_figure, shorten, styled

# Per FFN the neurons of a class, best first; an int64 [L, K] is one.
ClassPath = Sequence[Sequence[int]]
MAX_CLASSES = len(COLOURS)
# Height of a neuron's place, and of the gap between classes, in inches.
SLOT, GAP = 0.22, 0.1
# Between lines that meet in a neuron, in inches; ten of them still fit behind its number.
LINE_GAP = 0.02
# Where lines start and end, in FFNs before the first and after the last.
STUB = 0.6
# About what names of classes leave of the width.
AXES_WIDTH = 5.8


@dataclass(frozen=True)
class Node:
    """A neuron in the picture.

    Attributes:
        layer: position of its FFN.
        neuron: index in the FFN.
        classes: positions of the classes on whose paths it lies, ascending.
        height: where it stands, in inches below the top.
    """

    layer: int
    neuron: int
    classes: tuple[int, ...]
    height: float


@styled
def draw_paths(
    layers: Sequence[str],
    paths: Mapping[str, ClassPath],
    *,
    name_node: Callable[[str, int], str] = lambda _layer, node: str(node),
    sure: Mapping[str, Sequence[Sequence[bool]]] | None = None,
    title: str = "",
) -> Figure:
    """Draw one line per class from layer to layer; where classes share a neuron, their lines meet in its number.

    A line goes through the best neuron of each FFN; thin ones branch off to the others. Each class has rows of its
    own. A shared neuron stands in a row of one of its classes, the one nearest to the middle of them, so that no two
    neurons of an FFN stand in one place. Classes that share many neurons are neighbours.

    Args:
        layers: L names.
        paths: class name -> per layer its nodes, best first: int64 [L, K]; 2 to 10 classes.
        name_node: layer name and node -> what is written in a node that classes share.
        sure: class name -> [L, K]: whether the node is sure to be on the path; others are drawn hollow, and shared ones
            that are sure for no class in a dashed frame. None: nothing is known.
        title: above the picture.

    Raises:
        VitpruneError: if there are fewer or more classes, a path does not cover ``layers``, has no neuron in
            one, or names one twice.
    """
    if not 2 <= len(paths) <= MAX_CLASSES:
        raise VitpruneError(f"path picture: needs 2 to {MAX_CLASSES} classes, to tell them apart, got {len(paths)}")
    neurons = {name: [[int(neuron) for neuron in layer] for layer in path] for name, path in paths.items()}
    for name, path in neurons.items():
        if len(path) != len(layers):
            raise VitpruneError(f"path picture: the path of '{name}' covers {len(path)} layers, not {len(layers)}")
        if not all(path):
            raise VitpruneError(f"path picture: the path of '{name}' has no neuron in an FFN")
        if any(len(set(layer)) < len(layer) for layer in path):
            raise VitpruneError(f"path picture: the path of '{name}' names a neuron twice in an FFN")
    names = order_classes(neurons)
    digits = max(
        len(name_node(layer, neuron))
        for path in neurons.values()
        for layer, of_layer in zip(layers, path, strict=True)
        for neuron in of_layer
    )
    # Numbers side by side where there is room for them at 7 points, else turned.
    turned = 72 * AXES_WIDTH / (len(layers) + 0.5) < 5 * digits + 8
    slot = SLOT if not turned else max(SLOT, (5 * digits + 8) / 72)
    branches = any(len(layer) > 1 for path in neurons.values() for layer in path)
    nodes, rows = place_neurons([neurons[name] for name in names], slot=slot)
    height = rows[-1][-1] + slot
    figure = new_figure(PAGE, (0.9 + 0.3 * branches + 0.3 * (sure is not None)) + height, title=title)
    axes = figure.subplots()
    place_of = {name: place for place, name in enumerate(neurons)}
    surely = {
        (layer, neuron)
        for name, of_class in (sure or {}).items()
        for layer, (own, known) in enumerate(zip(neurons[name], of_class, strict=True))
        for neuron, is_sure in zip(own, known, strict=True)
        if is_sure
    }
    for row, name in enumerate(names):
        # Colours follow the order given, whatever the rows do.
        look = COLOURS[place_of[name]], MARKERS[place_of[name]]
        _draw_class(axes, neurons[name], nodes, row, rows[row][0], *look, sure=None if sure is None else sure[name])
    for node in nodes.values():
        if len(node.classes) > 1:
            axes.text(
                node.layer,
                node.height,
                name_node(layers[node.layer], node.neuron),
                ha="center",
                va="center",
                rotation=90 if turned else 0,
                fontsize=7,
                fontweight="bold",
                bbox={
                    "boxstyle": "round,pad=0.25",
                    "facecolor": "white",
                    "edgecolor": "black",
                    "linewidth": 0.8,
                    "linestyle": "-" if sure is None or (node.layer, node.neuron) in surely else (0, (2, 1.5)),
                },
                zorder=5,
            )
    axes.set_yticks([row[0] for row in rows], [shorten(name) for name in names])
    axes.set_ylim(height - slot / 2, -slot / 2)
    axes.set_xlim(-STUB, len(layers) - 1 + STUB)
    axes.tick_params(left=False)
    axes.spines["left"].set_visible(False)
    label_blocks(axes, layers, width=AXES_WIDTH)
    _explain(figure, branches=branches, with_sure=sure is not None)
    return figure


def order_classes(paths: Mapping[str, ClassPath]) -> list[str]:
    """Put classes that share many neurons beside each other (average linkage over the share not shared)."""
    names = list(paths)
    places = sorted({(layer, neuron) for path in paths.values() for layer, of in enumerate(path) for neuron in of})
    column_of = {place: column for column, place in enumerate(places)}
    on_path = np.zeros((len(names), len(places)), dtype=bool)
    for row, path in enumerate(paths.values()):
        on_path[row, [column_of[layer, neuron] for layer, of in enumerate(path) for neuron in of]] = True
    distances = pdist(on_path, "jaccard")
    return [names[place] for place in leaves_list(cluster(distances, "average", optimal_ordering=True))]


def place_neurons(paths: Sequence[ClassPath], *, slot: float) -> tuple[dict[tuple[int, int], Node], list[list[float]]]:
    """Give each neuron its place; no two of an FFN stand in the same.

    Args:
        paths: of the classes, from top to bottom.
        slot: inches between places.

    Returns:
        (layer, neuron) -> node, and per class the heights of its places, one per rank.
    """
    rows, top = [], 0.0
    for path in paths:
        num_ranks = max(map(len, path))
        rows.append([top + slot * rank for rank in range(num_ranks)])
        top = rows[-1][-1] + slot + GAP
    nodes = {}
    for layer in range(len(paths[0])):
        # A class's neuron of rank k may stand at its k-th place only, so that places never clash.
        places: dict[int, dict[int, float]] = {}
        for row, path in enumerate(paths):
            for rank, neuron in enumerate(path[layer]):
                places.setdefault(neuron, {})[row] = rows[row][rank]
        for neuron, by_class in places.items():
            middle = float(np.mean(list(by_class.values())))
            height = min(by_class.values(), key=lambda height, middle=middle: abs(height - middle))
            nodes[layer, neuron] = Node(layer, neuron, tuple(by_class), height)
    return nodes, rows


def _draw_class(
    axes: Axes,
    path: ClassPath,
    nodes: Mapping[tuple[int, int], Node],
    row: int,
    own_height: float,
    colour: str,
    marker: str,
    *,
    sure: Sequence[Sequence[bool]] | None,
) -> None:
    def height_in(node: Node) -> float:
        # Lines that meet stay beside each other.
        return node.height + LINE_GAP * (node.classes.index(row) - (len(node.classes) - 1) / 2)

    best = [height_in(nodes[layer, of[0]]) for layer, of in enumerate(path)]
    # From the class's name and back to its row.
    stops = [(-STUB, own_height), *enumerate(best), (len(path) - 1 + STUB, own_height)]
    for place in range(len(stops) - 1):
        _draw_curve(axes, stops[place], stops[place + 1], colour, linewidth=1.4)
        if 0 < place + 1 < len(stops) - 1:
            for neuron in path[place][1:]:
                end = (place, height_in(nodes[place, neuron]))
                _draw_curve(axes, stops[place], end, colour, linewidth=0.7)
    of_kind: dict[bool, list[tuple[int, float]]] = {True: [], False: []}
    for layer, of in enumerate(path):
        for rank, neuron in enumerate(of):
            node = nodes[layer, neuron]
            if len(node.classes) == 1:
                of_kind[sure is None or bool(sure[layer][rank])].append((node.layer, node.height))
    for is_sure, own in of_kind.items():
        axes.plot(
            [layer for layer, _height in own],
            [height for _layer, height in own],
            linestyle="",
            marker=marker,
            markersize=4.5,
            color=colour if is_sure else "white",
            markeredgecolor="white" if is_sure else colour,
            markeredgewidth=0.4 if is_sure else 0.9,
            zorder=4,
        )


def _draw_curve(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str, **line) -> None:
    middle = (start[0] + end[0]) / 2
    outline = Outline(
        [start, (middle, start[1]), (middle, end[1]), end],
        [Outline.MOVETO, Outline.CURVE4, Outline.CURVE4, Outline.CURVE4],
    )
    axes.add_patch(PathPatch(outline, fill=False, edgecolor=colour, zorder=2, **line))


def _explain(figure: Figure, *, branches: bool, with_sure: bool) -> None:
    handles = [
        Line2D([], [], color="0.3", marker="o", label="path of a class; a neuron of this class alone"),
        Line2D(
            [],
            [],
            linestyle="",
            marker="s",
            markersize=8,
            markerfacecolor="white",
            markeredgecolor="black",
            label="neuron on the paths of two or more classes, with its index",
        ),
    ]
    if branches:
        best = "the thick line goes through the best neuron of each FFN, thin ones lead to the others"
        handles.append(Line2D([], [], color="0.3", linewidth=0.7, label=best))
    if with_sure:
        unsure = "hollow or dashed: other images of the class may exchange it (on the path in less than 95 % of draws)"
        handles.append(Line2D([], [], color="white", marker="o", markeredgecolor="0.3", linestyle="", label=unsure))
    figure.legend(handles=handles, loc="outside lower center", ncols=1 if branches or with_sure else 2)
