"""What pruning costs an encoder: cosine to its dense self, agreement of neighbours, k-NN accuracy; a dated JSON file.

    python benchmarks/encoder.py --model vit_small_patch14_dinov2 \
        --checkpoint vit_small_patch14_dinov2_saliency.safetensors \
        --calibration imagenet-train-1000 --evaluation nips17-1000 --image_size 224

The embedding is what the model answers without its classifier, which is taken off where there is one. Labels are read
for k-NN alone: ``--known imagenette/train --asked imagenette/val``.
"""

from __future__ import annotations

import json
from datetime import date

import timm
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
    known: str | None = None,
    asked: str | None = None,
    image_size: int = 224,
    num_calibration: int = 1000,
    parts: tuple[str, ...] = ("ffn",),
    ratio: float = 0.5,
    compensate: str = "sequential",
    batch_size: int = 32,
    label: str = "",
):
    """Measure one model.

    Args:
        model: timm name.
        checkpoint: its weights.
        calibration: folder of images, one folder deep.
        evaluation: folder with other images, for the cosine.
        known: class folders whose images vote.
        asked: class folders with other images of the same classes, which they vote about.
        image_size: height and width that images are fed at.
        num_calibration: images, spread evenly over the folder.
        parts: what may go.
        ratio: share of the units of every part to remove.
        compensate: key of COMPENSATIONS.
        batch_size: images at once.
        label: end of the name of the result.
    """
    without_head = {"num_classes": 0} if timm.create_model(model).num_classes else None
    dense = vitprune.load(model, checkpoint=checkpoint, model_args=without_head).float()
    if image_size != dense.patch_embed.img_size[0]:
        dense = vitprune.set_image_size(dense, image_size)
    images = vitprune.find_images(calibration, None).head(num_calibration)
    evaluated = vitprune.find_images(evaluation, None)
    refuse_overlap(images, evaluated)
    batches, others = (vitprune.ImageBatches(chosen, dense, batch_size=batch_size) for chosen in (images, evaluated))
    pruned, plan = vitprune.prune(dense, batches, ratio=ratio, parts=parts, compensate=compensate, track=track)
    fidelity = vitprune.compare_embeddings(pruned, dense, others)
    log(str(fidelity))
    result = {
        **describe_machine(),
        "model": model,
        "image_size": image_size,
        "num_calibration": len(images),
        "parts": list(parts),
        "ratio": ratio,
        "compensate": compensate,
        "widths": dict(plan.widths),
        "macs_share": round(count_macs(pruned) / count_macs(dense), 4),
        "num_images": len(fidelity.cosines),
        "mean_cosine": round(fidelity.mean_cosine, 5),
        "tenth_cosine": round(fidelity.tenth_cosine, 5),
        "least_cosine": round(fidelity.least_cosine, 5),
        "agreement": round(fidelity.agreement, 5),
    }
    if known is not None and asked is not None:
        for name, each in (("dense", dense), ("pruned", pruned)):
            voters = vitprune.ImageBatches(vitprune.find_images(known, None), dense, batch_size=batch_size)
            classifier = vitprune.NeighbourClassifier(each, voters)
            chosen = vitprune.ImageChoice(asked).find(classifier)
            accuracy = vitprune.evaluate(classifier, vitprune.ImageBatches(chosen, classifier, batch_size=batch_size))
            result[f"knn_top1_{name}"] = round(accuracy.top1, 5)
            log(f"{name}: {accuracy}")
    path = RESULTS / f"{date.today()}-encoder-{model}{f'-{label}' if label else ''}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    log(f"wrote {path.name}")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
