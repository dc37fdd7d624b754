"""Which neurons of a class path are sure, against draws in loops and what can be said on paper."""

from __future__ import annotations

import random

import pytest
import torch

import vitprune
from vitprune.analysis.stability import measure_stability
from vitprune.discovery.discover import Discovery, class_paths


def run_of(neurons, labels, *, num_neurons=9, scores=None):
    neurons, labels = torch.tensor(neurons), torch.tensor(labels)
    classes = tuple(sorted(set(labels.tolist())))
    names = tuple(f"blocks.{layer}.mlp" for layer in range(neurons.shape[1]))
    if scores is None:
        generator = torch.Generator().manual_seed(0)
        scores = {name: torch.rand(len(classes), num_neurons, generator=generator) for name in names}
    return Discovery(
        layers=names,
        neurons=neurons,
        joint_scores=torch.zeros(len(labels)),
        labels=labels,
        predictions=labels,
        completeness_errors=None,
        classes=classes,
        class_scores=scores,
        method="jas",
        tokens="cls",
        quadrature="riemann:20",
    )


def test_a_neuron_of_all_images_is_sure_and_one_of_half_is_not():
    found = run_of([[[5], [1]], [[5], [1]], [[5], [2]], [[5], [2]]] * 5, [3] * 20)
    stability = measure_stability(found)
    assert stability.membership[3][0].tolist() == [1.0]
    assert 0.35 < stability.membership[3][1].item() < 0.7  # 10 of 20 images each; ties go to one of the two
    assert stability.sure(3).tolist() == [[True], [False]]


@pytest.mark.parametrize("top_k", [1, 3])
def test_it_is_how_often_a_run_of_the_drawn_images_has_the_neuron(top_k):
    drawn = random.Random(1)
    neurons = [[drawn.sample(range(6), top_k) for _layer in range(2)] for _image in range(12)]
    labels = [0, 1, 1] * 4
    found = run_of(neurons, labels)
    stability = measure_stability(found, num_draws=4000)
    paths, counts = class_paths(found), {index: torch.zeros(2, top_k) for index in (0, 1)}
    num_draws = 1500
    for _draw in range(num_draws):
        for index in (0, 1):
            members = [place for place, label in enumerate(labels) if label == index]
            chosen = drawn.choices(members, k=len(members))
            scores = {name: each[[index]] for name, each in found.class_scores.items()}
            of_draw = class_paths(run_of([neurons[place] for place in chosen], [index] * len(chosen), scores=scores))
            for layer in range(2):
                for rank, neuron in enumerate(paths[index][layer].tolist()):
                    counts[index][layer, rank] += neuron in of_draw[index][layer].tolist()
    for index in (0, 1):
        torch.testing.assert_close(stability.membership[index], counts[index] / num_draws, atol=0.05, rtol=0)


def test_a_class_depends_on_its_own_images_alone():
    neurons = [[[place % 4]] for place in range(12)]
    both = measure_stability(run_of(neurons, [0, 1] * 6))
    scores = run_of(neurons, [0, 1] * 6).class_scores["blocks.0.mlp"]
    alone = measure_stability(run_of(neurons[1::2], [1] * 6, scores={"blocks.0.mlp": scores[[1]]}))
    assert torch.equal(both.membership[1], alone.membership[1])


def test_classes_can_be_chosen():
    found = run_of([[[place % 3]] for place in range(12)], [0, 1] * 6)
    assert set(measure_stability(found, classes=[1]).membership) == {1}
    assert torch.equal(measure_stability(found, classes=[1]).membership[1], measure_stability(found).membership[1])


def test_the_same_seed_gives_the_same_draws_and_another_one_others():
    found = run_of([[[place % 3]] for place in range(9)], [0] * 9)
    first, again, other = (measure_stability(found, seed=seed).membership[0] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_one_image_says_nothing():
    assert not measure_stability(run_of([[[4]]], [7])).sure(7).any()


def test_paths_without_scores_have_stability_too():
    found = run_of([[[4]], [[4]]], [7, 7], scores={"blocks.0.mlp": torch.zeros(0, 9)})
    assert measure_stability(found).sure(7).all()


def test_refuses_no_draws():
    with pytest.raises(vitprune.VitpruneError, match="num_draws must be at least 1"):
        measure_stability(run_of([[[4]]], [7]), num_draws=0)
