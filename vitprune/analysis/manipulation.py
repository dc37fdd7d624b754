"""The paper's comparison of methods: the scores of their paths, and what happens when these are removed or doubled.

Letters: I images, L layers, K nodes per layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from vitprune.analysis.finished_passes import read_pass, write_pass
from vitprune.analysis.interventions import (
    Reactions,
    deviate,
    deviations_by_class,
    measure_interventions,
    measure_reactions,
)
from vitprune.data import Batches
from vitprune.discovery.discover import Discovery
from vitprune.errors import VitpruneError
from vitprune.intervals import Interval, mean_interval
from vitprune.models.path_layers import DEFAULT_NODES
from vitprune.progress import Track, untracked

# Whose path an image is tested with.
OWN = "own"
OTHER_HALF = "other half"
OTHER_CLASS = "other class"
CLASS = "class"
BEST_HEADS, LEAST_HEADS = "best heads", "least heads"
WHOSE: Mapping[str, str] = {
    OWN: "each image's own path",
    OTHER_HALF: "the class path on the other half of the class's images",
    OTHER_CLASS: "the same of another class: the control",
    CLASS: "the class path of the run, on other images",
    BEST_HEADS: "of every attention the head with the highest score of the class, whole",
    LEAST_HEADS: "of every attention the head with the lowest score of the class: the control",
}
# Experiments that scale path neurons; their results are lists of ``DeviationRow``.
MANIPULATIONS = ("manipulation", "halves", "transfer", "heads")


@dataclass(frozen=True)
class MethodScore:
    """Joint attribution scores of one method's paths.

    Attributes:
        method: that found the paths.
        joint_score: mean over classes of the class means.
        advantage: how much higher the first method's is, class by class; None for the first itself.
        by_class: class index -> mean joint score.
        num_images: scored.
    """

    method: str
    joint_score: Interval
    advantage: Interval | None
    by_class: Mapping[int, float]
    num_images: int


@dataclass(frozen=True)
class DeviationRow:
    """What one intervention on one method's paths changes.

    Attributes:
        method: that found the paths.
        paths: whose path each image is tested with: ``own``, ``other half`` (the class path on the other half of its
            class's images), ``other class`` (the same of another class: the control), ``class`` (that of the run),
            ``best heads`` and ``least heads`` (whole heads, by the scores of the class).
        factor: what path neurons are multiplied by.
        tokens: where: ``cls``, ``patch`` or ``all``.
        probability_deviation: of the true class; mean over classes of (mean / clean mean - 1).
        advantage: the first method's deviation minus this one's, class by class: negative where the first lowers more;
            None for the first itself.
        accuracy_deviation: top-1 / clean top-1 - 1; None where the clean model answers nothing rightly.
        probability: mean over images of the true class's, in [0, 1].
        probability_clean: the same of the undisturbed model.
        top1: in [0, 1].
        top1_clean: of the undisturbed model.
        by_class: class index -> probability deviation.
        num_images: intervened on.
    """

    method: str
    paths: str
    factor: float
    tokens: str
    probability_deviation: Interval
    advantage: Interval | None
    accuracy_deviation: float | None
    probability: float
    probability_clean: float
    top1: float
    top1_clean: float
    by_class: Mapping[int, float]
    num_images: int


def compare_joint_scores(runs: Mapping[str, Discovery]) -> list[MethodScore]:
    """Compare the joint attribution scores of several methods' paths through the same images.

    Args:
        runs: method -> its paths; the first is compared with the others.

    Raises:
        VitpruneError: if the runs are not of the same images.
    """
    check_same_images(runs)
    by_class = {method: _scores_by_class(found) for method, found in runs.items()}
    first = next(iter(by_class))
    return [
        MethodScore(
            method=method,
            joint_score=mean_interval(list(scores.values())),
            advantage=None if method == first else _difference(by_class[first], scores),
            by_class=scores,
            num_images=len(runs[method].labels),
        )
        for method, scores in by_class.items()
    ]


def _scores_by_class(found: Discovery) -> dict[int, float]:
    return {index: found.joint_scores[found.labels == index].double().mean().item() for index in found.classes}


def _difference(first: Mapping[int, float], other: Mapping[int, float]) -> Interval:
    return mean_interval([first[index] - other[index] for index in first])


def check_same_images(runs: Mapping[str, Discovery]) -> None:
    """Refuse runs whose images differ in number or labels.

    Raises:
        VitpruneError: naming both.
    """
    (first, reference), *others = runs.items()
    for method, found in others:
        if not torch.equal(found.labels, reference.labels):
            raise VitpruneError(
                f"the runs of {first} ({len(reference.labels)} images) and {method} ({len(found.labels)}) are not of "
                "the same images; discover both on the same folder, with the same `images_per_class` and `seed`"
            )


def measure_undisturbed(
    model: nn.Module, batches: Batches, name: str, *, folder: str | Path | None = None, track: Track = untracked
) -> Reactions:
    """Return the undisturbed model's answers, those that ``folder`` keeps under this name where it does."""
    reactions = _read(folder, name)
    if reactions is None:
        reactions = measure_reactions(model, track(batches, name))
        write_pass(folder, name, vars(reactions))
    return reactions


def manipulate(
    model: nn.Module,
    batches: Batches,
    clean: Reactions,
    paths: Mapping[str, Tensor],
    *,
    whose: str,
    factors: Sequence[float] = (0.0, 2.0),
    tokens: Sequence[str] = ("cls",),
    nodes: Mapping[str, Sequence[str]] | None = None,
    folder: str | Path | None = None,
    track: Track = untracked,
) -> list[DeviationRow]:
    """Scale the neurons of several methods' paths, one pass over the images each, and compare what is left.

    Args:
        model: timm Vision Transformer in eval mode.
        batches: pairs of images and labels; read once per method.
        clean: the undisturbed model's answers to them, from ``measure_undisturbed``.
        paths: method -> int64 [I, L, K], a path for each image; the first method is compared with the others.
        whose: whose paths these are, as in ``DeviationRow.paths``.
        factors: 0 removes the neurons, 2 doubles them.
        tokens: where, each ``cls``, ``patch`` or ``all``.
        nodes: method -> what its paths go through, as ``find_path_layers`` takes it; None: FFNs.
        folder: keeps the answers of finished passes, which another call then takes over; the caller makes sure that
            it is of the same model, images and paths.
        track: wraps (items, description), for progress.

    Returns:
        One row per factor, token scope and method.

    Source:
        arXiv:2503.09046, figures of the manipulation experiment; intervals and comparison are ours.
    """
    wanted = [(factor, scope) for factor in factors for scope in tokens]
    changed: dict[str, dict[tuple[float, str], Reactions]] = {}
    for method, neurons_ILK in paths.items():
        names = {key: f"{_slug(whose)}-{method}-{key[0]:g}-{key[1]}" for key in wanted}
        missing = [key for key in wanted if _read(folder, names[key]) is None]
        measured = {}
        if missing:
            through = DEFAULT_NODES if nodes is None else nodes[method]
            watched = track(batches, f"{whose} paths of {method}")
            measured = measure_interventions(model, watched, neurons_ILK, missing, nodes=through)
        for key, reactions in measured.items():
            write_pass(folder, names[key], vars(reactions))
        changed[method] = {key: measured[key] if key in measured else _read(folder, names[key]) for key in wanted}
    first = next(iter(changed))
    rows = []
    for key in wanted:
        reference = deviations_by_class(clean, changed[first][key])
        for method, reactions in changed.items():
            found = deviate(clean, reactions[key])
            rows.append(
                DeviationRow(
                    method=method,
                    paths=whose,
                    factor=key[0],
                    tokens=key[1],
                    probability_deviation=found.probability_deviation,
                    advantage=None if method == first else _difference(reference, found.by_class),
                    accuracy_deviation=found.accuracy_deviation,
                    probability=found.probability,
                    probability_clean=clean.probability.double().mean().item(),
                    top1=found.top1,
                    top1_clean=(clean.prediction == clean.label).double().mean().item(),
                    by_class=found.by_class,
                    num_images=found.num_images,
                )
            )
    return rows


def _slug(text: str) -> str:
    return text.replace(" ", "-")


def _read(folder: str | Path | None, name: str) -> Reactions | None:
    known = read_pass(folder, name)
    return None if known is None else Reactions(**known)
