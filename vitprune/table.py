"""Tables on their way to a reader: a terminal or a page shows them, each in its own way."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """Rows for people.

    Attributes:
        title: what is shown, with the number of images it rests on.
        columns: headings, with units.
        rows: one cell per column: text, a number (shown and sorted as one), or None where there is nothing.
        note: what a reader must know to read it right; may be empty.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | float | int | None, ...], ...]
    note: str = ""
