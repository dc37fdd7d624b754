"""What one calibration image costs, and what processes that share the images exchange; writes a dated JSON file.

    python benchmarks/calibration_cost.py --model deit_base_patch16_224
    python benchmarks/calibration_cost.py --model vit_large_patch16_224

Matrix products and messages are counted on two random images and random weights: of one ranking (statistics of
criterion obs), and of one compensation (sequential). Systems of equations, which every process solves by itself, are
timed for one FFN.
"""

from __future__ import annotations

import json
import time
from contextlib import contextmanager
from datetime import date
from typing import Any

import timm
import torch
from common import RESULTS, describe_machine
from jsonargparse import auto_cli
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from vitprune import Plan, compensate_sequentially, find_feed_forwards, measure_statistics, sharing
from vitprune.calibration.second_order import eliminate
from vitprune.processes import Processes
from vitprune.pruning import sequential


def gather(moments):
    """Sum moments up over the processes, as what solves them does first."""
    return moments.of_all()


class CountedProducts(TorchDispatchMode):
    """Count the matrix products of forward and backward passes; torch's own counter knows no gradients of inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.flop = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        count = flop_registry.get(function._overloadpacket)
        self.flop += 0 if count is None else count(*args, **(kwargs or {}), out_val=result)
        return result


@contextmanager
def counted_messages():
    """Pretend to be one of two processes, and count the bytes that it would send."""
    sent = {"bytes": 0, "messages": 0}

    def count(tensor: torch.Tensor, *_more: Any) -> None:
        sent["bytes"] += tensor.numel() * tensor.element_size()
        sent["messages"] += 1

    before = torch.distributed.all_reduce, torch.distributed.broadcast
    torch.distributed.all_reduce = torch.distributed.broadcast = count
    sharing._current.append(Processes(0, 2))
    try:
        yield sent
    finally:
        sharing._current.pop()
        torch.distributed.all_reduce, torch.distributed.broadcast = before


def measure(run, size: int) -> dict[str, float]:
    """Return what one more image costs, and what is exchanged however many there are."""
    flops = []
    for count in (1, 2):
        generator = torch.Generator().manual_seed(0)
        batches = [(torch.randn(count, 3, size, size, generator=generator), torch.zeros(count, dtype=torch.int64))]
        with CountedProducts() as counter, counted_messages() as sent:
            run(batches)
        flops.append(counter.flop)
    return {"flop_per_image": flops[1] - flops[0], **sent}


def main(model: str = "deit_base_patch16_224"):
    """Count and time.

    Args:
        model: timm name; its weights are random.
    """
    torch.manual_seed(0)
    network = timm.create_model(model).eval()
    ffns = find_feed_forwards(network)
    size = network.patch_embed.img_size[0]
    plan = Plan({ffn.name: torch.arange(ffn.num_neurons) < ffn.num_neurons // 2 for ffn in ffns})
    ranking = measure(lambda batches: measure_statistics(network, ffns, batches, {"moments", "gradients"}), size)
    # What is solved is timed below: here it would count as a product of every image's.
    solve, sequential._solve = (
        sequential._solve,
        lambda _down, _keep_H, halves, *_: [m.of_all() for m in halves.moments],
    )
    try:
        compensation = measure(
            lambda batches: compensate_sequentially(network, plan, batches, towards_stream=True), size
        )
    finally:
        sequential._solve = solve
    hidden, width = ffns[0].num_neurons, network.embed_dim
    rows_NH = torch.randn(2 * hidden, hidden, dtype=torch.float64)
    covariance_HH = rows_NH.T @ rows_NH / len(rows_NH)
    started = time.perf_counter()
    eliminate(torch.randn(width, hidden, dtype=torch.float64), covariance_HH)
    eliminated = time.perf_counter() - started
    started = time.perf_counter()
    torch.linalg.eigh(covariance_HH[: hidden // 2, : hidden // 2])
    decomposed = time.perf_counter() - started
    result = {
        **describe_machine(),
        "model": model,
        "num_ffns": len(ffns),
        "hidden": hidden,
        "ranking": ranking,
        "compensation": compensation,
        "seconds_to_eliminate_one_ffn": eliminated,
        "seconds_to_decompose_one_half": decomposed,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{date.today()}-calibration-cost-{model}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({key: result[key] for key in list(result)[-6:]}, indent=2))


if __name__ == "__main__":
    auto_cli(main)
