"""Cosine of an encoder's embeddings to those of its dense self, with fewer query/key dimensions; a dated JSON file.

    python benchmarks/encoder.py --model vit_small_patch14_dinov2 \
        --checkpoint vit_small_patch14_dinov2_saliency.safetensors \
        --calibration imagenet-train-1000 --evaluation nips17-1000 --image_size 224

The embedding is what the model answers without a classifier. Labels are not read.
"""

from __future__ import annotations

import json
from datetime import date

import torch
from common import RESULTS, describe_machine, log, refuse_overlap, track
from jsonargparse import auto_cli

import vitprune
from vitprune.models.macs import count_macs


@torch.no_grad()
def main(
    model: str,
    checkpoint: str,
    calibration: str,
    evaluation: str,
    image_size: int = 224,
    num_calibration: int = 1000,
    ratio: float = 0.5,
    batch_size: int = 32,
):
    """Measure one model.

    Args:
        model: timm name.
        checkpoint: its weights.
        calibration: folder of images, one folder deep.
        evaluation: folder with other images.
        image_size: height and width that images are fed at.
        num_calibration: images, spread evenly over the folder.
        ratio: share of the query/key dimensions of every layer to remove.
        batch_size: images at once.
    """
    dense = vitprune.set_image_size(vitprune.load(model, checkpoint=checkpoint).float(), image_size)
    images = vitprune.find_images(calibration, None).head(num_calibration)
    evaluated = vitprune.find_images(evaluation, None)
    refuse_overlap(images, evaluated)
    batches, others = (vitprune.ImageBatches(chosen, dense, batch_size=batch_size) for chosen in (images, evaluated))
    narrow, plan = vitprune.prune(
        dense, batches, pruning_ratio=ratio, parts=["qk"], allocation="uniform", criterion="variance", track=track
    )
    cosines = torch.cat(
        [torch.cosine_similarity(dense(each), narrow(each), dim=-1) for each, _labels in track(others, "compare")]
    )
    result = {
        **describe_machine(),
        "model": model,
        "image_size": image_size,
        "num_calibration": len(images),
        "num_images": len(cosines),
        "widths": sorted(set(plan.widths.values())),
        "macs_share": round(count_macs(narrow) / count_macs(dense), 4),
        "mean_cosine": round(float(cosines.mean()), 5),
        "least_cosine": round(float(cosines.min()), 5),
    }
    path = RESULTS / f"{date.today()}-encoder-{model}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    log(f"mean cosine {result['mean_cosine']}, least {result['least_cosine']}; wrote {path.name}")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
