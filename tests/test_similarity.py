"""Similarity of classes and of images, utilisation, and paths of wrong answers."""

from __future__ import annotations

import json
import math
from dataclasses import astuple
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t as student
from sklearn.metrics.pairwise import cosine_similarity

import vitprune
from vitprune.analysis.image_similarity import PathSimilarity, measure_path_similarity, share_with_class
from vitprune.analysis.mistakes import Mean, compare_mistakes
from vitprune.analysis.similarity import ClassSimilarity, compare_scores, compare_visits, plain, rank_pairs
from vitprune.analysis.utilisation import measure_utilisation
from vitprune.discovery.discover import count_visits, only_classes
from vitprune.intervals import Interval


def run_of(neurons, labels, *, predictions=None, joint_scores=None, scores=None, width=4):
    """A run of the given paths [I, L, K]; classes score all neurons alike unless ``scores`` [L, C, H] says more."""
    neurons, labels = torch.tensor(neurons), torch.tensor(labels)
    classes = tuple(labels.unique().tolist())
    names = tuple(f"blocks.{layer}.mlp" for layer in range(neurons.shape[1]))
    scores = torch.ones(len(names), len(classes), width) if scores is None else torch.tensor(scores)
    return vitprune.Discovery(
        layers=names,
        neurons=neurons,
        joint_scores=torch.zeros(len(labels)) if joint_scores is None else torch.tensor(joint_scores),
        labels=labels,
        predictions=labels if predictions is None else torch.tensor(predictions),
        completeness_errors=None,
        classes=classes,
        class_scores=dict(zip(names, scores, strict=True)),
        method="jas",
        tokens="cls",
        quadrature="adaptive",
    )


@st.composite
def runs(draw, min_images=2):
    """Two to five classes with gaps in their numbers, one to three FFNs of six neurons, one to three of them a path."""
    numbers = draw(st.lists(st.integers(0, 20), min_size=2, max_size=5, unique=True))
    labels = [number for number in numbers for _ in range(draw(st.integers(min_images, 4)))]
    labels = draw(st.permutations(labels))
    num_ffns, top_k = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    neurons = [[generator.permutation(6)[:top_k].tolist() for _ in range(num_ffns)] for _ in labels]
    return run_of(
        neurons,
        labels,
        predictions=generator.choice(21, len(labels)).tolist(),
        joint_scores=generator.normal(size=len(labels)).tolist(),
        scores=generator.normal(size=(num_ffns, len(numbers), 6)).tolist(),
        width=6,
    )


def rearranged(found, order):
    per_image = {name: getattr(found, name)[order] for name in ("neurons", "labels", "predictions", "joint_scores")}
    return vitprune.Discovery(**{**vars(found), **per_image})


def common_share(found, first, second):
    """The share of neurons that the paths of two images have in common, from sets."""
    sets = [
        {(ffn, neuron) for ffn, row in enumerate(found.neurons[i].tolist()) for neuron in row} for i in (first, second)
    ]
    return len(sets[0] & sets[1]) / len(sets[0])


def test_visits_of_two_classes_on_paper():
    found = run_of([[[0]], [[0]], [[1]], [[0]], [[2]]], [3, 3, 3, 7, 7])  # (2, 1, 0) and (1, 0, 1)
    similarity = compare_visits(found)
    assert similarity.classes == (3, 7)
    assert similarity.cosines[0, 1] == pytest.approx(2 / math.sqrt(5 * 2))


@given(runs(min_images=1))
def test_cosines_are_those_of_scikit_learn(found):
    visits = torch.cat(list(count_visits(found).values()), 1).numpy()
    scores = np.concatenate(
        [each - each.mean(1, keepdims=True) for each in map(np.asarray, found.class_scores.values())], 1
    )
    np.testing.assert_allclose(compare_visits(found).cosines, cosine_similarity(visits), atol=1e-12)
    np.testing.assert_allclose(compare_scores(found).cosines, cosine_similarity(scores), atol=1e-6)


def test_equal_paths_have_cosine_1_and_disjoint_paths_0():
    cosines = compare_visits(run_of([[[0, 1]], [[1, 0]], [[2, 3]]], [0, 1, 2])).cosines
    assert cosines.tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]


@given(runs(), st.randoms())
def test_the_order_of_images_changes_nothing(found, random):
    order = random.sample(range(len(found.labels)), len(found.labels))
    other = rearranged(found, order)
    assert np.array_equal(compare_visits(found).cosines, compare_visits(other).cosines)
    assert measure_path_similarity(found) == measure_path_similarity(other)
    assert measure_utilisation(found) == measure_utilisation(other)
    mistakes = zip(*(plain(compare_mistakes(each)).values() for each in (found, other)), strict=True)
    assert all(first == pytest.approx(second) for first, second in mistakes)


@given(runs(), st.randoms())
def test_renumbering_classes_permutes_the_results(found, random):
    order = random.sample(found.classes, len(found.classes))
    other, rows = only_classes(found, order), [found.classes.index(index) for index in order]
    for compare in (compare_visits, compare_scores):
        np.testing.assert_allclose(compare(other).cosines, compare(found).cosines[np.ix_(rows, rows)], atol=1e-12)
    first, second = measure_path_similarity(found), measure_path_similarity(other)
    assert [second.intra_by_class[row] for row in range(len(order))] == [first.intra_by_class[i] for i in order]
    assert second.difference.mean == pytest.approx(first.difference.mean)


def test_a_term_that_all_neurons_of_an_ffn_share_does_not_count():
    scores = np.random.default_rng(0).normal(size=(2, 3, 4))
    shifted = scores + np.array([100.0, -50.0])[:, None, None]
    first, second = (
        compare_scores(run_of([[[0], [0]]] * 3, [0, 1, 2], scores=each.tolist())) for each in (scores, shifted)
    )
    np.testing.assert_allclose(first.cosines, second.cosines, atol=1e-5)  # float32 scores
    assert first.cosines[0, 1] < 0.9


def test_pairs_are_ranked_with_ties_in_the_order_of_the_classes():
    similarity = ClassSimilarity("visits", (2, 5, 9), np.array([[1, 0.3, 0.8], [0.3, 1, 0.3], [0.8, 0.3, 1]]))
    most, least = rank_pairs(similarity, 2)
    assert [(pair.first, pair.second, pair.cosine) for pair in most] == [(2, 9, 0.8), (2, 5, 0.3)]
    assert [(pair.first, pair.second) for pair in least] == [(2, 5), (5, 9)]
    assert [len(pairs) for pairs in rank_pairs(similarity, 50)] == [3, 3]


@given(runs())
def test_means_over_pairs_are_those_of_all_pairs(found):
    measured = measure_path_similarity(found)
    by_pair = {(i, j): common_share(found, i, j) for i, j in combinations(range(len(found.labels)), 2)}
    labels = found.labels.tolist()
    for index in found.classes:
        own = [share for (i, j), share in by_pair.items() if labels[i] == labels[j] == index]
        assert measured.intra_by_class[index] == pytest.approx(np.mean(own))
        between = []
        for other in set(found.classes) - {index}:
            between.append(
                np.mean([share for (i, j), share in by_pair.items() if {labels[i], labels[j]} == {index, other}])
            )
        assert measured.inter_by_class[index] == pytest.approx(np.mean(between))
    assert measured.intra == pytest.approx(np.mean(list(measured.intra_by_class.values())))
    assert measured.difference.mean == pytest.approx(measured.intra - np.mean(list(measured.inter_by_class.values())))


@given(runs().filter(lambda found: len(found.classes) > 2))
def test_the_interval_is_that_of_leaving_out_each_class(found):
    measured, count = measure_path_similarity(found), len(found.classes)
    without = []
    for index in found.classes:
        rest = only_classes(found, [other for other in found.classes if other != index])
        without.append(measure_path_similarity(rest).difference.mean)
    error = math.sqrt((count - 1) / count * np.sum((without - np.mean(without)) ** 2))
    mean, half = measured.intra - measured.inter, student.ppf(0.975, count - 1) * error
    assert astuple(measured.difference) == pytest.approx((mean, mean - half, mean + half), abs=1e-9)


def test_the_interval_covers_the_truth_of_simulated_runs():
    """Images take their class's neuron with probability q, else any; the difference is E[q²] (1 − 1/H)."""
    generator, covered = np.random.default_rng(0), []
    for _ in range(200):
        follows = generator.random((10, 6, 4)) < generator.uniform(size=(10, 1, 1))
        neurons = np.where(follows, generator.integers(8, size=(10, 1, 4)), generator.integers(8, size=(10, 6, 4)))
        found = run_of(neurons.reshape(60, 4, 1).tolist(), np.repeat(np.arange(10), 6).tolist(), width=8)
        difference = measure_path_similarity(found).difference
        covered.append(difference.low <= 1 / 3 * 7 / 8 <= difference.high)
    assert 0.89 <= np.mean(covered) <= 0.99


def test_a_class_with_one_image_is_left_out():
    measured = measure_path_similarity(run_of([[[0]], [[0]], [[1]], [[2]], [[0]]], [0, 0, 1, 1, 4]))
    assert measured == PathSimilarity(
        intra=0.5,
        inter=0.0,
        difference=Interval(0.5, None, None),
        intra_by_class={0: 1.0, 1: 0.0},
        inter_by_class={0: 0.0, 1: 0.0},
        classes_left_out=(4,),
    )


@given(runs(min_images=1))
def test_shares_with_a_class_are_those_of_all_its_other_images(found):
    for asked in (found.labels, found.predictions):
        for image, share in enumerate(share_with_class(found, asked).tolist()):
            others = [i for i in range(len(asked)) if found.labels[i] == asked[image] and i != image]
            expected = np.mean([common_share(found, image, i) for i in others]) if others else math.nan
            assert share == pytest.approx(expected, nan_ok=True)


def test_utilisation_on_paper():
    even, alone = measure_utilisation(run_of([[[n, 3 - n], [1, 2]] for n in range(4)], [0, 0, 1, 1], width=8))
    assert (even.num_neurons, even.num_visits, even.num_visited, even.visited_share) == (8, 8, 4, 0.5)
    assert (even.entropy_bits, even.effective_neurons) == pytest.approx((2, 4))
    assert (alone.ffn, alone.num_visited) == ("blocks.1.mlp", 2)
    assert alone.entropy_bits == pytest.approx(1)


def test_mistakes_on_paper():
    found = run_of(
        [[[0], [0]], [[0], [0]], [[1], [0]], [[1], [1]], [[1], [2]], [[3], [3]]],
        [0, 0, 0, 1, 1, 5],
        predictions=[0, 0, 1, 1, 1, 8],
        joint_scores=[4.0, 3.0, 2.0, 5.0, 6.0, 1.0],
    )
    mistakes = compare_mistakes(found)
    assert (mistakes.joint_score_correct, mistakes.joint_score_wrong) == (Mean(4.5, 4), Mean(1.5, 2))
    assert mistakes.superiority == 1
    assert mistakes.p_value == pytest.approx(2 / math.comb(6, 2))
    # Images 0, 1: (1 + 0.5) / 2 with the others of class 0; images 3, 4 of class 1: 0.5 with each other.
    assert mistakes.own_correct == Mean(pytest.approx((0.75 + 0.75 + 0.5 + 0.5) / 4), 4)
    assert mistakes.own_wrong == mistakes.wrong_own == Mean(0.5, 1)  # class 5 has one image
    assert mistakes.wrong_predicted == Mean(0.5, 1)


def test_without_wrong_answers_there_is_nothing_to_compare():
    mistakes = compare_mistakes(run_of([[[0]], [[0]], [[1]]], [0, 0, 1], joint_scores=[1.0, 2.0, 3.0]))
    assert mistakes.joint_score_correct == Mean(2.0, 3)
    assert {mistakes.superiority, mistakes.p_value, mistakes.joint_score_wrong.value} == {None}
    one_wrong = compare_mistakes(run_of([[[0]], [[0]], [[1]]], [0, 0, 1], predictions=[0, 1, 1]))
    assert (one_wrong.joint_score_wrong, one_wrong.p_value) == (Mean(0.0, 1), None)


def test_results_are_written_as_json():
    found = run_of([[[0]], [[1]], [[1]], [[2]], [[2]], [[3]]], [0, 0, 1, 1, 2, 2], scores=np.eye(4)[None, :3].tolist())
    results = [
        measure_path_similarity(found),
        compare_scores(found),
        measure_utilisation(found),
        compare_mistakes(found),
    ]
    again = json.loads(json.dumps(plain([*results, rank_pairs(compare_visits(found), 1)])))
    assert again[0]["intra_by_class"] == {"0": 0.0, "1": 0.0, "2": 0.0}
    assert np.array(again[1]["cosines"]).shape == (3, 3)
    assert again[4][0][0]["first"] == 0


@pytest.mark.parametrize(
    ("measure", "labels", "message"),
    [
        (compare_visits, [3, 3], "needs at least two, the run has class 3 only"),
        (compare_scores, [3, 3], "needs at least two, the run has class 3 only"),
        (compare_scores, [3, 4], "class 3 has no scores to compare"),
        (measure_path_similarity, [3, 3], "two classes with two images, the run has 1"),
        (measure_path_similarity, [3, 4], "two classes with two images, the run has 0"),
    ],
)
def test_refuses(measure, labels, message):
    with pytest.raises(vitprune.VitpruneError, match=message):
        measure(run_of([[[0]], [[1]]], labels))


def test_refuses_to_rank_no_pairs():
    with pytest.raises(vitprune.VitpruneError, match="number of pairs must be at least 1, got 0"):
        rank_pairs(ClassSimilarity("visits", (0, 1), np.eye(2)), 0)
