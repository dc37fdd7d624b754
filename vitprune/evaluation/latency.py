"""Time several programs against each other on a machine that may be busy."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

WARM_UP_ROUNDS = 3
MIN_ROUNDS, MAX_ROUNDS = 11, 301


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
    """Time programs in turn, round after round, so that a change of the machine's load hits all of them alike.

    Args:
        runners: name -> program without arguments that returns when its work is done.
        seconds: time to spend on all rounds together, after three warm-up rounds; 11 to 301 rounds are run.

    Returns:
        name -> latency.
    """
    for _ in range(WARM_UP_ROUNDS):
        started = time.perf_counter()
        for run in runners.values():
            run()
        round_seconds = time.perf_counter() - started
    num_rounds = min(MAX_ROUNDS, max(MIN_ROUNDS, int(seconds / max(round_seconds, 1e-9))))
    times: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(num_rounds):
        for name, run in runners.items():
            started = time.perf_counter()
            run()
            times[name].append(1000 * (time.perf_counter() - started))
    return {
        name: Latency(statistics.median(values), _percentile(values, 0.95), len(values))
        for name, values in times.items()
    }


def _percentile(values: list[float], share: float) -> float:
    """Return the nearest-rank percentile."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]
