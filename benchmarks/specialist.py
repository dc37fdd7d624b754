"""A specialist for the classes of a folder against a class-agnostic model of the same size; writes a dated JSON file.

    python benchmarks/specialist.py --checkpoint deit_tiny_patch16_224.safetensors \
        --calibration imagenette/train --general imagenet-train-1000 --evaluation imagenette/val

Both answer among the kept classes only. About 25 minutes on 2 CPU cores.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from dataclasses import asdict
from datetime import date
from pathlib import Path

import timm
import torch
from jsonargparse import auto_cli

import vitprune
from vitprune.evaluation.curve import Curve, measure_curve

HERE = Path(__file__).resolve().parent


def main(
    checkpoint: str,
    calibration: str,
    evaluation: str,
    general: str | None = None,
    model: str = "deit_tiny_patch16_224",
    ratios: list[float] = [0.5, 0.7, 0.8],  # noqa: B006 (read only)
    folder: str | None = None,
):
    """Measure both.

    Args:
        checkpoint: weights of the model.
        calibration: folder of class folders: the classes to keep, and their images.
        evaluation: folder of class folders with other images of these classes.
        general: folder of class folders to calibrate the class-agnostic model on; None leaves it out.
        model: timm name.
        ratios: shares of FFN neurons to remove.
        folder: where finished points are kept; of these arguments alone.
    """
    started = time.perf_counter()
    network = vitprune.load(model, checkpoint=checkpoint)
    images = vitprune.find_images(calibration, network.num_classes)
    classes = sorted(images.class_names)
    names = [images.class_names[index] for index in classes]
    specialist = vitprune.keep_classes(network, classes, label_names=names)
    others = vitprune.find_images(evaluation, len(classes), label_names=names)

    def read(chosen):
        return list(vitprune.ImageBatches(chosen, network, batch_size=50))

    def track(items, description):
        for position, item in enumerate(items, 1):
            print(f"{time.perf_counter() - started:6.0f} s  {description} {position}/{len(items)}", file=sys.stderr)
            yield item

    curve = Curve(["obs"], ["global"], ["sequential"], folder=None if folder is None else Path(folder))
    evaluation_batches = read(others)
    points = measure_curve(
        specialist, read(images.only_classes(classes)), evaluation_batches, curve, ratios=ratios, track=track
    )
    rows = [{"kind": "specialist", **asdict(point)} for point in points]
    if general is not None:
        batches = read(vitprune.find_images(general, network.num_classes))
        for ratio in ratios:
            pruned, plan = vitprune.prune(network, batches, pruning_ratio=ratio)
            reduced = vitprune.keep_classes(pruned, classes, label_names=names)
            top1 = vitprune.evaluate(reduced, evaluation_batches).top1
            rows.append({"kind": "class-agnostic", "pruning_ratio": plan.pruning_ratio, "top1": top1})
    result = {
        "classes": names,
        "num_calibration_images": len(images),
        "num_evaluation_images": len(others),
        "rows": rows,
        "seconds": round(time.perf_counter() - started),
        "hardware": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__},
        "command": f"python benchmarks/specialist.py --model {model} --ratios {ratios} --checkpoint ... "
        "--calibration imagenette/train --general imagenet-train-1000 --evaluation imagenette/val",
    }
    (HERE / "results").mkdir(exist_ok=True)
    path = HERE / "results" / f"{date.today()}-specialist-{model}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    for row in rows:
        print(f"{row['kind']:15} {row['pruning_ratio']:.2f} {row['top1']:.4f}")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
