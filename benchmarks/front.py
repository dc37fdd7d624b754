"""What every speed costs, beside what is to be had without a budget; a dated JSON file and the README's picture.

    python benchmarks/front.py --checkpoint deit_tiny_patch16_224.safetensors \
        --calibration imagenet-train-1000 --evaluation nips17-1000 --folder runs/front

Labels of the calibration images are not read. The folder keeps what is finished, and the models. Run it on an idle
machine: times are compared within one run, but every model is timed on its way as well.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from datetime import date
from pathlib import Path

from common import RESULTS, describe_machine, log, refuse_overlap, track
from jsonargparse import auto_cli

import vitprune
from vitprune.speed.fit_latency import list_formats
from vitprune.speed.speed_folder import load_speed

# For 32 models at two batch sizes about five minutes.
SECONDS_EACH = 5.0
PICTURE = Path(__file__).resolve().parents[1] / "docs" / "front.png"


def main(
    checkpoint: str,
    calibration: str,
    evaluation: str,
    folder: str,
    model: str = "deit_tiny_patch16_224",
    speedups: list[float] = [1.25, 1.5, 2.0, 3.0],  # noqa: B006 - read alone
    backends: list[str] = ["onnxruntime-cpu"],  # noqa: B006
    allow: list[str] = ["int8"],  # noqa: B006
    batch_sizes: list[int] = [1, 8],  # noqa: B006
    num_calibration: int = 1000,
    draw: bool = False,
):
    """Measure one model.

    Args:
        checkpoint: weights of the dense model.
        calibration: folder of images, one folder deep.
        evaluation: folder of other images, labelled.
        folder: to write; a killed run goes on there.
        model: timm name.
        speedups: over the dense float32 file on the first backend.
        backends: to run on.
        allow: precisions beside float32.
        batch_sizes: images per run; the least speed-up counts.
        num_calibration: images, spread evenly over the folder.
        draw: put the picture into the documentation.
    """
    dense = vitprune.load(model, checkpoint=checkpoint).float()
    images = vitprune.find_images(calibration, None).head(num_calibration)
    evaluated = vitprune.find_images(evaluation, dense.num_classes)
    refuse_overlap(images, evaluated)
    front = vitprune.measure_front(
        dense,
        vitprune.ImageBatches(images, dense, batch_size=32),
        vitprune.ImageBatches(evaluated, dense),
        speedups,
        folder,
        formats=list_formats(backends, allow),
        batch_sizes=batch_sizes,
        seconds_each=SECONDS_EACH,
        track=track,
    )
    found = {path.name: load_speed(path).facts for path in sorted(Path(folder, "models").iterdir())}
    result = {
        **describe_machine(),
        "model": model,
        "num_calibration": len(images),
        "num_images": front.num_images,
        "batch_sizes": batch_sizes,
        "fit_errors": {name: round(facts["fit_error"], 4) for name, facts in found.items()},
        "rows": [
            {name: round(value, 4) if isinstance(value, float) else value for name, value in asdict(row).items()}
            for row in front.rows
        ],
        "unreached": dict(front.unreached),
        "left_out": dict(front.left_out),
        "above": [f"{row.lever}: {row.name} {row.backend} {row.precision}" for row in front.above],
    }
    path = RESULTS / f"{date.today()}-front-{model}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    if draw:
        shutil.copyfile(Path(folder, "front.png"), PICTURE)
    print(front)
    log(f"alternatives above the front: {', '.join(result['above']) or 'none'}; wrote {path.name}")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
