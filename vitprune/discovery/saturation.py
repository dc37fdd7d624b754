"""Tell whether a model is so sure of itself that a probability has no gradient left."""

from __future__ import annotations

from typing import Any

import torch

from vitprune.answers import ask, log_shares
from vitprune.data import ImageBatches, ImageSet, on_device

# How many images are looked at, and what counts as sure.
NUM_IMAGES, SURE = 16, 0.999


@torch.no_grad()
def describe_saturation(model: Any, images: ImageSet, *, num_workers: int = 0) -> str | None:
    """Say that most images are answered with a probability of nearly 1; None where they are not.

    There the gradient of a probability vanishes, and scores that follow it tell less.

    Args:
        model: timm model with a classifier, in eval mode.
        images: of which some are looked at, evenly spread.
        num_workers: processes that decode images.
    """
    few = ImageBatches(images.head(NUM_IMAGES), model, batch_size=NUM_IMAGES, num_workers=num_workers)
    decoded = [(batch.images, batch.labels) for batch in few.read() if batch.images is not None]
    sure = [log_shares(ask(model, each).double()).exp().amax(-1) > SURE for each, _labels in on_device(model, decoded)]
    if not sure or model.num_classes < 2:
        return None
    of_images = torch.cat(sure)
    if of_images.double().mean() <= 0.5:
        return None
    return (
        f"{int(of_images.sum())} of {len(of_images)} images that were looked at are answered with a probability above "
        f"{SURE}, where its gradient vanishes; `quantity` logit does not saturate"
    )
