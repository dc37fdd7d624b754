"""How often 95 % intervals of intra-class minus inter-class similarity cover the truth; writes a dated JSON file.

    python benchmarks/interval_coverage.py

Simulated runs whose truth is known: each class prefers one neuron per FFN, drawn like those of the other images (Zipf),
and an image follows it with a probability that differs between classes. Compared are the interval of
``measure_path_similarity`` and bootstraps over classes (``scipy.stats.bootstrap``) of the same estimate.
"""

from __future__ import annotations

import json
import warnings
from datetime import date

import numpy as np
import torch
from common import RESULTS, describe_machine, log
from jsonargparse import auto_cli
from scipy.stats import DegenerateDataWarning, bootstrap

import vitprune
from vitprune.analysis.image_similarity import measure_path_similarity
from vitprune.analysis.similarity import count_common

NUM_FFNS, NUM_NEURONS, PER_CLASS = 6, 60, 12
BETA = (2, 3)  # of the probability to follow the class
NUM_RESAMPLES = 1999


def main(num_classes: list[int] | None = None, num_runs: int = 500):
    """Simulate runs and count.

    Args:
        num_classes: of a run; 3, 5, 10, 20 and 50 if not given.
        num_runs: of each size.
    """
    shares = 1 / np.arange(1, NUM_NEURONS + 1)
    shares /= shares.sum()
    first, second = BETA
    follow_twice = first * (first + 1) / ((first + second) * (first + second + 1))
    truth = follow_twice * (1 - (shares**2).sum())
    rows = []
    for count in num_classes or [3, 5, 10, 20, 50]:
        generator = np.random.default_rng(count)
        covered: dict[str, list[bool]] = {"jackknife": [], "percentile": [], "BCa": []}
        for _ in range(num_runs):
            found = simulate(count, shares, generator)
            difference = measure_path_similarity(found).difference
            intervals = {"jackknife": (difference.low, difference.high)}
            if count > 3:  # three classes leave too many resamples of a single class
                intervals |= {method: resample(found, method, generator) for method in ("percentile", "BCa")}
            for method, (low, high) in intervals.items():
                covered[method].append(bool(low <= truth <= high))
        for method, hits in covered.items():
            if hits:
                rows.append({"num_classes": count, "method": method, "coverage": float(np.mean(hits))})
                log(f"{count} classes, {method}: {np.mean(hits):.3f}")
    result = {**describe_machine(), "num_runs": num_runs, "truth": float(truth), "rows": rows}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{date.today()}-interval-coverage.json").write_text(json.dumps(result, indent=1) + "\n")


def simulate(num_classes: int, shares: np.ndarray, generator: np.random.Generator) -> vitprune.Discovery:
    """Draw a run of ``PER_CLASS`` images of each class."""
    size = (num_classes, PER_CLASS, NUM_FFNS)
    follows = generator.random(size) < generator.beta(*BETA, size=(num_classes, 1, 1))
    preferred = generator.choice(NUM_NEURONS, p=shares, size=(num_classes, 1, NUM_FFNS))
    neurons = np.where(follows, preferred, generator.choice(NUM_NEURONS, p=shares, size=size))
    names = tuple(f"blocks.{index}.mlp" for index in range(NUM_FFNS))
    labels = torch.arange(num_classes).repeat_interleave(PER_CLASS)
    return vitprune.Discovery(
        layers=names,
        neurons=torch.from_numpy(neurons).reshape(-1, NUM_FFNS, 1),
        joint_scores=torch.zeros(len(labels)),
        labels=labels,
        predictions=labels,
        completeness_errors=None,
        classes=tuple(range(num_classes)),
        class_scores={name: torch.zeros(num_classes, NUM_NEURONS) for name in names},
        method="jas",
        tokens="cls",
        quadrature="adaptive",
    )


def resample(found: vitprune.Discovery, method: str, generator: np.random.Generator) -> tuple[float, float]:
    """Bootstrap classes; a class drawn several times makes no pairs with itself."""
    pairs = count_common(found).numpy() / NUM_FFNS
    intra = (pairs.diagonal() - PER_CLASS) / (PER_CLASS * (PER_CLASS - 1))
    inter = pairs / PER_CLASS**2

    def difference(classes: np.ndarray, axis: int = -1) -> np.ndarray:
        weights = (classes.astype(int)[..., None] == np.arange(len(intra))).sum(-2)
        between = ((weights @ inter) * weights).sum(-1) - weights**2 @ inter.diagonal()
        num_pairs = weights.sum(-1) ** 2 - (weights**2).sum(-1)
        return weights @ intra / weights.sum(-1) - between / num_pairs

    classes = (np.arange(len(intra)),)
    # A resample of one class alone has no pair, and BCa then no interval.
    with np.errstate(invalid="ignore", divide="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateDataWarning)
        result = bootstrap(
            classes, difference, method=method, n_resamples=NUM_RESAMPLES, vectorized=True, rng=generator
        )
    values = result.bootstrap_distribution
    if np.isnan(values).any():
        return tuple(np.nanquantile(values, (0.025, 0.975)))
    return tuple(result.confidence_interval)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
