"""Why is a model not faster here? Each answer is timed against the change that it proposes.

Letters: B images, N tokens, D embedding width, H hidden neurons.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnxruntime
from onnx_ir.passes.common import NameFixPass, RemoveInitializersFromInputsPass

from vitprune.errors import VitpruneError
from vitprune.export.fuse import fuse_attention, skip_unread_tokens
from vitprune.export.fuse_merging import fuse_merging
from vitprune.export.graph import read_graph
from vitprune.export.graph_ffns import find_graph_ffns, find_linears
from vitprune.export.onnx_file import save_graph, write_graph
from vitprune.export.profile import NodeRun, count_node_macs, make_feed, make_session_runner, profile
from vitprune.export.quantize import quantize
from vitprune.export.runtime import PROVIDERS, open_session, read_facts
from vitprune.options import check_choice
from vitprune.progress import Track, untracked
from vitprune.speed.alignment import FfnShape, measure_multiples
from vitprune.timing import Latency, measure_latency, paired_speedup

COSTS, FINE, KNOW, GAIN = "costs", "fine", "know", "gain"
# Verdicts, with what they mean.
VERDICTS: Mapping[str, str] = {
    COSTS: "makes this file slower here than it needs to be",
    GAIN: "would be faster still, with other answers",
    KNOW: "good to know",
    FINE: "as it should be",
}
# What is faster by less is not worth a word.
WORTH = 1.01
_PARTS_OF_NORMS = frozenset({"ReduceMean", "Pow", "Sqrt"})
_PARTS_OF_GELU = frozenset({"Erf", "Tanh"})
_HALF_AND_DOUBLE = ("float16", "double", "bfloat16")
BATCHES = (1, 8, 32)


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: what: ``attention``, ``threads``, ...
        verdict: key of ``VERDICTS``.
        text: what was found.
        cost_ms: what it costs in one run, as measured here; None where nothing was timed.
        remedy: what to do; empty where there is nothing to do.
    """

    name: str
    verdict: str
    text: str
    cost_ms: float | None = None
    remedy: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """All that was found.

    Attributes:
        path: the file.
        backend: key of ``BACKENDS``.
        batch_size: images per run.
        num_threads: of the operators; None where the runtime chose.
        median_ms: one run of the file as it is.
        macs: multiply-accumulates of one image, as the file computes them; None where an OpenVINO file does not tell.
        ffn_share: share of them in FFNs, in [0, 1]; None where no FFN was found.
        findings: what costs most first.
    """

    path: Path
    backend: str
    batch_size: int
    num_threads: int | None
    median_ms: float
    macs: int | None
    ffn_share: float | None
    findings: tuple[Finding, ...]


def diagnose(
    path: str | Path,
    *,
    backend: str = "onnxruntime-cpu",
    batch_size: int = 1,
    num_threads: int | None = None,
    seconds: float = 20.0,
    track: Track = untracked,
) -> Diagnosis:
    """Look at an ONNX file, and time it against what could be changed about it.

    Args:
        path: any ONNX file with one input of images.
        backend: key of ``PROVIDERS``.
        batch_size: images per run, where the file leaves it open.
        num_threads: of the operators; None leaves the choice to ONNX Runtime.
        seconds: to spend on timed runs of the whole model; half of that again goes to batch sizes and widths.
        track: wraps (steps, description), for progress.

    Raises:
        VitpruneError: if the file cannot be read or run, or the provider is absent.
    """
    path = Path(path)
    check_choice("backend", backend, PROVIDERS)
    settings = {"backend": backend, "num_threads": num_threads}
    session = open_session(path, **settings)
    batch_size = len(next(iter(make_feed(session, batch_size).values())))
    graph = read_graph(path)
    stages = iter(track(("nodes", "changes", "batch sizes", "widths"), "doctor"))
    next(stages)
    nodes = profile(path, batch_size=batch_size, **settings)
    macs, share, ffns = _count(graph, batch_size)
    next(stages)
    counts = thread_counts() if backend == "onnxruntime-cpu" else []
    with tempfile.TemporaryDirectory() as folder:
        variants, untried = _make_variants(path, graph, Path(folder))
        runners = {_NOW: make_session_runner(session, batch_size)}
        for name, variant in variants.items():
            runners[name] = make_session_runner(open_session(variant.path, **settings), batch_size)
        for count in counts:
            other = open_session(path, backend=backend, num_threads=count)
            runners[_threads(count)] = make_session_runner(other, batch_size)
        measured = measure_latency(runners, seconds=seconds)
    findings = [_judge(name, variant, measured) for name, variant in variants.items()]
    findings += [Finding(name, KNOW, f"not tried: {reason}") for name, reason in untried.items()]
    findings += [_judge_absent(name, graph) for name in _CHANGES if name not in {**variants, **untried}]
    findings += [
        _about_ffns(share),
        _about_threads(counts, num_threads, measured),
        _about_leftovers("norms", _PARTS_OF_NORMS, nodes, "LayerNormalization (opset 17 or newer)"),
        _about_leftovers("gelu", _PARTS_OF_GELU, nodes, "Gelu (opset 20 or newer)"),
        _about_precision(nodes),
        _about_placement(nodes, backend),
        _about_opset(graph),
        about_facts(read_facts(session, path)),
    ]
    next(stages)
    findings.append(_about_batch(session, seconds / 4))
    next(stages)
    findings += [_about_widths(ffns, {**settings, "batch_size": batch_size}, seconds / 4)] if ffns else []
    next(stages, None)
    order = list(VERDICTS)
    findings.sort(key=lambda finding: (order.index(finding.verdict), -(finding.cost_ms or 0.0)))
    median_ms = measured[_NOW].median_ms
    return Diagnosis(path, backend, batch_size, num_threads, median_ms, macs, share, tuple(findings))


# --- changes that are made and timed ------------------------------------------------------------------------------


_NOW = "as it is"


@dataclass(frozen=True)
class _Change:
    """A way to rewrite a graph: what to call it before and after, and what to do about it."""

    rewrite: Callable[[ir.Model], int]
    found: str
    nothing: str
    remedy: str


@dataclass(frozen=True)
class _Variant:
    """A changed file: how much was changed, and which file it is to be compared with."""

    path: Path
    count: int
    reference: str = _NOW


def _free_weights(graph: ir.Model) -> int:
    inputs = set(graph.graph.inputs)
    count = sum(value in inputs for value in graph.graph.initializers.values())
    RemoveInitializersFromInputsPass()(graph)
    return count


# Each is made on top of those before it: keys have to be compared in few steps before attention can share them with the
# comparison, and attention has to be one operator before the last block's queries, keys and values can be told apart.
_CHANGES: Mapping[str, _Change] = {
    "weights as inputs": _Change(
        _free_weights,
        "{count} weights are inputs of the graph, which keeps ONNX Runtime from folding, fusing and packing them",
        "weights are constants",
        "export without keep_initializers_as_inputs",
    ),
    "merging": _Change(
        fuse_merging,
        "{count} steps of merging tokens take more operators than they need",
        "no merging of tokens that could be simpler is left",
        "export it with vitprune",
    ),
    "attention": _Change(
        fuse_attention,
        "{count} attentions are computed by products, softmax and transpositions one by one",
        "no attention that could be fused is left",
        "export it with vitprune",
    ),
    "unread tokens": _Change(
        skip_unread_tokens,
        "{count} products of the last block are computed for tokens that the head does not read",
        "every token that is computed is read",
        "export it with vitprune",
    ),
}


def _make_variants(path: Path, graph: ir.Model, folder: Path) -> tuple[dict[str, _Variant], dict[str, str]]:
    """Write the changed files.

    Returns:
        Name -> changed file, and name -> why a change was not made.
    """
    dtypes = {linear.weight_IO.dtype.name for linear in find_linears(graph)} - {"float32"}
    if dtypes:
        reason = f"the weights are {', '.join(sorted(dtypes))}"
        return {}, dict.fromkeys((*_CHANGES, "int8"), reason)
    variants: dict[str, _Variant] = {}
    untried: dict[str, str] = {}
    changed, reference = read_graph(path), _NOW
    for number, (name, change) in enumerate(_CHANGES.items()):
        count = change.rewrite(changed)
        if count:
            variant = _Variant(folder / f"{number}.onnx", count, reference)
            try:
                save_graph(changed, variant.path)
            except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
                untried[name] = f"what comes out is no valid graph ({str(error).splitlines()[0]})"
                break
            variants[name], reference = variant, name
    operators = {node.op_type for node in graph.graph}
    if {"MatMul", "Gemm"} & operators and not any("Quantize" in name or "Integer" in name for name in operators):
        variants["int8"] = _Variant(folder / "int8.onnx", 1)
        quantize(path, variants["int8"].path, dict(graph.metadata_props))
    return variants, untried


def _threads(count: int) -> str:
    return f"{count} threads"


def thread_counts() -> list[int]:
    """Return numbers of threads that are worth a try: powers of two, and as many as there are cores.

    >>> 1 in thread_counts()
    True
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return sorted({*(2**power for power in range(8) if 2**power < cores), cores})


def _judge(name: str, variant: _Variant, measured: Mapping[str, Latency]) -> Finding:
    before = measured[variant.reference]
    speedup = paired_speedup(before, measured[name])
    saved = before.median_ms * (1 - 1 / speedup.ratio)
    told = f"{speedup.ratio:.2f} x as fast ({speedup.low:.2f} .. {speedup.high:.2f})"
    worth = speedup.low > WORTH
    if name == "int8":
        remedy = "export it with `precision` int8, and evaluate what it costs in accuracy" if worth else ""
        return Finding(name, GAIN if worth else KNOW, f"with 8-bit products: {told}", saved, remedy)
    found = _CHANGES[name].found.format(count=variant.count)
    if worth:
        return Finding(name, COSTS, f"{found}; otherwise it is {told}", saved, _CHANGES[name].remedy)
    return Finding(name, KNOW, f"{found}, which costs nothing that could be measured here ({told} otherwise)", saved)


def _judge_absent(name: str, graph: ir.Model) -> Finding:
    left = sum(node.op_type == "Softmax" for node in graph.graph)
    if name == "attention" and left:
        text = (
            f"{left} softmax are left as they are: with a mask, a bias, or a norm or rotation of queries and keys, or "
            "the file does not tell their shapes (before opset 15 it may not)"
        )
        return Finding(name, KNOW, text)
    return Finding(name, FINE, _CHANGES[name].nothing)


# --- findings that are read off -----------------------------------------------------------------------------------


def _count(graph: ir.Model, batch_size: int) -> tuple[int, float | None, list[FfnShape]]:
    """Return multiply-accumulates of one image, the FFNs' share of them, and how large each FFN is."""
    NameFixPass()(graph)  # nodes without a name could not be told apart in a profile
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "named.onnx"
        write_graph(graph, path)
        nodes = profile(path, batch_size=batch_size, optimized=False, num_runs=1)
    macs = sum(map(count_node_macs, nodes))
    try:
        ffns = find_graph_ffns(graph)
    except VitpruneError:
        # Not an answer to refuse: a file without FFNs, or with quantised ones, is told about all the rest.
        return macs // batch_size, None, []
    runs = {node.name: node for node in nodes}
    shapes, in_ffns = [], 0
    for ffn in ffns:
        rows = _rows(runs[ffn.down.product.name])
        weights = [linear.weight_IO.shape for linear in (*ffn.ups, ffn.down)]
        in_ffns += sum(rows * inputs * outputs for inputs, outputs in weights)
        shapes.append(FfnShape(max(1, rows // batch_size), weights[-1][1], ffn.num_neurons))
    return macs // batch_size, in_ffns / macs, shapes


def _rows(node: NodeRun) -> int:
    count = 1
    for length in node.inputs[0][:-1]:
        count *= length
    return count


def _about_ffns(share: float | None) -> Finding:
    if share is None:
        return Finding("ffns", KNOW, "no FFN with float32 weights was found, so none can be pruned")
    ceilings = ", ".join(f"{ratio:.0%} -> {1 / (1 - ratio * share):.2f} x" for ratio in (0.3, 0.5, 0.7))
    return Finding(
        "ffns",
        KNOW,
        f"{share:.0%} of the multiply-accumulates are in FFNs; removing neurons makes it at most faster by {ceilings}",
    )


def _about_threads(counts: Sequence[int], num_threads: int | None, measured: Mapping[str, Latency]) -> Finding:
    if not counts:
        return Finding("threads", KNOW, "not timed: they are the CPU provider's")
    now, times = measured[_NOW], {count: measured[_threads(count)] for count in counts}
    listed = ", ".join(f"{count}: {latency.median_ms:.2f} ms" for count, latency in times.items())
    best = min(times, key=lambda count: times[count].median_ms)
    speedup = paired_speedup(now, times[best])
    asked = "ONNX Runtime's own choice" if num_threads is None else f"{num_threads} threads"
    if speedup.low > WORTH:
        saved = now.median_ms * (1 - 1 / speedup.ratio)
        remedy = f"set intra_op_num_threads to {best}"
        return Finding("threads", COSTS, f"{asked} is slower than {best} ({listed})", saved, remedy)
    return Finding("threads", FINE, f"{asked} is as fast as any number ({listed})")


def _about_leftovers(name: str, operators: frozenset[str], nodes: Sequence[NodeRun], operator: str) -> Finding:
    """Look for what ONNX Runtime would have fused when it opened the file, and did not."""
    left = [node for node in nodes if node.op_type in operators]
    if not left or (operators == _PARTS_OF_NORMS and "Sqrt" not in {node.op_type for node in left}):
        return Finding(name, FINE, "whole, or fused by ONNX Runtime when it opens the file")
    cost = sum(node.milliseconds for node in left)
    kinds = ", ".join(sorted({node.op_type for node in left}))
    return Finding(
        name, COSTS, f"{len(left)} nodes of a decomposed one are left ({kinds})", cost, f"export with {operator}"
    )


def _about_precision(nodes: Sequence[NodeRun]) -> Finding:
    total = sum(node.milliseconds for node in nodes)
    odd = [
        node
        for node in nodes
        if node.op_type == "DequantizeLinear"
        or any(each in _HALF_AND_DOUBLE for each in node.dtypes)
        # What makes zeros and ones of a comparison is no change of precision.
        or (node.op_type == "Cast" and "bool" not in node.dtypes)
    ]
    cost = sum(node.milliseconds for node in odd)
    dtypes = sorted({each for node in nodes for each in node.dtypes if each in _HALF_AND_DOUBLE})
    if dtypes and cost > 0.01 * total:
        text = f"{', '.join(dtypes)} numbers and casts take {cost / total:.0%} of the time"
        return Finding("precision", COSTS, text, cost, "export a float32 (or int8) model for the CPU")
    if cost > 0.01 * total:
        return Finding(
            "precision", COSTS, f"{len(odd)} casts take {cost / total:.0%} of the time", cost, "export without casts"
        )
    kind = "int8" if any("Integer" in node.op_type or "Quantize" in node.op_type for node in nodes) else "float32"
    return Finding("precision", FINE, f"{kind}, without casts that take time")


def _about_placement(nodes: Sequence[NodeRun], backend: str) -> Finding:
    by_provider: dict[str, list[NodeRun]] = {}
    for node in nodes:
        by_provider.setdefault(node.provider, []).append(node)
    listed = "; ".join(
        f"{provider}: {len(own)} nodes, {sum(node.milliseconds for node in own):.2f} ms"
        for provider, own in by_provider.items()
    )
    away = [node for node in nodes if node.provider != PROVIDERS[backend]]
    if not away:
        return Finding("placement", FINE, listed)
    kinds = ", ".join(sorted({node.op_type for node in away}))
    cost = sum(node.milliseconds for node in away)
    remedy = "export with `operators` standard, or use another provider"
    return Finding("placement", COSTS, f"{listed}; not on {PROVIDERS[backend]}: {kinds}", cost, remedy)


def _about_opset(graph: ir.Model) -> Finding:
    opset = graph.opset_imports.get("", 0)
    missing = [name for name, since in (("LayerNormalization", 17), ("Gelu", 20)) if opset < since]
    if missing:
        text = f"opset {opset} has no {' and no '.join(missing)}; what that costs here stands under norms and gelu"
        return Finding("opset", KNOW, text)
    return Finding("opset", FINE, f"opset {opset}")


def _about_batch(session: onnxruntime.InferenceSession, seconds: float) -> Finding:
    first = session.get_inputs()[0].shape[0]
    if isinstance(first, int):
        remedy = "" if first == 1 else "export it with a dynamic batch if fewer images come at a time"
        return Finding("batch", KNOW, f"the file runs exactly {first} images at a time", None, remedy)
    measured = measure_latency({str(size): make_session_runner(session, size) for size in BATCHES}, seconds=seconds)
    rates = {size: 1000 * size / measured[str(size)].median_ms for size in BATCHES}
    return Finding(
        "batch", KNOW, "any batch size; " + ", ".join(f"{size}: {rate:.0f} images/s" for size, rate in rates.items())
    )


def about_facts(facts: Mapping[str, Any]) -> Finding:
    """Tell whether a file says how its images are prepared and what its classes are."""
    if facts:
        return Finding("metadata", FINE, f"says its transform and classes ({facts.get('architecture', 'no name')})")
    text = "does not say which transform its images need, nor its classes"
    return Finding("metadata", KNOW, text, None, "files that vitprune exports do")


def _about_widths(shapes: Sequence[FfnShape], settings: Mapping[str, Any], seconds: float) -> Finding:
    widths = [shape.num_neurons for shape in shapes]
    listed = f"{min(widths)} .. {max(widths)}" if len(set(widths)) > 1 else str(widths[0])
    measured = measure_multiples(shapes, **settings, seconds=seconds)
    faster = {multiple: paired_speedup(measured[1], latency) for multiple, latency in measured.items() if multiple > 1}
    best = max(faster, key=lambda multiple: faster[multiple].ratio, default=None)
    if best is None or faster[best].low <= 1:
        told = "" if best is None else "; wider ones, of multiples of 8 .. 128, are no faster"
        return Finding("widths", FINE, f"{listed} neurons in each FFN{told}")
    saved = measured[1].median_ms * (1 - 1 / faster[best].ratio)
    text = f"{listed} neurons in each FFN: rounded up to multiples of {best} they would run faster"
    return Finding("widths", COSTS, text, saved, f"prune with `round_to` {best}")
