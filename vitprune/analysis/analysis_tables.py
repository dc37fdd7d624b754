"""The results of an analysis as tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vitprune.analysis.manipulation import MANIPULATIONS, WHOSE
from vitprune.data import describe_class
from vitprune.figures.deviations_figure import FACTORS
from vitprune.options import ABLATIONS, ORACLE
from vitprune.table import Table

# Of the shares that are measured, those in the table.
SHARES_SHOWN = (0.01, 0.1, 0.5)
# Of each class.
EDGES_SHOWN = 3
SCORES_OF: Mapping[str, str] = {"class": "by class", "image": "by image", "all": "for all"}

if TYPE_CHECKING:
    from vitprune.analysis.analysis_folder import Analysis


def analysis_tables(analysis: Analysis) -> tuple[Table, ...]:
    """Return the results of an analysis as tables."""
    results = analysis.results
    tables = []
    if "scores" in results:
        tables.append(_scores_table(results["scores"]))
    for experiment in MANIPULATIONS:
        if experiment in results:
            tables.append(_deviations_table(experiment, results[experiment]))
    if "similarity" in results:
        tables += _similarity_tables(results["similarity"], analysis.class_names)
    if "edges" in results:
        tables.append(_edges_table(results["edges"], analysis.class_names))
    if "cards" in results:
        tables.append(_cards_table(results["cards"]))
    if "stability" in results:
        tables.append(_stability_table(results["stability"]))
    if "faithfulness" in results:
        tables += _faithfulness_tables(results["faithfulness"])
    if "topk_mask" in results:
        tables.append(_topk_table(results["topk_mask"]))
    return tuple(tables)


def _interval(measured: Mapping[str, Any] | None, *, scale: float = 1) -> tuple[float | None, str | None]:
    """Return a mean, and its interval as text."""
    if measured is None:
        return None, None
    if measured["low"] is None:
        return measured["mean"] * scale, None
    return measured["mean"] * scale, f"{measured['low'] * scale:.3g} .. {measured['high'] * scale:.3g}"


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


def _similarity_tables(similarity: Mapping[str, Any], class_names: Mapping[int, str]) -> list[Table]:
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
            ("paths of", "neurons", "of all (%)", "entropy per layer (bits)"),
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
    names = {index: describe_class(name) for index, name in class_names.items()}
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
        "p: two-sided test of Mann and Whitney that JAS is as large in both; own, predicted: share of path neurons in "
        "common with the other images of the own and of the predicted class",
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


def _edges_table(edges: Mapping[str, Any], class_names: Mapping[int, str]) -> Table:
    rows = [
        (describe_class(class_names[int(index)]), _end(edge["start"]), _end(edge["end"]), edge["score"])
        for index, strongest in edges["strongest"].items()
        for edge in strongest[:EDGES_SHOWN]
    ]
    rows.sort(key=lambda row: -abs(row[3]))
    told = "none was cut to compare with"
    if edges["agreement"] is not None:
        told = (
            f"rank correlation of {edges['num_exact']} single edges with what the answer loses when just that one is "
            f"cut {edges['agreement']:.3f}"
        )
    return Table(
        "strongest edges of class paths",
        ("class", "from", "to", "score"),
        tuple(rows),
        "score: what the answer gains by what the first neuron adds to the stream that the second one's layer reads, "
        f"to first order, mean over the images of the class; {told}",
    )


def _end(end: Mapping[str, Any]) -> str:
    return f"{end['layer']} {end['name']}"


def _cards_table(cards: Mapping[str, Any]) -> Table:
    rows = cards["cards"]
    cells = []
    for row in rows:
        peak = row["peak"]
        changed = {each["factor"]: each["answers"][0]["name"] for each in row["steering"]}
        cells.append(
            (
                f"{row['layer']} {row['name']}",
                len(row["paths"]),
                None if peak is None else describe_class(peak["name"]),
                None if peak is None else peak["value"],
                ", ".join(describe_class(each["name"]) for each in row["towards"][:2]) or None,
                *(describe_class(changed[factor]) for factor in (0.0, 1.0, 4.0)),
            )
        )
    return Table(
        f"neurons of the class paths, at tokens {cards['tokens']}",
        ("neuron", "paths", "excited most by", "chance", "moves up", "top image x 0", "x 1", "x 4"),
        tuple(cells),
        "chance: that an image of that class excites it more than one of another; moves up: the classes that its "
        "output points to through the final norm and the classifier; top image: what the model answers to the image "
        "that excites it most, with the neuron scaled",
    )


def _as_text(interval: Mapping[str, Any] | None) -> str | None:
    if interval is None:
        return None
    ends = "" if interval["low"] is None else f" ({interval['low']:.3f} .. {interval['high']:.3f})"
    return f"{interval['mean']:.3f}{ends}"


def _stability_table(stability: Mapping[str, Any]) -> Table:
    first = next(iter(stability.values()))
    return Table(
        "neurons of class paths that are sure",
        ("paths of", "sure (%)", "95 % interval"),
        tuple((method, *_interval(each["sure"], scale=100)) for method, each in stability.items()),
        f"on the class's path in at least 95 % of {first['num_draws']} draws of its images, with replacement; mean "
        "over classes",
    )


def _faithfulness_tables(rows) -> list[Table]:
    tables = []
    for tokens, ablation in dict.fromkeys((row["tokens"], row["ablation"]) for row in rows):
        own = [row for row in rows if (row["tokens"], row["ablation"]) == (tokens, ablation)]
        shares = own[0]["shares"]
        shown = [shares.index(share) for share in SHARES_SHOWN if share in shares]
        tables.append(
            Table(
                f"faithfulness, ablated at {tokens}, {ablation} ({own[0]['num_images']} images)",
                (
                    "ranked by",
                    *(f"best {100 * shares[at]:g} %" for at in shown),
                    "area kept",
                    f"{own[0]['method']} minus it",
                    "area without",
                    f"{own[0]['method']} minus it ",
                ),
                tuple(
                    (
                        f"{row['method']}, {SCORES_OF[row['ranked']]}",
                        *(row["kept"][at] for at in shown),
                        _as_text(row["faithfulness"]),
                        _as_text(row["faithfulness_advantage"]),
                        _as_text(row["completeness"]),
                        _as_text(row["completeness_advantage"]),
                    )
                    for row in own
                ),
                f"all others set to: {ABLATIONS[ablation]}. Best kept: mean probability of the true class "
                f"({own[0]['kept'][-1]:.3f} undisturbed, {own[0]['kept'][0]:.3f} with all ablated). Area: under that "
                "curve over all shares, as a share of the undisturbed probability; without: over the curve with the "
                "best ablated. The first by class is compared with those by class and for all, the first by image with "
                "those by image; intervals by Student's t over classes",
            )
        )
    return tables


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
