"""What a GPU shows that a CPU cannot; one command of at most eight minutes, which writes a dated JSON file.

    python benchmarks/gpu.py --device cuda
    python benchmarks/gpu.py --device cpu --small true --minutes 2

Every verb beside the CPU's numbers, paths per second of ViT-B/16 in every precision and how many are the same as in
float32, the seconds of a pruning, and the latency of dense, narrow and merged models. Weights and images are random, so
that nothing has to be fetched. A part that fails is recorded with its reason, and the next one goes on; a part that
would begin when the time is over is left out.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from common import RESULTS, describe_machine
from jsonargparse import auto_cli

import vitprune
from vitprune.models.merging import set_merging

TESTS = Path(__file__).resolve().parents[1] / "tests"
BATCH_SIZES = (1, 8, 64)


def make_model(small: bool) -> torch.nn.Module:
    """Return ViT-B/16 with random weights, or a narrow model of few blocks."""
    torch.manual_seed(0)
    name = "vit_tiny_patch16_224" if small else "vit_base_patch16_224"
    return timm.create_model(name, **({"depth": 3} if small else {})).eval()


def make_batches(count: int, batch_size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return random images and labels."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, 224, 224, generator=generator)
    return [(each, torch.arange(len(each))) for each in images.split(batch_size)]


def compare_verbs(device: str) -> list[dict[str, Any]]:
    """Run every verb on the CPU and on the device, as the tests do on a pretended one."""
    sys.path.insert(0, str(TESTS))
    import pretend_verbs

    with tempfile.TemporaryDirectory() as folder:
        pretend_verbs.make_inputs(Path(folder))
        return [pretend_verbs.compare(name, Path(folder), device) for name in pretend_verbs.VERBS]


def measure_discovery(device: str, small: bool) -> list[dict[str, Any]]:
    """Measure paths per second in every precision, and how many choices are those of float32."""
    model, count = make_model(small).to(device), 8 if small else 64
    batches = make_batches(count, count // 2)
    rows, exact = [], None
    for precision in ("float32", "tf32", "bf16"):
        try:
            vitprune.discover(model, batches[:1], precision=precision)  # to warm up
            started = time.perf_counter()
            found = vitprune.discover(model, batches, precision=precision)
            seconds = time.perf_counter() - started
        except vitprune.VitpruneError as error:
            rows.append({"precision": precision, "refused": str(error)})
            continue
        exact = found.neurons if exact is None else exact
        same = float((found.neurons == exact).double().mean())
        rows.append({"precision": precision, "images_per_second": count / seconds, "same_choices": same})
    return rows


def measure_pruning(device: str, small: bool) -> dict[str, Any]:
    """Measure the seconds of a pruning by default."""
    model, count = make_model(small).to(device), 32 if small else 128
    started = time.perf_counter()
    _pruned, plan = vitprune.prune(model, make_batches(count, 32), step=1)
    return {"seconds": time.perf_counter() - started, "images": count, "pruning_ratio": plan.pruning_ratio}


def measure_latency(device: str, small: bool, backend: str, precision: str) -> list[dict[str, Any]]:
    """Time the dense model, one of half the neurons, and one whose tokens merge."""
    model = make_model(small)
    ffns = vitprune.find_feed_forwards(model)
    half = vitprune.Plan({ffn.name: torch.arange(ffn.num_neurons) < ffn.num_neurons // 2 for ffn in ffns})
    schedule = [60 if index in (1, 2) else 0 for index in range(len(model.blocks))]
    models = {"dense": model, "half": vitprune.apply_plan(model, half), "merged": set_merging(model, schedule)}
    where = {"device": device} if backend.startswith("torch") else {}
    rows = vitprune.bench(
        {name: each.to(device if where else "cpu") for name, each in models.items()},
        backends=[backend],
        precisions=[precision],
        batch_sizes=(1, 8) if small else BATCH_SIZES,
        seconds=0.2 if small else 1.0,
        **where,
    )
    return [vars(row) for row in rows]


def list_parts(device: str, small: bool) -> dict[str, Callable[[], Any]]:
    """Return the parts in the order of what they are worth."""
    parts: dict[str, Callable[[], Any]] = {
        "verbs": partial(compare_verbs, device),
        "discovery": partial(measure_discovery, device, small),
        "pruning": partial(measure_pruning, device, small),
    }
    on_gpu = torch.device(device).type == "cuda"
    of_torch = ("float32", "tf32", "bf16", "fp16")
    precisions = {"torch-eager": of_torch, "torch-compile": of_torch, "onnxruntime-cuda": ("float32", "float16")}
    for backend in precisions if on_gpu else ("torch-eager", "torch-compile"):
        for precision in precisions[backend] if on_gpu else ("float32",):
            parts[f"{backend}, {precision}"] = partial(measure_latency, device, small, backend, precision)
    return parts


def main(device: str = "cuda", minutes: float = 8.0, small: bool = False):
    """Measure all that there is time for.

    Args:
        device: as torch names it.
        minutes: after which no part begins.
        small: narrow models and few images, to try the program out.
    """
    warnings.simplefilter("ignore")
    started = time.perf_counter()
    measured: dict[str, Any] = {}
    for name, measure in list_parts(device, small).items():
        if time.perf_counter() - started > 60 * minutes:
            measured[name] = {"left_out": "the time was over"}
            continue
        began = time.perf_counter()
        try:
            measured[name] = measure()
        except Exception as error:  # what one part cannot must not cost the others
            traceback.print_exc()
            measured[name] = {"failed": f"{type(error).__name__}: {error}"}
        print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
    gpu = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else None
    result = {**describe_machine(), "device": device, "gpu": gpu, "small": small, **measured}
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{date.today()}-gpu{'-small' if small else ''}-{torch.device(device).type}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(path)


if __name__ == "__main__":
    auto_cli(main)
