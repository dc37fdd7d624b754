"""The verb: make a model as fast as asked for, with whatever costs least: fewer tokens, narrower layers, 8 bits.

How fast a candidate is follows from a fitted model of the machine's times; what it loses is measured on images that
nothing was fitted to. The best is timed, which corrects the fit where it matters, pruned, and timed again.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from torch import nn

from vitprune.data import Batches
from vitprune.entry import entry
from vitprune.errors import VitpruneError
from vitprune.options import DEFAULT_ALLOCATION, DEFAULT_CRITERION, DEFAULT_FLOOR, DEFAULT_RIDGE
from vitprune.progress import Track, expect_work, untracked
from vitprune.pruning.choose_tokens import Judged, Weighed, ask_dense, weigh
from vitprune.pruning.decide import check_parts
from vitprune.pruning.latency_model import LatencyModel
from vitprune.pruning.plan import Plan
from vitprune.pruning.prune import prune
from vitprune.seen_images import watch
from vitprune.speed.fit_latency import Fitted, Format, Writer, fit_latency
from vitprune.speed.settle_widths import MAX_ROUNDS, TOLERANCE, Shaper, cuts, is_near
from vitprune.speed.speed_candidates import (
    Candidate,
    Measure,
    Timer,
    look_around,
    look_at,
    mean_speedups,
    propose_candidates,
    seen_as_json,
    seen_from_json,
)
from vitprune.speed.speed_reach import DEFAULT_PARTS, check_reach
from vitprune.speed.stages import open_stages


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
        refused: format -> why nothing in it is so fast.
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
    refused: Mapping[str, str] = field(default_factory=dict)

    @property
    def speedup(self) -> float:
        """The least speed-up that was measured over the batch sizes."""
        return min(self.speedups)


@entry
def prune_for_speed(
    model: nn.Module,
    batches: Batches,
    speedup: float | None = None,
    *,
    latency_ms: float | None = None,
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
    weighed: Weighed | Callable[[], Weighed] | None = None,
    measure: Measure | None = None,
    stages: str | Path | None = None,
    track: Track = untracked,
    **options: Any,
) -> PrunedForSpeed:
    """Prune a model until it runs so many times faster than it does now, and lose as little as possible.

    Args:
        model: timm Vision Transformer in eval mode, whose tokens can merge; stays as it is.
        batches: calibration images and labels, readable more than once; labels are not used.
        speedup: how many times faster than the dense float32 model on the first backend, above 1; with ``fitted`` than
            its reference.
        latency_ms: how long a run of the first batch size may take instead.
        formats: that the result may be run as; the best is taken.
        parts: keys of ``PARTS``: what may go.
        batch_sizes: images per run; the speed-up is reached at each of them.
        num_threads: of the operators; None takes torch's.
        allocation: key of ``ALLOCATIONS``.
        floor: share of its units that ``global`` leaves to each group at least.
        round_to: every FFN's width is a multiple of it.
        ridge: λ of what stands in.
        seed: of everything drawn at random.
        fitted: from ``fit_latency`` with the same batch sizes and these formats at least, where it is there already.
        weighed: from ``weigh`` with the same images and parts, where it is there already, or what makes it.
        measure: model and format -> how many times faster it is than the dense one at each batch size, where the model
            is for another machine than this one; goes with ``fitted``.
        stages: folder that keeps what is finished: the same call goes on there after it was killed. Yours to delete.
        track: wraps (items, description) of long loops, for progress.
        options: ``criterion``, ``compensate`` and ``step``, as ``prune`` takes them.

    Raises:
        OutOfReachError: if all that may go does not make it so fast.
        VitpruneError: if an argument is unknown, or a backend is absent.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=1).eval()
    >>> prune_for_speed(model, [], 1.0)
    Traceback (most recent call last):
        ...
    vitprune.errors.VitpruneError: speedup must be above 1, got 1
    """
    if (speedup is None) == (latency_ms is None):
        raise VitpruneError("say how fast: either `speedup` or `latency_ms`")
    if speedup is not None and not 1 < speedup < float("inf"):
        raise VitpruneError(f"speedup must be above 1, got {speedup:g}")
    if latency_ms is not None and not 0 < latency_ms < float("inf"):
        raise VitpruneError(f"latency_ms must be above 0, got {latency_ms:g}")
    if not formats:
        raise VitpruneError("no `formats` to choose from")
    parts = check_parts(model, parts)
    batches = watch(batches)
    expect_work(())  # what is pruned on the way is not all
    widths = {"allocation": allocation, "round_to": round_to, "floor": floor}
    asked = {"speedup": speedup, "latency_ms": latency_ms, "formats": list(map(str, formats)), "parts": parts}
    timing = {"batch_sizes": list(batch_sizes), "num_threads": num_threads, "seed": seed}
    named = {name: value for name, value in options.items() if isinstance(value, str | float | int)}
    everything = {**asked, **timing, "ridge": ridge, **widths, **named}
    rounds = range(1, MAX_ROUNDS + 1)
    names = ["latency.json", "candidates.json", *(f"shape-{number}.json" for number in rounds)]
    names += [f"round-{number}" for number in rounds]
    kept = open_stages(stages, model, batches, everything, names=names)
    if fitted is None:
        fit = partial(fit_latency, model, formats, track=track, **timing)
        fitted = kept.facts("latency", fit, Fitted.as_json, Fitted.from_json)
    if latency_ms is not None:
        speedup = fitted.dense_ms / latency_ms
        if speedup <= 1:
            raise VitpruneError(f"latency_ms {latency_ms:g}: the dense model takes {fitted.dense_ms:.2f} ms already")
    limit = fitted.dense_ms / speedup
    check_reach(model, speedup, parts, fitted, formats, floor)
    shared = {"ridge": ridge, "seed": seed, "track": track, **widths}

    @cache
    def scales() -> tuple[Weighed, Judged]:
        found = weighed() if callable(weighed) else weighed
        found = found or weigh(model, batches, parts, ridge=ridge, seed=seed, track=track)
        return found, ask_dense(model, found.kept_back)

    def propose(latency: LatencyModel):
        found, judged = scales()
        of_target = {"limit": limit, "dense_ms": fitted.dense_ms, "parts": parts, "weighed": found, "judged": judged}
        return propose_candidates(model, latency, **of_target, track=track, ridge=ridge, **widths)

    with tempfile.TemporaryDirectory() as folder:
        writer = Writer(Path(folder), _Later(lambda: scales()[0].fitted))
        timer = Timer(model, writer, fitted, tuple(batch_sizes), num_threads, measure)

        def look(latency: LatencyModel) -> tuple[list[Candidate], LatencyModel]:
            return look_at(propose(latency), latency, timer, scales()[1])

        seen = kept.facts(
            "candidates", lambda: look_around(look, fitted, formats, speedup), seen_as_json, seen_from_json
        )
        criterion = options.get("criterion", DEFAULT_CRITERION)
        shaper = Shaper(model, batches, parts, limit, look, timer, shared, criterion)
        results = []
        for number in range(1, MAX_ROUNDS + 1):
            seen = kept.facts(f"shape-{number}", partial(shaper.settle, seen, speedup), seen_as_json, seen_from_json)
            chosen, latency = seen.candidates[seen.best], seen.latency
            wanted = Format(chosen.backend, chosen.precision)

            def make(seen=seen, wanted=wanted):
                shaped, own, left, target, decided = shaper.shape(seen)
                of_units = {"target": target, "decided": decided} if cuts(target) else {"ratio": 0.0}
                pruned, plan = prune(shaped, own, parts=left, dense=model, **of_units, **shared, **options)
                took = seen.latency.predict(pruned)
                timed = shaped if decided is None else decided.in_shape
                as_settled = bool(seen.settled) and math.isclose(took, seen.latency.predict(timed))
                facts = {"predicted": fitted.dense_ms / took, "cut": cuts(target), "as_settled": as_settled}
                near = partial(is_near, speedup=speedup, cuts=cuts(target))
                return pruned, plan, {**facts, "speedups": timer.sure_speedups(pruned, wanted, near)}

            pruned, plan, facts = kept.model(f"round-{number}", make)
            predicted, speedups = facts["predicted"], tuple(facts["speedups"])
            results.append((pruned, plan, predicted, speedups))
            # Where these widths were timed before, pruning again for one measurement would only chase noise.
            found = mean_speedups(seen.settled, speedups) if facts["as_settled"] else speedups
            if is_near(found, speedup, facts["cut"]):
                break
            seen = replace(seen, latency=latency.scaled(predicted / min(found)), settled=())
    candidates = seen.candidates
    pruned, plan, predicted, speedups = _nearest(results, TOLERANCE * speedup)
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
        tuple(replace(each, chosen=each is chosen) for each in sorted(candidates, key=lambda each: each.loss)),
        seen.refused,
    )


class _Later:
    """Batches that are made when they are first read."""

    def __init__(self, make: Callable[[], Batches]) -> None:
        self.make = make

    def __iter__(self):
        return iter(self.make())


def _nearest(results: Sequence[tuple[nn.Module, Plan, float, tuple[float, ...]]], speedup: float):
    """Return the slowest of the results that are fast enough; the fastest where none is."""
    enough = [result for result in results if min(result[3]) >= speedup]
    return min(enough, key=lambda result: min(result[3])) if enough else max(results, key=lambda result: min(result[3]))
