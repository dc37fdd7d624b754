"""Accuracy of anything that maps images to logits, with confidence intervals and paired comparison."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from scipy.optimize import brentq
from scipy.stats import binomtest, norm
from torch import Tensor, nn

from vitprune.answers import ask, check_label_range, check_one_class, give_shares, has_several, of_classes
from vitprune.data import Batches, on_device
from vitprune.entry import entry
from vitprune.errors import VitpruneError
from vitprune.intervals import CONFIDENCE
from vitprune.seen_images import UnseenBatches, check_labels, files_of, seen_by
from vitprune.sharing import gather_rows, sharing, sum_of_all
from vitprune.views import has_classifier


@dataclass(frozen=True)
class Answers:
    """What a model answers to I images, in the order read; on the CPU.

    Attributes:
        labels: int64 [I]; class index of each image.
        predictions: int64 [I]; the class with the highest logit.
        probabilities: float64 [I]; softmax of the label's class, in [0, 1].
        among_five: bool [I]; whether the label is among the five highest logits.
        num_overlap: images that had a say in the model; above 0 only where that was allowed.
        are_shares: whether the model answers probabilities (it ends in a softmax), which are then taken as they are.
    """

    labels: Tensor
    predictions: Tensor
    probabilities: Tensor
    among_five: Tensor
    num_overlap: int = 0
    are_shares: bool = False


@dataclass(frozen=True)
class Accuracy:
    """Counts of right answers.

    Attributes:
        top1: share of images whose highest logit is the label's, in [0, 1].
        top5: share of images whose label is among the five highest logits (all, if there are fewer), in [0, 1].
        num_images: images evaluated.
        top1_interval: Wilson score interval of ``top1`` at 95 % confidence.
        top1_by_class: class index -> share of right answers.
        images_by_class: class index -> images.
        correct: per image in the order read, whether the first answer was right.
        num_overlap: images that had a say in the model; above 0 only where that was allowed.
        are_shares: whether the model answers probabilities, which are then taken as they are.
    """

    top1: float
    top5: float
    num_images: int
    top1_interval: tuple[float, float]
    top1_by_class: Mapping[int, float]
    images_by_class: Mapping[int, int]
    correct: tuple[bool, ...]
    num_overlap: int = 0
    are_shares: bool = False

    def __str__(self) -> str:
        low, high = self.top1_interval
        lines = [
            f"top-1 {self.top1:.4f} (95 % interval {low:.4f} .. {high:.4f})",
            f"top-5 {self.top5:.4f}",
            f"{self.num_images} images of {len(self.images_by_class)} classes",
        ]
        if self.num_overlap:
            lines.append(f"{self.num_overlap} of these images had a say in the model")
        if self.are_shares:
            lines.append("the model answers probabilities: it ends in a softmax")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return str(self)


@dataclass(frozen=True)
class MultiLabelAccuracy:
    """How well classes are told from others where an image may have several.

    Attributes:
        mean_average_precision: mean over the classes that an image has, in [0, 1].
        average_precision_by_class: class index -> mean precision over its images.
        images_by_class: class index -> images.
        num_images: images evaluated.
        num_overlap: images that had a say in the model; above 0 only where that was allowed.
    """

    mean_average_precision: float
    average_precision_by_class: Mapping[int, float]
    images_by_class: Mapping[int, int]
    num_images: int
    num_overlap: int = 0

    def __str__(self) -> str:
        return (
            f"mean average precision {self.mean_average_precision:.4f}\n{self.num_images} images of "
            f"{len(self.images_by_class)} classes (multi-label)"
        )

    def __repr__(self) -> str:
        return str(self)


@dataclass(frozen=True)
class Comparison:
    """Paired comparison of two models on the same images.

    Attributes:
        gained: images that only the second answers rightly.
        lost: images that only the first answers rightly.
        p_value: two-sided exact McNemar test.
    """

    gained: int
    lost: int
    p_value: float


@entry(any_module=True)
def evaluate(
    model: Callable[[Tensor], Tensor], batches: Batches, *, allow_overlap: bool = False
) -> Accuracy | MultiLabelAccuracy:
    """Measure top-1 and top-5 accuracy, or mean average precision where an image may have several classes.

    A model with one output answers two classes: the second where its logit is positive.

    Args:
        model: images [B, channels, height, width] -> logits [B, C]: a torch model, or an ONNX file opened with
            ``vitprune.open_onnx``.
        batches: pairs of images (normalised by the model's own transform) and class labels [B] (int64), or zeros and
            ones [B, C] (floating point) where an image may have several classes. Read once.
        allow_overlap: measure on images that had a say in the model (its ``calibration``) as well, and count them.

    Raises:
        VitpruneError: if there are no images, the model has no classifier, an image had a say in it, labels of files
            are unknown or not numbered as the model's classes are, or its answers are no finite logits.

    >>> batches = [(torch.eye(3).view(3, 1, 1, 3), torch.tensor([0, 1, 0]))]
    >>> evaluate(lambda images: images.flatten(1), batches).top1
    0.6666666666666666
    """
    answers = _collect(model, batches, allow_overlap)
    return count_right(answers) if isinstance(answers, Answers) else _mean_precision(*answers)


@entry(any_module=True)
def collect_answers(model: Callable[[Tensor], Tensor], batches: Batches, *, allow_overlap: bool = False) -> Answers:
    """Ask a model about images and keep what it answers to each.

    Args:
        model: as for ``evaluate``.
        batches: as for ``evaluate``, with one class for each image.
        allow_overlap: as for ``evaluate``.

    Raises:
        VitpruneError: as ``evaluate`` does.
    """
    answers = _collect(model, batches, allow_overlap)
    if not isinstance(answers, Answers):
        check_one_class(answers[1], "an answer kept for each image")
    return answers


@torch.inference_mode()
def _collect(model: Callable[[Tensor], Tensor], batches: Batches, allow_overlap: bool):
    """Return the answers; logits [I, C], labels [I, C] and images that had a say where there are several classes."""
    if isinstance(model, nn.Module) and not has_classifier(model):
        raise VitpruneError("the model has no classifier (num_classes=0), so it has no accuracy")
    check_labels(model, batches)
    unseen = UnseenBatches(batches, seen_by(model), allow_overlap=allow_overlap)
    parts: list[tuple[Tensor, ...]] = []
    are_shares = True
    for images, labels in on_device(model, unseen) if isinstance(model, nn.Module) else unseen:
        logits, labels = ask(model, images).cpu(), labels.cpu()
        check_label_range(labels, logits.shape[1], "accuracy")
        if has_several(labels):
            parts.append((logits, labels))
            continue
        are_shares = are_shares and give_shares(logits)
        logits, own = of_classes(logits), labels.unsqueeze(1)
        ranked = logits.topk(min(5, logits.shape[1])).indices
        probabilities = logits.double().softmax(1).gather(1, own).squeeze(1)
        as_given = logits.double().gather(1, own).squeeze(1)
        parts.append((labels, ranked[:, 0], probabilities, as_given, (ranked == own).any(1)))
    if not parts:
        raise VitpruneError("no images to evaluate on")
    if len(set(map(len, parts))) > 1:
        raise VitpruneError("some batches have one class for each image, others have several; bring one kind")
    columns = [gather_rows(torch.cat(column)) for column in zip(*parts, strict=True)]
    num_overlap = unseen.num_overlap if files_of(batches) is not None else sum_of_all(unseen.num_overlap)[0]
    if len(columns) == 2:
        return *columns, num_overlap
    are_shares = sum_of_all(int(are_shares))[0] == sharing().count
    labels, predictions, probabilities, as_given, among_five = columns
    probabilities = as_given if are_shares else probabilities
    return Answers(labels, predictions, probabilities, among_five, num_overlap, are_shares)


def _mean_precision(logits_IC: Tensor, labels_IC: Tensor, num_overlap: int) -> MultiLabelAccuracy:
    """Average the precision over the recall of every class that an image has, and those over classes."""
    present = [index for index in range(labels_IC.shape[1]) if bool(labels_IC[:, index].any())]
    if not present:
        raise VitpruneError("no image has any class, so there is no precision to average")
    by_class = {index: average_precision(logits_IC[:, index], labels_IC[:, index] > 0) for index in present}
    return MultiLabelAccuracy(
        mean_average_precision=sum(by_class.values()) / len(by_class),
        average_precision_by_class=by_class,
        images_by_class={index: int(labels_IC[:, index].sum()) for index in present},
        num_images=len(labels_IC),
        num_overlap=num_overlap,
    )


def average_precision(scores_I: Tensor, belongs_I: Tensor) -> float:
    """Return the mean of the precision over the images that belong to a class; images with one score come together.

    >>> average_precision(torch.tensor([3.0, 2.0, 1.0]), torch.tensor([True, False, True]))
    0.8333333333333333
    """
    order = scores_I.argsort(descending=True)
    hits = belongs_I[order].double().cumsum(0)
    precision = hits / torch.arange(1, len(hits) + 1)
    # The last place of a score stands for all places that have it.
    _values, counts = torch.unique_consecutive(scores_I[order], return_counts=True)
    at_last = precision[counts.cumsum(0) - 1].repeat_interleave(counts)
    return float(at_last[belongs_I[order]].mean())


def count_right(answers: Answers) -> Accuracy:
    """Count right answers, in all and by class."""
    correct, label = answers.predictions == answers.labels, answers.labels
    interval = binomtest(int(correct.sum()), len(correct)).proportion_ci(CONFIDENCE, method="wilson")
    present = label.unique().tolist()
    return Accuracy(
        top1=correct.double().mean().item(),
        top5=answers.among_five.double().mean().item(),
        num_images=len(correct),
        top1_interval=(float(interval.low), float(interval.high)),
        top1_by_class={index: correct[label == index].double().mean().item() for index in present},
        images_by_class={index: int((label == index).sum()) for index in present},
        correct=tuple(correct.tolist()),
        num_overlap=answers.num_overlap,
        are_shares=answers.are_shares,
    )


def compare(first: Accuracy, second: Accuracy) -> Comparison:
    """Compare two evaluations of the same images, image by image.

    Raises:
        VitpruneError: if they cover different numbers of images.

    Source:
        McNemar, Psychometrika 1947; exact binomial form.

    >>> images = torch.eye(3).view(3, 1, 1, 3)
    >>> of = lambda labels: evaluate(lambda x: x.flatten(1), [(images, torch.tensor(labels))])
    >>> first, second = of([0, 1, 2]), of([0, 2, 1])
    >>> compare(first, second)
    Comparison(gained=0, lost=2, p_value=0.5)
    """
    if first.num_images != second.num_images:
        raise VitpruneError(f"cannot pair evaluations of {first.num_images} and {second.num_images} images")
    pairs = list(zip(first.correct, second.correct, strict=True))
    gained = sum(after and not before for before, after in pairs)
    lost = sum(before and not after for before, after in pairs)
    p_value = float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    return Comparison(gained, lost, p_value)


def drop_bound(dense: Accuracy, pruned: Accuracy, *, confidence: float = CONFIDENCE) -> float:
    """Return an upper confidence bound of the accuracy that pruning costs, from the same images.

    Args:
        dense: of the dense model.
        pruned: of the pruned model on the same images in the same order.
        confidence: of the one-sided bound, in (0.5, 1).

    Returns:
        The largest drop of top-1 that the images do not speak against, in [-1, 1].

    Raises:
        VitpruneError: if they cover different numbers of images.

    Source:
        Score interval of Tango, Statistics in Medicine 1998, for the difference of paired proportions.
    """
    paired = compare(dense, pruned)
    count, lost, gained = dense.num_images, paired.lost, paired.gained
    limit = norm.ppf(confidence)

    def score(drop: float) -> float:
        linear = -lost - gained + (2 * count - lost + gained) * drop
        constant = -gained * drop * (1 - drop)
        share = (math.sqrt(linear**2 - 8 * count * constant) - linear) / (4 * count)
        variance = count * (2 * share + drop * (1 - drop))
        return (lost - gained - count * drop) / math.sqrt(max(variance, 1e-300)) + limit

    lowest = (lost - gained) / count
    return 1.0 if score(1 - 1e-12) > 0 else float(brentq(score, lowest, 1 - 1e-12))


def accuracy_as_json(accuracy: Accuracy) -> dict[str, Any]:
    """Return JSON values that ``accuracy_from_json`` reads.

    >>> images = torch.eye(2).view(2, 1, 1, 2)
    >>> accuracy = evaluate(lambda x: x.flatten(1), [(images, torch.tensor([0, 0]))])
    >>> accuracy_as_json(accuracy)["correct"], accuracy_from_json(accuracy_as_json(accuracy)) == accuracy
    ('10', True)
    """
    return {**asdict(accuracy), "correct": "".join("01"[right] for right in accuracy.correct)}


def accuracy_from_json(content: Mapping[str, Any]) -> Accuracy:
    """Read what ``accuracy_as_json`` gave."""

    def numbered(mapping: Mapping[str, Any]) -> dict[int, Any]:
        return {int(index): value for index, value in mapping.items()}

    return Accuracy(
        **{
            **content,
            "top1_interval": tuple(content["top1_interval"]),
            "top1_by_class": numbered(content["top1_by_class"]),
            "images_by_class": numbered(content["images_by_class"]),
            "correct": tuple(mark == "1" for mark in content["correct"]),
        }
    )
