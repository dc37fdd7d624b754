"""A tree of classes with similar paths, and whether it agrees with WordNet.

Letters: C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.cluster.hierarchy import cophenet, leaves_list, linkage
from scipy.spatial.distance import squareform
from scipy.stats import permutation_test, rankdata

from vitprune.analysis.similarity import ClassSimilarity
from vitprune.analysis.wordnet import measure_wordnet_distances
from vitprune.errors import VitpruneError


@dataclass(frozen=True)
class Clustering:
    """A tree of classes.

    Attributes:
        classes: class indices, ascending; the tree's leaf i is ``classes[i]``.
        linkage: float64 [C - 1, 4]; as in ``scipy.cluster.hierarchy``, distances are 1 minus the cosine.
        leaf_order: class indices in the order of the tree's leaves, similar ones beside each other.
    """

    classes: tuple[int, ...]
    linkage: np.ndarray
    leaf_order: tuple[int, ...]


@dataclass(frozen=True)
class Correlation:
    """Whether two distances between classes rank the pairs of classes alike.

    Attributes:
        rho: Spearman's rank correlation over all pairs, in [-1, 1]; None where all pairs have the same distance.
        p_value: two-sided Mantel test; None as ``rho``.
        num_classes: C.
        num_permutations: of the classes that the test drew; all of them where there are no more.
    """

    rho: float | None
    p_value: float | None
    num_classes: int
    num_permutations: int


@dataclass(frozen=True)
class WordNetAgreement:
    """Correlation with the WordNet distance.

    Attributes:
        cosine: of 1 minus the cosine of two classes.
        tree: of the height at which two classes meet in the tree (cophenetic distance).
    """

    cosine: Correlation
    tree: Correlation


def cluster_classes(similarity: ClassSimilarity) -> Clustering:
    """Put similar classes together, by average linkage of 1 minus the cosine.

    Takes at most about 2 s for 1,000 classes, most of it for the order of the leaves.
    """
    distances = squareform(1 - similarity.cosines)
    tree = linkage(distances, method="average", optimal_ordering=True)
    return Clustering(similarity.classes, tree, tuple(similarity.classes[leaf] for leaf in leaves_list(tree)))


def compare_with_wordnet(
    similarity: ClassSimilarity,
    wnids: Sequence[str],
    *,
    wordnet: str | Path | None = None,
    num_permutations: int = 999,
    seed: int = 0,
) -> WordNetAgreement:
    """Test whether classes that are near each other in WordNet have similar paths.

    Args:
        similarity: of the classes.
        wnids: of the same classes in the same order, as ``n01440764``.
        wordnet: folder of WordNet 3.0; None looks in the usual places, see ``vitprune.analysis.wordnet.find_nouns``.
        num_permutations: as in ``correlate_distances``.
        seed: likewise.

    Raises:
        VitpruneError: if a class is no noun of WordNet, or WordNet is not found.
    """
    if len(wnids) != len(similarity.classes):
        raise VitpruneError(f"{len(similarity.classes)} classes need as many wnids, got {len(wnids)}")
    steps_CC = measure_wordnet_distances(wnids, wordnet=wordnet)
    tree_CC = squareform(cophenet(cluster_classes(similarity).linkage))
    cosine, tree = (
        correlate_distances(each_CC, steps_CC, num_permutations=num_permutations, seed=seed)
        for each_CC in (1 - similarity.cosines, tree_CC)
    )
    return WordNetAgreement(cosine, tree)


def correlate_distances(
    first: np.ndarray, second: np.ndarray, *, num_permutations: int = 999, seed: int = 0
) -> Correlation:
    """Correlate the ranks of two distances between the same classes.

    Pairs of classes share classes, so they are no independent observations. The test therefore permutes the classes of
    one of the two, not the pairs. Takes about 10 s for 1,000 classes.

    Args:
        first: [C, C], symmetric; C at least 2.
        second: [C, C], symmetric.
        num_permutations: to draw; all permutations are taken where there are no more. The p-value can be no smaller
            than about 2 in this number.
        seed: of the permutations.

    Source:
        Mantel, Cancer Research 1967; with ranks.
    """
    first_CC, second_CC = _centred_ranks(first), _centred_ranks(second)
    norm = np.sqrt(np.vdot(first_CC, first_CC) * np.vdot(second_CC, second_CC))
    num_classes = len(first_CC)
    if norm == 0:
        return Correlation(None, None, num_classes, 0)
    test = permutation_test(
        (np.arange(num_classes),),
        lambda order: np.vdot(first_CC[np.ix_(order, order)], second_CC) / norm,
        permutation_type="pairings",
        vectorized=False,
        n_resamples=num_permutations,
        rng=seed,
    )
    return Correlation(float(test.statistic), float(test.pvalue), num_classes, len(test.null_distribution))


def _centred_ranks(distances: np.ndarray) -> np.ndarray:
    ranks = rankdata(squareform(distances, checks=False))
    return squareform(ranks - ranks.mean())
