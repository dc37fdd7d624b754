"""Time and peak memory of every criterion, each in a process of its own; writes a dated JSON file.

    python benchmarks/criteria_cost.py --checkpoint deit_tiny_patch16_224.safetensors --data imagenet-train-1000

Images are in memory before the clock starts.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from datetime import date

import torch
from common import RESULTS, describe_machine, log
from jsonargparse import auto_cli

import vitprune
from vitprune.options import CRITERIA
from vitprune.processes import peak_memory_bytes


def main(checkpoint: str, data: str, model: str = "deit_tiny_patch16_224", num_images: int = 100):
    """Measure all criteria.

    Args:
        checkpoint: weights of the model.
        data: folder of class folders.
        model: timm name.
        num_images: spread evenly over the folder.
    """
    rows = {}
    for criterion in CRITERIA:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            rows[criterion] = pool.apply(_measure, (model, checkpoint, data, criterion, num_images))
        log(f"{criterion} {rows[criterion]}")
    result = {**describe_machine(), "threads": torch.get_num_threads(), "num_images": num_images, "criteria": rows}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{date.today()}-criteria-cost-{model}.json").write_text(json.dumps(result, indent=1) + "\n")


def _measure(model: str, checkpoint: str, data: str, criterion: str, count: int) -> dict[str, float]:
    network = vitprune.load(model, checkpoint=checkpoint)
    images = vitprune.find_images(data, network.num_classes).head(count)
    batches = list(vitprune.ImageBatches(images, network, batch_size=32))
    before = peak_memory_bytes()
    started = time.perf_counter()
    found = vitprune.discover(network, batches) if criterion == "jas" else None
    vitprune.score_neurons(network, criterion, batches=batches, found=found)
    seconds = time.perf_counter() - started
    return {
        "seconds": round(seconds, 2),
        "peak_mib": round(peak_memory_bytes() / 2**20),
        "peak_before_mib": round(before / 2**20),
    }


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
