"""How the paths of images that the model answers wrongly differ from the others."""

from __future__ import annotations

from dataclasses import dataclass

from scipy.stats import mannwhitneyu
from torch import Tensor

from vitprune.analysis.image_similarity import share_with_class
from vitprune.discovery.discover import Discovery


@dataclass(frozen=True)
class Mean:
    """A mean over images.

    Attributes:
        value: None where there is no image.
        num_images: averaged over.
    """

    value: float | None
    num_images: int


@dataclass(frozen=True)
class Mistakes:
    """Paths of images with right and with wrong answers.

    Attributes:
        joint_score_correct, joint_score_wrong: mean joint score of the paths.
        superiority: probability that the path of a correct image has the higher joint score than that of a wrong one,
            ties counted half, in [0, 1]; None with fewer than two images of either kind.
        p_value: two-sided Mann-Whitney test of the joint scores; None as ``superiority``.
        own_correct, own_wrong: mean share of the path in common with the other images of the own class, in [0, 1];
            over images whose class has others.
        wrong_own, wrong_predicted: the same mean for the own and for the predicted class, over the wrong images for
            which both classes have (other) images in the run.
    """

    joint_score_correct: Mean
    joint_score_wrong: Mean
    superiority: float | None
    p_value: float | None
    own_correct: Mean
    own_wrong: Mean
    wrong_own: Mean
    wrong_predicted: Mean


def compare_mistakes(found: Discovery) -> Mistakes:
    """Compare the paths of images that the model answers with their class and of those that it does not.

    The test takes the images as drawn independently of each other. No test is made of the shares in common, which
    images of one class have from each other. Not for what ``only_classes`` returns, where labels and predictions are
    numbered differently.

    Source:
        The share in common is that of ``measure_path_similarity``; the comparison is ours.
    """
    correct = found.predictions == found.labels
    first, second = found.joint_scores[correct].double(), found.joint_scores[~correct].double()
    superiority = p_value = None
    if min(len(first), len(second)) >= 2:
        test = mannwhitneyu(first.numpy(), second.numpy(), alternative="two-sided")
        superiority, p_value = float(test.statistic) / (len(first) * len(second)), float(test.pvalue)
    own, predicted = share_with_class(found, found.labels), share_with_class(found, found.predictions)
    both = ~correct & ~own.isnan() & ~predicted.isnan()
    return Mistakes(
        joint_score_correct=_mean(first),
        joint_score_wrong=_mean(second),
        superiority=superiority,
        p_value=p_value,
        own_correct=_mean(own[correct & ~own.isnan()]),
        own_wrong=_mean(own[~correct & ~own.isnan()]),
        wrong_own=_mean(own[both]),
        wrong_predicted=_mean(predicted[both]),
    )


def _mean(values: Tensor) -> Mean:
    return Mean(values.mean().item() if len(values) else None, len(values))
