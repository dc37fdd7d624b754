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
from vitprune.sharing import deal_out, places, sharing, sum_of_all
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
    kept: dict[int, tuple[Tensor, Tensor]] = {}
    every, passed, like = 1, 0, None
    for images, labels in batches:
        like = images[:0], labels[:0]
        for place, *pair in zip(places(len(images), passed).tolist(), images, labels, strict=True):
            if place % every == 0:
                kept[place] = tuple(pair)
            while place >= every * (2 * num_images - 1):
                every *= 2
                kept = {known: pair for known, pair in kept.items() if known % every == 0}
        passed += len(images)
    if like is None:
        return []
    (total,) = sum_of_all(passed)
    while total - 1 >= every * (2 * num_images - 1):  # others may have come further
        every *= 2
    chosen = range(0, total, every)
    if len(chosen) > num_images:
        chosen = [chosen[place * len(chosen) // num_images] for place in range(num_images)]
    if sharing().count == 1:
        starts = range(0, len(chosen), batch_size)
        parts = [zip(*(kept[place] for place in chosen[start : start + batch_size]), strict=True) for start in starts]
        return [(torch.stack(images), torch.stack(labels)) for images, labels in parts]
    batch_size -= batch_size % sharing().count
    held, columns = torch.tensor(list(kept), dtype=torch.int64), zip(*kept.values(), strict=True)
    images, labels = (torch.stack(column) for column in columns) if kept else like
    return list(zip(*(deal_out(each, held, chosen, batch_size) for each in (images, labels)), strict=True))
