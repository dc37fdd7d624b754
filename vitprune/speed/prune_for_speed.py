"""The verb: make a model as fast as asked for, with whatever costs least: fewer tokens, narrower layers, 8 bits.

How fast a candidate is follows from a fitted model of the machine's times; what it loses is measured on images that
nothing was fitted to. The best is timed, which corrects the fit where it matters, pruned, and timed again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from torch import nn

from vitprune.calibration.criteria import REGISTRY as CRITERIA
from vitprune.data import Batches, label_names_of
from vitprune.entry import entry
from vitprune.errors import VitpruneError
from vitprune.export.openvino_file import OPENVINO, OpenVinoModel, open_openvino
from vitprune.export.runtime import OnnxModel, open_session
from vitprune.images.resized_batches import resize_batches
from vitprune.models.fewer_tokens import FewerTokens, reduce_tokens
from vitprune.models.image_size import check_image_size, smaller_sizes
from vitprune.models.units import FFN
from vitprune.options import DEFAULT_ALLOCATION, DEFAULT_CRITERION, DEFAULT_FLOOR, DEFAULT_RIDGE
from vitprune.progress import Track, untracked
from vitprune.pruning.choose_tokens import Judged, Weighed, ask_dense, choose_tokens, go_on, make_candidates, weigh
from vitprune.pruning.decide import OUTER, PIXELS, TOKENS, check_parts
from vitprune.pruning.decide_parts import Decided, decide_parts, study_parts
from vitprune.pruning.latency_model import AttentionShape, LatencyModel, Shape, shape_of
from vitprune.pruning.plan import Plan
from vitprune.pruning.prune import prune
from vitprune.pruning.target import Target
from vitprune.seen_images import watch
from vitprune.speed.fit_latency import Fitted, Format, Writer, fit_latency, time_sources
from vitprune.speed.stages import open_stages
from vitprune.timing import paired_speedup
from vitprune.views import data_config

DEFAULT_PARTS = ("ffn", "qk", "vo", "layers", *OUTER)
# A result that is slower than this share of what was asked for is pruned again, and more mildly one that is faster than
# the other, so many times at most.
TOLERANCE, GENEROUS = 0.985, 1.02
MAX_ROUNDS = 3


class OutOfReachError(VitpruneError):
    """A speed-up that all that may go does not give."""


# Model and format -> how many times faster than the dense model, at each batch size.
Measure = Callable[[nn.Module, Format], Sequence[float]]


@dataclass(frozen=True)
class Candidate:
    """A way to be as fast as asked for that was looked at.

    Attributes:
        backend: key of ``BACKENDS``.
        precision: of the products with weights.
        image_size: height and width in pixels; None: the model's own.
        merge: tokens that disappear in each block; None where none do.
        loss: KL(dense || candidate) on images kept back, nats per image, everything refitted at once.
        predicted_speedup: by the fitted model.
        measured_speedup: the least over batch sizes; None where it was not timed.
        chosen: whether the result was made of it.
    """

    backend: str
    precision: str
    image_size: tuple[int, int] | None
    merge: tuple[int, ...] | None
    loss: float
    predicted_speedup: float
    measured_speedup: float | None = None
    chosen: bool = False

    @property
    def fewer(self) -> FewerTokens:
        """How its tokens are fewer."""
        return FewerTokens(self.image_size, self.merge)


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
    _check_reach(model, speedup, parts, fitted, formats, floor)
    shared = {"ridge": ridge, "seed": seed, "track": track, **widths}

    @cache
    def scales() -> tuple[Weighed, Judged]:
        found = weighed() if callable(weighed) else weighed
        found = found or weigh(model, batches, parts, ridge=ridge, seed=seed, track=track)
        return found, ask_dense(model, found.kept_back)

    def propose(latency: LatencyModel):
        found, judged = scales()
        of_target = {"limit": limit, "dense_ms": fitted.dense_ms, "parts": parts, "weighed": found, "judged": judged}
        return _propose(model, latency, **of_target, track=track, ridge=ridge, **widths)

    with tempfile.TemporaryDirectory() as folder:
        writer = Writer(Path(folder), _Later(lambda: scales()[0].fitted))
        timer = _Timer(model, writer, fitted, tuple(batch_sizes), num_threads, measure)

        def look(latency: LatencyModel) -> tuple[list[Candidate], LatencyModel]:
            return _look(propose(latency), latency, timer, scales()[1])

        seen = kept.facts("candidates", lambda: _look_around(look, fitted, formats, speedup), _as_json, _from_json)
        shaper = _Shaper(model, batches, parts, limit, look, timer, shared, options)
        results = []
        for number in range(1, MAX_ROUNDS + 1):
            seen = kept.facts(f"shape-{number}", partial(shaper.settle, seen, speedup), _as_json, _from_json)
            chosen, latency = seen.candidates[seen.best], seen.latency
            wanted = Format(chosen.backend, chosen.precision)

            def make(seen=seen, wanted=wanted):
                shaped, own, left, target, decided = shaper.shape(seen)
                of_units = {"target": target, "decided": decided} if _cuts(target) else {"ratio": 0.0}
                pruned, plan = prune(shaped, own, parts=left, dense=model, **of_units, **shared, **options)
                predicted = fitted.dense_ms / seen.latency.predict(pruned)
                facts = {"predicted": predicted, "speedups": timer.speedups(pruned, wanted), "cut": _cuts(target)}
                return pruned, plan, facts

            pruned, plan, facts = kept.model(f"round-{number}", make)
            predicted, speedups = facts["predicted"], tuple(facts["speedups"])
            results.append((pruned, plan, predicted, speedups))
            if _is_near(speedups, speedup, facts["cut"]):
                break
            seen = replace(seen, latency=latency.scaled(predicted / min(speedups)))
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


@dataclass(frozen=True)
class _Seen:
    """What a look around in all formats found.

    Attributes:
        candidates: of all formats.
        best: which of these to go on with.
        latency: of its format, corrected by what was timed.
        refused: format -> why nothing in it is so fast.
    """

    candidates: tuple[Candidate, ...]
    best: int
    latency: LatencyModel
    refused: Mapping[str, str]


def _as_json(seen: _Seen) -> dict[str, Any]:
    return asdict(seen)


def _from_json(content: Mapping[str, Any]) -> _Seen:
    latency = content["latency"]
    return _Seen(
        tuple(candidate_from_json(row) for row in content["candidates"]),
        content["best"],
        LatencyModel(**{**latency, "rates": tuple(latency["rates"])}),
        content["refused"],
    )


def candidate_from_json(row: Mapping[str, Any]) -> Candidate:
    """Read a candidate from JSON values.

    >>> candidate_from_json(asdict(Candidate("openvino", "int8", (160, 160), None, 0.5, 2.0))).image_size
    (160, 160)
    """
    return Candidate(**{**row, **{name: row.get(name) and tuple(row[name]) for name in ("image_size", "merge")}})


def _look_around(
    look: Callable[[LatencyModel], tuple[list[Candidate], LatencyModel]],
    fitted: Fitted,
    formats: Sequence[Format],
    speedup: float,
) -> _Seen:
    """Look at candidates in every format; the least loss is best."""
    found, refused = [], {}
    for wanted in formats:
        try:
            found.append(look(fitted.models[wanted]))
        except VitpruneError as error:
            refused[str(wanted)] = str(error)
    if not found:
        reasons = "; ".join(f"{wanted}: {reason}" for wanted, reason in refused.items())
        raise OutOfReachError(f"{speedup:.4g} times as fast is out of reach; {reasons}")
    best, latency = min(found, key=lambda each: each[0][0].loss)
    candidates = tuple(candidate for of_format, _latency in found for candidate in of_format)
    return _Seen(candidates, next(at for at, each in enumerate(candidates) if each is best[0]), latency, refused)


class _Later:
    """Batches that are made when they are first read."""

    def __init__(self, make: Callable[[], Batches]) -> None:
        self.make = make

    def __iter__(self):
        return iter(self.make())


def _cuts(target: Target) -> bool:
    return target.dense > target.limit


def _is_near(speedups: Sequence[float], speedup: float, cuts: bool) -> bool:
    """Tell whether a result is fast enough and not milder than need be; without units to keep it cannot be milder."""
    return TOLERANCE * speedup <= min(speedups) <= (GENEROUS * speedup if cuts else float("inf"))


class _Shaper:
    """Decides how wide everything is, and times models of these widths, before their weights are fitted."""

    def __init__(self, model, batches, parts, limit: float, look, timer: _Timer, shared, options) -> None:
        self.model, self.batches, self.parts, self.limit = model, batches, parts, limit
        self.look, self.timer, self.shared = look, timer, shared
        self.wanted = CRITERIA[options.get("criterion", DEFAULT_CRITERION)].statistics
        self.known: dict[Any, Any] = {}

    def settle(self, seen: _Seen, speedup: float) -> _Seen:
        """Return what was seen, with a fit by which the widths that are decided turn out as fast as asked for."""
        for _round in range(MAX_ROUNDS):
            chosen = seen.candidates[seen.best]
            try:
                _shaped, _own, _left, target, decided = self.shape(seen)
            except VitpruneError:
                # The fit was further off than this schedule leaves room for: others, with what was measured.
                try:
                    again, latency = self.look(seen.latency)
                except VitpruneError as error:
                    raise OutOfReachError(f"{speedup:.4g} times as fast is out of reach; {error}") from error
                seen = replace(seen, candidates=(*seen.candidates, *again), best=len(seen.candidates), latency=latency)
                continue
            if decided is None:
                break
            candidate = decided.in_shape
            speedups = self.timer.speedups(candidate, Format(chosen.backend, chosen.precision))
            if _is_near(speedups, speedup, _cuts(target)):
                break
            ratio = self.timer.dense_ms / seen.latency.predict(candidate) / min(speedups)
            seen = replace(seen, latency=seen.latency.scaled(ratio))
        return seen

    def shape(self, seen: _Seen) -> tuple[nn.Module, Batches, tuple[str, ...], Target, Decided | None]:
        """Return the model with fewer tokens, its images, the parts that go of it, how far, and what is decided."""
        chosen, meter = seen.candidates[seen.best], seen.latency.meter()
        target = _target_of(meter, self.model, self.limit)
        shaped, target, left = go_on(self.model, chosen.fewer, target, self.parts, meter)
        own = self.batches if chosen.image_size is None else resize_batches(self.batches, shaped)
        if left == (FFN,) or not _cuts(target):
            return shaped, own, left, target, None
        names = ("allocation", "round_to", "floor", "ridge", "seed", "track")
        options = {name: self.shared[name] for name in names}
        if (chosen.fewer, left) not in self.known:
            measuring = {name: options[name] for name in ("ridge", "seed", "track")}
            self.known[chosen.fewer, left] = study_parts(shaped, own, left, self.wanted, **measuring)
        studied = self.known[chosen.fewer, left]
        key = (chosen.fewer, seen.latency)
        if key not in self.known:
            self.known[key] = decide_parts(shaped, own, left, target=target, studied=studied, **options)
        return shaped, own, left, target, self.known[key]


def _nearest(results: Sequence[tuple[nn.Module, Plan, float, tuple[float, ...]]], speedup: float):
    """Return the slowest of the results that are fast enough; the fastest where none is."""
    enough = [result for result in results if min(result[3]) >= speedup]
    return min(enough, key=lambda result: min(result[3])) if enough else max(results, key=lambda result: min(result[3]))


def _look(
    proposed: tuple[list[Candidate], Callable[[FewerTokens], nn.Module]],
    latency: LatencyModel,
    timer: _Timer,
    judged: Judged,
) -> tuple[list[Candidate], LatencyModel]:
    """Time the best candidate of a format, in it, and return all with the fit corrected by that."""
    found, make = proposed
    best, wanted = found[0], Format(latency.backend, latency.precision)
    candidate = make(best.fewer)
    if wanted.precision != "float32":
        file = _open(candidate, timer.write(candidate, wanted), wanted.backend)
        best = replace(best, loss=judged.loss_of(lambda images: file(images).to(images), best.image_size))
    best = replace(best, measured_speedup=min(timer.speedups(candidate, wanted)))
    return [best, *found[1:]], latency.scaled(best.predicted_speedup / best.measured_speedup)


def _target_of(meter, model: nn.Module, limit: float):
    return replace(meter.target(model, meter.count(model)), limit=limit)


def _propose(
    model: nn.Module,
    latency: LatencyModel,
    *,
    limit: float,
    dense_ms: float,
    parts: Sequence[str],
    weighed: Weighed,
    judged: Judged,
    track: Track,
    **widths: Any,
) -> tuple[list[Candidate], Callable[[FewerTokens], nn.Module]]:
    """Return what meets a limit in one format, the least loss first, and what makes a candidate of fewer tokens."""
    meter = latency.meter()
    target = _target_of(meter, model, limit)

    def make(fewer: FewerTokens) -> nn.Module:
        sized, size = reduce_tokens(model, FewerTokens(fewer.image_size)), fewer.image_size
        return make_candidates(sized, target, parts, weighed.at_size(size), meter=meter, **widths)(fewer.schedule)

    if any(part in OUTER for part in parts) and latency.predict(model) > limit:
        tried = choose_tokens(model, target, parts, weighed, meter=meter, track=track, **widths)
        of_each = [(each.fewer, each.loss, each.cost) for each in tried]
    else:
        only = make(FewerTokens())
        of_each = [(FewerTokens(), judged.loss_of(only), latency.predict(only))]
    return [
        Candidate(latency.backend, latency.precision, fewer.image_size, fewer.schedule, loss, dense_ms / cost)
        for fewer, loss, cost in of_each
    ], make


def _check_reach(
    model: nn.Module, speedup: float, parts: Sequence[str], fitted: Fitted, formats: Sequence[Format], floor: float
) -> None:
    """Refuse what would not be reached by taking all that may go, before anything is measured on images."""
    most = {
        wanted: _times_faster(fitted.dense_ms, latency.of_shape(_least(model, latency, parts, floor)))
        for wanted, latency in ((each, fitted.models[each]) for each in formats)
    }
    best = max(most, key=lambda wanted: most[wanted])
    if speedup > most[best]:
        others = [part for part in DEFAULT_PARTS if part not in parts]
        more = f"let {', '.join(others)} go as well, or ask for less" if others else "ask for less"
        raise OutOfReachError(
            f"{speedup:.4g} times as fast is out of reach: with next to nothing left of {', '.join(parts)} the model "
            f"would be about {most[best]:.3g} times as fast ({best}); {more}"
        )


def _times_faster(dense_ms: float, ms: float) -> float:
    """Return a speed-up; infinite where the fit gives nothing for what is left."""
    return dense_ms / ms if ms > 0 else float("inf")


def _least(model: nn.Module, latency: LatencyModel, parts: Sequence[str], floor: float) -> Shape:
    """Return the shape of a model that lost all it could."""
    shape = shape_of(model, reads_last_block=latency.reads_last_block)
    blocks = []
    for block in shape.blocks:
        attention = block.attention
        if isinstance(attention, AttentionShape):
            qk, vo = (
                max(1, round(floor * width)) if part in parts else width
                for part, width in (("qk", attention.qk), ("vo", attention.vo))
            )
            attention = replace(attention, qk=qk, vo=vo)
        if "layers" in parts:
            attention = None
        ffn = 0.0 if "layers" in parts else block.ffn * floor if "ffn" in parts else block.ffn
        blocks.append(replace(block, attention=attention, ffn=ffn))
    shape = replace(shape, blocks=tuple(blocks))
    if PIXELS in parts:
        height, width = smaller_sizes(model)[-1] if smaller_sizes(model) else data_config(model)["input_size"][1:]
        patch_size = check_image_size(model)
        patches = (height // patch_size[0]) * (width // patch_size[1])
        shape = replace(shape, num_tokens=shape.num_prefix + patches)
    if TOKENS not in parts:
        return shape
    schedule, left = [], shape.num_tokens - shape.num_prefix
    for _block in blocks:
        schedule.append(left // 2)
        left -= left // 2
    return shape.with_merging(schedule)


def open_as(model: nn.Module, wanted: Format, writer: Writer, name: str) -> Any:
    """Return what answers as a model does in a format: itself in float32, else its file, opened.

    Args:
        model: pruned or not.
        wanted: the format.
        writer: of files.
        name: of the model, for its files.

    >>> model = nn.Identity()
    >>> open_as(model, Format("onnxruntime-cpu"), Writer(Path()), "identity") is model
    True
    """
    if wanted.precision == "float32":
        return model
    return _open(model, writer.source(model, wanted, name), wanted.backend)


def _open(model: nn.Module, path: Path, backend: str) -> OnnxModel | OpenVinoModel:
    if backend == OPENVINO:
        return open_openvino(path)
    facts = {"data_config": data_config(model), "num_classes": model.num_classes}
    names = label_names_of(model)
    return OnnxModel(open_session(path, backend=backend), {**facts, "label_names": names or ()}, path)


class _Timer:
    """Times models in turns with the dense one, which is written once."""

    def __init__(
        self,
        dense: nn.Module,
        writer: Writer,
        fitted: Fitted,
        batch_sizes: tuple[int, ...],
        num_threads: int | None,
        measure: Measure | None,
    ) -> None:
        self.writer, self.reference, self.written = writer, fitted.reference, {}
        self.dense_ms = fitted.dense_ms
        self.dense, self.measure = dense, measure
        self.batch_sizes, self.num_threads = batch_sizes, num_threads

    def write(self, model: nn.Module, wanted: Format) -> nn.Module | Path:
        """Return what runs a model in a format; the same model is written once."""
        _model, number = self.written.setdefault(id(model), (model, len(self.written)))
        return self.writer.source(model, wanted, f"{number}")

    def speedups(self, model: nn.Module, wanted: Format) -> tuple[float, ...]:
        """Return how many times faster than the dense model a candidate is at each batch size."""
        if self.measure is not None:
            return tuple(self.measure(model, wanted))
        dense = self.write(self.dense, self.reference)
        sources = {(self.reference, "dense"): dense, (wanted, "candidate"): self.write(model, wanted)}
        result = []
        for batch_size in self.batch_sizes:
            first, second = time_sources(sources, batch_size, self.num_threads).values()
            result.append(paired_speedup(first, second).ratio)
        return tuple(result)
