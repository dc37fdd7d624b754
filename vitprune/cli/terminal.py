"""What people see: progress on stderr, tables on stdout."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from vitprune.progress import Reported, enter_stage, log_lines
from vitprune.table import Table

SECONDS_BETWEEN_LINES = 20


def Tracked(batches: Any, description: str) -> Reported:
    """Return batches with progress on stderr each time they are read; otherwise as they are."""
    return Reported(batches, description, _track)


def _track(items: Iterable[Any], description: str, total: int | None, done: int) -> Iterable[Any]:
    say_held()
    if _QUIET:
        return items
    if sys.stderr.isatty():
        return _draw_bar(items, description, total, done)
    return log_lines(items, description, total, done, SECONDS_BETWEEN_LINES)


def track(items: Iterable[Any], description: str, *, total: int | None = None, done: int = 0) -> Iterable[Any]:
    """Show progress and time left while items are taken: a bar on a terminal, a line now and then in a log."""
    say_held()
    total = len(items) if total is None else total
    return _track(items, description, total, done)


def _draw_bar(items: Iterable[Any], description: str, total: int | None, done: int) -> Iterator[Any]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    in_all_left = enter_stage(description)
    with Progress(*columns, console=_console(stderr=True)) as progress:
        task = progress.add_task(description, total=total, completed=done)
        for count, item in enumerate(items, done + 1):
            yield item
            progress.update(task, advance=1, description=f"{description}{in_all_left(count, total)}")


def _console(*, stderr: bool = False):
    from rich.console import Console

    # Tables keep their columns where nobody watches: a pipe or a file has no width to fit.
    stream = sys.stderr if stderr else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else 120, highlight=False)


def print_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, texts: Sequence[str] = ()
) -> None:
    """Print a table; its first column and those of ``texts`` are words, the others numbers.

    Columns that are empty in all rows are left out.
    """
    from rich.markup import escape
    from rich.table import Table

    rows = list(rows)
    shown = [place for place in range(len(columns)) if place == 0 or not rows or any(row[place] for row in rows)]
    table = Table()
    for place in shown:
        table.add_column(columns[place], justify="left" if place == 0 or columns[place] in texts else "right")
    for row in rows:
        table.add_row(*(escape(row[place]) for place in shown))
    # A title of the table itself would be broken where the table is narrower.
    _console().print(title, style="table.title", markup=False, soft_wrap=True)
    _console().print(table)


def note(text: str) -> None:
    say_held()
    if not _QUIET:
        print(text, file=sys.stderr)


# Not empty while a command was asked to tell its result alone.
_QUIET: list[bool] = []


@contextmanager
def said(*, quiet: bool) -> Iterator[None]:
    """Hold back progress and notes, or not."""
    before = list(_QUIET)
    _QUIET[:] = [True] if quiet else before
    try:
        yield
    finally:
        _QUIET[:] = before


# Notes on what a command starts from; said when it gets to work, so that a mistake is one line.
_HELD: list[str] = []


def note_at_work(text: str) -> None:
    _HELD.append(text)


def say_held() -> None:
    for text in forget_held():
        if not _QUIET:
            print(text, file=sys.stderr)


def forget_held() -> list[str]:
    held, _HELD[:] = list(_HELD), []
    return held


def show_table(table: Table) -> None:
    """Print a table whose cells are text and numbers."""
    texts = [
        column for place, column in enumerate(table.columns) if any(isinstance(row[place], str) for row in table.rows)
    ]
    print_table(table.title, table.columns, [[show_cell(cell) for cell in row] for row in table.rows], texts=texts)
    if table.note:
        print(table.note)


def show_cell(cell: str | float | int | None) -> str:
    if cell is None:
        return ""
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)
