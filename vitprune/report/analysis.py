"""Tables and figures of an analysis."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vitprune.report.table import Table


@dataclass(frozen=True)
class Figure:
    """A picture of an analysis folder.

    Attributes:
        stem: of its files, ``STEM.png`` and ``STEM.svg``.
        caption: what it shows.
    """

    stem: str
    caption: str


def analysis_tables(content: Mapping[str, Any]) -> tuple[Table, ...]:
    """Return the tables of an analysis."""
    return tuple(
        Table(table["title"], tuple(table["columns"]), tuple(map(tuple, table["rows"])), table.get("note", ""))
        for table in content.get("tables", ())
    )


def analysis_figures(content: Mapping[str, Any]) -> tuple[Figure, ...]:
    """Return the figures of an analysis."""
    return tuple(Figure(**figure) for figure in content.get("figures", ()))
