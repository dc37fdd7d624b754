"""Reduce a model, its calibration images and its discovery to the classes that will be asked for."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from vitprune.data import ImageSet, find_class
from vitprune.discovery.discover import Discovery, only_classes
from vitprune.models.classifier import keep_classes


def specialise(
    model: nn.Module, images: ImageSet, classes: Sequence[str] | None = None, *, found: Discovery | None = None
) -> tuple[nn.Module, ImageSet, Discovery | None]:
    """Return a copy of a model that answers only some classes, with their images and what was found on these.

    Args:
        model: timm model with a classifier; stays as it is.
        images: of these classes and perhaps of others.
        classes: folder names, class indices or English names; None takes the classes of the images.
        found: a discovery on the model.

    Raises:
        VitpruneError: if a class is unknown or has no images, fewer than two are left, or the classifier is not linear.
    """
    indices = sorted(images.class_names)
    if classes is not None:
        indices = sorted({find_class(images.root, images.class_names, name) for name in classes})
    reduced = keep_classes(model, indices, label_names=[images.class_names[index] for index in indices])
    return reduced, images.only_classes(indices), None if found is None else only_classes(found, indices)
