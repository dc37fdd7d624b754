"""Tables on their way to a reader: a terminal or a page shows them, each in its own way."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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


def align(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table as lines of text; the first column is words, the others numbers.

    >>> print(align(("model", "top-1"), [("dense", "0.9"), ("half", "0.85")]))
    model  top-1
    dense    0.9
    half    0.85
    """
    lines = [tuple(columns), *map(tuple, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width) for place, (cell, width) in enumerate(pairs)
        ).rstrip()
        for pairs in (list(zip(line, widths, strict=True)) for line in lines)
    )
