"""Calibration images as a model of another image size reads them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from vitprune.views import data_config


def resize_images(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Return images [B, channels, height, width] of another size, by bicubic interpolation with anti-aliasing.

    Those of the right size stay as they are.

    >>> import torch
    >>> resize_images(torch.zeros(2, 3, 32, 32), (16, 24)).shape
    torch.Size([2, 3, 16, 24])
    """
    if tuple(images.shape[2:]) == tuple(size):
        return images
    return F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False)


def resize_batches(batches: Any, model: Any) -> Any:
    """Return batches of the same images as large as a model reads them.

    Those that are read from files are read anew, by the model's own transform; tensors are interpolated.

    Args:
        batches: images [B, channels, height, width] and labels, readable more than once.
        model: a timm model, or an opened ONNX file.

    >>> import timm, torch
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32)
    >>> [images.shape for images, _labels in resize_batches([(torch.zeros(2, 3, 64, 64), torch.zeros(2))], model)]
    [torch.Size([2, 3, 32, 32])]
    """
    of_model = getattr(batches, "of_model", None)
    return _Resized(batches, tuple(data_config(model)["input_size"][1:])) if of_model is None else of_model(model)


def follow_size(batches: Any, model: Any, dense: Any) -> Any:
    """Return batches of ``dense`` as ``model`` reads them; as they are where both read images of one size.

    >>> import timm
    >>> model, batches = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32), []
    >>> follow_size(batches, model, model) is batches
    True
    """
    same = data_config(model)["input_size"] == data_config(dense)["input_size"]
    return batches if same else resize_batches(batches, model)


class _Resized:
    """Batches of tensors, each interpolated as it comes."""

    def __init__(self, batches: Any, size: tuple[int, int]) -> None:
        self.batches, self.size = batches, size

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in self.batches:
            yield resize_images(images, self.size), labels
