"""Time a model's FFNs over widths on a backend, for latency targets."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from vitprune.errors import VitpruneError
from vitprune.evaluation.latency import measure_latency
from vitprune.export.bench import make_runner, random_batch
from vitprune.export.onnx_file import export_onnx, quiet
from vitprune.export.runtime import open_onnx
from vitprune.feed_forward import FeedForward, find_feed_forwards
from vitprune.options import BACKENDS, check_choice
from vitprune.progress import Track, untracked
from vitprune.pruning.apply import remove_neurons
from vitprune.pruning.plan import Plan

NUM_WIDTHS = 8
Tables = dict[str, list[tuple[int, float]]]


def measure_ffn_latency(
    model: nn.Module,
    *,
    backend: str,
    batch_size: int = 1,
    seconds: float = 20.0,
    track: Track = untracked,
) -> tuple[float, Tables]:
    """Time the whole model and one FFN of each shape at eight widths, all in turn.

    Args:
        model: timm Vision Transformer in eval mode, timed on the CPU.
        backend: key of ``BACKENDS``.
        batch_size: images per run.
        seconds: to spend on all timed runs together.
        track: wraps (items, description) of the preparation, for progress.

    Returns:
        Median ms of the model, and FFN name -> pairs (width, median ms), for ``target_latency``.

    Raises:
        VitpruneError: if the backend is unknown or the batch is empty.
    """
    check_choice("backend", backend, BACKENDS)
    if batch_size < 1:
        raise VitpruneError(f"batch_size must be at least 1, got {batch_size}")
    model = copy.deepcopy(model).cpu().float()
    ffns = find_feed_forwards(model)
    inputs = _record_inputs(model, ffns, random_batch(model, batch_size)[0])
    shape_of = {ffn.name: (ffn.num_neurons, ffn.packed, len(ffn.up_projs), *inputs[ffn.name].shape) for ffn in ffns}
    first_of = {shape: name for name, shape in reversed(shape_of.items())}
    runners: dict[Any, Callable[[], Any]] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for number in track(range(1, NUM_WIDTHS + 1), f"prepare {backend}"):
            widths = {ffn.name: max(1, ffn.num_neurons * number // NUM_WIDTHS) for ffn in ffns}
            narrow = remove_neurons(model, Plan({f.name: torch.arange(f.num_neurons) < widths[f.name] for f in ffns}))
            for shape, name in first_of.items():
                module = copy.deepcopy(narrow.get_submodule(name))
                path = folder / f"{number}-{len(runners)}.onnx"
                runners[shape, widths[name]] = _make_ffn_runner(module, inputs[name], backend, path)
        images = random_batch(model, batch_size)[0]
        whole: Any = model
        if backend == "onnxruntime-cpu":
            export_onnx(model, folder / "model.onnx", [random_batch(model, 2)])
            whole = open_onnx(folder / "model.onnx", num_threads=torch.get_num_threads())
        runners["model"] = make_runner(whole, images)
        measured = measure_latency(runners, seconds=seconds)
    total = measured.pop("model").median_ms
    tables: Tables = {name: [] for name in shape_of}
    for (shape, width), latency in measured.items():
        for name in shape_of:
            if shape_of[name] == shape:
                tables[name].append((width, latency.median_ms))
    return total, {name: sorted(table) for name, table in tables.items()}


@torch.no_grad()
def _record_inputs(model: nn.Module, ffns: Sequence[FeedForward], images: Tensor) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for ffn in ffns:
            hook = lambda _module, args, name=ffn.name: seen.update({name: args[0].detach().clone()})  # noqa: E731
            stack.callback(model.get_submodule(ffn.name).register_forward_pre_hook(hook).remove)
        model(images)
    return seen


def _make_ffn_runner(module: nn.Module, states: Tensor, backend: str, path: Path) -> Callable[[], Any]:
    if backend != "onnxruntime-cpu":
        return make_runner(module, states)
    with quiet():
        torch.onnx.export(module, (states,), str(path), dynamo=True, external_data=False, verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: np.ascontiguousarray(states.numpy())}
    return lambda: session.run(None, feed)
