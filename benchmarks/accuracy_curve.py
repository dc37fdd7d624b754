"""Accuracy against pruning ratio on real weights and photos; writes a dated JSON file and the README's picture.

    python benchmarks/accuracy_curve.py --checkpoint deit_tiny_patch16_224.safetensors \
        --calibration imagenet-train-1000 --evaluation nips17-1000

Hardware, versions and the command are recorded beside the figures. About 15 minutes on 2 CPU cores.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from datetime import date
from pathlib import Path

import timm
import torch
from jsonargparse import auto_cli

import vitprune
from vitprune.report.curve import measure_curve, render_curve

HERE = Path(__file__).resolve().parent


def main(
    checkpoint: str,
    calibration: str,
    evaluation: str,
    model: str = "deit_tiny_patch16_224",
    ratios: list[float] = [0.1, 0.3, 0.5, 0.7],  # noqa: B006 (read only)
    criteria: list[str] = ["obs", "taylor", "activation", "magnitude", "random"],  # noqa: B006
    allocations: list[str] = ["global"],  # noqa: B006
    compensations: list[str] = ["none", "ridge"],  # noqa: B006
    picture: str | None = None,
):
    """Measure the curve.

    Args:
        checkpoint: weights of the model.
        calibration: folder of class folders that scores and compensation come from.
        evaluation: folder of class folders with other images.
        model: timm name.
        ratios: shares of FFN neurons to remove.
        criteria: how neurons are ranked.
        allocations: how the ratio is spread over the FFNs.
        compensations: how the kept neurons make good the loss.
        picture: PNG or SVG file to write; default: next to the JSON file.
    """
    network = vitprune.load(model, checkpoint=checkpoint)
    batches = [
        list(vitprune.ImageBatches(vitprune.find_images(folder, network.num_classes), network, batch_size=50))
        for folder in (calibration, evaluation)
    ]
    started = time.perf_counter()

    def track(items):
        for position, item in enumerate(items, 1):
            print(f"{time.perf_counter() - started:6.0f} s  {position}/{len(items)}  {item}", file=sys.stderr)
            yield item

    dense, points = measure_curve(
        network,
        *batches,
        ratios=ratios,
        criteria=criteria,
        allocations=allocations,
        compensations=compensations,
        track=track,
    )
    name = f"{date.today()}-accuracy-{model}"
    rows = [vars(point) for point in points]
    result = {
        "dense_top1": dense.top1,
        "num_calibration_images": sum(len(labels) for _, labels in batches[0]),
        "num_evaluation_images": dense.num_images,
        "rows": rows,
        "seconds": round(time.perf_counter() - started),
        "hardware": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__},
        "command": f"python benchmarks/accuracy_curve.py --model {model} --ratios {ratios} --criteria {criteria} "
        f"--allocations {allocations} --compensations {compensations} "
        "--checkpoint ... --calibration imagenet-train-1000 --evaluation nips17-1000",
    }
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    title = f"{model}, {dense.num_images} photos, no retraining"
    render_curve(dense.top1, points, picture or HERE / "results" / f"{name}.png", title=title)
    for row in rows:
        line = f"{row['criterion']:12}{row['allocation']:9}{row['compensation']:7}{row['pruning_ratio']:.2f}"
        print(f"{line} {row['top1']:.3f}")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
