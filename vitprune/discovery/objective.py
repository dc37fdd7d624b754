"""What the paths explain: the probability or the logit of one class.

Letters: B images, C classes, R rows (images x quadrature nodes).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vitprune.answers import of_classes
from vitprune.errors import VitpruneError
from vitprune.options import QUANTITIES, TARGET_CLASSES, check_choice


@dataclass(frozen=True)
class Objective:
    """The number F of an image that is attributed to neurons.

    Attributes:
        target: whose answer: ``label`` (the image's own class), ``predicted`` (what the undisturbed model answers), or
            the index of a class for all images.
        quantity: ``probability`` (softmax; the paper), ``logit``, or ``cosine`` to the mean of a class.
    """

    target: str | int = "label"
    quantity: str = "probability"

    def classes(self, labels_B: Tensor, logits_BC: Tensor) -> Tensor:
        """Return the class [B] (int64) that each image's F is of, given labels and the undisturbed answer."""
        if self.target == "label":
            return labels_B
        return (
            of_classes(logits_BC).argmax(-1) if self.target == "predicted" else torch.full_like(labels_B, self.target)
        )

    def value(self, logits_RC: Tensor, classes_R: Tensor) -> Tensor:
        """Return F [R]."""
        logits_RC = of_classes(logits_RC)
        answers_RC = logits_RC.softmax(-1) if self.quantity == "probability" else logits_RC
        return answers_RC.gather(1, classes_R.unsqueeze(1)).squeeze(1)


DEFAULT_OBJECTIVE = Objective()


def make_objective(target: str | int, quantity: str, *, num_classes: int) -> Objective:
    """Check a choice against the model's classes.

    Raises:
        VitpruneError: if the target is no class of the model, or either is unknown.

    >>> make_objective(3, "logit", num_classes=10)
    Objective(target=3, quantity='logit')
    """
    check_choice("quantity", quantity, QUANTITIES)
    if num_classes == 1:
        if quantity == "logit":
            raise VitpruneError(
                "the model has one output, so its classes have no logit each; use `quantity` probability"
            )
        num_classes = 2
    if isinstance(target, str):
        check_choice("target", target, TARGET_CLASSES)
    elif not 0 <= target < num_classes:
        raise VitpruneError(f"target must be one of {', '.join(TARGET_CLASSES)} or in [0, {num_classes}), got {target}")
    return Objective(target, quantity)
