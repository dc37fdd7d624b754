"""Time several programs against each other on a machine that may be busy."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from scipy.stats import t as student_t

from vitprune.intervals import CONFIDENCE

ROUNDS = 10
# A thread pool keeps its threads spinning for a while after its last run (ONNX Runtime's for tens of milliseconds),
# and they would be counted as the next program's slowness.
SETTLE_SECONDS = 0.1


@dataclass(frozen=True)
class Latency:
    """Wall-clock times of one program.

    Attributes:
        median_ms: milliseconds.
        p95_ms: 95th percentile, milliseconds.
        num_runs: timed runs.
        rounds_ms: median of each round, in which all programs took their turn.
    """

    median_ms: float
    p95_ms: float
    num_runs: int
    rounds_ms: tuple[float, ...]


@dataclass(frozen=True)
class Speedup:
    """How many times faster one program is than another.

    Attributes:
        ratio: geometric mean over the rounds.
        low: lower end of its 95 % confidence interval.
        high: upper end.
    """

    ratio: float
    low: float
    high: float


def measure_latency(runners: Mapping[str, Callable[[], Any]], *, seconds: float = 3.0) -> dict[str, Latency]:
    """Time programs in turn, so that a change of the machine's load hits all of them alike.

    In each of ten rounds every program first runs untimed for 0.1 s, until it has the machine for itself, and then
    timed for its share of ``seconds``, at least once.

    Args:
        runners: name -> program without arguments that returns when its work is done.
        seconds: time to spend on all timed runs together.

    Returns:
        name -> latency.
    """
    share = seconds / ROUNDS / len(runners)
    rounds: dict[str, list[list[float]]] = {name: [] for name in runners}
    for _ in range(ROUNDS):
        for name, run in runners.items():
            _repeat(run, SETTLE_SECONDS)
            rounds[name].append(_repeat(run, share))
    return {name: _summarise(of_program) for name, of_program in rounds.items()}


def _summarise(rounds: list[list[float]]) -> Latency:
    times = [milliseconds for each in rounds for milliseconds in each]
    return Latency(
        statistics.median(times),
        _percentile(times, 0.95),
        len(times),
        tuple(statistics.median(each) for each in rounds),
    )


def paired_speedup(first: Latency, second: Latency) -> Speedup:
    """Compare two programs round by round, so that what slowed a whole round down cancels.

    Args:
        first: the reference.
        second: timed in the same rounds.

    Returns:
        How many times faster the second is, with Student's interval of the mean logarithm of the rounds' ratios.

    >>> first = Latency(2.0, 2.0, 20, (2.0, 4.0, 2.0))
    >>> paired_speedup(first, Latency(1.0, 1.0, 20, (1.0, 2.0, 1.0)))
    Speedup(ratio=2.0, low=2.0, high=2.0)
    """
    logs = [math.log(a / b) for a, b in zip(first.rounds_ms, second.rounds_ms, strict=True)]
    mean = statistics.fmean(logs)
    half = 0.0
    if len(logs) > 1:
        half = float(student_t.ppf(0.5 + CONFIDENCE / 2, len(logs) - 1)) * statistics.stdev(logs) / math.sqrt(len(logs))
    return Speedup(*(round(math.exp(value), 12) for value in (mean, mean - half, mean + half)))


def _repeat(run: Callable[[], Any], seconds: float) -> list[float]:
    """Run at least once and until the time is over; return milliseconds per run."""
    times = []
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        started = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - started))
    return times


def _percentile(values: list[float], share: float) -> float:
    """Return the nearest-rank percentile."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]
