"""How fast exported models run here: graphs, session settings, pruning, int8, torch; and what an export costs.

    python benchmarks/deployment.py --checkpoint deit_tiny_patch16_224.safetensors --pruned runs/half

Every table is one interleaved run. Writes a dated JSON file.
"""

from __future__ import annotations

import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import date
from pathlib import Path

import onnxruntime
import timm
import torch
from common import RESULTS, describe_machine, log
from jsonargparse import auto_cli

import vitprune
from vitprune.export.onnx_file import export_onnx, quiet
from vitprune.export.profile import count_graph_macs, make_session_runner
from vitprune.export.runtime import open_session
from vitprune.processes import peak_memory_bytes
from vitprune.speed.bench import describe_hardware, random_batch
from vitprune.speed.ffn_latency import measure_ffn_latency
from vitprune.timing import measure_latency, paired_speedup

BATCHES = (1, 8)
ENTRIES = {
    "no spinning": {"session.intra_op.allow_spinning": "0"},
    "no denormals": {"session.set_denormal_as_zero": "1"},
    "no prepacking": {"session.disable_prepacking": "1"},
}


def main(
    checkpoint: str,
    pruned: str,
    model: str = "deit_tiny_patch16_224",
    seconds: float = 20.0,
    large: str = "vit_base_patch16_224",
    compiled: bool = True,
):
    """Measure everything.

    Args:
        checkpoint: weights of the dense model.
        pruned: folder of the pruned model.
        model: timm name of the dense model.
        seconds: to spend on each table.
        large: timm name of the model whose export is timed, with random weights.
        compiled: time torch.compile as well.
    """
    dense, small = vitprune.load(model, checkpoint=checkpoint), vitprune.load(pruned)
    result = {"graphs": {}, "session settings": {}, "rows": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        graphs = {
            which: {key: write(network, folder / f"{which}-{key}.onnx") for key, write in WRITERS.items()}
            for which, network in (("dense", dense), ("pruned", small))
        }
        result["macs"] = {
            which: {key: count_graph_macs(path) for key, path in of.items()} for which, of in graphs.items()
        }
        log("exported")
        for batch_size in BATCHES:
            for which, of in graphs.items():
                runners = {key: _open(path, batch_size) for key, path in of.items()}
                result["graphs"][f"{which}, batch {batch_size}"] = _compare(runners, seconds)
            runners = {"default": _open(graphs["dense"]["vitprune"], batch_size)}
            for key, make in SETTINGS.items():
                runners[key] = _open(graphs["dense"]["vitprune"], batch_size, make())
            result["session settings"][f"batch {batch_size}"] = _compare(runners, seconds)
            log(f"graphs and settings, batch {batch_size}")
    networks = {"dense": dense, "pruned": small}
    backends = ["torch-eager", *(["torch-compile"] if compiled else [])]
    for backend, precisions in (("onnxruntime-cpu", ["float32", "int8"]), *((each, ["float32"]) for each in backends)):
        rows = vitprune.bench(networks, backends=[backend], precisions=precisions, seconds=seconds, memory=True)
        result["rows"] += [asdict(row) for row in rows]
        log(backend)
    result["predicted"] = {}
    for backend, batch_size in (("onnxruntime-cpu", 1), ("onnxruntime-cpu", 8), ("torch-eager", 1)):
        result["predicted"][f"{backend}, batch {batch_size}"] = _predict(dense, small, backend, batch_size, seconds)
        log(f"predicted {backend}, batch {batch_size}")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        result["export"] = {large: pool.apply(_export_large, (large,))}
    facts = {**describe_machine(), **describe_hardware(), "threads": torch.get_num_threads()}
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps({**facts, **result}, indent=1) + "\n"
    (RESULTS / f"{date.today()}-deployment-{model}.json").write_text(text)


def _plain(**options) -> Callable:
    def write(network: torch.nn.Module, path: Path) -> Path:
        dynamic = ({0: torch.export.Dim("batch", min=1, max=1000)},)
        with quiet():
            torch.onnx.export(
                network, (random_batch(network, 2)[0],), str(path), dynamo=True, dynamic_shapes=dynamic,
                external_data=False, verbose=False, **options,
            )  # fmt: skip
        return path

    return write


def _ours(**options) -> Callable:
    def write(network: torch.nn.Module, path: Path) -> Path:
        export_onnx(network, path, [random_batch(network, 4)], **options)
        return path

    return write


# The first is what the others are compared with.
WRITERS = {
    "torch.onnx.export": _plain(),
    "torch.onnx.export, opset 18": _plain(opset_version=18),
    "torch.onnx.export, opset 23": _plain(opset_version=23),
    "vitprune --operators standard": _ours(operators="standard"),
    "vitprune": _ours(),
}


def _with_entries(entries: dict[str, str]) -> Callable:
    def make() -> onnxruntime.SessionOptions:
        options = onnxruntime.SessionOptions()
        for key, value in entries.items():
            options.add_session_config_entry(key, value)
        return options

    return make


def _with_attribute(name: str, value) -> Callable:
    def make() -> onnxruntime.SessionOptions:
        options = onnxruntime.SessionOptions()
        setattr(options, name, value)
        return options

    return make


SETTINGS = {
    **{name: _with_entries(entries) for name, entries in ENTRIES.items()},
    "basic optimisations alone": _with_attribute(
        "graph_optimization_level", onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    ),
    "no arena": _with_attribute("enable_cpu_mem_arena", False),
    "no memory pattern": _with_attribute("enable_mem_pattern", False),
    "parallel execution": _with_attribute("execution_mode", onnxruntime.ExecutionMode.ORT_PARALLEL),
}


def _open(path: Path, batch_size: int, options: onnxruntime.SessionOptions | None = None) -> Callable:
    return make_session_runner(open_session(path, num_threads=torch.get_num_threads(), options=options), batch_size)


def _compare(runners: dict[str, Callable], seconds: float) -> dict[str, dict]:
    """Return median ms of each, and how many times faster than the first it is."""
    measured = measure_latency(runners, seconds=seconds)
    first = next(iter(measured.values()))
    return {
        name: {"median_ms": latency.median_ms, **asdict(paired_speedup(first, latency))}
        for name, latency in measured.items()
    }


def _predict(dense, small, backend: str, batch_size: int, seconds: float) -> dict[str, float]:
    """Predict the pruned model's latency from tables of the dense one, and measure it beside the dense one."""
    total, tables = measure_ffn_latency(dense, backend=backend, batch_size=batch_size, seconds=seconds)
    target = vitprune.target_latency(dense, total, total=total, tables=tables)
    widths = {ffn.name: ffn.num_neurons for ffn in vitprune.find_feed_forwards(small)}
    rows = vitprune.bench(
        {"dense": dense, "pruned": small}, backends=[backend], batch_sizes=[batch_size], seconds=seconds
    )
    predicted = total / target.predict(widths)
    return {
        "dense_ms": total,
        "predicted_ms": target.predict(widths),
        "predicted_speedup": predicted,
        "measured_speedup": rows[1].speedup,
        "measured_low": rows[1].speedup_low,
        "measured_high": rows[1].speedup_high,
        "error": rows[1].speedup / predicted - 1,  # of the time
    }


def _export_large(name: str) -> dict[str, float]:
    network = timm.create_model(name).eval()
    before = peak_memory_bytes()
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        report = export_onnx(network, Path(folder) / "model.onnx", [random_batch(network, 16)] * 4)
        seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "peak_gib": peak_memory_bytes() / 2**30,
        "peak_before_gib": before / 2**30,
        "num_images": report.num_images,
        "max_abs_diff": report.max_abs_diff,
    }


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
