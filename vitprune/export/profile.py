"""What ONNX Runtime does node by node: where, how long, on which shapes."""

from __future__ import annotations

import json
import math
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from vitprune.errors import VitpruneError
from vitprune.export.runtime import complete_size, open_session, read_facts

NUM_RUNS = 20
_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(uint8)": np.uint8,
}
Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class NodeRun:
    """One node of the graph as ONNX Runtime ran it.

    Attributes:
        name: of the node.
        op_type: such as ``MatMul``; ONNX Runtime's own after its fusions.
        provider: that ran it.
        milliseconds: median over runs.
        inputs: shapes of what it read, absent inputs left out.
        outputs: shapes of what it gave.
        dtypes: of what it read, as ONNX Runtime writes them.
    """

    name: str
    op_type: str
    provider: str
    milliseconds: float
    inputs: Shapes
    outputs: Shapes
    dtypes: tuple[str, ...]


def profile(
    path: str | Path,
    *,
    batch_size: int = 1,
    num_threads: int | None = None,
    backend: str = "onnxruntime-cpu",
    optimized: bool = True,
    num_runs: int = NUM_RUNS,
) -> list[NodeRun]:
    """Run an ONNX file with ONNX Runtime's profiler, which itself takes some microseconds for each node.

    Args:
        path: the file.
        batch_size: images per run, where the file leaves it open.
        num_threads: of ONNX Runtime's operators; None leaves the choice to it.
        backend: key of ``PROVIDERS``.
        optimized: let ONNX Runtime fuse nodes first, as it does for users; otherwise the graph as it was written.
        num_runs: timed, after two that are not.

    Returns:
        Nodes in the order in which they ran.
    """
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = open_session(path, num_threads=num_threads, backend=backend, options=options)
        feed = make_feed(session, batch_size)
        for _ in range(num_runs + 2):
            session.run(None, feed)
        events = json.loads(Path(session.end_profiling()).read_text())
    found: dict[str, list[dict]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            found.setdefault(event["args"]["node_index"] + event["name"], []).append(event)
    return [_summarise(runs[2:] or runs) for runs in found.values()]


def _summarise(runs: list[dict]) -> NodeRun:
    args = runs[0]["args"]
    inputs, outputs = (args[key] for key in ("input_type_shape", "output_type_shape"))
    return NodeRun(
        runs[0]["name"].removesuffix("_kernel_time"),
        args["op_name"],
        args["provider"],
        statistics.median(run["dur"] for run in runs) / 1000,
        tuple(tuple(shape) for each in inputs for shape in each.values()),
        tuple(tuple(shape) for each in outputs for shape in each.values()),
        tuple(dtype for each in inputs for dtype in each),
    )


def make_feed(session: onnxruntime.InferenceSession, batch_size: int) -> dict[str, np.ndarray]:
    """Return random images for a session.

    Raises:
        VitpruneError: if the file has not one image input, or neither its graph nor what vitprune wrote into it says
            how large images are.
    """
    inputs = session.get_inputs()
    if len(inputs) != 1 or inputs[0].type not in _DTYPES or len(inputs[0].shape) != 4:
        listed = ", ".join(f"{each.name} {each.type} {each.shape}" for each in inputs)
        raise VitpruneError(f"expected one input of images [batch, channels, height, width], the file has {listed}")
    batch, *rest = inputs[0].shape
    size = complete_size(rest, read_facts(session, "the file"), "the file")
    if size is None:
        raise VitpruneError(
            f"the file leaves the size of its images open: {inputs[0].shape}; export it with a fixed one"
        )
    shape = (batch if isinstance(batch, int) else batch_size, *size)
    images = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    return {inputs[0].name: images.astype(_DTYPES[inputs[0].type])}


def make_session_runner(session: onnxruntime.InferenceSession, batch_size: int) -> Callable[[], Any]:
    """Return a program that runs random images through a session once."""
    feed = make_feed(session, batch_size)
    return lambda: session.run(None, feed)


def count_node_macs(node: NodeRun) -> int:
    """Count a node's multiply-accumulates: products of matrices, convolutions, attention; nothing else has any.

    >>> count_node_macs(NodeRun("", "MatMul", "", 0.0, ((2, 5, 3), (3, 4)), ((2, 5, 4),), ("float", "float")))
    120
    """
    if node.op_type in ("MatMul", "FusedMatMul", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"):
        return math.prod(node.outputs[0]) * node.inputs[0][-1]
    if node.op_type in ("Gemm", "FusedGemm", "QGemm"):
        return math.prod(node.inputs[0]) * node.outputs[0][-1]
    if node.op_type in ("Conv", "FusedConv", "NhwcFusedConv"):
        return math.prod(node.outputs[0]) * math.prod(node.inputs[1][1:])
    if node.op_type == "MultiHeadAttention" and len(node.inputs[1]) == 3:
        return math.prod(node.inputs[0]) * node.inputs[1][1] + math.prod(node.outputs[0]) * node.inputs[1][1]
    if node.op_type == "Attention" and len(node.inputs) >= 3 and len(node.inputs[0]) == 4:  # ONNX's, opset 23
        return (math.prod(node.inputs[0]) + math.prod(node.outputs[0])) * node.inputs[1][2]
    return 0


def count_graph_macs(path: str | Path) -> int:
    """Count the multiply-accumulates of one image as an ONNX file computes them."""
    nodes = profile(path, optimized=False, num_runs=1)
    batch = nodes[0].inputs[0][0] if nodes[0].inputs and len(nodes[0].inputs[0]) == 4 else 1
    return sum(map(count_node_macs, nodes)) // max(batch, 1)
