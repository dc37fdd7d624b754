"""How fast a model shall be on a backend, which widths it is fast at, and how fast it became."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from vitprune.errors import VitpruneError
from vitprune.models.facts import Asked
from vitprune.progress import Track, untracked
from vitprune.pruning.target import Target, target_latency
from vitprune.speed.alignment import find_round_to
from vitprune.speed.bench import bench
from vitprune.speed.ffn_latency import ffn_shapes, measure_ffn_latency


@dataclass(frozen=True)
class Reached:
    """What came of a latency target.

    Attributes:
        backend: key of ``BACKENDS``.
        batch_size: images per run.
        median_ms: of the pruned model.
        dense_median_ms: of the dense one, in the same run.
        speedup: how many times faster the pruned one is.
        predicted_ms: of the pruned model, by the tables that the target was met with.
        predicted_speedup: likewise.
    """

    backend: str
    batch_size: int
    median_ms: float
    dense_median_ms: float
    speedup: float
    predicted_ms: float
    predicted_speedup: float


def default_backend(model: nn.Module) -> str:
    """Return the backend that a model is probably for: ONNX Runtime on a CPU, torch on a GPU."""
    return "onnxruntime-cpu" if _device(model) == "cpu" else "torch-eager"


def measure_target(
    model: nn.Module,
    limit: float | None = None,
    *,
    speedup: float | None = None,
    backend: str,
    batch_size: int = 1,
    track: Track = untracked,
) -> Target:
    """Ask for a latency: time the model over the widths of its FFNs here.

    Args:
        model: timm Vision Transformer in eval mode.
        limit: ms per run.
        speedup: how many times as fast as it is now instead.
        backend: key of ``BACKENDS``.
        batch_size: images per run.
        track: wraps (items, description), for progress.

    Raises:
        VitpruneError: if the backend is absent, or the model cannot be that fast or is faster already.
    """
    if (limit is None) == (speedup is None):
        raise VitpruneError("say how fast: either `limit` or `speedup`")
    if speedup is not None and not 1 < speedup < float("inf"):
        raise VitpruneError(f"speedup must be above 1, got {speedup:g}")
    total, tables = measure_ffn_latency(
        model, backend=backend, batch_size=batch_size, device=_device(model), track=track
    )
    return target_latency(model, total / speedup if limit is None else limit, total=total, tables=tables)


def find_multiple(model: nn.Module, share: float, *, backend: str, batch_size: int = 1) -> int:
    """Return which multiple the widths of a model should be of on a backend, once a share of its neurons is gone."""
    largest = max(ffn_shapes(model).values(), key=lambda shape: shape.num_neurons)
    return find_round_to(largest, share, backend=backend, batch_size=batch_size, device=_device(model))


def measure_reached(
    model: nn.Module,
    pruned: nn.Module,
    asked: Asked,
    *,
    backend: str,
    batch_size: int = 1,
    track: Track = untracked,
) -> Reached:
    """Time the pruned model beside the dense one, which tells a prediction's error from a change of the machine.

    Args:
        model: the dense model.
        pruned: what came of it.
        asked: the target in the plan's facts.
        backend: key of ``BACKENDS``.
        batch_size: images per run.
        track: wraps (settings, description), for progress.
    """
    device = "cpu" if backend.startswith("onnxruntime") else _device(model)
    models = {"dense": model, "pruned": pruned}
    dense, small = bench(models, backends=[backend], batch_sizes=[batch_size], device=device, track=track)
    return Reached(
        small.backend,
        small.batch_size,
        small.median_ms,
        dense.median_ms,
        small.speedup,
        asked.predicted,
        asked.dense / asked.predicted,
    )


def _device(model: nn.Module) -> str:
    return str(next(model.parameters()).device)
