"""What a model answers: asked in one place, so that nothing but finite logits or embeddings gets further.

Letters: B images, C outputs, P places (tokens, cells of a feature map), E width of an embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from vitprune.batches import NO_LABEL, inside_door, where_read
from vitprune.errors import VitpruneError
from vitprune.views import has_classifier
from vitprune.wrappers import input_size

# Of an image's outputs, where they are shares of one whole.
_SHARES_SUM_TO = 1e-3


def ask(model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Return a model's logits [B, C] or, of one without classes, its embeddings: [B, E], or [B, P, E]; finite.

    Args:
        model: images [B, channels, height, width] -> logits.
        images: on its device and of its dtype.

    Raises:
        VitpruneError: if the model cannot read images of this shape, answers something else than that, or holds NaN or
            infinity in its answer.

    >>> ask(lambda images: images.flatten(1), torch.ones(2, 1, 1, 3)).shape
    torch.Size([2, 3])
    """
    logits = run(model, images)
    if isinstance(model, nn.Module) and not has_classifier(model):
        logits = shape_like(model, logits)
        check_finite_logits(model, logits)
        return logits
    if not isinstance(logits, Tensor):
        raise VitpruneError(
            f"{_name(model)} answers a {type(logits).__name__}, not logits [images, classes]; pass a model that gives "
            "the logits alone"
        )
    if logits.ndim != 2 or len(logits) != len(images):
        raise VitpruneError(
            f"{_name(model)} answers {list(logits.shape)} to {len(images)} images, not logits [images, classes]: "
            "tokens or feature maps have no accuracy; build it with a pooling (global_pool) and a classifier"
        )
    check_finite_logits(model, logits)
    return logits


def shape_embeddings(answer: Tensor | Sequence[Tensor], *, channels_last: bool = False) -> Tensor:
    """Return embeddings with their width at the end: pooled ones [B, E], of tokens or feature maps [B, P, E].

    Args:
        answer: of an encoder: [B, E], tokens [B, N, E], a feature map [B, E, h, w], or several of these, whose places
            then stand side by side; narrower ones are filled up with zeros, which change no cosine.
        channels_last: whether a feature map is [B, h, w, E].

    Raises:
        VitpruneError: if it is none of these.

    >>> shape_embeddings([torch.ones(2, 8, 3, 3), torch.ones(2, 5, 4)]).shape
    torch.Size([2, 14, 8])
    """
    if isinstance(answer, Tensor):
        if answer.ndim == 4:
            return answer.flatten(1, 2) if channels_last else answer.flatten(2).transpose(1, 2)
        if answer.ndim in (2, 3):
            return answer
    elif isinstance(answer, list | tuple) and answer and all(isinstance(each, Tensor) for each in answer):
        shaped = [shape_embeddings(each, channels_last=channels_last) for each in answer]
        places = [each.unsqueeze(1) if each.ndim == 2 else each for each in shaped]
        width = max(each.shape[-1] for each in places)
        return torch.cat([nn.functional.pad(each, (0, width - each.shape[-1])) for each in places], 1)
    found = list(answer.shape) if isinstance(answer, Tensor) else f"a {type(answer).__name__}"
    raise VitpruneError(
        f"a model without classes answers {found}, neither embeddings [images, width] nor tokens nor a feature map"
    )


def shape_like(model: nn.Module, answer: Tensor | Sequence[Tensor]) -> Tensor:
    """Return what an encoder, or a file of it, answers as ``shape_embeddings`` does.

    Args:
        model: timm model without classes, which knows where the width of its feature maps is.
        answer: its own, or of a file of it.
    """
    return shape_embeddings(answer, channels_last=getattr(model, "output_fmt", "") == "NHWC")


def run(model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Run a model on images, whatever it answers.

    Raises:
        VitpruneError: if it cannot read images of this shape.
    """
    try:
        return model(images)
    except (AssertionError, RuntimeError, ValueError) as error:
        if not inside_door() or not isinstance(model, nn.Module) or tuple(images.shape[1:]) == input_size(model):
            raise
        raise VitpruneError(
            f"images are {list(images.shape[1:])}, {_name(model)} reads {list(input_size(model))} (channels, height, "
            f"width): {_first_line(error)}; prepare them with its own transform"
        ) from error


def check_finite_logits(model: Callable[[Tensor], Tensor], logits: Tensor) -> None:
    """Refuse logits that hold NaN or infinity.

    Raises:
        VitpruneError: naming the batch.
    """
    if bool(torch.isfinite(logits).all()):
        return
    reason = getattr(model, "explain_not_finite", lambda: None)()
    if reason is None and logits.dtype in (torch.float16, torch.bfloat16):
        reason = f"{logits.dtype} may be too narrow for it, load it in float32".replace("torch.", "")
    raise VitpruneError(
        f"{_name(model)} answers {name_not_finite(logits)} to {where_read() or 'an image'}"
        + (f": {reason}" if reason else "; weights and images are finite, so a layer overflows or divides by zero")
    )


def name_not_finite(tensor: Tensor) -> str:
    """Return ``NaN``, ``infinity`` or both: what a tensor holds beside numbers."""
    found = (("NaN", torch.isnan(tensor)), ("infinity", torch.isinf(tensor)))
    return " and ".join(name for name, mask in found if bool(mask.any()))


def of_classes(logits_BC: Tensor) -> Tensor:
    """Return logits of two classes where there is one output, whose sigmoid is the second class's probability.

    Softmax over [0, z] is sigmoid of z: what is true of classes is then true of a binary head.

    >>> of_classes(torch.tensor([[2.0]])).softmax(1)[0, 1] == torch.tensor(2.0).sigmoid()
    tensor(True)
    """
    if logits_BC.shape[-1] != 1:
        return logits_BC
    return torch.cat([torch.zeros_like(logits_BC), logits_BC], dim=-1)


def log_shares(logits_BC: Tensor) -> Tensor:
    """Return the logarithms of the classes' probabilities [B, C]; [B, 2] for a binary head."""
    return of_classes(logits_BC).log_softmax(-1)


def log_answers(logits_BC: Tensor, *, several: bool) -> Tensor:
    """Return ``log_shares``, or those of yes and no to each class [B, 2 C] where an image may have several."""
    if not several:
        return log_shares(logits_BC)
    return nn.functional.logsigmoid(torch.cat([logits_BC, -logits_BC], dim=1))


def give_shares(logits_BC: Tensor) -> bool:
    """Tell whether answers are probabilities already: non-negative, and one whole for every image.

    >>> give_shares(torch.tensor([[0.25, 0.75]])), give_shares(torch.tensor([[-1.0, 2.0]]))
    (True, False)
    """
    if logits_BC.shape[1] < 2 or bool((logits_BC < 0).any()):
        return False
    return bool(((logits_BC.double().sum(1) - 1).abs() < _SHARES_SUM_TO).all())


def has_several(labels: Tensor) -> bool:
    """Tell whether an image may have several classes: labels are [B, C], 0 or 1 for each."""
    return labels.ndim == 2


def check_label_range(labels: Tensor, num_outputs: int, what: str) -> None:
    """Refuse labels that are missing or none of the model's classes.

    Args:
        labels: [B] (int64), or [B, C] (0 or 1) where an image may have several classes.
        num_outputs: C.
        what: is done with them, for the message.

    Raises:
        VitpruneError: naming the first that is wrong, and its batch.
    """
    where = where_read() or "a batch"
    if has_several(labels):
        if labels.shape[1] != num_outputs:
            raise VitpruneError(f"labels of {where} are of {labels.shape[1]} classes, the model has {num_outputs}")
        return
    num_classes = 2 if num_outputs == 1 else num_outputs
    if len(labels) and bool((labels == NO_LABEL).all()):
        raise VitpruneError(f"{what} needs labels, and {where} has none; pass pairs of images and labels")
    wrong = labels[(labels < 0) | (labels >= num_classes)]
    if len(wrong):
        raise VitpruneError(
            f"label {int(wrong[0])} in {where} is none of the model's {num_classes} classes (0 to {num_classes - 1}); "
            "number the classes as the model does"
        )


def check_one_class(labels: Tensor, what: str) -> None:
    """Refuse labels of several classes for one image.

    Raises:
        VitpruneError: saying what has no meaning for them.
    """
    if has_several(labels):
        raise VitpruneError(f"{what} is about one class for each image; these labels are of several (multi-label)")


def loss_of(logits_BC: Tensor, labels: Tensor, what: str) -> Tensor:
    """Return the summed cross-entropy with the labels given; over all outputs where an image may have several classes.

    Raises:
        VitpruneError: as ``check_label_range`` does.
    """
    check_label_range(labels, logits_BC.shape[1], what)
    if has_several(labels):
        return nn.functional.binary_cross_entropy_with_logits(logits_BC, labels.to(logits_BC.dtype), reduction="sum")
    return nn.functional.cross_entropy(of_classes(logits_BC), labels, reduction="sum")


def _name(model: Callable[[Tensor], Tensor]) -> str:
    return type(model).__name__ if isinstance(model, nn.Module) else "the model"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
