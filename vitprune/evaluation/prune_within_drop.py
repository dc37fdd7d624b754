"""The verb: as fast as a model gets within a budget of accuracy."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from scipy.stats import norm
from torch import nn

from vitprune.data import Batches
from vitprune.entry import entry
from vitprune.errors import VitpruneError
from vitprune.evaluation.accuracy import Accuracy, accuracy_as_json, accuracy_from_json, drop_bound, evaluate
from vitprune.images.resized_batches import resize_batches
from vitprune.intervals import CONFIDENCE
from vitprune.options import DEFAULT_RIDGE
from vitprune.progress import Track, untracked
from vitprune.pruning.choose_tokens import weigh
from vitprune.pruning.decide import check_parts
from vitprune.seen_images import check_unseen, files_of, hash_images
from vitprune.speed.fit_latency import Fitted, Format, Writer, fit_latency
from vitprune.speed.prune_for_speed import PrunedForSpeed, prune_for_speed
from vitprune.speed.speed_candidates import OutOfReachError, open_as
from vitprune.speed.speed_reach import DEFAULT_PARTS
from vitprune.speed.stages import open_stages

# Speed-ups that are tried, from the second on up while they hold, else down; then one between the last two.
SPEEDUPS = (1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0)
CLOSE = 1.1


@dataclass(frozen=True)
class TriedSpeed:
    """A speed-up that was tried.

    Attributes:
        asked_speedup: over the dense float32 model.
        speedup: that was measured, the least over batch sizes; None where it is out of reach.
        backend: that the result is for; None likewise, as are all that follow.
        precision: of its products with weights.
        top1: of the result as it is run, in [0, 1].
        drop: of top-1 from the dense model.
        drop_bound: 95 % upper bound of the drop, paired.
        within: whether that is within the budget.
    """

    asked_speedup: float
    speedup: float | None = None
    backend: str | None = None
    precision: str | None = None
    top1: float | None = None
    drop: float | None = None
    drop_bound: float | None = None
    within: bool = False


@dataclass(frozen=True)
class WithinDrop:
    """What came of it.

    Attributes:
        result: the fastest that is within the budget.
        max_drop: the budget of top-1.
        dense_top1: of the dense model.
        num_images: that accuracy was measured on.
        tried: all speed-ups that were tried, in their order.
    """

    result: PrunedForSpeed
    max_drop: float
    dense_top1: float
    num_images: int
    tried: tuple[TriedSpeed, ...]


def images_needed(max_drop: float) -> int:
    """Return how many images it takes to prove of a model that changed nothing that it lost no more than a budget.

    >>> images_needed(0.01)
    268
    """
    z = float(norm.ppf(CONFIDENCE))
    return math.ceil(z * z / max_drop - z * z)


@entry
def prune_within_drop(
    model: nn.Module,
    batches: Batches,
    evaluation: Batches,
    max_drop: float,
    *,
    formats: Sequence[Format] = (Format("onnxruntime-cpu"),),
    batch_sizes: Sequence[int] = (1,),
    num_threads: int | None = None,
    seed: int = 0,
    fitted: Fitted | None = None,
    parts: Sequence[str] = DEFAULT_PARTS,
    ridge: float = DEFAULT_RIDGE,
    stages: str | Path | None = None,
    track: Track = untracked,
    **options: Any,
) -> WithinDrop:
    """Make a model as fast as it gets without losing more top-1 than a budget, at 95 % confidence.

    Speed-ups are tried one after another, each by ``prune_for_speed``, and judged on evaluation images as they would be
    run (8-bit candidates as files). Each is tested by itself, so the answer leans on the same images a few times: check
    it on others before relying on it.

    Args:
        model: timm Vision Transformer in eval mode, whose tokens can merge; stays as it is.
        batches: calibration images and labels, readable more than once.
        evaluation: other images and their labels; readable more than once.
        max_drop: of top-1, in (0, 1); the paired upper bound of the drop must not exceed it.
        formats: as in ``prune_for_speed``, as are all that follow.
        batch_sizes: images per run.
        num_threads: of the operators.
        seed: of everything drawn at random.
        fitted: from ``fit_latency``, where it is there already.
        parts: keys of ``PARTS``: what may go.
        ridge: λ of what stands in.
        stages: folder that keeps what is finished: the same call goes on there after it was killed. Yours to delete.
        track: wraps (items, description) of long loops, for progress.
        options: what else ``prune_for_speed`` takes.

    Raises:
        VitpruneError: if the images are too few to prove it even of an unchanged model, if some were calibrated on, or
            if no speed-up is within the budget.

    >>> import timm, torch
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=2).eval()
    >>> images = [(torch.randn(4, 3, 32, 32), torch.zeros(4, dtype=torch.int64))]
    >>> prune_within_drop(model, images, images, 0.01)
    Traceback (most recent call last):
        ...
    vitprune.errors.VitpruneError: max_drop 0.01: 4 images cannot prove it even of an unchanged model; 268 can
    """
    if not 0 < max_drop < 1:
        raise VitpruneError(f"max_drop must be in (0, 1), got {max_drop:g}")
    images, calibrated = files_of(evaluation), files_of(batches)
    if images is not None:
        _check_number(len(images), max_drop)
        if calibrated is not None:
            check_unseen(images, hash_images(calibrated))
    timing = {"batch_sizes": list(batch_sizes), "num_threads": num_threads, "seed": seed}
    asked = {"max_drop": max_drop, "formats": list(map(str, formats)), "parts": list(parts), "ridge": ridge, **timing}
    named = {name: value for name, value in options.items() if isinstance(value, str | float | int)}
    of_images = None if images is None else sorted(hash_images(images))
    kept = open_stages(
        stages, model, batches, {**asked, **named, "evaluation images": of_images}, names=_names_of_stages()
    )
    dense = kept.facts("dense", lambda: evaluate(model, evaluation), accuracy_as_json, accuracy_from_json)
    _check_number(dense.num_images, max_drop)
    if fitted is None:
        fit = partial(fit_latency, model, formats, track=track, **timing)
        fitted = kept.facts("latency", fit, Fitted.as_json, Fitted.from_json)
    weighed = cache(lambda: weigh(model, batches, check_parts(model, parts), ridge=ridge, seed=seed, track=track))
    shared = {"formats": formats, "parts": parts, "ridge": ridge, "weighed": weighed, "track": track, **timing}
    tried: list[TriedSpeed] = []
    best: PrunedForSpeed | None = None

    def holds(speedup: float) -> bool:
        nonlocal best
        name = _name(speedup)
        own = None if stages is None else Path(stages) / name
        try:
            result = prune_for_speed(model, batches, speedup, fitted=fitted, stages=own, **shared, **options)
        except OutOfReachError:
            tried.append(TriedSpeed(speedup))
            return False
        judge = partial(_judge, result, speedup, dense, evaluation, batches, max_drop)
        row = kept.facts(f"{name}-judged", judge, asdict, _row_from_json)
        tried.append(row)
        best = result if row.within else best
        return row.within

    low, high = _walk(holds)
    if best is None:
        nearest = min((row.drop_bound for row in tried if row.drop_bound is not None), default=None)
        said = "" if nearest is None else f"; the least upper bound of the drop was {nearest:.4f}"
        raise OutOfReachError(f"max_drop {max_drop:g}: no speed-up of {SPEEDUPS[0]:g} or more is within it{said}")
    if high is not None and high / low > CLOSE:
        holds(math.sqrt(low * high))
    return WithinDrop(best, max_drop, dense.top1, dense.num_images, tuple(tried))


def _name(speedup: float) -> str:
    return f"{speedup:.4g}x"


def _names_of_stages() -> list[str]:
    between = [math.sqrt(low * high) for low, high in pairwise((1.0, *SPEEDUPS))]
    of_speeds = [
        name for speedup in (*SPEEDUPS, *between) for name in (_name(speedup), f"{_name(speedup)}-judged.json")
    ]
    return ["dense.json", "latency.json", *of_speeds]


def _row_from_json(content: Mapping[str, Any]) -> TriedSpeed:
    return TriedSpeed(**{each.name: content[each.name] for each in fields(TriedSpeed)})


def _walk(holds: Any) -> tuple[float, float | None]:
    """Return the largest speed-up of the list that holds, and the next one, that does not."""
    place = 1
    if not holds(SPEEDUPS[place]):
        return (SPEEDUPS[0], SPEEDUPS[1]) if holds(SPEEDUPS[0]) else (1.0, SPEEDUPS[0])
    while place + 1 < len(SPEEDUPS):
        if not holds(SPEEDUPS[place + 1]):
            return SPEEDUPS[place], SPEEDUPS[place + 1]
        place += 1
    return SPEEDUPS[place], None


def _judge(
    result: PrunedForSpeed, speedup: float, dense: Accuracy, evaluation: Batches, batches: Batches, max_drop: float
) -> TriedSpeed:
    with tempfile.TemporaryDirectory() as folder:
        wanted = Format(result.backend, result.precision)
        opened = open_as(result.model, wanted, Writer(Path(folder), batches), "model")
        accuracy = evaluate(opened, resize_batches(evaluation, result.model))
    bound = drop_bound(dense, accuracy)
    drop = dense.top1 - accuracy.top1
    return TriedSpeed(
        speedup, result.speedup, result.backend, result.precision, accuracy.top1, drop, bound, bound <= max_drop
    )


def _check_number(num_images: int, max_drop: float) -> None:
    needed = images_needed(max_drop)
    if num_images < needed:
        raise VitpruneError(
            f"max_drop {max_drop:g}: {num_images} images cannot prove it even of an unchanged model; {needed} can"
        )
