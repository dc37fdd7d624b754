"""What people see: progress on stderr, tables on stdout."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from vitprune.table import Table

SECONDS_BETWEEN_LINES = 20


class Tracked:
    """Batches with progress on stderr each time they are read; otherwise as they are.

    ``begin`` is called when the first of them is through for the first time.
    """

    def __init__(self, batches: Any, description: str, begin: Callable[[], None] | None = None) -> None:
        self.batches, self.description, self._begin = batches, description, begin
        self.passes = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.batches, name)

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.batches)
        for first in batches:
            yield first
            break
        # A reader that only looked at the first batch made no pass.
        self.passes += 1
        if self._begin is not None:
            self._begin()
            self._begin = None
        suffix = f" (pass {self.passes})" if self.passes > 1 else ""
        yield from track(batches, self.description + suffix, total=len(self.batches), done=1)


def track(items: Iterable[Any], description: str, *, total: int | None = None, done: int = 0) -> Iterable[Any]:
    """Show progress and time left while items are taken: a bar on a terminal, a line now and then in a log."""
    total = len(items) if total is None else total
    show = _draw_bar if sys.stderr.isatty() else _log_lines
    return show(items, description, total, done)


def _log_lines(items: Iterable[Any], description: str, total: int, done: int) -> Iterator[Any]:
    from time import monotonic

    started = said = monotonic()
    for count, item in enumerate(items, done):
        if monotonic() - said >= SECONDS_BETWEEN_LINES:
            said = monotonic()
            left = (said - started) / max(count - done, 1) * (total - count)
            note(f"{description} {count}/{total}, {_clock(said - started)} so far, about {_clock(left)} left")
        yield item
    if total > done:
        note(f"{description} {total}/{total}, {_clock(monotonic() - started)}")


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def _draw_bar(items: Iterable[Any], description: str, total: int, done: int) -> Iterator[Any]:
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
    with Progress(*columns, console=_console(stderr=True)) as progress:
        task = progress.add_task(description, total=total, completed=done)
        for item in items:
            yield item
            progress.advance(task)


def _console(*, stderr: bool = False):
    from rich.console import Console

    # Tables keep their columns where nobody watches: a pipe or a file has no width to fit.
    stream = sys.stderr if stderr else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else 120, highlight=False)


def print_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, texts: Sequence[str] = ()
) -> None:
    """Print a table; its first column and those of ``texts`` are words, the others numbers."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for position, column in enumerate(columns):
        table.add_column(column, justify="left" if position == 0 or column in texts else "right")
    for row in rows:
        table.add_row(*map(escape, row))
    _console().print(table)


def note(text: str) -> None:
    print(text, file=sys.stderr)


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
