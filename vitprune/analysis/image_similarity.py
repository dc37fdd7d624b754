"""How alike the paths of two images are, within a class and between classes.

Letters: I images, C classes, L FFNs, K neurons per FFN.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vitprune.analysis.similarity import count_common
from vitprune.discovery.discover import Discovery, count_correct, count_visits
from vitprune.errors import VitpruneError
from vitprune.intervals import Interval, mean_interval


@dataclass(frozen=True)
class PathSimilarity:
    """Similarity of image pairs within a class and between classes; every class weighs the same.

    Attributes:
        intra: mean over classes of ``intra_by_class``, in [0, 1].
        inter: mean over classes of ``inter_by_class``, in [0, 1].
        difference: ``intra`` minus ``inter``, with its 95 % interval; without one for two classes.
        intra_by_class: class index -> mean similarity of two different images of the class, in [0, 1].
        inter_by_class: class index -> mean similarity of an image of the class and one of another class, every other
            class weighing the same, in [0, 1].
        classes_left_out: class indices with a single image; no figure includes them.
    """

    intra: float
    inter: float
    difference: Interval
    intra_by_class: Mapping[int, float]
    inter_by_class: Mapping[int, float]
    classes_left_out: tuple[int, ...]


def measure_path_similarity(found: Discovery) -> PathSimilarity:
    r"""Measure whether two images of one class share more of their paths than two images of different classes.

    The similarity of two images is the share of neurons that their paths have in common: of L·K, since every path has
    as many; the same is the cosine of their indicator vectors. Means over pairs come from the visits :math:`v_c` of the
    classes, exactly and without any matrix of images, with :math:`n_c` images of class c:

    .. math::
        \mathrm{intra}_c = \frac{\|v_c\|^2 - n_c L K}{n_c (n_c - 1) L K}, \qquad
        \mathrm{inter}_{cd} = \frac{v_c \cdot v_d}{n_c n_d L K}

    Pairs that share an image or a class are not independent. The unit of the interval is therefore the class: the
    difference is computed again without each class in turn (delete-one jackknife, Student's t with C - 1 degrees of
    freedom). It covers what the choice of the classes and of their images changes, and speaks about classes like these.
    It covered the truth of simulated runs of 3, 5, 10, 20, 50 classes in 89, 90, 92, 94, 94 % of them; bootstraps over
    classes did worse below 20 classes, as with 79 % for 5 (``benchmarks/interval_coverage.py``).

    Raises:
        VitpruneError: if fewer than two classes have two images.

    Source:
        The intra-class comparison of arXiv:2503.09046, which shows examples; the interval is Arvesen's (Jackknifing
        U-statistics, Annals of Mathematical Statistics 1969).
    """
    num_images = count_correct(found)[1].numpy()
    used = num_images >= 2
    if used.sum() < 2:
        raise VitpruneError(
            f"pairs of images within a class need at least two classes with two images, the run has {used.sum()}; "
            "discover with `images_per_class` 2 or more"
        )
    path_size, num_images = found.neurons[0].numel(), num_images[used]
    common_CC = count_common(found).numpy()[np.ix_(used, used)]
    own_C = (common_CC.diagonal() - num_images * path_size) / (num_images * (num_images - 1) * path_size)
    between_CC = common_CC / (np.outer(num_images, num_images) * path_size)
    np.fill_diagonal(between_CC, 0)
    sums_C, num_classes = between_CC.sum(1), len(own_C)
    inter_C = sums_C / (num_classes - 1)
    intra, inter = own_C.mean(), inter_C.mean()
    difference = Interval(float(intra - inter), None, None)
    if num_classes > 2:
        without_C = (own_C.sum() - own_C) / (num_classes - 1)
        without_C -= (sums_C.sum() - 2 * sums_C) / ((num_classes - 1) * (num_classes - 2))
        difference = mean_interval(num_classes * (intra - inter) - (num_classes - 1) * without_C)  # pseudo-values
    classes = [index for index, is_used in zip(found.classes, used, strict=True) if is_used]
    return PathSimilarity(
        intra=float(intra),
        inter=float(inter),
        difference=difference,
        intra_by_class=dict(zip(classes, own_C.tolist(), strict=True)),
        inter_by_class=dict(zip(classes, inter_C.tolist(), strict=True)),
        classes_left_out=tuple(index for index, is_used in zip(found.classes, used, strict=True) if not is_used),
    )


def share_with_class(found: Discovery, classes: Tensor) -> Tensor:
    """Measure how much of each image's path it shares with the images of a class, itself left out.

    Args:
        found: paths of I images.
        classes: int64 [I]; the class index to compare each image with.

    Returns:
        float64 [I], in [0, 1]; mean over the other images of the class of the share of neurons in common. NaN where
        the class has no other image. Unlike the cosine with visit frequencies it does not depend on how many they are.
    """
    known = torch.tensor(found.classes)
    rows = torch.searchsorted(known, classes).clamp(max=len(known) - 1)
    others = torch.where(known[rows] == classes, count_correct(found)[1][rows], 0) - (classes == found.labels).long()
    visits = count_visits(found)
    common = -(classes == found.labels).long() * found.neurons[0].numel()
    for position, name in enumerate(found.layers):
        common = common + visits[name][rows.unsqueeze(1), found.neurons[:, position]].sum(1)
    shares = common.double() / (others * found.neurons[0].numel())
    return torch.where(others > 0, shares, torch.nan)
