"""Which FFN widths this machine is fast at.

Letters: B images, N tokens, D embedding width, H hidden neurons.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from vitprune.errors import VitpruneError
from vitprune.export.runtime import PROVIDERS, check_provider, open_session
from vitprune.models.load import check_device
from vitprune.options import BACKENDS, check_choice
from vitprune.speed.bench import Runner, make_runner
from vitprune.timing import Latency, measure_latency, paired_speedup

MULTIPLES = (1, 8, 16, 32, 64, 128)
NUM_FFNS = 6


@dataclass(frozen=True)
class FfnShape:
    """How large one FFN is: two linear layers and a GELU between them.

    Attributes:
        num_tokens: N.
        embed_dim: D.
        num_neurons: H.
    """

    num_tokens: int
    embed_dim: int
    num_neurons: int


def round_up(width: int, multiple: int) -> int:
    """Return the next multiple that is not smaller.

    >>> round_up(383, 16)
    384
    """
    return -(-width // multiple) * multiple


def measure_multiples(
    shapes: Sequence[FfnShape],
    *,
    backend: str,
    batch_size: int = 1,
    num_threads: int | None = None,
    device: str = "cpu",
    multiples: Sequence[int] = MULTIPLES,
    seconds: float = 6.0,
) -> dict[int, Latency]:
    """Time a chain of FFNs as they are, and with every width rounded up to multiples, in turns.

    Args:
        shapes: of FFNs that run one after the other, as in a model, so that none finds its weights in the cache.
        backend: ``torch-eager`` or a key of ``PROVIDERS``.
        batch_size: images per run.
        num_threads: of ONNX Runtime's operators; None leaves the choice to it.
        device: of torch.
        multiples: to round up to; 1 among them.
        seconds: to spend on all of them.

    Returns:
        Multiple -> latency of the whole chain; 1 is the chain as it is, multiples that change nothing are left out.

    Raises:
        VitpruneError: if the backend is unknown or absent.
    """
    check_choice("backend", backend, BACKENDS)
    if backend not in PROVIDERS and not backend.startswith("torch"):
        raise VitpruneError(f"widths are not measured on {backend}; name onnxruntime-cpu, or a number as `round_to`")
    runners: dict[int, Runner] = {}
    seen: set[tuple[int, ...]] = set()
    with tempfile.TemporaryDirectory() as folder:
        for multiple in multiples:
            rounded = [FfnShape(s.num_tokens, s.embed_dim, round_up(s.num_neurons, multiple)) for s in shapes]
            widths = tuple(shape.num_neurons for shape in rounded)
            if widths in seen:
                continue
            seen.add(widths)
            if backend in PROVIDERS:
                path = Path(folder) / f"{multiple}.onnx"
                runners[multiple] = _onnx_chain(rounded, path, backend, batch_size, num_threads)
            else:
                runners[multiple] = _torch_chain(rounded, backend, batch_size, device)
        for run in runners.values():
            run()
        return measure_latency(runners, seconds=seconds)


def find_round_to(
    shape: FfnShape,
    pruning_ratio: float,
    *,
    backend: str,
    batch_size: int = 1,
    device: str = "cpu",
    seconds: float = 6.0,
) -> int:
    """Find which multiple the widths of a pruned model should be of on this machine.

    A chain of FFNs of odd widths around the one that the ratio leaves is timed as it is and rounded up to every
    multiple of at most a quarter of that width. The fastest multiple is worth it if the wider chain is faster than the
    odd one at 95 % confidence.

    Args:
        shape: of an FFN of the dense model.
        pruning_ratio: share of neurons to be removed, in [0, 1).
        backend: ``torch-eager`` or a key of ``PROVIDERS``.
        batch_size: images per run.
        device: of torch.
        seconds: to spend.

    Returns:
        One of ``MULTIPLES``; 1 where none is faster.

    Raises:
        VitpruneError: if the backend is unknown or absent.
    """
    middle = max(1, round(shape.num_neurons * (1 - pruning_ratio)))
    offsets = [middle * (2 * number - NUM_FFNS) // (8 * NUM_FFNS) for number in range(NUM_FFNS)]
    widths = [max(1, middle + offset) | 1 for offset in offsets]
    shapes = [FfnShape(shape.num_tokens, shape.embed_dim, width) for width in widths]
    multiples = [multiple for multiple in MULTIPLES if multiple <= max(1, middle // 4)]
    measured = measure_multiples(
        shapes, multiples=multiples, backend=backend, batch_size=batch_size, device=device, seconds=seconds
    )
    return _fastest(measured)


def _fastest(measured: Mapping[int, Latency]) -> int:
    """Return the fastest multiple, or 1 where none is faster than no rounding at 95 % confidence."""
    faster = {multiple: paired_speedup(measured[1], latency) for multiple, latency in measured.items() if multiple > 1}
    best = max(faster, key=lambda multiple: faster[multiple].ratio, default=1)
    return best if best > 1 and faster[best].low > 1 else 1


def _torch_chain(shapes: Sequence[FfnShape], backend: str, batch_size: int, device: str) -> Runner:
    if backend != "torch-eager":
        raise VitpruneError(f"widths are timed in torch-eager or in ONNX Runtime, not in {backend}")
    check_device(device)
    layers: list[nn.Module] = []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for before, shape in pairwise([None, *shapes]):
            if before is not None and _states(before) != _states(shape):
                layers.append(_Resized(shape))
            layers += [
                nn.Linear(shape.embed_dim, shape.num_neurons),
                nn.GELU(),
                nn.Linear(shape.num_neurons, shape.embed_dim),
            ]
    chain = nn.Sequential(*layers).to(device).eval()
    states = torch.randn(batch_size, *_states(shapes[0]), device=device)
    return make_runner(chain, states)


def _states(shape: FfnShape) -> tuple[int, int]:
    return shape.num_tokens, shape.embed_dim


class _Resized(nn.Module):
    """Begin anew with states of another size, as between the stages of a Swin Transformer."""

    def __init__(self, shape: FfnShape) -> None:
        super().__init__()
        self.shape = _states(shape)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(len(x), *self.shape)


def _onnx_chain(
    shapes: Sequence[FfnShape], path: Path, backend: str, batch_size: int, num_threads: int | None
) -> Runner:
    check_provider(backend)
    generator = np.random.default_rng(0)
    nodes, weights, inputs, outputs = [], [], [], []
    state = ""

    def constant(*shape: int) -> str:
        name = f"weight_{len(weights)}"
        weights.append(numpy_helper.from_array(generator.standard_normal(shape, dtype=np.float32) * 0.05, name))
        return name

    def node(op_type: str, *read: str) -> str:
        nodes.append(helper.make_node(op_type, read, [f"value_{len(nodes)}"]))
        return nodes[-1].output[0]

    for before, shape in pairwise([None, *shapes]):
        if before is None or _states(before) != _states(shape):
            if state:
                outputs.append(helper.make_tensor_value_info(state, TensorProto.FLOAT, None))
            state = f"states_{len(inputs)}"
            inputs.append(helper.make_tensor_value_info(state, TensorProto.FLOAT, [batch_size, *_states(shape)]))
        hidden = node("MatMul", state, constant(shape.embed_dim, shape.num_neurons))
        hidden = node("Gelu", node("Add", hidden, constant(shape.num_neurons)))
        state = node("MatMul", hidden, constant(shape.num_neurons, shape.embed_dim))
        state = node("Add", state, constant(shape.embed_dim))
    outputs.append(helper.make_tensor_value_info(state, TensorProto.FLOAT, None))
    graph = helper.make_graph(nodes, "ffns", inputs, outputs, weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)
    session = open_session(path, num_threads=num_threads, backend=backend)
    feed = {
        value.name: generator.standard_normal([dim.dim_value for dim in value.type.tensor_type.shape.dim]).astype("f")
        for value in inputs
    }
    return lambda: session.run(None, feed)
