"""Of an analysis: its tables and figures as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vitprune.report.analysis import WHOSE, analysis_figures, analysis_tables
from vitprune.report.artefacts import Artefact
from vitprune.report.blocks import Section, grid_of
from vitprune.report.deviations import FACTORS
from vitprune.report.pictures import read_photos, read_svg
from vitprune.report.sections.links import card_id, of_kind, part_name

# Figures of a run alone: where it is on the page too, its own part shows them.
OF_A_RUN = frozenset({"utilisation", "violins", "class_paths"})


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
    sentences = []
    method = content["runs"][0]["method"]
    for experiment in ("manipulation", "halves", "transfer"):
        for row in content.get(experiment, ()):
            if row["method"] == method and row["factor"] in FACTORS:
                deviation = row["probability_deviation"]
                interval = (
                    ""
                    if deviation["low"] is None
                    else f" ({_percent(deviation['low'])} to {_percent(deviation['high'])})"
                )
                sentences.append(
                    f"{WHOSE[row['paths']]}, {FACTORS[row['factor']]} ({row['tokens']}): probability of the true class "
                    f"{_percent(deviation['mean'])}{interval}"
                )
    told = []
    if sentences:
        told.append(f"What neurons of the {method} paths do: " + "; ".join(sentences) + ".")
    images = next(iter(content.get("similarity", {}).values()), {}).get("images")
    if images is not None:
        told.append(
            f"Two images of one class share {100 * images['intra']:.1f} % of their path neurons, two of different "
            f"classes {100 * images['inter']:.1f} %."
        )
    return tuple(told)


def _percent(ratio: float) -> str:
    return f"{100 * ratio:+.1f} %"
