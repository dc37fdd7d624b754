"""Progress of long loops: functions that run one take a ``track`` that may show it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from threading import Timer
from time import monotonic
from typing import Any

# (items, description) -> the same items, one by one.
Track = Callable[[Sequence[Any], str], Iterable[Any]]

SECONDS_BETWEEN_LINES = 20
SECONDS_BEFORE_A_LINE = 2


def untracked(items: Sequence[Any], _description: str) -> Iterable[Any]:
    """Show nothing."""
    return items


def in_step(track: Track, number: int, count: int) -> Track:
    """Return what shows the progress of one of several like steps; of a single one, as it is.

    >>> in_step(lambda items, description: description, 2, 5)([], "rank neurons")
    'rank neurons (step 2 of 5)'
    """
    if count < 2:
        return track
    return lambda items, description: track(items, f"{description} (step {number} of {count})")


def report(items: Sequence[Any], description: str) -> Iterator[Any]:
    """Say on stderr, a line now and then, how far a loop is and how long it will take."""
    return log_lines(items, description, _count(items))


class Reported:
    """Batches that say on stderr how far they are each time they are read; otherwise as they are."""

    def __init__(self, batches: Any, description: str, show: Callable[..., Iterable[Any]] | None = None) -> None:
        self.batches, self.description, self.show = batches, description, show or log_lines
        self.passes = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "batches" not in self.__dict__:
            raise AttributeError(name)
        own = getattr(self.batches, name)
        if name == "of_model":
            return lambda model: Reported(own(model), self.description, self.show)
        return own

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.batches)
        for first in batches:
            yield first
            break
        # A reader that only looked at the first batch made no pass.
        self.passes += 1
        suffix = f" (pass {self.passes})" if self.passes > 1 else ""
        yield from self.show(batches, self.description + suffix, _count(self.batches), 1)


def log_lines(
    items: Iterable[Any], description: str, total: int | None, done: int = 0, every: float = SECONDS_BETWEEN_LINES
) -> Iterator[Any]:
    """Yield items, and say on stderr now and then how many, out of how many, and how long the others will take.

    The first line does not wait for the first item: it comes after two seconds, whatever an item takes.
    """
    started = said = monotonic()
    count = done
    first = Timer(SECONDS_BEFORE_A_LINE, lambda: _say(f"{description} {_of(count, total)} ..."))
    first.daemon = True
    first.start()
    try:
        for item in items:
            if monotonic() - said >= every:
                said = monotonic()
                so_far = f"{_clock(said - started)} so far"
                if total is not None:
                    so_far += f", about {_clock((said - started) / max(count - done, 1) * (total - count))} left"
                _say(f"{description} {_of(count, total)}, {so_far}")
            yield item
            count += 1
    finally:
        first.cancel()
    if total is None or total > done:
        _say(f"{description} {_of(count if total is None else total, total)}, {_clock(monotonic() - started)}")


def _of(count: int, total: int | None) -> str:
    return str(count) if total is None else f"{count}/{total}"


def _count(items: Any) -> int | None:
    try:
        return len(items)
    except TypeError:  # a loader of a stream has no length
        return None


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
