"""The verb: make a model as fast as asked for, with whatever costs least: merged tokens, narrower layers, 8 bits.

How fast a candidate is follows from a fitted model of the machine's times; what it loses is measured on images that
nothing was fitted to. The best is timed, which corrects the fit where it matters, pruned, and timed again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitprune.answers import ask, log_shares
from vitprune.calibration.layer_losses import mean_divergence, measure_divergence
from vitprune.data import Batches, on_device
from vitprune.entry import entry
from vitprune.errors import VitpruneError
from vitprune.models.macs import amdahl_ceiling, count_macs
from vitprune.options import DEFAULT_ALLOCATION, DEFAULT_FLOOR, DEFAULT_RIDGE
from vitprune.progress import Track, untracked
from vitprune.pruning.choose_merging import Weighed, choose_merging, go_on, make_candidates, weigh
from vitprune.pruning.decide import TOKENS, check_parts
from vitprune.pruning.latency_model import LatencyModel
from vitprune.pruning.plan import Plan
from vitprune.pruning.prune import prune
from vitprune.pruning.target import target_macs
from vitprune.seen_images import watch
from vitprune.speed.fit_latency import Fitted, Format, Writer, fit_latency, time_sources
from vitprune.timing import paired_speedup

DEFAULT_PARTS = ("ffn", "qk", "vo", "layers", TOKENS)
# A result that is slower than asked for by more than this is pruned again, so many times at most.
TOLERANCE = 0.985
MAX_ROUNDS = 3


@dataclass(frozen=True)
class Candidate:
    """A way to be as fast as asked for that was looked at.

    Attributes:
        backend: key of ``BACKENDS``.
        precision: of the products with weights.
        merge: tokens that disappear in each block; None where none do.
        loss: KL(dense || candidate) on images kept back, nats per image, everything refitted at once.
        predicted_speedup: by the fitted model.
        measured_speedup: the least over batch sizes; None where it was not timed.
        chosen: whether the result was made of it.
    """

    backend: str
    precision: str
    merge: tuple[int, ...] | None
    loss: float
    predicted_speedup: float
    measured_speedup: float | None = None
    chosen: bool = False


@dataclass(frozen=True)
class PrunedForSpeed:
    """What came of it.

    Attributes:
        model: the pruned model.
        plan: what was taken.
        backend: that it is to be run on.
        precision: of its products with weights there; a file gets it when it is exported.
        asked_speedup: over the dense float32 model on the first backend.
        predicted_speedup: by the fitted model, corrected by the candidate that was timed.
        speedups: what was measured at each batch size, in turns with the dense model.
        batch_sizes: images per run.
        dense_ms: of the dense model at the first batch size.
        fit_error: largest relative error of the fitted model over the shapes that it was fitted to.
        candidates: all that was looked at, the least loss first.
    """

    model: nn.Module
    plan: Plan
    backend: str
    precision: str
    asked_speedup: float
    predicted_speedup: float
    speedups: tuple[float, ...]
    batch_sizes: tuple[int, ...]
    dense_ms: float
    fit_error: float
    candidates: tuple[Candidate, ...]

    @property
    def speedup(self) -> float:
        """The least speed-up that was measured over the batch sizes."""
        return min(self.speedups)


@entry
def prune_for_speed(
    model: nn.Module,
    batches: Batches,
    speedup: float,
    *,
    formats: Sequence[Format] = (Format("onnxruntime-cpu"),),
    parts: Sequence[str] = DEFAULT_PARTS,
    batch_sizes: Sequence[int] = (1,),
    num_threads: int | None = None,
    allocation: str = DEFAULT_ALLOCATION,
    floor: float = DEFAULT_FLOOR,
    round_to: int = 1,
    ridge: float = DEFAULT_RIDGE,
    seed: int = 0,
    fitted: Fitted | None = None,
    track: Track = untracked,
    **options: Any,
) -> PrunedForSpeed:
    """Prune a model until it runs so many times faster than it does now, and lose as little as possible.

    Args:
        model: timm Vision Transformer in eval mode, whose tokens can merge; stays as it is.
        batches: calibration images and labels, readable more than once; labels are not used.
        speedup: how many times faster than the dense float32 model on the first backend, above 1.
        formats: that the result may be run as; the best is taken.
        parts: keys of ``PARTS``: what may go.
        batch_sizes: images per run; the speed-up is reached at each of them.
        num_threads: of the operators; None takes torch's.
        allocation: key of ``ALLOCATIONS``.
        floor: share of its units that ``global`` leaves to each group at least.
        round_to: every FFN's width is a multiple of it.
        ridge: λ of what stands in.
        seed: of everything drawn at random.
        fitted: from ``fit_latency`` with the same formats and batch sizes, where it is there already.
        track: wraps (items, description) of long loops, for progress.
        options: ``criterion``, ``compensate`` and ``step``, as ``prune`` takes them.

    Raises:
        VitpruneError: if the speed-up is out of reach, an argument is unknown, or a backend is absent.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=4, embed_dim=48, img_size=64, num_classes=5).eval()
    >>> batches = [(torch.randn(4, 3, 64, 64), torch.zeros(4, dtype=torch.int64)) for _ in range(2)]
    >>> result = prune_for_speed(model, batches, 1.2, formats=[Format("torch-eager")], parts=["ffn", "tokens"])
    >>> result.backend, len(result.candidates) > 0
    ('torch-eager', True)
    """
    if not speedup > 1:
        raise VitpruneError(f"speedup must be above 1, got {speedup}")
    parts = check_parts(model, parts)
    units = tuple(part for part in parts if part != TOKENS)
    _check_reach(model, speedup, parts, formats)
    batches = watch(batches)
    if fitted is None:
        fitted = fit_latency(model, formats, batch_sizes=batch_sizes, num_threads=num_threads, seed=seed, track=track)
    limit = fitted.dense_ms / speedup
    weighed = weigh(model, batches, units, ridge=ridge, seed=seed, track=track)
    widths = {"allocation": allocation, "round_to": round_to, "floor": floor}
    with tempfile.TemporaryDirectory() as folder:
        timer = _Timer(model, Path(folder), formats[0], tuple(batch_sizes), num_threads)
        looked_at: list[Candidate] = []
        best: tuple[float, LatencyModel, Candidate, nn.Module] | None = None
        reasons = []
        for wanted in formats:
            latency = fitted.models[wanted]
            try:
                found, make = _propose(
                    model, batches, limit, latency, parts, weighed, ridge=ridge, seed=seed, track=track, **widths
                )
            except VitpruneError as error:
                reasons.append(f"{wanted}: {error}")
                continue
            first = make(found[0].merge)
            source = timer.writer.source(first, wanted, f"candidate-{len(looked_at)}")
            loss = found[0].loss if wanted.precision == "float32" else _measure_file(model, source, weighed.kept_back)
            measured = min(timer.speedups(source, wanted))
            found[0] = replace(found[0], loss=loss, measured_speedup=measured)
            looked_at += found
            if best is None or loss < best[0]:
                best = (loss, latency.scaled(found[0].predicted_speedup / measured), found[0], first)
        if best is None:
            raise VitpruneError(f"{speedup:g} times as fast is out of reach; {'; '.join(reasons)}")
        _loss, latency, chosen, _model = best
        wanted = Format(chosen.backend, chosen.precision)
        for number in range(MAX_ROUNDS):
            meter = latency.meter()
            shaped, target, left = go_on(model, chosen.merge, _target_of(meter, model, limit), units, meter)
            kept = {"ratio": 0.0} if target.dense <= target.limit else {"target": target}
            pruned, plan = prune(
                shaped,
                batches,
                parts=left,
                dense=model,
                ridge=ridge,
                seed=seed,
                track=track,
                **kept,
                **widths,
                **options,
            )
            predicted = fitted.dense_ms / latency.predict(pruned)
            speedups = timer.speedups(timer.writer.source(pruned, wanted, f"pruned-{number}"), wanted)
            if min(speedups) >= TOLERANCE * speedup:
                break
            latency = latency.scaled(predicted / min(speedups))
    looked_at = [replace(each, chosen=each == chosen) for each in looked_at]
    return PrunedForSpeed(
        pruned,
        plan,
        chosen.backend,
        chosen.precision,
        speedup,
        predicted,
        speedups,
        tuple(batch_sizes),
        fitted.dense_ms,
        fitted.models[wanted].error,
        tuple(sorted(looked_at, key=lambda each: each.loss)),
    )


def _target_of(meter, model: nn.Module, limit: float):
    return replace(meter.target(model, meter.count(model)), limit=limit)


def _propose(
    model: nn.Module,
    batches: Batches,
    limit: float,
    latency: LatencyModel,
    parts: Sequence[str],
    weighed: Weighed,
    **options: Any,
) -> tuple[list[Candidate], Callable[[Sequence[int] | None], nn.Module]]:
    """Return what meets a limit in one format, the least loss first, and what makes a candidate of a schedule."""
    meter, units = latency.meter(), tuple(part for part in parts if part != TOKENS)
    target = _target_of(meter, model, limit)
    widths = {name: options[name] for name in ("ridge", "allocation", "round_to", "floor")}
    make = make_candidates(model, target, units, weighed, meter=meter, **widths)
    dense_ms = latency.predict(model)
    if TOKENS in parts and dense_ms > limit:
        tried = choose_merging(model, batches, target, units, meter=meter, weighed=weighed, **options)
        of_each = [(each.schedule, each.loss) for each in tried]
    else:
        images = [images for images, _labels in on_device(model, weighed.kept_back)]
        of_each = [(None, mean_divergence(model, make(None), images))]
    return [
        Candidate(latency.backend, latency.precision, schedule, loss, limit / latency.predict(make(schedule)))
        for schedule, loss in of_each
    ], make


def _check_reach(model: nn.Module, speedup: float, parts: Sequence[str], formats: Sequence[Format]) -> None:
    """Refuse, before anything is timed, what even no unit at all of what may go would not reach."""
    if TOKENS in parts or any(each.precision != "float32" or each.backend != formats[0].backend for each in formats):
        return
    kinds = [part for part in parts if part in ("ffn", "qk", "vo")] or ["ffn", "qk", "vo"]
    macs = count_macs(model)
    target = target_macs(model, macs, kinds=[kind for kind in kinds if kind == "ffn"] or ["ffn"], total=macs)
    if "layers" not in parts and kinds == ["ffn"]:
        most = amdahl_ceiling(macs, target.fixed)
        if speedup > most:
            raise VitpruneError(
                f"speedup {speedup:g}: without any FFN neurons the model would be {most:.2f} times as fast at most; "
                "let other `parts` go (qk, vo, layers, tokens)"
            )


@torch.no_grad()
def _measure_file(model: nn.Module, path: Path, batches: Batches) -> float:
    """Return the mean KL(dense || file) over images, in nats."""
    from vitprune.export.runtime import OnnxModel, open_session
    from vitprune.views import data_config

    file = OnnxModel(open_session(path), {"data_config": data_config(model), "num_classes": model.num_classes}, path)
    losses = [
        measure_divergence(log_shares(ask(model, images)).cpu(), ask(file, images))
        for images, _labels in on_device(model, batches)
    ]
    return float(torch.cat(losses).mean())


class _Timer:
    """Times files in turns with the dense model, which is written once."""

    def __init__(
        self, dense: nn.Module, folder: Path, first: Format, batch_sizes: tuple[int, ...], num_threads: int | None
    ) -> None:
        self.writer, self.reference = Writer(folder), Format(first.backend)
        self.dense = self.writer.source(dense, self.reference, "dense")
        self.batch_sizes, self.num_threads = batch_sizes, num_threads

    def speedups(self, source: nn.Module | Path, wanted: Format) -> tuple[float, ...]:
        """Return how many times faster than the dense model a candidate is at each batch size."""
        sources = {(self.reference, "dense"): self.dense, (wanted, "candidate"): source}
        result = []
        for batch_size in self.batch_sizes:
            dense, candidate = time_sources(sources, batch_size, self.num_threads).values()
            result.append(paired_speedup(dense, candidate).ratio)
        return tuple(result)
