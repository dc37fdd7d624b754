"""Confidence intervals of a mean over classes: images of one class resemble each other, so classes are resampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import bootstrap

CONFIDENCE, NUM_RESAMPLES = 0.95, 9_999


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % confidence interval.

    Attributes:
        mean: of the values.
        low: None, as ``high``, where there are fewer than two values.
        high: see ``low``.
    """

    mean: float
    low: float | None
    high: float | None


def mean_interval(values: Sequence[float], *, seed: int = 0) -> Interval:
    """Return the mean of some values, one per class, and how far another draw of classes could move it.

    Args:
        values: finite; at least one.
        seed: of the resampling.

    Source:
        Efron, JASA 1987 (bias-corrected and accelerated bootstrap), by SciPy.

    >>> mean_interval([1.0, 1.0, 1.0])
    Interval(mean=1.0, low=1.0, high=1.0)
    >>> mean_interval([0.5])
    Interval(mean=0.5, low=None, high=None)
    """
    array = np.asarray(values, dtype=np.float64)
    mean = float(array.mean())
    if len(array) < 2:
        return Interval(mean, None, None)
    if np.ptp(array) <= 1e-12 * max(1.0, float(np.abs(array).max())):  # resampling changes nothing
        return Interval(mean, mean, mean)
    resampled = bootstrap(
        (array,), np.mean, n_resamples=NUM_RESAMPLES, confidence_level=CONFIDENCE, rng=np.random.default_rng(seed)
    )
    return Interval(mean, float(resampled.confidence_interval.low), float(resampled.confidence_interval.high))
