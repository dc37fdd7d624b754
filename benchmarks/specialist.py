"""A specialist for the classes of a folder against a class-agnostic model of the same size; writes a dated JSON file.

    python benchmarks/specialist.py --checkpoint deit_tiny_patch16_224.safetensors \
        --calibration imagenette/train --general imagenet-train-1000 --evaluation imagenette/val

Both answer among the kept classes only.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import date

from common import RESULTS, describe_machine, open_points, read_batches, refuse_overlap, track
from jsonargparse import auto_cli

import vitprune
from vitprune.evaluation.curve import Curve, measure_curve


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
    network = vitprune.load(model, checkpoint=checkpoint)
    images = vitprune.find_images(calibration, network.num_classes)
    classes = sorted(images.class_names)
    names = [images.class_names[index] for index in classes]
    specialist = vitprune.keep_classes(network, classes, label_names=names)
    others = vitprune.find_images(evaluation, len(classes), label_names=names)

    general_images = None if general is None else vitprune.find_images(general, network.num_classes)
    refuse_overlap(images, *(() if general_images is None else (general_images,)), others)
    points_folder = None if folder is None else open_points(folder, specialist, images, others) / "points"
    curve = Curve(["obs"], ["global"], ["sequential"], folder=points_folder)
    evaluation_batches = read_batches(others, network)
    calibration_batches = read_batches(images.only_classes(classes), network)
    points = measure_curve(specialist, calibration_batches, evaluation_batches, curve, ratios=ratios, track=track)
    rows = [{"kind": "specialist", **asdict(point)} for point in points]
    if general_images is not None:
        batches = read_batches(general_images, network)
        for ratio in ratios:
            pruned, plan = vitprune.prune(network, batches, pruning_ratio=ratio)
            reduced = vitprune.keep_classes(pruned, classes, label_names=names)
            top1 = vitprune.evaluate(reduced, evaluation_batches).top1
            rows.append({"kind": "class-agnostic", "pruning_ratio": plan.pruning_ratio, "top1": top1})
    result = {
        **describe_machine(),
        "classes": names,
        "num_calibration_images": len(images),
        "num_evaluation_images": len(others),
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{date.today()}-specialist-{model}.json").write_text(json.dumps(result, indent=1) + "\n")
    for row in rows:
        print(f"{row['kind']:15} {row['pruning_ratio']:.2f} {row['top1']:.4f}")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
