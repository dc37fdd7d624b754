"""How long a model takes over the widths of its FFNs on a backend, for latency targets.

Letters: N tokens, D embedding width, H hidden neurons.
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from vitprune.errors import VitpruneError
from vitprune.export.graph import forget_shapes, read_graph
from vitprune.export.graph_ffns import find_graph_ffns, match_ffns
from vitprune.export.graph_ffns import remove_neurons as remove_graph_neurons
from vitprune.export.onnx_file import export_onnx, save_graph
from vitprune.export.profile import profile
from vitprune.export.runtime import PROVIDERS, check_provider
from vitprune.models.units import find_feed_forwards
from vitprune.options import BACKENDS, check_choice
from vitprune.progress import Track, untracked
from vitprune.pruning.apply import remove_neurons
from vitprune.pruning.plan import Plan
from vitprune.pruning.target import count_tokens
from vitprune.speed.alignment import FfnShape
from vitprune.speed.bench import FILE_BACKENDS, Runner, Setting, make_backend_runner, operators_for, random_batch
from vitprune.timing import Latency, measure_latency, paired_speedup

NUM_WIDTHS = 8
Tables = dict[str, list[tuple[int, float]]]


def measure_ffn_latency(
    model: nn.Module,
    *,
    backend: str,
    batch_size: int = 1,
    seconds: float = 20.0,
    device: str = "cpu",
    track: Track = untracked,
) -> tuple[float, Tables]:
    """Time the whole model with all FFNs at eight widths, in turn, and share out to each FFN what it takes of that.

    An FFN that runs alone finds its weights in the cache and its thread pool warm; in the model it does not. So whole
    models are timed, and what changes with their widths is shared out by the multiply-accumulates of the FFNs as this
    backend computes them (an exported file computes the last one for the tokens alone that the head reads).

    Args:
        model: timm Vision Transformer in eval mode.
        backend: key of ``BACKENDS``.
        batch_size: images per run.
        seconds: to spend on all timed runs together.
        device: of torch.
        track: wraps (items, description) of the preparation, for progress.

    Returns:
        Median ms of the model, and FFN name -> pairs (width, median ms), for ``target_latency``.

    Raises:
        VitpruneError: if the backend is unknown or absent, or the batch is empty.
    """
    check_choice("backend", backend, BACKENDS)
    if batch_size < 1:
        raise VitpruneError(f"batch_size must be at least 1, got {batch_size}")
    if backend in PROVIDERS:
        check_provider(backend)
    model = copy.deepcopy(model).cpu().float()
    ffns = find_feed_forwards(model)
    setting = Setting(backend, "float32", batch_size, torch.get_num_threads(), device)
    runners: dict[int, Runner] = {}
    if backend == "torch-compile":
        torch._dynamo.reset()  # or what was compiled before would count against its limit
    with tempfile.TemporaryDirectory() as folder:
        dense = Path(folder) / "dense.onnx"
        if backend in FILE_BACKENDS:
            export_onnx(model, dense, [random_batch(model, 2)], operators=operators_for([backend]))
        for number in track(range(1, NUM_WIDTHS + 1), f"prepare {backend}"):
            widths = {ffn.name: _width(ffn.num_neurons, number) for ffn in ffns}
            source: Any = Path(folder) / f"{number}.onnx"
            if backend in FILE_BACKENDS:
                _write_narrow(dense, widths, source)
            else:
                keep = {ffn.name: torch.arange(ffn.num_neurons) < widths[ffn.name] for ffn in ffns}
                source = remove_neurons(model, Plan(keep))
            runners[number] = make_backend_runner(source, setting)
            runners[number]()
        measured = measure_latency(runners, seconds=seconds)
        shapes = shapes_in_file(dense, list(widths)) if backend in FILE_BACKENDS else ffn_shapes(model)
    total = measured[NUM_WIDTHS].median_ms
    times = _scaled_to(total, measured)
    # What the neurons take: all that a straight line through the times loses on its way to no neurons at all.
    slope, _fixed = np.polyfit(np.arange(1, NUM_WIDTHS + 1), times, 1)
    at_none = max(0.0, min(*times, times[0] - slope))
    macs = {name: shape.num_tokens * shape.embed_dim * shape.num_neurons for name, shape in shapes.items()}
    share = {name: count / sum(macs.values()) for name, count in macs.items()}
    tables = {
        ffn.name: [
            (_width(ffn.num_neurons, number), share[ffn.name] * (time - at_none))
            for number, time in enumerate(times, 1)
        ]
        for ffn in ffns
    }
    return total, tables


def _width(num_neurons: int, number: int) -> int:
    return max(1, num_neurons * number // NUM_WIDTHS)


def _scaled_to(total: float, measured: Mapping[int, Latency]) -> list[float]:
    """Return ms at each width; ratios are paired round by round, which the load of the machine disturbs least."""
    dense = measured[NUM_WIDTHS]
    return [total / paired_speedup(dense, measured[number]).ratio for number in range(1, NUM_WIDTHS + 1)]


def _write_narrow(dense: Path, widths: Mapping[str, int], path: Path) -> None:
    graph = read_graph(dense)
    for name, ffn in match_ffns(find_graph_ffns(graph), list(widths)).items():
        remove_graph_neurons(graph.graph, ffn, np.arange(widths[name]))
    forget_shapes(graph.graph)
    save_graph(graph, path)


def shapes_in_file(path: Path, modules: list[str]) -> dict[str, FfnShape]:
    """Return how large each FFN is as an ONNX file computes it.

    Args:
        path: written by ``export_onnx``.
        modules: names of the model's FFNs, in block order.

    Returns:
        FFN name -> its shape; N counts the tokens that the file computes.
    """
    runs = {node.name: node for node in profile(path, optimized=False, num_runs=1)}
    shapes = {}
    for name, ffn in match_ffns(find_graph_ffns(read_graph(path)), modules).items():
        *tokens, width = runs[ffn.down.product.name].inputs[0]
        shapes[name] = FfnShape(math.prod(tokens), ffn.down.weight_IO.shape[1], width)
    return shapes


def ffn_shapes(model: nn.Module) -> dict[str, FfnShape]:
    """Return how large each FFN of a torch model is, by name."""
    ffns = find_feed_forwards(model)
    tokens = count_tokens(model, ffns)
    return {
        ffn.name: FfnShape(tokens[ffn.name], model.get_submodule(ffn.down_proj).out_features, ffn.num_neurons)
        for ffn in ffns
    }
