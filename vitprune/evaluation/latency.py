"""Time several programs against each other on a machine that may be busy."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

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
    """

    median_ms: float
    p95_ms: float
    num_runs: int


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
    times: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(ROUNDS):
        for name, run in runners.items():
            _repeat(run, SETTLE_SECONDS)
            times[name] += _repeat(run, share)
    return {
        name: Latency(statistics.median(values), _percentile(values, 0.95), len(values))
        for name, values in times.items()
    }


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
