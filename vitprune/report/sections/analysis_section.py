"""Of an analysis: its tables and figures as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vitprune.analysis.analysis_figures import analysis_figures
from vitprune.analysis.analysis_folder import FIGURES_FOLDER, Analysis
from vitprune.analysis.analysis_tables import SCORES_OF, analysis_tables
from vitprune.analysis.manipulation import MANIPULATIONS, OTHER_CLASS, WHOSE
from vitprune.figures.deviations_figure import FACTORS
from vitprune.report.neuron_shots import show_cards
from vitprune.report.page_blocks import Section, grid_of
from vitprune.report.pictures import read_photos, read_svg
from vitprune.report.shown_folder import Artefact, card_id, of_kind, part_name
from vitprune.report.text import SPACE, percent, points

# In a sentence, where nothing stands before it.
PATHS_OF = {**WHOSE, OTHER_CLASS: "another class's path, the control"}


def analysis_section(artefact: Artefact, artefacts: Sequence[Artefact]) -> Section:
    """Show what experiments on the paths of runs gave."""
    analysis: Analysis = artefact.content
    # Where the run is on the page too, its own part shows it.
    run_is_shown = bool(of_kind(artefacts, "run"))
    pictures = tuple(
        (read_photos if figure.of_photos else read_svg)(
            artefact.folder / FIGURES_FOLDER / figure.files[0],
            id=f"{artefact.key}-{figure.stem}",
            caption=f"{figure.title}. {figure.caption}",
        )
        for figure in analysis_figures(analysis)
        if not (figure.of_run and run_is_shown)
    )
    grids = tuple(
        grid_of(table, id=f"{artefact.key}-table-{number}") for number, table in enumerate(analysis_tables(analysis), 1)
    )
    cards = (show_cards(analysis, id=f"{artefact.key}-neurons"),) if "cards" in analysis.results else ()
    title = f"{artefact.name}: what the path neurons do"
    name = part_name(artefact, artefacts, "Analysis")
    return Section(artefact.key, name, "analysis", title, tell(analysis), pictures + grids + cards, card_id(artefact))


def tell(analysis: Analysis) -> tuple[str, ...]:
    """Say in sentences what the first run's paths showed."""
    method, results = analysis.runs[0].method, analysis.results
    told = []
    for experiment in MANIPULATIONS:
        rows = [row for row in results.get(experiment, ()) if row["method"] == method and row["factor"] in FACTORS]
        for whose, tokens in dict.fromkeys((row["paths"], row["tokens"]) for row in rows):
            changes = [
                f"{_change(row)} when {FACTORS[row['factor']]}"
                for row in rows
                if (row["paths"], row["tokens"]) == (whose, tokens)
            ]
            told.append(
                f"Neurons of {PATHS_OF[whose]} ({method}, tokens {tokens}): the probability of the true class changes "
                f"by {', by '.join(changes)}."
            )
    told += _tell_faithfulness(results.get("faithfulness", ()))
    if "similarity" in results and "images" in results["similarity"][method]:
        images = results["similarity"][method]["images"]
        told.append(
            f"Two images of one class share {percent(images['intra'])} of their path neurons, two of different classes "
            f"{percent(images['inter'])} ({method})."
        )
    return tuple(told)


def _tell_faithfulness(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say which ranking keeps more of the answer, and whether that depends on how the others are ablated."""
    told = []
    for other, ranked, tokens in dict.fromkeys((row["method"], row["ranked"], row["tokens"]) for row in rows):
        found = {}
        for row in rows:
            of_row = (row["method"], row["ranked"], row["tokens"])
            if of_row == (other, ranked, tokens) and row["faithfulness_advantage"] is not None:
                found[row["ablation"]] = row["faithfulness_advantage"]
        sure = {name: each["mean"] > 0 for name, each in found.items() if each["low"] is not None and _is_sure(each)}
        if not found:
            continue
        first = next(row["method"] for row in rows if row["ranked"] in (ranked, "class"))
        more = [name for name, is_more in sure.items() if is_more]
        less = [name for name, is_more in sure.items() if not is_more]
        rest = [name for name in found if name not in sure]
        said = [
            f"{what} ({', '.join(names)})"
            for names, what in ((more, "more"), (less, "less"), (rest, "no surely different share"))
            if names
        ]
        told.append(
            f"Kept alone, neurons ranked by {first} carry {' and '.join(said)} of the answer than those by {other} "
            f"({SCORES_OF[ranked]}, tokens {tokens}), with the others set to what stands in brackets."
        )
    return told


def _is_sure(interval: Mapping[str, float]) -> bool:
    return interval["low"] > 0 or interval["high"] < 0


def _change(row: Mapping[str, Any]) -> str:
    deviation = row["probability_deviation"]
    interval = "" if deviation["low"] is None else f" ({points(deviation['low'])} to {points(deviation['high'])})"
    return f"{points(deviation['mean'])}{SPACE}%{interval}"
