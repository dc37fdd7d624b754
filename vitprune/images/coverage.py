"""How many of a model's classes images show."""

from __future__ import annotations

import warnings
from typing import Any

from vitprune.errors import VitpruneNote
from vitprune.images.image_set import ImageSet


def describe_coverage(model: Any, images: ImageSet, what: str = "calibration") -> str | None:
    """Say that images show fewer than half of the classes that a model chooses among; None where they do not.

    Args:
        model: a timm model, or an opened ONNX file.
        images: with labels; others show nobody knows what, and nothing is said of them.
        what: ``calibration`` or ``evaluation`` images.

    >>> from pathlib import Path
    >>> from types import SimpleNamespace
    >>> describe_coverage(SimpleNamespace(num_classes=4), ImageSet(Path("x"), ("1.jpg",), (2,)), "evaluation")
    'the evaluation images show 1 of the 4 classes that the model chooses among; nothing is measured of the others'
    """
    seen = len(set(images.labels))
    if not images.has_labels or seen >= model.num_classes / 2:
        return None
    consequence = (
        "nothing is learned of the others (`keep_classes` drops them)"
        if what == "calibration"
        else "nothing is measured of the others"
    )
    return (
        f"the {what} images show {seen} of the {model.num_classes} classes that the model chooses among; {consequence}"
    )


def warn_of_few_classes(model: Any, images: ImageSet | None, what: str = "calibration") -> None:
    """Warn (``VitpruneNote``) of what ``describe_coverage`` says, if there are images and it says something."""
    told = None if images is None else describe_coverage(model, images, what)
    if told is not None:
        warnings.warn(told, VitpruneNote, stacklevel=3)
