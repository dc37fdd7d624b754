"""The verb: time models against each other in torch and ONNX Runtime."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn

from vitprune.data import data_config
from vitprune.errors import VitpruneError
from vitprune.evaluation.latency import measure_latency
from vitprune.export.onnx_file import export_onnx
from vitprune.export.runtime import OnnxModel, open_onnx
from vitprune.options import BACKENDS, check_choice
from vitprune.progress import Track, untracked


@dataclass(frozen=True)
class BenchRow:
    """Latency of one model on one backend.

    Attributes:
        model: name given to the model.
        backend: key of ``BACKENDS``.
        batch_size: images per run.
        num_threads: threads of the operators.
        median_ms: milliseconds per run.
        p95_ms: 95th percentile, milliseconds per run.
        images_per_second: from the median.
        speedup: median of the first model over median of this one, same backend and batch size.
    """

    model: str
    backend: str
    batch_size: int
    num_threads: int
    median_ms: float
    p95_ms: float
    images_per_second: float
    speedup: float


def bench(
    models: Mapping[str, nn.Module],
    *,
    backends: Sequence[str] = tuple(BACKENDS),
    batch_sizes: Sequence[int] = (1, 8),
    num_threads: int | None = None,
    seconds: float = 3.0,
    track: Track = untracked,
) -> list[BenchRow]:
    """Time models in turn, backend by backend, on random images of their own input size.

    Args:
        models: name -> model in eval mode, on the CPU; the first is what speed-ups refer to.
        backends: keys of ``BACKENDS``.
        batch_sizes: images per run, each at least 1.
        num_threads: threads of the operators; None takes torch's default for all backends.
        seconds: time to spend per backend and batch size, after warm-up.
        track: wraps (pairs of backend and batch size, description), for progress.

    Raises:
        VitpruneError: if a backend or batch size is unknown.
    """
    for backend in backends:
        check_choice("backend", backend, BACKENDS)
    if min(batch_sizes, default=0) < 1:
        raise VitpruneError(f"batch sizes must be at least 1, got {list(batch_sizes)}")
    threads = num_threads or torch.get_num_threads()
    rows = []
    with tempfile.TemporaryDirectory() as folder, _torch_threads(threads):
        exported: dict[str, OnnxModel] = {}
        for backend, batch_size in track(list(product(backends, batch_sizes)), "bench"):
            if backend == "onnxruntime-cpu" and not exported:
                for position, (name, model) in enumerate(models.items()):
                    path = Path(folder) / f"{position}.onnx"
                    export_onnx(model, path, [random_batch(model, 2)])
                    exported[name] = open_onnx(path, num_threads=threads)
            runnable = exported if backend == "onnxruntime-cpu" else models
            runners = {
                name: make_runner(runnable[name], random_batch(model, batch_size)[0]) for name, model in models.items()
            }
            measured = measure_latency(runners, seconds=seconds)
            first = next(iter(measured.values()))
            for name, latency in measured.items():
                rows.append(
                    BenchRow(
                        name,
                        backend,
                        batch_size,
                        threads,
                        latency.median_ms,
                        latency.p95_ms,
                        1000 * batch_size / latency.median_ms,
                        first.median_ms / latency.median_ms,
                    )
                )
    return rows


def random_batch(model: nn.Module, batch_size: int) -> tuple[Tensor, Tensor]:
    """Return random images of the model's own size, and labels that mean nothing."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch_size, *data_config(model)["input_size"], generator=generator), torch.zeros(batch_size)


def make_runner(model: Callable[[Tensor], Tensor], images: Tensor) -> Callable[[], Tensor]:
    """Return a program that runs a model once."""

    @torch.inference_mode()
    def run() -> Tensor:
        return model(images)

    return run


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
