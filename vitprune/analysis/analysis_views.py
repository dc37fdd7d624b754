"""What ``vitprune analyze`` shows: its results as tables, and its figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image

from vitprune.analysis.topk_mask import TopKRow
from vitprune.data import ImageSet, describe_class
from vitprune.discovery.discover import Discovery, class_paths
from vitprune.figures.deviations_figure import FACTORS, draw_deviations
from vitprune.figures.joint_scores_figure import draw_joint_scores
from vitprune.figures.path_figure import draw_paths
from vitprune.figures.similarity_figure import draw_similarity
from vitprune.figures.style import save_figure
from vitprune.figures.top_images_figure import draw_top_images
from vitprune.figures.topk_mask_figure import draw_topk_mask
from vitprune.figures.utilisation_figure import draw_utilisation
from vitprune.figures.violins_figure import draw_violins
from vitprune.intervals import Interval
from vitprune.options import ORACLE
from vitprune.progress import Track, untracked
from vitprune.table import Table

ANALYSIS_FILES = frozenset({"analysis.json", "passes", "figures", "similarity.safetensors"})
# A picture of paths, and a violin per class, stay legible up to here.
MOST_CLASSES_DRAWN = 10
WHOSE = {
    "own": "each image's own path",
    "other half": "the class path on the other half of the class's images",
    "other class": "the same of another class: the control",
    "class": "the class path of the run, on other images",
}


@dataclass(frozen=True)
class AnalysisFigure:
    """A figure of an analysis folder.

    Attributes:
        stem: of its files, below ``figures/``.
        title: what it shows.
        caption: how to read it.
        of_photos: it shows photos, and is written as PNG alone.
    """

    stem: str
    title: str
    caption: str
    of_photos: bool = False

    @property
    def files(self) -> tuple[str, ...]:
        """Names of its files."""
        return tuple(f"{self.stem}.{suffix}" for suffix in (("png",) if self.of_photos else ("svg", "png")))


def analysis_tables(content: Mapping[str, Any]) -> tuple[Table, ...]:
    """Return the results of an analysis as tables.

    Args:
        content: of ``analysis.json``.
    """
    tables = []
    if "scores" in content:
        tables.append(_scores_table(content["scores"]))
    for experiment in ("manipulation", "halves", "transfer"):
        if experiment in content:
            tables.append(_deviations_table(experiment, content[experiment]))
    if "similarity" in content:
        tables += _similarity_tables(content)
    if "topk_mask" in content:
        tables.append(_topk_table(content["topk_mask"]))
    return tuple(tables)


def _interval(content: Mapping[str, Any] | None, *, scale: float = 1) -> tuple[float | None, str | None]:
    """Return a mean, and its interval as text."""
    if content is None:
        return None, None
    if content["low"] is None:
        return content["mean"] * scale, None
    return content["mean"] * scale, f"{content['low'] * scale:.3g} .. {content['high'] * scale:.3g}"


def _scores_table(rows) -> Table:
    first = rows[0]["method"]
    cells = tuple((row["method"], *_interval(row["joint_score"]), *_interval(row["advantage"])) for row in rows)
    return Table(
        f"joint attribution score ({rows[0]['num_images']} images of {len(rows[0]['by_class'])} classes)",
        ("paths of", "mean JAS", "95 % interval", f"{first} higher by", "95 % interval "),
        cells,
        "means of class means; intervals by Student's t over classes",
    )


def _deviations_table(experiment: str, rows) -> Table:
    first = rows[0]["method"]
    cells = []
    for row in rows:
        accuracy = row["accuracy_deviation"]
        cells.append(
            (
                row["paths"],
                FACTORS.get(row["factor"], f"times {row['factor']:g}"),
                row["tokens"],
                row["method"],
                *_interval(row["probability_deviation"], scale=100),
                *_interval(row["advantage"], scale=100),
                None if accuracy is None else 100 * accuracy,
            )
        )
    shown = dict.fromkeys(row["paths"] for row in rows)
    return Table(
        f"{experiment} ({rows[0]['num_images']} images, top-1 {rows[0]['top1_clean']:.3f} undisturbed)",
        (
            "paths",
            "neurons",
            "tokens",
            "method",
            "probability (%)",
            "95 % interval",
            f"{first} minus it",
            "95 % interval ",
            "top-1 (%)",
        ),
        tuple(cells),
        "change of the true class's probability (mean over classes) and of top-1, against the undisturbed model; "
        + "; ".join(f"{whose}: {WHOSE[whose]}" for whose in shown),
    )


def similarity_by_run(content: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return what similarity gave of each run's method, in the order of the runs: a file may have it in another."""
    return {run["method"]: content["similarity"][run["method"]] for run in content["runs"]}


def _similarity_tables(content: Mapping[str, Any]) -> list[Table]:
    similarity = similarity_by_run(content)
    tables = []
    with_images = {method: each["images"] for method, each in similarity.items() if "images" in each}
    if with_images:
        cells = []
        for method, images in with_images.items():
            cells.append((method, images["intra"], images["inter"], *_interval(images["difference"])))
        tables.append(
            Table(
                "share of path neurons that two images have in common",
                ("paths of", "same class", "different classes", "difference", "95 % interval"),
                tuple(cells),
                "means over classes; interval by the jackknife over classes",
            )
        )
    tables.append(
        Table(
            "neurons that ever lie on a path",
            ("paths of", "neurons", "of all (%)", "entropy per FFN (bits)"),
            tuple(
                (
                    method,
                    sum(row["num_visited"] for row in each["utilisation"]),
                    100
                    * sum(row["num_visited"] for row in each["utilisation"])
                    / sum(row["num_neurons"] for row in each["utilisation"]),
                    sum(row["entropy_bits"] for row in each["utilisation"]) / len(each["utilisation"]),
                )
                for method, each in similarity.items()
            ),
        )
    )
    tables.append(_mistakes_table(similarity))
    first = next(iter(similarity.values()))
    names = {int(index): describe_class(name) for index, name in content["class_names"].items()}
    for of, what in (("visits", "how often they use each neuron"), ("scores", "their mean scores")):
        if of in first:
            tables.append(_pairs_table(first[of], what, names))
    return tables


def _mistakes_table(similarity: Mapping[str, Any]) -> Table:
    cells = []
    for method, each in similarity.items():
        found = each["mistakes"]
        cells.append(
            (
                method,
                found["joint_score_correct"]["value"],
                found["joint_score_wrong"]["value"],
                found["p_value"],
                found["own_correct"]["value"],
                found["own_wrong"]["value"],
                found["wrong_predicted"]["value"],
            )
        )
    counts = next(iter(similarity.values()))["mistakes"]
    return Table(
        f"right and wrong answers ({counts['joint_score_correct']['num_images']} and "
        f"{counts['joint_score_wrong']['num_images']} images)",
        ("paths of", "JAS right", "JAS wrong", "p", "own, right", "own, wrong", "predicted, wrong"),
        tuple(cells),
        "p: Mann-Whitney; own, predicted: share of path neurons in common with the other images of the own and of the "
        "predicted class",
    )


def _pairs_table(similarity: Mapping[str, Any], what: str, names: Mapping[int, str]) -> Table:
    cells = [
        (kind, names[pair["first"]], names[pair["second"]], pair["cosine"])
        for kind, pairs in (("most", similarity["most_similar"]), ("least", similarity["least_similar"]))
        for pair in pairs[:10]
    ]
    wordnet = similarity["wordnet"]
    note = ""
    if wordnet is not None:
        note = (
            f"rank correlation of class distance with WordNet distance {wordnet['cosine']['rho']:.3f} "
            f"(p {wordnet['cosine']['p_value']:.3g}), along the tree {wordnet['tree']['rho']:.3f} "
            f"(p {wordnet['tree']['p_value']:.3g}); Mantel permutation test"
        )
    return Table(f"most and least similar classes by {what}", ("", "class", "and", "cosine"), tuple(cells), note)


def _topk_table(rows) -> Table:
    cells = tuple(
        (
            row["mask"],
            row["tokens"],
            row["top_k"],
            100 * row["mask_share"],
            row["num_neurons_masked"],
            row["probability"],
            row["top1"],
        )
        for row in rows
    )
    return Table(
        f"top-K neurons of each class ({rows[0]['num_images']} images)",
        ("mask", "tokens", "top-K", "masked of others (%)", "neurons", "probability", "top-1"),
        cells,
        f"{ORACLE}: each image is masked by the scores of its true class, which no deployed model knows",
    )


def analysis_figures(content: Mapping[str, Any]) -> tuple[AnalysisFigure, ...]:
    """Return what ``render_analysis`` draws of an analysis.

    Args:
        content: of ``analysis.json``.
    """
    method = content["runs"][0]["method"]
    figures = []
    if "scores" in content:
        figures.append(
            AnalysisFigure("joint_scores", "Joint attribution score by method", "Higher is better; intervals by class.")
        )
    for experiment in ("manipulation", "halves", "transfer"):
        for whose in dict.fromkeys(row["paths"] for row in content.get(experiment, ())):
            if any(row["factor"] in FACTORS for row in content[experiment] if row["paths"] == whose):
                figures.append(
                    AnalysisFigure(
                        f"deviations_{whose.replace(' ', '_')}",
                        f"Path neurons removed and doubled: {WHOSE[whose]}",
                        "Change of the true class's probability; a box holds one value per class.",
                    )
                )
    if "similarity" in content:
        first = content["similarity"][method]
        for of, what in (("visits", "neurons visited"), ("scores", "mean scores")):
            if of in first:
                figures.append(
                    AnalysisFigure(
                        f"class_similarity_{of}",
                        f"Similarity of classes by {what}",
                        "Cosine of every two classes, in the order of the tree (average linkage).",
                    )
                )
        figures.append(AnalysisFigure("utilisation", "Neurons that ever lie on a path", f"By FFN, paths of {method}."))
        figures.append(
            AnalysisFigure("violins", "Path neurons by FFN and class", "One point per image: how much a class agrees.")
        )
        if "visits" in first:
            figures.append(
                AnalysisFigure("class_paths", "Class paths", "One neuron per FFN and class; shared ones are named.")
            )
    if "top_images" in content:
        figures += [
            AnalysisFigure(
                f"top_images_{position}",
                f"Images that excite neuron {each['neuron']} of {each['ffn']} most",
                f"Activation at tokens '{content['top_images']['tokens']}', images of the run.",
                of_photos=True,
            )
            for position, each in enumerate(content["top_images"]["neurons"])
        ]
    if "topk_mask" in content:
        figures.append(
            AnalysisFigure(
                "topk_mask",
                "All but the top-K neurons masked",
                f"{ORACLE}: masked by the scores of the true class, which no deployed model knows.",
            )
        )
    return tuple(figures)


def render_analysis(
    content: Mapping[str, Any],
    folder: str | Path,
    *,
    runs: Mapping[str, Discovery],
    images: ImageSet,
    cosines: Mapping[str, torch.Tensor],
    track: Track = untracked,
) -> None:
    """Draw the figures of an analysis into files.

    Args:
        content: of ``analysis.json``.
        folder: for the files; made where it is missing.
        runs: method -> paths; the first is drawn where a figure is about one.
        images: of the runs.
        cosines: ``visits`` and ``scores`` -> float64 [C, C], where similarity was measured.
        track: wraps (items, description), for progress.
    """
    method, found = next(iter(runs.items()))
    names = {int(index): describe_class(name) for index, name in content["class_names"].items()}
    drawn = {index: names[index] for index in found.classes[:MOST_CLASSES_DRAWN]}

    def draw(stem: str) -> Figure:
        if stem == "joint_scores":
            intervals = {row["method"]: Interval(**row["joint_score"]) for row in content["scores"]}
            return draw_joint_scores({name: each.joint_scores for name, each in runs.items()}, intervals=intervals)
        elif stem.startswith("deviations_"):
            whose = stem.removeprefix("deviations_").replace("_", " ")
            return draw_deviations(_deviations(content, whose), title=WHOSE[whose])
        elif stem.startswith("class_similarity_"):
            of = stem.removeprefix("class_similarity_")
            return draw_similarity(
                cosines[of],
                linkage=content["similarity"][method][of]["linkage"],
                names=[names[index] for index in found.classes],
            )
        elif stem == "utilisation":
            rows = content["similarity"][method]["utilisation"]
            return draw_utilisation(
                found.ffns,
                num_neurons=[row["num_neurons"] for row in rows],
                num_used=[row["num_visited"] for row in rows],
                effective=[row["effective_neurons"] for row in rows],
            )
        elif stem == "violins":
            return draw_violins(found, classes=drawn)
        elif stem == "class_paths":
            paths = class_paths(found)
            return draw_paths(found.ffns, paths={name: paths[index] for index, name in drawn.items()})
        elif stem.startswith("top_images_"):
            each = content["top_images"]["neurons"][int(stem.removeprefix("top_images_"))]
            return draw_top_images(_pictures(each, images, names))
        else:
            return draw_topk_mask([TopKRow(**row) for row in content["topk_mask"]])

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for figure in track(analysis_figures(content), "figures"):
        drawn_figure = draw(figure.stem)
        for name in figure.files:
            save_figure(drawn_figure, folder / name)


def _deviations(content: Mapping[str, Any], whose: str) -> dict[str, dict[tuple[str, float], list[float]]]:
    deviations: dict[str, dict[tuple[str, float], list[float]]] = {}
    for experiment in ("manipulation", "halves", "transfer"):
        for row in content.get(experiment, ()):
            if row["paths"] == whose and row["factor"] in FACTORS:
                deviations.setdefault(row["tokens"], {})[row["method"], row["factor"]] = list(row["by_class"].values())
    return deviations


def _pictures(each: Mapping[str, Any], images: ImageSet, names: Mapping[int, str]) -> list[tuple[Any, str, float]]:
    pictures = []
    for position, activation in zip(each["images"], each["activations"], strict=True):
        with Image.open(images.root / images.files[position]) as opened:
            picture = opened.convert("RGB")
        pictures.append((picture, names[images.labels[position]], activation))
    return pictures
