"""Of an analysis: its tables and figures as they are."""

from __future__ import annotations

from collections.abc import Sequence

from vitprune.report.analysis import analysis_figures, analysis_tables
from vitprune.report.artefacts import Artefact
from vitprune.report.blocks import Section, grid_of
from vitprune.report.pictures import read_svg
from vitprune.report.sections.links import card_id, part_name


def analysis_section(artefact: Artefact, artefacts: Sequence[Artefact]) -> Section:
    """Show what experiments on the paths of runs gave."""
    pictures = tuple(
        read_svg(
            artefact.folder / f"{figure.stem}.svg",
            id=f"{artefact.key}-{figure.stem}",
            caption=figure.caption,
            made_by="analyze",
        )
        for figure in analysis_figures(artefact.content)
    )
    grids = tuple(
        grid_of(table, id=f"{artefact.key}-table-{number}")
        for number, table in enumerate(analysis_tables(artefact.content), 1)
    )
    title = f"{artefact.name}: what the path neurons do"
    name = part_name(artefact, artefacts, "Analysis")
    return Section(artefact.key, name, "analysis", title, (), pictures + grids, card_id(artefact))
