"""Progress of long loops: functions that run one take a ``track`` that may show it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from threading import Timer
from time import monotonic
from typing import Any

# (items, description) -> the same items, one by one.
Track = Callable[[Sequence[Any], str], Iterable[Any]]

SECONDS_BETWEEN_LINES = 20
SECONDS_BEFORE_A_LINE = 2
# Of all the work, before what is left of it is told.
LEAST_SHARE = 0.02
# The stage of a pass over images, whatever it is called.
IMAGES = "images"


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


class Journey:
    """Several loops one after another, each with its share of the work, as far as that is known beforehand.

    Args:
        stages: (what a loop is called first, its work in any unit), in the order in which they come; a loop that none
            of these names begin is ``IMAGES``.
        clock: seconds.

    >>> seconds = iter([0.0, 30.0])
    >>> journey = Journey([(IMAGES, 1.0), ("rank neurons", 0.5), (IMAGES, 1.0), ("compensate", 2.5)], seconds.__next__)
    >>> journey.enter("calibrate")(0.6)  # seconds that are left of all
    220.0
    """

    def __init__(self, stages: Sequence[tuple[str, float]], clock: Callable[[], float] = monotonic) -> None:
        self.stages, self.clock, self.started, self.begun = tuple(stages), clock, clock(), 0

    def enter(self, description: str) -> Callable[[float], float | None]:
        """Begin a loop.

        Returns:
            Share of it that is done, in [0, 1] -> seconds that all stages will still take; None where that is not known
            yet, or the loop is none of the stages that are to come.
        """
        names = {name for name, _work in self.stages}
        own = next((name for name in names if description.startswith(name)), IMAGES)
        place = next((at for at in range(self.begun, len(self.stages)) if self.stages[at][0] == own), None)
        if place is None:
            return lambda _share: None
        self.begun = place + 1
        whole, before = (sum(work for _name, work in some) for some in (self.stages, self.stages[:place]))
        work = self.stages[place][1]

        def left(share: float) -> float | None:
            done = (before + share * work) / whole
            return None if done < LEAST_SHARE else (self.clock() - self.started) * (1 - done) / done

        return left


_JOURNEY: ContextVar[Journey | None] = ContextVar("journey", default=None)


def expect_work(stages: Sequence[tuple[str, float]]) -> None:
    """Let loops from here on tell how long all of them will take as well, unless they are part of something longer.

    Args:
        stages: as ``Journey`` takes them; none: nothing tells it, until ``forget_work``.
    """
    if _JOURNEY.get() is None:
        _JOURNEY.set(Journey(stages))


def forget_work() -> None:
    """End what ``expect_work`` began."""
    _JOURNEY.set(None)


def enter_stage(description: str) -> Callable[[int, int | None], str]:
    """Return what says after so many items, of so many, how long all will take; nothing where that is not known."""
    journey = _JOURNEY.get()
    if journey is None:
        return lambda _count, _total: ""
    left = journey.enter(description)

    def say(count: int, total: int | None) -> str:
        seconds = left(count / total) if total else None
        return "" if not seconds else f"; in all about {_clock(seconds)} left"

    return say


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
    in_all_left = enter_stage(description)
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
                _say(f"{description} {_of(count, total)}, {so_far}{in_all_left(count, total)}")
            yield item
            count += 1
    finally:
        first.cancel()
    if total is None or total > done:
        whole = "" if total is None else in_all_left(total, total)
        _say(f"{description} {_of(count if total is None else total, total)}, {_clock(monotonic() - started)}{whole}")


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
