"""Confidence intervals of a mean over classes: images of one class resemble each other, so classes are the units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

CONFIDENCE = 0.95


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


def mean_interval(values: Sequence[float]) -> Interval:
    """Return the mean of some values, one per class, and how far another draw of classes could move it.

    Student's t: with as few as ten classes a bootstrap is too narrow.

    Args:
        values: finite; at least one.

    >>> mean_interval([1.0, 1.0, 1.0])
    Interval(mean=1.0, low=1.0, high=1.0)
    >>> mean_interval([0.5])
    Interval(mean=0.5, low=None, high=None)
    """
    array = np.asarray(values, dtype=np.float64)
    mean = float(array.mean())
    if len(array) < 2:
        return Interval(mean, None, None)
    half = float(student.ppf((1 + CONFIDENCE) / 2, len(array) - 1) * array.std(ddof=1) / np.sqrt(len(array)))
    return Interval(mean, mean - half, mean + half)
