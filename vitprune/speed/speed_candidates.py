"""Ways to a speed: proposed by a fit of the machine's times, judged on images kept back, the best one timed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from vitprune.data import label_names_of
from vitprune.errors import VitpruneError
from vitprune.export.openvino_file import OPENVINO, OpenVinoModel, open_openvino
from vitprune.export.runtime import OnnxModel, open_session
from vitprune.models.fewer_tokens import FewerTokens, reduce_tokens
from vitprune.progress import Track
from vitprune.pruning.choose_tokens import Judged, Weighed, choose_tokens, make_candidates
from vitprune.pruning.decide import OUTER
from vitprune.pruning.latency_model import LatencyModel
from vitprune.pruning.meters import Meter
from vitprune.pruning.target import Target
from vitprune.speed.fit_latency import Fitted, Format, Writer, time_sources
from vitprune.timing import paired_speedup
from vitprune.views import data_config

# Of timing a candidate and the dense model: more than of the many for the fit, for one by one they decide.
SECONDS_EACH = 4.0


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
        loss: how far its answers are from the dense ones (``answer_loss``), per image, on images kept back, everything
            refitted at once.
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
class Seen:
    """What a look around in all formats found.

    Attributes:
        candidates: of all formats.
        best: which of these to go on with.
        latency: of its format, corrected by what was timed.
        refused: format -> why nothing in it is so fast.
        settled: how many times faster than the dense model the widths are that were decided, at each batch size; empty
            where none were timed.
    """

    candidates: tuple[Candidate, ...]
    best: int
    latency: LatencyModel
    refused: Mapping[str, str]
    settled: tuple[float, ...] = ()


def seen_as_json(seen: Seen) -> dict[str, Any]:
    """Return JSON values."""
    return asdict(seen)


def seen_from_json(content: Mapping[str, Any]) -> Seen:
    """Read what ``seen_as_json`` gave."""
    latency = content["latency"]
    return Seen(
        tuple(candidate_from_json(row) for row in content["candidates"]),
        content["best"],
        LatencyModel(**{**latency, "rates": tuple(latency["rates"])}),
        content["refused"],
        tuple(content.get("settled", ())),
    )


def candidate_from_json(row: Mapping[str, Any]) -> Candidate:
    """Read a candidate from JSON values.

    >>> candidate_from_json(asdict(Candidate("openvino", "int8", (160, 160), None, 0.5, 2.0))).image_size
    (160, 160)
    """
    return Candidate(**{**row, **{name: row.get(name) and tuple(row[name]) for name in ("image_size", "merge")}})


def look_around(
    look: Callable[[LatencyModel], tuple[list[Candidate], LatencyModel]],
    fitted: Fitted,
    formats: Sequence[Format],
    speedup: float,
) -> Seen:
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
    return Seen(candidates, next(at for at, each in enumerate(candidates) if each is best[0]), latency, refused)


def look_at(
    proposed: tuple[list[Candidate], Callable[[FewerTokens], nn.Module]],
    latency: LatencyModel,
    timer: Timer,
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


def target_of(meter: Meter, model: nn.Module, limit: float) -> Target:
    """Return the target of so many milliseconds for all of a model."""
    return replace(meter.target(model, meter.count(model)), limit=limit)


def propose_candidates(
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
    target = target_of(meter, model, limit)

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


def mean_speedups(first: Sequence[float], second: Sequence[float]) -> tuple[float, ...]:
    """Return the geometric means of two measurements of one shape, at each batch size.

    >>> mean_speedups((2.0, 3.0), (8.0, 3.0))
    (4.0, 3.0)
    """
    return tuple(math.sqrt(one * other) for one, other in zip(first, second, strict=True))


class Timer:
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

    def sure_speedups(
        self, model: nn.Module, wanted: Format, is_near: Callable[[Sequence[float]], bool]
    ) -> tuple[float, ...]:
        """Return ``speedups``, of two measurements where one alone is not near: what follows costs minutes."""
        first = self.speedups(model, wanted)
        return first if is_near(first) else mean_speedups(first, self.speedups(model, wanted))

    def speedups(self, model: nn.Module, wanted: Format) -> tuple[float, ...]:
        """Return how many times faster than the dense model a candidate is at each batch size."""
        if self.measure is not None:
            return tuple(self.measure(model, wanted))
        dense = self.write(self.dense, self.reference)
        sources = {(self.reference, "dense"): dense, (wanted, "candidate"): self.write(model, wanted)}
        result = []
        for batch_size in self.batch_sizes:
            timed = time_sources(sources, batch_size, self.num_threads, seconds_each=SECONDS_EACH)
            first, second = timed.values()
            result.append(paired_speedup(first, second).ratio)
        return tuple(result)
