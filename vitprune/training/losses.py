"""What a student is asked to match: answers, features and blocks of a teacher, and labels.

Letters: B images, N tokens, D embedding width, C classes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from vitprune.answers import log_shares, of_classes
from vitprune.errors import VitpruneError
from vitprune.models.merging import describe_merging
from vitprune.models.units import find_groups
from vitprune.training.settings import Training
from vitprune.views import block_of, has_classifier, num_prefix_tokens


class Outputs(nn.Module):
    """A model that answers all that is compared: ``logits`` [B, C], ``features`` [B, D], ``blocks``, each [B, N, D].

    Args:
        model: timm Vision Transformer; its parameters are this module's.
        wanted: keys of ``LOSSES``: blocks are collected only where they are asked for.
        num_tokens: leading tokens of each block's output that are compared; None: all.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32, num_classes=5)
    >>> found = Outputs(model, ["answers", "blocks"])(torch.randn(2, 3, 32, 32))
    >>> found["logits"].shape, len(found["blocks"])
    (torch.Size([2, 5]), 2)
    """

    def __init__(self, model: nn.Module, wanted: Sequence[str], num_tokens: int | None = None) -> None:
        super().__init__()
        self.model, self.wanted, self.num_tokens = model, tuple(wanted), num_tokens

    def forward(self, images: Tensor) -> dict[str, Tensor | list[Tensor]]:
        """Answer images [B, 3, height, width]."""
        blocks: list[Tensor] = []
        with ExitStack() as stack:
            if "blocks" in self.wanted:
                hook = lambda _module, _inputs, output: blocks.append(self._states(output))  # noqa: E731
                for block in self.model.blocks:
                    stack.callback(block.register_forward_hook(hook).remove)
            states = self.model.forward_features(images)
        found = {"logits": self.model.forward_head(states)} if has_classifier(self.model) else {}
        if "features" in self.wanted:
            found["features"] = self.model.forward_head(states, pre_logits=True)
        return {**found, "blocks": blocks} if blocks else found

    def _states(self, output: Tensor | tuple) -> Tensor:
        states = output[0] if isinstance(output, tuple) else output
        return states if self.num_tokens is None else states[:, : self.num_tokens]


def choose_losses(student: nn.Module, teacher: nn.Module) -> dict[str, float]:
    """Return what a student is asked to match where nobody says: key of ``LOSSES`` -> weight.

    Every token of every block says more about a teacher than its answers to a few images do; where there are no blocks
    to compare, what the classifier reads has to do.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=5)
    >>> choose_losses(model, model)
    {'answers': 1.0, 'blocks': 5.0}
    """
    answers = {"answers": 1.0} if has_classifier(student) else {}
    states = {"features": 1.0} if why_no_blocks(student, teacher) else {"blocks": 5.0}
    return {**answers, **states}


def why_no_blocks(student: nn.Module, teacher: nn.Module) -> str:
    """Return why the states after each block cannot be compared; empty where they can.

    >>> why_no_blocks(nn.Identity(), nn.Identity())
    'Identity has no row of equal blocks'
    """
    if not _has_row_of_blocks(teacher):
        return f"{type(teacher).__name__} has no row of equal blocks"
    counts = [len(model.blocks) for model in (student, teacher)]
    if counts[0] != counts[1]:
        return f"the model has {counts[0]} blocks, the teacher {counts[1]}"
    if (describe_merging(student) or describe_merging(teacher)) and not num_prefix_tokens(student):
        return "the tokens merge and none is in front"
    return ""


def _has_row_of_blocks(model: nn.Module) -> bool:
    """Tell whether ``blocks`` are blocks, and no stages or branches of such."""
    try:
        groups = find_groups(model)
    except VitpruneError:  # none of its modules is known
        return False
    return all(re.fullmatch(r"blocks\.\d+", block_of(group.name)) for group in groups)


def pair_up(student: nn.Module, teacher: nn.Module, training: Training) -> tuple[Outputs, Outputs]:
    """Return student and teacher as what is compared of them, after checking that it can be.

    Where tokens of either merge, of the blocks the tokens in front are compared, which never do.

    Raises:
        VitpruneError: if a loss means nothing for these models.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=0)
    >>> pair_up(model, model, Training(losses={"answers": 1.0}))
    Traceback (most recent call last):
        ...
    vitprune.errors.VitpruneError: loss answers compares classes, and the model has none; leave it out of `losses`
    """
    for name, what in (("answers", "compares classes"), ("labels", "asks for classes")):
        if name in training.losses and not has_classifier(student):
            raise VitpruneError(f"loss {name} {what}, and the model has none; leave it out of `losses`")
    num_tokens = None
    if "blocks" in training.losses:
        reason = why_no_blocks(student, teacher)
        if reason:
            raise VitpruneError(f"loss blocks: {reason}; leave it out of `losses`")
        if describe_merging(student) or describe_merging(teacher):
            num_tokens = num_prefix_tokens(student)
    wanted = list(training.losses)
    return Outputs(student, wanted, num_tokens), Outputs(teacher, wanted, num_tokens)


def sum_losses(
    student: Mapping[str, Tensor | list[Tensor]],
    teacher: Mapping[str, Tensor | list[Tensor]],
    labels: Tensor | None,
    training: Training,
) -> tuple[Tensor, dict[str, float]]:
    """Return the weighted sum of the losses, and each of them by itself.

    ``answers`` is the KL divergence from the teacher's answers at a temperature, times its square; ``features`` and
    ``blocks`` are squared errors relative to the mean square of the teacher's; ``labels`` is the cross-entropy.

    Args:
        student: from ``Outputs``.
        teacher: from ``Outputs``, without gradients.
        labels: int64 [B], or shares of the classes [B, C] where images are mixed; None where nothing reads them.
        training: weights, temperature and smoothing.

    Source:
        Answers as in Hinton et al., arXiv:1503.02531; states as in Romero et al., arXiv:1412.6550.

    >>> answers = {"logits": torch.tensor([[2.0, 0.0]])}
    >>> float(sum_losses(answers, answers, None, Training(losses={"answers": 1.0}))[0])
    0.0
    """
    parts: dict[str, Tensor] = {}
    if "answers" in training.losses:
        t = training.temperature
        of_student, of_teacher = (log_shares(_wide(each["logits"]) / t) for each in (student, teacher))
        parts["answers"] = t**2 * nn.functional.kl_div(of_student, of_teacher, reduction="batchmean", log_target=True)
    if "features" in training.losses:
        parts["features"] = _relative_error(student["features"], teacher["features"])
    if "blocks" in training.losses:
        errors = [_relative_error(*pair) for pair in zip(student["blocks"], teacher["blocks"], strict=True)]
        parts["blocks"] = torch.stack(errors).mean()
    if "labels" in training.losses:
        parts["labels"] = nn.functional.cross_entropy(
            of_classes(_wide(student["logits"])), labels, label_smoothing=training.smoothing
        )
    total = sum(training.losses[name] * part for name, part in parts.items())
    return total, {name: part.item() for name, part in parts.items()}


def _relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    student, teacher = _wide(student), _wide(teacher)
    return (student - teacher).square().mean() / teacher.square().mean().clamp_min(torch.finfo(torch.float32).tiny)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
