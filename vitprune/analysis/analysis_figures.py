"""The figures of an analysis: what each shows, and how it is drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from vitprune.analysis.analysis_folder import FIGURES_FOLDER, Analysis
from vitprune.analysis.faithfulness import FaithfulnessRow
from vitprune.analysis.manipulation import MANIPULATIONS, WHOSE
from vitprune.analysis.stability import measure_stability
from vitprune.analysis.topk_mask import TopKRow
from vitprune.data import ImageSet, describe_class
from vitprune.discovery.discover import class_paths
from vitprune.discovery.heads import node_names
from vitprune.discovery.run import Run
from vitprune.figures.deviations_figure import FACTORS, draw_deviations
from vitprune.figures.edges_figure import draw_edges
from vitprune.figures.faithfulness_figure import draw_faithfulness
from vitprune.figures.joint_scores_figure import draw_joint_scores
from vitprune.figures.path_figure import draw_paths
from vitprune.figures.similarity_figure import draw_similarity
from vitprune.figures.style import save_figure
from vitprune.figures.top_images_figure import draw_top_images
from vitprune.figures.topk_mask_figure import draw_topk_mask
from vitprune.figures.utilisation_figure import draw_utilisation
from vitprune.figures.violins_figure import draw_violins
from vitprune.images.decode import read_image
from vitprune.intervals import Interval
from vitprune.options import ORACLE
from vitprune.progress import Track, untracked

# A picture of paths, and a violin per class, stay legible up to here.
MOST_CLASSES_DRAWN = 10
# What is drawn of the analysed runs, by name.
Draw = Callable[[Mapping[str, Run]], Figure]


@dataclass(frozen=True)
class AnalysisFigure:
    """A figure of an analysis.

    Attributes:
        stem: of its files, below ``figures/``.
        title: what it shows.
        caption: how to read it.
        draw: runs that were analysed -> figure.
        of_photos: it shows photos, and is written as PNG alone.
        of_run: it shows the first run as it is, whatever the experiments gave.
    """

    stem: str
    title: str
    caption: str
    draw: Draw
    of_photos: bool = False
    of_run: bool = False

    @property
    def files(self) -> tuple[str, ...]:
        """Names of its files."""
        return tuple(f"{self.stem}.{suffix}" for suffix in (("png",) if self.of_photos else ("svg", "png")))


def analysis_figures(analysis: Analysis) -> tuple[AnalysisFigure, ...]:
    """Return the figures of an analysis, in the order of its experiments."""
    made = [make(analysis) for experiment, make in _FIGURES_OF.items() if experiment in analysis.results]
    return tuple(figure for figures in made for figure in figures)


def save_analysis_figures(
    analysis: Analysis, folder: str | Path, *, runs: Mapping[str, Run], track: Track = untracked
) -> None:
    """Draw the figures of an analysis into ``figures`` of its folder.

    Args:
        analysis: what was found.
        folder: of the analysis.
        runs: that ``analyze`` was given; figures show their paths and images.
        track: wraps (items, description), for progress.

    Raises:
        VitpruneError: if an image that a figure shows is no longer where the runs found it.
    """
    figures = Path(folder) / FIGURES_FOLDER
    figures.mkdir(parents=True, exist_ok=True)
    for figure in track(analysis_figures(analysis), "figures"):
        drawn = figure.draw(runs)
        for name in figure.files:
            save_figure(drawn, figures / name)


def _score_figures(analysis: Analysis) -> list[AnalysisFigure]:
    def draw(runs: Mapping[str, Run]) -> Figure:
        intervals = {row["method"]: Interval(**row["joint_score"]) for row in analysis.results["scores"]}
        return draw_joint_scores({name: run.found.joint_scores for name, run in runs.items()}, intervals=intervals)

    title = "Joint attribution score by method"
    return [AnalysisFigure("joint_scores", title, "Higher is better; intervals by class.", draw)]


def _deviation_figures(analysis: Analysis, *, experiment: str) -> list[AnalysisFigure]:
    rows_of: dict[str, list[Mapping[str, Any]]] = {}
    for row in analysis.results[experiment]:
        if row["factor"] in FACTORS:
            rows_of.setdefault(row["paths"], []).append(row)

    def draw(_runs: Mapping[str, Run], *, whose: str) -> Figure:
        deviations: dict[str, dict[tuple[str, float], list[float]]] = {}
        for row in rows_of[whose]:
            deviations.setdefault(row["tokens"], {})[row["method"], row["factor"]] = list(row["by_class"].values())
        return draw_deviations(deviations, title=WHOSE[whose])

    return [
        AnalysisFigure(
            f"deviations_{whose.replace(' ', '_')}",
            f"Path neurons removed and doubled: {WHOSE[whose]}",
            "Change of the true class's probability; a box holds one value per class.",
            partial(draw, whose=whose),
        )
        for whose in rows_of
    ]


def _similarity_figures(analysis: Analysis) -> list[AnalysisFigure]:
    names = {index: describe_class(name) for index, name in analysis.class_names.items()}
    method = analysis.runs[0].method
    similarity = analysis.results["similarity"][method]

    def draw_classes(runs: Mapping[str, Run], *, of: str) -> Figure:
        classes = [names[index] for index in _first(runs).found.classes]
        return draw_similarity(analysis.cosines[of], linkage=similarity[of]["linkage"], names=classes)

    def draw_used(runs: Mapping[str, Run]) -> Figure:
        rows = similarity["utilisation"]
        return draw_utilisation(
            _first(runs).found.layers,
            num_neurons=[row["num_neurons"] for row in rows],
            num_used=[row["num_visited"] for row in rows],
            effective=[row["effective_neurons"] for row in rows],
        )

    def drawn_classes(runs: Mapping[str, Run]) -> dict[int, str]:
        return {index: names[index] for index in _first(runs).found.classes[:MOST_CLASSES_DRAWN]}

    def draw_agreement(runs: Mapping[str, Run]) -> Figure:
        return draw_violins(_first(runs).found, classes=drawn_classes(runs))

    def draw_class_paths(runs: Mapping[str, Run]) -> Figure:
        found = _first(runs).found
        paths = class_paths(found)
        drawn = {name: paths[index] for index, name in drawn_classes(runs).items()}
        shown = drawn_classes(runs)
        stability = measure_stability(found, classes=list(shown))
        sure = {name: stability.sure(index).tolist() for index, name in shown.items()}
        return draw_paths(found.layers, drawn, name_node=node_names(found), sure=sure)

    figures = [
        AnalysisFigure(
            f"class_similarity_{of}",
            f"Similarity of classes by {what}",
            "Cosine of every two classes, in the order of the tree (average linkage).",
            partial(draw_classes, of=of),
        )
        for of, what in (("visits", "neurons visited"), ("scores", "mean scores"))
        if of in similarity
    ]
    figures += [
        AnalysisFigure(
            "utilisation", "Neurons that ever lie on a path", f"By FFN, paths of {method}.", draw_used, of_run=True
        ),
        AnalysisFigure(
            "violins",
            "Path neurons by FFN and class",
            "One point per image: how much a class agrees.",
            draw_agreement,
            of_run=True,
        ),
    ]
    if "visits" in similarity:
        caption = "One neuron per FFN and class; shared ones are named."
        figures.append(AnalysisFigure("class_paths", "Class paths", caption, draw_class_paths, of_run=True))
    return figures


def _top_image_figures(analysis: Analysis) -> list[AnalysisFigure]:
    names = {index: describe_class(name) for index, name in analysis.class_names.items()}
    found = analysis.results["top_images"]

    def draw(runs: Mapping[str, Run], *, neuron: Mapping[str, Any]) -> Figure:
        return draw_top_images(_open_images(neuron, _first(runs).images, names))

    return [
        AnalysisFigure(
            f"top_images_{position}",
            f"Images that excite neuron {neuron['neuron']} of {neuron['ffn']} most",
            f"Activation at tokens '{found['tokens']}', images of the run.",
            partial(draw, neuron=neuron),
            of_photos=True,
        )
        for position, neuron in enumerate(found["neurons"])
    ]


def _edge_figures(analysis: Analysis) -> list[AnalysisFigure]:
    edges = analysis.results["edges"]

    def draw(_runs: Mapping[str, Run]) -> Figure:
        return draw_edges(edges["layers"], edges["strength"])

    caption = "Mean size of an edge between the nodes of class paths, over the classes."
    return [AnalysisFigure("edges", "Which layers of a path feed which", caption, draw)]


def _faithfulness_figures(analysis: Analysis) -> list[AnalysisFigure]:
    def draw(_runs: Mapping[str, Run]) -> Figure:
        return draw_faithfulness([FaithfulnessRow(**row) for row in analysis.results["faithfulness"]])

    caption = "Mean probability of the true class, on images that no ranking was made of."
    return [AnalysisFigure("faithfulness", "Only the best neurons kept, and only they ablated", caption, draw)]


def _topk_figures(analysis: Analysis) -> list[AnalysisFigure]:
    def draw(_runs: Mapping[str, Run]) -> Figure:
        return draw_topk_mask([TopKRow(**row) for row in analysis.results["topk_mask"]])

    caption = f"{ORACLE}: masked by the scores of the true class, which no deployed model knows."
    return [AnalysisFigure("topk_mask", "All but the top-K neurons masked", caption, draw)]


# By experiment, in the order shown.
_FIGURES_OF: Mapping[str, Callable[[Analysis], list[AnalysisFigure]]] = {
    "scores": _score_figures,
    **{experiment: partial(_deviation_figures, experiment=experiment) for experiment in MANIPULATIONS},
    "similarity": _similarity_figures,
    "top_images": _top_image_figures,
    "edges": _edge_figures,
    "faithfulness": _faithfulness_figures,
    "topk_mask": _topk_figures,
}


def _first(runs: Mapping[str, Run]) -> Run:
    return next(iter(runs.values()))


def _open_images(
    neuron: Mapping[str, Any], images: ImageSet, names: Mapping[int, str]
) -> list[tuple[Image.Image, str, float]]:
    """Return the images that excite a neuron most, what they show, and how much they excite it."""
    pictures = []
    for position, activation in zip(neuron["images"], neuron["activations"], strict=True):
        picture = read_image(images.root / images.files[position])
        pictures.append((picture, names[images.labels[position]], activation))
    return pictures
