"""The verb: time models against each other in torch and ONNX Runtime."""

from __future__ import annotations

import copy
import multiprocessing
import os
import platform
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor, nn

from vitprune.card import name_processor
from vitprune.entry import entry
from vitprune.errors import VitpruneError
from vitprune.export.onnx_file import export_onnx
from vitprune.export.openvino_file import (
    OPENVINO,
    SUFFIX,
    facts_in,
    import_nncf,
    import_openvino,
    make_openvino_runner,
    quantize_for_openvino,
    read_openvino,
)
from vitprune.export.profile import count_graph_macs, make_session_runner
from vitprune.export.quantize import halve, quantize
from vitprune.export.runtime import PROVIDERS, check_finite_initializers, check_provider, open_session, read_facts
from vitprune.models.load import check_device
from vitprune.models.macs import amdahl_ceiling, count_macs
from vitprune.options import BACKENDS, PRECISIONS_TORCH, check_choice
from vitprune.processes import peak_memory_bytes
from vitprune.progress import Track, untracked
from vitprune.speed.footprint import measure_footprint
from vitprune.timing import measure_latency, paired_speedup
from vitprune.views import data_config

DEFAULT_BACKENDS = ("torch-eager", "onnxruntime-cpu")
DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# What files are timed in without images to quantise them by.
TIMED_IN_FILES = ("float32", "float16", "int8")
# Backends that run files, which torch models are exported to first.
FILE_BACKENDS = (*PROVIDERS, OPENVINO)
Runner = Callable[[], Any]


@dataclass(frozen=True)
class BenchRow:
    """Latency of one model on one backend.

    Attributes:
        model: name given to the model.
        backend: key of ``BACKENDS``.
        precision: of the matrix products with weights.
        batch_size: images per run.
        num_threads: threads of the operators.
        median_ms: milliseconds per run.
        p95_ms: 95th percentile, milliseconds per run.
        images_per_second: from the median.
        speedup: how many times faster than the first model in the first precision, at the same backend, batch size and
            number of threads, or than the baseline, timed in the same rounds; geometric mean over rounds.
        speedup_low: lower end of its 95 % confidence interval.
        speedup_high: upper end.
        speedup_ceiling: what fewer multiply-accumulates allow at most, as this backend computes them (Amdahl); None at
            another precision than that of what it is compared with, or where a file does not tell them.
        ceiling_share: speed-up over ceiling; None without a ceiling.
        peak_bytes: most memory held by a process that runs nothing else (on a GPU: of its memory, by torch); None where
            it was not measured, as with ONNX Runtime's providers for GPUs.
    """

    model: str
    backend: str
    precision: str
    batch_size: int
    num_threads: int
    median_ms: float
    p95_ms: float
    images_per_second: float
    speedup: float
    speedup_low: float
    speedup_high: float
    speedup_ceiling: float | None
    ceiling_share: float | None
    peak_bytes: int | None = None


@dataclass(frozen=True)
class Setting:
    """How a model is run.

    Attributes:
        backend: key of ``BACKENDS``.
        precision: key of ``DTYPES``; files of ONNX Runtime have their own.
        batch_size: images per run.
        num_threads: of ONNX Runtime's operators; torch's are the process's.
        device: of the torch backends.
    """

    backend: str
    precision: str = "float32"
    batch_size: int = 1
    num_threads: int | None = None
    device: str = "cpu"


@entry
def bench(
    models: Mapping[str, nn.Module | str | Path],
    *,
    backends: Sequence[str] = DEFAULT_BACKENDS,
    precisions: Sequence[str] = ("float32",),
    batch_sizes: Sequence[int] = (1, 8),
    num_threads: Sequence[int] | None = None,
    device: str = "cpu",
    seconds: float = 5.0,
    memory: bool = False,
    baseline: str | None = None,
    track: Track = untracked,
) -> list[BenchRow]:
    """Time models in turn on random images of their own input size.

    Args:
        models: name -> model in eval mode, or path of an ONNX or OpenVINO file; the first is what speed-ups refer
            to, on each backend.
        backends: keys of ``BACKENDS``.
        precisions: for torch ``float32``, ``tf32``, ``bf16``, ``fp16``; for ONNX Runtime ``float32``, ``int8``; for
            OpenVINO ``float32``, ``int8`` (quantised by random images: good for timing alone; files are timed as they
            are).
        batch_sizes: images per run, each at least 1.
        num_threads: threads of the operators, each at least 1; None takes torch's default.
        device: of the torch backends.
        seconds: time to spend per backend, batch size and number of threads, after warm-up.
        memory: measure peak memory too, in a process of its own for each row (on the CPU: it is spawned, so the calling
            script needs the usual ``if __name__ == "__main__"``).
        baseline: name of a model, or ``MODEL@BACKEND``, that all speed-ups refer to instead, on every backend: all rows
            of a batch size and number of threads then run in the same rounds, and a file is run by those of
            ``backends`` that can run its kind. Without a backend: the first that runs the model.
        track: wraps (settings, description), for progress.

    Raises:
        VitpruneError: if an argument is unknown or absent here, or a combination cannot be run.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32).eval()
    >>> rows = bench({"tiny": model}, backends=["torch-eager"], batch_sizes=[1], seconds=0.01)
    >>> [(row.model, row.backend, row.speedup) for row in rows]
    [('tiny', 'torch-eager', 1.0)]
    """
    threads = list(num_threads or [torch.get_num_threads()])
    _check(models, backends, precisions, batch_sizes, threads, device, baseline)
    pairs = _pairs(models, backends, baseline)
    reference = None if baseline is None else _find_baseline(baseline, pairs)
    sets = [backends] if baseline is not None else [[backend] for backend in backends]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        files = _Files(models, Path(folder), backends)
        for together, batch_size, count in track(list(product(sets, batch_sizes, threads)), "bench"):
            keys = [(*pair, precision) for pair in pairs if pair[0] in together for precision in precisions]
            first = keys[0] if reference is None else (*reference, precisions[0])
            if "torch-compile" in together:
                torch._dynamo.reset()  # or the models compiled before would count against its limit
            with _torch_threads(count):
                runners = {
                    (backend, name, precision): make_backend_runner(
                        files.get(name, precision, backend) if backend in FILE_BACKENDS else models[name],
                        Setting(backend, precision, batch_size, count, device),
                    )
                    for backend, name, precision in keys
                }
                for run in runners.values():
                    run()  # compiles
                measured = measure_latency(runners, seconds=seconds * len(together))
            for key in keys:
                speedup = paired_speedup(measured[first], measured[key])
                ceiling = _find_ceiling(files, first, key)
                rows.append(
                    BenchRow(
                        *(key[1], key[0], files.precision(key[1], key[2]), batch_size, count),
                        measured[key].median_ms,
                        measured[key].p95_ms,
                        1000 * batch_size / measured[key].median_ms,
                        *(speedup.ratio, speedup.low, speedup.high),
                        ceiling,
                        None if ceiling is None else speedup.ratio / ceiling,
                        _measure_memory(files, key, batch_size, count, device) if memory else None,
                    )
                )
    return rows


def _pairs(models: Mapping[str, Any], backends: Sequence[str], baseline: str | None) -> list[tuple[str, str]]:
    """Return which backend runs which model; with a baseline, none that cannot run a file of its kind."""
    pairs = list(product(backends, models))
    if baseline is None:
        return pairs
    pairs = [(backend, name) for backend, name in pairs if _runs(backend, models[name])]
    lost = [name for name in models if name not in {name for _backend, name in pairs}]
    if lost:
        raise VitpruneError(f"{lost[0]}: none of {', '.join(backends)} runs a file of its kind; name other backends")
    return pairs


def _runs(backend: str, model: Any) -> bool:
    if isinstance(model, nn.Module):
        return True
    return backend == OPENVINO or (backend in PROVIDERS and not _is_openvino(model))


def _is_openvino(model: Any) -> bool:
    return not isinstance(model, nn.Module) and Path(model).suffix == SUFFIX


def _find_baseline(baseline: str, pairs: Sequence[tuple[str, str]]) -> tuple[str, str]:
    name, sign, backend = baseline.rpartition("@")
    found = [pair for pair in pairs if pair[1] == baseline or (sign and pair == (backend, name))]
    if not found:
        known = ", ".join(f"{name}@{backend}" for backend, name in pairs)
        raise VitpruneError(f"baseline '{baseline}' is none of what is timed: {known}")
    return found[0]


def _find_ceiling(files: _Files, first: tuple[str, str, str], key: tuple[str, str, str]) -> float | None:
    if files.precision(first[1], first[2]) != files.precision(key[1], key[2]):
        return None
    dense, own = (files.count_macs(name, backend) for backend, name, _precision in (first, key))
    return None if dense is None or own is None else amdahl_ceiling(dense, own)


def _measure_memory(files: _Files, key: tuple[str, str, str], batch_size: int, count: int, device: str) -> int | None:
    backend, name, precision = key
    if backend == "onnxruntime-cpu":
        return measure_footprint(files.get(name, precision, backend), batch_size=batch_size, num_threads=count)
    if backend in FILE_BACKENDS:
        return None
    return _measure_peak(files.models[name], Setting(backend, precision, batch_size, count, device))


def _check(models, backends, precisions, batch_sizes, threads, device: str, baseline: str | None) -> None:
    for backend in backends:
        check_choice("backend", backend, BACKENDS)
        known = TIMED_IN_FILES if backend in PROVIDERS else PRECISIONS_TORCH
        if backend == OPENVINO:
            import_openvino()
            known = ("float32", "int8")
            if "int8" in precisions:
                import_nncf()
        for precision in precisions:
            if precision not in known:
                raise VitpruneError(f"{backend} runs {', '.join(known)}, not '{precision}'; name other backends")
        if backend in PROVIDERS:
            check_provider(backend)
        elif backend != OPENVINO:
            check_device(device)
        unable = [name for name, model in models.items() if not _runs(backend, model)]
        if unable and baseline is None:
            kind, able = ("OpenVINO", OPENVINO) if _is_openvino(models[unable[0]]) else ("ONNX", "onnxruntime-cpu")
            raise VitpruneError(f"{unable[0]} is an {kind} file: {backend} cannot run it, {able} can")
    if "tf32" in precisions and torch.device(device).type != "cuda":
        raise VitpruneError(f"tf32 is a precision of GPUs; the device is {device}")
    narrow = next((precision for precision in ("int8", "float16") if precision in precisions), None)
    if narrow is not None:
        files = [name for name, model in models.items() if not isinstance(model, nn.Module)]
        if files:
            raise VitpruneError(f"{files[0]} is timed as it is; export its model with `precision` {narrow}")
    for what, values in (("batch sizes", batch_sizes), ("thread counts", threads)):
        if min(values, default=0) < 1:
            raise VitpruneError(f"{what} must be at least 1, got {list(values)}")
    if device != "cpu" and set(backends) <= set(FILE_BACKENDS):
        raise VitpruneError(f"device {device} is for torch; backends that run files say where they run")
    for model in models.values():
        if not isinstance(model, nn.Module) and not _is_openvino(model):
            fixed = open_session(model).get_inputs()[0].shape[0]
            if isinstance(fixed, int) and set(batch_sizes) != {fixed}:
                raise VitpruneError(
                    f"{model} runs {fixed} images at a time, not {list(batch_sizes)}; pass {fixed} as `batch_size`"
                )


def operators_for(backends: Sequence[str]) -> str:
    """Return which operators to export for providers: their own where all of them have them."""
    known = {"onnxruntime-cpu", "onnxruntime-cuda"}
    if OPENVINO in backends:
        return "standard"
    return "onnxruntime" if known >= set(backends) & set(PROVIDERS) else "standard"


class _Files:
    """The models as ONNX files, each exported when it is first asked for; and their multiply-accumulates."""

    def __init__(self, models: Mapping[str, Any], folder: Path, backends: Sequence[str]) -> None:
        self.models, self.folder = models, folder
        self.providers = [backend for backend in backends if backend in PROVIDERS]
        self.precisions: dict[str, str] = {}
        self.exported: dict[tuple[str, str, str], Path] = {}
        self.macs: dict[tuple[str, str], int | None] = {}

    def get(self, name: str, precision: str, backend: str) -> Path:
        model = self.models[name]
        operators = operators_for([backend] if backend == OPENVINO else self.providers)
        key = (name, precision if precision != "int8" or backend != OPENVINO else "int8-openvino", operators)
        if not isinstance(model, nn.Module):
            return Path(model)
        if key not in self.exported:
            self.exported[key] = self.folder / f"{len(self.exported)}.onnx"
            if precision == "int8" and backend == OPENVINO:
                self._quantize_for_openvino(model, self.get(name, "float32", backend), key)
            elif precision != "float32":
                narrow = {"int8": quantize, "float16": halve}[precision]
                narrow(self.get(name, "float32", backend), self.exported[key], {})
            else:
                export_onnx(model, self.exported[key], [random_batch(model, 2)], operators=operators)
        return self.exported[key]

    def _quantize_for_openvino(self, model: nn.Module, exact: Path, key: tuple[str, str, str]) -> None:
        narrow = self.exported[key].with_suffix(SUFFIX)
        facts = {"data_config": data_config(model), "num_classes": model.num_classes}
        quantize_for_openvino(exact, narrow, [random_batch(model, 2)[0].numpy()], facts)
        self.exported[key] = narrow

    def precision(self, name: str, precision: str) -> str:
        """Return the precision of a model that is exported in this one; a file has its own."""
        if isinstance(self.models[name], nn.Module):
            return precision
        if name not in self.precisions:
            self.precisions[name] = self._facts(name).get("precision", "float32")
        return self.precisions[name]

    def count_macs(self, name: str, backend: str) -> int | None:
        """Count the multiply-accumulates of one image; None where an OpenVINO file does not tell them."""
        kind = "torch" if backend not in FILE_BACKENDS else operators_for([backend])
        if (name, kind) not in self.macs:
            self.macs[name, kind] = self._count(name, backend)
        return self.macs[name, kind]

    def _count(self, name: str, backend: str) -> int | None:
        if backend not in FILE_BACKENDS:
            return count_macs(self.models[name])
        if _is_openvino(self.models[name]):
            return self._facts(name).get("macs")
        return count_graph_macs(self.get(name, "float32", backend))

    def _facts(self, name: str) -> Mapping[str, Any]:
        path = self.models[name]
        return facts_in(read_openvino(path)) if _is_openvino(path) else read_facts(open_session(path), path)


def make_backend_runner(source: nn.Module | Path, setting: Setting) -> Runner:
    """Return a program that runs random images through a model once and waits for its answer.

    Args:
        source: a torch model for the torch backends, an ONNX file for the others; for OpenVINO that or its own.
        setting: how to run it.

    Raises:
        VitpruneError: if the file cannot be opened or its provider is absent.
    """
    if setting.backend == OPENVINO:
        return make_openvino_runner(source, setting.batch_size, setting.num_threads)
    if setting.backend in PROVIDERS:
        check_finite_initializers(source)
        session = open_session(source, num_threads=setting.num_threads, backend=setting.backend)
        return make_session_runner(session, setting.batch_size)
    dtype = DTYPES[setting.precision]
    model = copy.deepcopy(source).to(setting.device, dtype).eval()
    if setting.backend == "torch-compile":
        # With fullgraph, what cannot be compiled is an error instead of running eagerly.
        model = torch.compile(model, dynamic=False, fullgraph=True)
    images = random_batch(source, setting.batch_size)[0].to(setting.device, dtype)
    return make_runner(model, images, tf32=setting.precision == "tf32")


def random_batch(model: nn.Module, batch_size: int) -> tuple[Tensor, Tensor]:
    """Return random images of the model's own size, and labels that mean nothing."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch_size, *data_config(model)["input_size"], generator=generator), torch.zeros(batch_size)


def make_runner(model: Callable[[Tensor], Tensor], images: Tensor, *, tf32: bool = False) -> Runner:
    """Return a program that runs a model once and waits for its answer."""

    @torch.inference_mode()
    def run() -> Tensor:
        answer = model(images)
        if images.is_cuda:
            torch.cuda.synchronize(images.device)
        return answer

    if not images.is_cuda:
        return run

    def run_in_precision() -> Tensor:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        try:
            return run()
        finally:
            torch.set_float32_matmul_precision(before)

    return run_in_precision


def _measure_peak(model: nn.Module, setting: Setting) -> int:
    """Run a torch model in a process of its own and return the most memory that it held."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_run_and_report, model, setting).result()


def _run_and_report(model: nn.Module, setting: Setting) -> int:
    torch.set_num_threads(setting.num_threads)
    run = make_backend_runner(model, setting)
    for _ in range(3):
        run()
    on_gpu = torch.device(setting.device).type == "cuda"
    return torch.cuda.max_memory_reserved(setting.device) if on_gpu else peak_memory_bytes()


def describe_hardware(backends: Sequence[str] = (), device: str = "cpu") -> dict[str, str]:
    """Return where a bench runs: processor and versions, for its records."""
    processor = f"{name_processor()}, {os.cpu_count()} cores"
    on_gpu = torch.device(device).type == "cuda" or {"onnxruntime-cuda", "onnxruntime-tensorrt"} & set(backends)
    if on_gpu and torch.cuda.is_available():
        processor = f"{torch.cuda.get_device_name()}; {processor}"
    versions = {"torch": torch.__version__, "onnxruntime": onnxruntime.__version__}
    return {"processor": processor, "python": platform.python_version(), **versions}


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
