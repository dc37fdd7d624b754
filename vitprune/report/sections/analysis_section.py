"""Of an analysis: its tables and figures as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vitprune.analysis.analysis_views import WHOSE, analysis_figures, analysis_tables
from vitprune.figures.deviations_figure import FACTORS
from vitprune.report.artefacts import Artefact
from vitprune.report.page_blocks import Section, grid_of
from vitprune.report.pictures import read_photos, read_svg
from vitprune.report.sections.links import card_id, of_kind, part_name
from vitprune.report.text import SPACE, percent, points

# Figures of a run alone: where it is on the page too, its own part shows them.
OF_A_RUN = frozenset({"utilisation", "violins", "class_paths"})
# In a sentence, where nothing stands before it.
PATHS_OF = {**WHOSE, "other class": "another class's path, the control"}


def analysis_section(artefact: Artefact, artefacts: Sequence[Artefact]) -> Section:
    """Show what experiments on the paths of runs gave."""
    left_out = OF_A_RUN if of_kind(artefacts, "run") else frozenset()
    pictures = tuple(
        (read_photos if figure.of_photos else read_svg)(
            artefact.folder / "figures" / figure.files[0],
            id=f"{artefact.key}-{figure.stem}",
            caption=f"{figure.title}. {figure.caption}",
            made_by="analyze",
        )
        for figure in analysis_figures(artefact.content)
        if figure.stem not in left_out
    )
    grids = tuple(
        grid_of(table, id=f"{artefact.key}-table-{number}")
        for number, table in enumerate(analysis_tables(artefact.content), 1)
    )
    title = f"{artefact.name}: what the path neurons do"
    name = part_name(artefact, artefacts, "Analysis")
    return Section(artefact.key, name, "analysis", title, tell(artefact.content), pictures + grids, card_id(artefact))


def tell(content: Mapping[str, Any]) -> tuple[str, ...]:
    """Say in sentences what the first run's paths showed."""
    method = content["runs"][0]["method"]
    told = []
    for experiment in ("manipulation", "halves", "transfer"):
        rows = [row for row in content.get(experiment, ()) if row["method"] == method and row["factor"] in FACTORS]
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
    if "similarity" in content and "images" in content["similarity"][method]:
        images = content["similarity"][method]["images"]
        told.append(
            f"Two images of one class share {percent(images['intra'])} of their path neurons, two of different classes "
            f"{percent(images['inter'])} ({method})."
        )
    return tuple(told)


def _change(row: Mapping[str, Any]) -> str:
    deviation = row["probability_deviation"]
    interval = "" if deviation["low"] is None else f" ({points(deviation['low'])} to {points(deviation['high'])})"
    return f"{points(deviation['mean'])}{SPACE}%{interval}"
