"""Time and peak memory of pruning by the defaults, on random weights of any timm model; writes a dated JSON file.

    python benchmarks/pruning_cost.py --model vit_base_patch16_224 --data imagenet-train-1000 --num_images 256
    python benchmarks/pruning_cost.py --model vit_base_patch16_224 --data imagenet-train-1000 --num_images 256 \
        --macs_share 0.5 --parts '["ffn", "qk", "vo", "layers", "tokens"]'

Weights decide nothing of the cost but which FFNs are left wide. Images are read from disk at every pass, as the command
line does.
"""

from __future__ import annotations

import json
import time
from datetime import date

import timm
import torch
from common import RESULTS, describe_machine, log, track
from jsonargparse import auto_cli

import vitprune
from vitprune import split_attention, target_macs
from vitprune.models.macs import count_macs, count_parameters
from vitprune.options import DEFAULT_COMPENSATION, DEFAULT_RATIO, DEFAULT_STEP
from vitprune.processes import peak_memory_bytes


def main(
    model: str,
    data: str,
    num_images: int = 256,
    pruning_ratio: float = DEFAULT_RATIO,
    compensation: str = DEFAULT_COMPENSATION,
    step: float = DEFAULT_STEP,
    macs_share: float | None = None,
    parts: list[str] = ["ffn"],  # noqa: B006 (read only)
    batch_size: int = 32,
):
    """Measure one pruning.

    Args:
        model: timm name; 1,000 classes.
        data: folder of class folders to calibrate on.
        num_images: spread evenly over the folder.
        pruning_ratio: share of FFN neurons to remove.
        compensation: as in ``vitprune prune``.
        step: as in ``vitprune prune``.
        macs_share: share of the multiply-accumulates to keep, instead of ``pruning_ratio``.
        parts: what may go.
        batch_size: images at once; the default is that of ``vitprune prune``.
    """
    torch.manual_seed(0)
    network = timm.create_model(model, pretrained=False).eval()
    images = vitprune.find_images(data, network.num_classes).head(num_images)
    batches = vitprune.ImageBatches(images, network, batch_size=batch_size)
    before = peak_memory_bytes()
    started = time.perf_counter()
    asked = {"pruning_ratio": pruning_ratio}
    if macs_share is not None:
        limit = macs_share * count_macs(network)
        asked = {"target": target_macs(split_attention(network), limit, kinds=["ffn", "qk", "vo"])}
    pruned, plan = vitprune.prune(
        network, batches, **asked, parts=parts, compensation=compensation, step=step, track=track
    )
    seconds = time.perf_counter() - started
    peak = peak_memory_bytes()
    result = {
        **describe_machine(),
        "threads": torch.get_num_threads(),
        "num_images": len(images),
        "pruning_ratio": pruning_ratio if macs_share is None else None,
        "macs_share": macs_share,
        "parts": parts,
        "merge": plan.facts.merge,
        "compensation": compensation,
        "step": step,
        "batch_size": batch_size,
        "prune_seconds": round(seconds, 1),
        "peak_gib": round(peak / 2**30, 2),
        "peak_before_gib": round(before / 2**30, 2),
        "macs": [count_macs(network), count_macs(pruned)],
        "num_parameters": [count_parameters(network), count_parameters(pruned)],
        "widths": plan.widths,
    }
    RESULTS.mkdir(exist_ok=True)
    label = "" if macs_share is None else f"-macs-{macs_share:g}"
    (RESULTS / f"{date.today()}-pruning-cost{label}-{model}.json").write_text(json.dumps(result, indent=1) + "\n")
    log(f"{model}: {seconds:.0f} s, {result['peak_gib']} GiB at most")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
