"""How alike the paths and scores of two classes are.

Letters: C classes, L FFNs, H hidden neurons of each FFN.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitprune.discovery.discover import Discovery, check_class_scores, count_visits
from vitprune.errors import VitpruneError


@dataclass(frozen=True)
class ClassSimilarity:
    """Cosine of every two classes.

    Attributes:
        of: what was compared: ``visits`` or ``scores``.
        classes: class indices, ascending; rows and columns of ``cosines``.
        cosines: float64 [C, C], symmetric, 1 on the diagonal; in [0, 1] for visits, in [-1, 1] for scores.
    """

    of: str
    classes: tuple[int, ...]
    cosines: np.ndarray


@dataclass(frozen=True)
class ClassPair:
    """Two classes.

    Attributes:
        first, second: class indices, ``first`` the lower.
        cosine: of the two.
    """

    first: int
    second: int
    cosine: float


def compare_visits(found: Discovery) -> ClassSimilarity:
    r"""Compare classes by how often each neuron lies on a path of their images.

    .. math:: \cos(c, d) = \frac{\sum_{l,i} v_{cli} v_{dli}}{\|v_c\| \, \|v_d\|}

    with :math:`v_{cli}` the share of the images of class c that have neuron i of FFN l on their path. Chance visits
    lower the cosine of classes with few images: compare classes with about as many images each.

    Raises:
        VitpruneError: if there are fewer than two classes.

    Source:
        The class similarity of arXiv:2503.09046, over all FFNs at once and any number of neurons per FFN.
    """
    _check_classes(found)
    return ClassSimilarity("visits", found.classes, _cosines(count_common(found)))


def compare_scores(found: Discovery) -> ClassSimilarity:
    """Compare classes by the mean scores of all neurons, whether they lie on a path or not.

    The scores of each FFN are centred over its neurons first. The joint attribution score gives every neuron of an FFN
    the same term, that of the neurons selected in earlier FFNs. In deep FFNs it is many times the spread of the scores,
    so that cosines of the scores as they are lie near 1 for all classes; it does not change which neurons are the best.
    FFNs whose scores spread more weigh more.

    Raises:
        VitpruneError: if there are fewer than two classes, a class scores no neuron above another one, or the run has
            paths only.
    """
    _check_classes(found)
    check_class_scores(found)
    products_CC = torch.zeros(len(found.classes), len(found.classes), dtype=torch.float64)
    for name in found.layers:
        score_CH = found.class_scores[name].double()
        score_CH = score_CH - score_CH.mean(1, keepdim=True)
        products_CC += score_CH @ score_CH.T
    silent = (~(products_CC.diagonal() > 0)).nonzero().flatten().tolist()
    if silent:
        raise VitpruneError(f"class {found.classes[silent[0]]} has no scores to compare; compare visits instead")
    return ClassSimilarity("scores", found.classes, _cosines(products_CC))


def count_common(found: Discovery) -> Tensor:
    """Count the neurons that the paths of two images have in common, summed over the image pairs of two classes.

    Of a class with itself: over all ordered pairs, each image with itself among them.

    Returns:
        float64 [C, C], whole numbers; rows and columns as ``found.classes``.
    """
    common_CC = torch.zeros(len(found.classes), len(found.classes), dtype=torch.float64)
    for visits_CH in count_visits(found).values():
        common_CC += visits_CH.double() @ visits_CH.double().T
    return common_CC


def rank_pairs(similarity: ClassSimilarity, num_pairs: int) -> tuple[tuple[ClassPair, ...], tuple[ClassPair, ...]]:
    """Find the most and the least similar pairs of classes.

    Args:
        similarity: of at least two classes.
        num_pairs: of each kind; all pairs where there are fewer.

    Returns:
        Most similar first, and least similar first; ties in the order of the classes.

    Raises:
        VitpruneError: if ``num_pairs`` is less than 1.
    """
    if num_pairs < 1:
        raise VitpruneError(f"number of pairs must be at least 1, got {num_pairs}")
    rows, columns = np.triu_indices(len(similarity.classes), 1)
    cosines = similarity.cosines[rows, columns]

    def pairs(order: np.ndarray) -> tuple[ClassPair, ...]:
        chosen = order[:num_pairs]
        return tuple(
            ClassPair(similarity.classes[row], similarity.classes[column], float(cosine))
            for row, column, cosine in zip(rows[chosen], columns[chosen], cosines[chosen], strict=True)
        )

    return pairs(np.argsort(-cosines, kind="stable")), pairs(np.argsort(cosines, kind="stable"))


def plain(result: Any) -> Any:
    """Return a result as values that JSON knows: data classes become objects, arrays and tensors lists.

    >>> plain(ClassSimilarity("visits", (3, 5), np.eye(2)))
    {'of': 'visits', 'classes': [3, 5], 'cosines': [[1.0, 0.0], [0.0, 1.0]]}
    """
    if is_dataclass(result):
        return {field.name: plain(getattr(result, field.name)) for field in fields(result)}
    if isinstance(result, Mapping):
        return {str(key): plain(value) for key, value in result.items()}
    if isinstance(result, tuple | list):
        return [plain(value) for value in result]
    return result.tolist() if isinstance(result, np.ndarray | Tensor) else result


def _check_classes(found: Discovery) -> None:
    if len(found.classes) < 2:
        raise VitpruneError(
            f"comparing classes needs at least two, the run has class {found.classes[0]} only; discover more classes"
        )


def _cosines(products_CC: Tensor) -> np.ndarray:
    """Return the cosines of vectors whose inner products are given."""
    squares_C = products_CC.diagonal()
    cosines_CC = products_CC / torch.outer(squares_C, squares_C).sqrt()
    return ((cosines_CC + cosines_CC.T) / 2).clamp(-1, 1).fill_diagonal_(1).numpy()
