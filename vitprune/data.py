"""What the rest of the package asks for by one name: images, labels, batches and hashes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from vitprune.images.class_names import class_names, describe_class, find_class, label_names_of, remember_names
from vitprune.images.find_images import ImageChoice, find_images
from vitprune.images.image_batches import ImageBatches, ReadBatch
from vitprune.images.image_hashes import digest_images, hash_images
from vitprune.images.image_set import ImageSet
from vitprune.views import data_config

__all__ = [
    "Batches",
    "ImageBatches",
    "ImageChoice",
    "ImageSet",
    "ReadBatch",
    "class_names",
    "data_config",
    "describe_class",
    "digest_images",
    "find_class",
    "find_images",
    "hash_images",
    "label_names_of",
    "on_device",
    "remember_names",
    "take_evenly",
]

# Images [B, channels, height, width] and class labels [B].
Batches = Iterable[tuple[Tensor, Tensor]]


def on_device(model: nn.Module, batches: Batches) -> Batches:
    """Move batches to a model's device, and their images to its dtype."""
    parameter = next(model.parameters(), torch.zeros(0))
    for images, labels in batches:
        yield images.to(parameter.device, parameter.dtype), labels.to(parameter.device)


def take_evenly(batches: Batches, num_images: int, *, batch_size: int = 32) -> list[tuple[Tensor, Tensor]]:
    """Return at most this many images with their labels, evenly spread; all, where there are fewer. Kept in memory.

    Args:
        batches: pairs of images [B, channels, height, width] and labels [B]. Read once.
        num_images: at most.
        batch_size: of what is returned.

    >>> batches = [(torch.zeros(4, 3, 2, 2), torch.arange(4)), (torch.zeros(2, 3, 2, 2), torch.arange(4, 6))]
    >>> [labels.tolist() for _images, labels in take_evenly(batches, 3, batch_size=2)]
    [[0, 2], [4]]
    """
    kept: list[tuple[Tensor, Tensor]] = []
    every, passed = 1, 0
    for images, labels in batches:
        for pair in zip(images, labels, strict=True):
            if passed % every == 0:
                kept.append(pair)
            passed += 1
            if len(kept) == 2 * num_images:
                kept, every = kept[::2], 2 * every
    if len(kept) > num_images:
        kept = [kept[place * len(kept) // num_images] for place in range(num_images)]
    starts = range(0, len(kept), batch_size)
    parts = [zip(*kept[start : start + batch_size], strict=True) for start in starts]
    return [(torch.stack(images), torch.stack(labels)) for images, labels in parts]
