"""What interventions on paths measure: slow references and closed forms. Golden values are in test_golden."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import make_vit
from hypothesis import given, settings
from hypothesis import strategies as st

from vitprune.analysis.held_out import assign_paths, halves_paths, paths_of, split_halves
from vitprune.analysis.interventions import Reactions, deviate, measure_interventions, measure_reactions
from vitprune.analysis.manipulation import compare_joint_scores, manipulate, measure_undisturbed
from vitprune.discovery.discover import Discovery, class_paths, discover
from vitprune.errors import VitpruneError
from vitprune.intervals import mean_interval
from vitprune.models.units import find_feed_forwards

LABELS = torch.tensor([1, 3, 1, 3, 1, 3])


@pytest.fixture
def images():
    return torch.randn(6, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def found(tiny_vit, images):
    return discover(tiny_vit, [(images, LABELS)], top_k=2)


def batches_of(images, size):
    return list(zip(images.split(size), LABELS.split(size), strict=True))


def by_hand(model, image, neurons_LK, factor, token_positions):
    """Scale one neuron of one token at a time, in a copy of the model whose FFNs are spelled out."""
    handles = []
    for ffn, neurons in zip(find_feed_forwards(model), neurons_LK.tolist(), strict=True):

        def scale(_module, inputs, neurons=neurons):
            hidden = inputs[0].clone()
            for token in token_positions(hidden.shape[1]):
                for neuron in neurons:
                    hidden[0, token, neuron] = hidden[0, token, neuron] * factor
            return (hidden,)

        handles.append(model.get_submodule(ffn.down_proj).register_forward_pre_hook(scale))
    with torch.no_grad():
        probabilities = model(image.unsqueeze(0)).softmax(-1)[0]
    for handle in handles:
        handle.remove()
    return probabilities


@pytest.mark.parametrize(
    ("tokens", "positions"), [("cls", lambda n: [0]), ("patch", lambda n: range(1, n)), ("all", range)]
)
def test_each_image_has_its_own_path_scaled(tokens, positions, tiny_vit, images, found):
    interventions = [(0.0, tokens), (2.0, tokens)]
    got = measure_interventions(tiny_vit, batches_of(images, 4), found.neurons, interventions)
    for factor, scope in interventions:
        slow = torch.stack(
            [by_hand(tiny_vit, x, path, factor, positions) for x, path in zip(images, found.neurons, strict=True)]
        )
        expected = slow[torch.arange(6), LABELS].float()
        torch.testing.assert_close(got[factor, scope].probability, expected, rtol=1e-6, atol=1e-7)
        assert torch.equal(got[factor, scope].prediction, slow.argmax(1))


def test_a_factor_of_one_changes_nothing(tiny_vit, images, found):
    clean = measure_reactions(tiny_vit, batches_of(images, 6))
    same = measure_interventions(tiny_vit, batches_of(images, 6), found.neurons, [(1.0, "all")])[1.0, "all"]
    deviation = deviate(clean, same)
    assert deviation.probability_deviation == mean_interval([0.0, 0.0])
    assert deviation.accuracy_deviation in (0.0, None)


def test_batches_and_passes_do_not_matter(tiny_vit, images, found, tmp_path):
    paths = {"jas": found.neurons, "other": found.neurons.flip(0)}
    clean = measure_undisturbed(tiny_vit, batches_of(images, 4), "undisturbed", folder=tmp_path)

    def rows(size, folder, **given):
        batches = None if size is None else batches_of(images, size)
        return manipulate(tiny_vit, batches, clean, paths, whose="own", folder=folder, **given)

    whole = rows(6, None, tokens=("cls", "all"))
    rows(2, tmp_path, factors=(2.0,), tokens=("all",))
    resumed = rows(2, tmp_path, tokens=("cls", "all"))
    assert [row.by_class for row in whole] == [pytest.approx(row.by_class, rel=1e-6) for row in resumed]
    assert rows(None, tmp_path, tokens=("cls", "all")) == resumed
    kept = measure_undisturbed(tiny_vit, None, "undisturbed", folder=tmp_path)
    assert torch.equal(kept.probability, clean.probability)


def test_paths_of_other_images_are_refused(tiny_vit, images, found):
    for neurons in (found.neurons[:5], torch.cat([found.neurons, found.neurons])):
        with pytest.raises(VitpruneError, match="paths are not for these images"):
            measure_interventions(tiny_vit, batches_of(images, 2), neurons, [(0.0, "cls")])


def test_no_hook_survives(tiny_vit, images, found):
    with pytest.raises(IndexError):
        measure_interventions(tiny_vit, batches_of(images, 6), found.neurons[:, :1], [(0.0, "cls")])
    assert all(not module._forward_pre_hooks for module in tiny_vit.modules())


def test_deviation_is_the_ratio_of_class_means():
    label = torch.tensor([0, 0, 7, 7])
    clean = Reactions(torch.tensor([0.2, 0.6, 0.5, 0.5]), torch.tensor([0, 0, 7, 0]), label)
    changed = Reactions(torch.tensor([0.2, 0.2, 0.5, 1.0]), torch.tensor([0, 7, 7, 7]), label)
    deviation = deviate(clean, changed)
    assert deviation.by_class == pytest.approx({0: -0.5, 7: 0.5})
    assert deviation.probability_deviation.mean == pytest.approx(0.0, abs=1e-7)
    assert deviation.accuracy_deviation == pytest.approx(0.0)
    with pytest.raises(VitpruneError, match="not of the same images"):
        deviate(clean, replace(changed, label=label.flip(0)))


@given(st.lists(st.integers(0, 3), min_size=2, max_size=40), st.integers(0, 5))
@settings(deadline=None)
def test_halves_are_halves_of_every_class(labels, seed):
    labels = torch.tensor([*labels, *labels])
    second = split_halves(labels, seed=seed)
    for index in labels.unique():
        members = second[labels == index]
        assert members.sum() == len(members) - len(members) // 2
    assert torch.equal(second, split_halves(labels, seed=seed))


def made_up(neurons_I, labels, joint_scores=None, num_neurons=6):
    """One FFN, one neuron per path."""
    neurons = torch.tensor(neurons_I).view(-1, 1, 1)
    labels = torch.tensor(labels)
    classes = tuple(labels.unique().tolist())
    joint = torch.ones(len(labels)) if joint_scores is None else torch.tensor(joint_scores)
    scores = {"blocks.0.mlp": torch.zeros(len(classes), num_neurons)}
    return Discovery(
        ("blocks.0.mlp",), neurons, joint, labels, labels, None, classes, scores, "jas", "cls", "riemann:20"
    )


def test_an_image_has_no_say_in_the_path_it_is_tested_with():
    base = [0, 1, 2, 3, 4, 5]
    labels = [1, 1, 1, 2, 2, 2]
    tested = halves_paths(made_up(base, labels), seed=3)
    for image in range(6):
        changed = [*base]
        changed[image] = (base[image] + 1) % 6
        assert torch.equal(halves_paths(made_up(changed, labels), seed=3)[image], tested[image])
    second = split_halves(torch.tensor(labels), seed=3)
    for image in range(6):
        donors = [i for i in range(6) if second[i] != second[image] and labels[i] == labels[image]]
        assert int(tested[image]) in {base[donor] for donor in donors}


def test_ties_of_a_class_path_go_by_joint_score_then_index():
    everything = torch.ones(4, dtype=torch.bool)
    assert paths_of(made_up([4, 2, 4, 2], [0] * 4), everything)[0].item() == 2
    assert paths_of(made_up([4, 2, 4, 2], [0] * 4, [3.0, 1.0, 3.0, 1.0]), everything)[0].item() == 4
    assert paths_of(made_up([5, 5], [0] * 2, [-1.0, -1.0]), everything[:2])[0].item() == 5


def test_paths_of_all_images_are_the_class_paths(tiny_vit):
    images = torch.randn(9, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    found = discover(tiny_vit, [(images, torch.tensor([0] * 9))])
    visits = class_paths(found)[0]
    ours = paths_of(found, torch.ones(9, dtype=torch.bool))[0]
    for position in range(3):
        neurons = found.neurons[:, position, 0].tolist()
        assert neurons.count(int(ours[position])) == neurons.count(int(visits[position]))


def test_controls_and_refusals():
    paths = {3: torch.tensor([[7]]), 5: torch.tensor([[8]])}
    assert assign_paths(paths, [5, 3]).flatten().tolist() == [8, 7]
    with pytest.raises(VitpruneError, match="class 4 has images but no path"):
        assign_paths(paths, [4])
    with pytest.raises(VitpruneError, match="no other class"):
        assign_paths({3: torch.tensor([[7]])}, [3], shift=1)
    with pytest.raises(VitpruneError, match="class 2 has one image"):
        split_halves(torch.tensor([1, 1, 2]))


def test_scores_are_compared_class_by_class():
    ours = made_up([0, 0, 0, 0], [0, 0, 1, 1], [1.0, 3.0, 5.0, 5.0])
    theirs = made_up([0, 0, 0, 0], [0, 0, 1, 1], [1.0, 1.0, 1.0, 1.0])
    first, second = compare_joint_scores({"jas": ours, "random": theirs})
    assert first.by_class == {0: 2.0, 1: 5.0}
    assert first.joint_score.mean == 3.5
    assert first.advantage is None
    assert second.advantage.mean == 2.5
    with pytest.raises(VitpruneError, match="not of the same images"):
        compare_joint_scores({"jas": ours, "random": made_up([0], [0])})


def test_intervals_cover_the_mean_of_classes():
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for _trial in range(100):
        interval = mean_interval(torch.randn(20, generator=generator).tolist())
        hits += interval.low <= 0 <= interval.high
    assert 86 <= hits <= 99


def test_random_paths_depend_on_seed_and_image_alone(tiny_vit, images):
    together = discover(tiny_vit, [(images, LABELS)], method="random", top_k=3)
    alone = discover(tiny_vit, [(images[2:3], LABELS[2:3])], method="random", top_k=3)
    assert torch.equal(together.neurons[2], alone.neurons[0])
    assert not torch.equal(together.neurons[0], together.neurons[1])
    other = discover(tiny_vit, [(images, LABELS)], method="random", top_k=3, seed=1)
    assert not torch.equal(together.neurons, other.neurons)


def test_random_neurons_are_uniform():
    model = make_vit(depth=1)
    images = torch.randn(400, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    found = discover(model, [(images, torch.zeros(400, dtype=torch.int64))], method="random")
    visits = torch.bincount(found.neurons.flatten(), minlength=48)
    chi_square = ((visits - 400 / 48) ** 2 / (400 / 48)).sum()
    assert 20 < chi_square < 85  # 47 degrees of freedom: 1e-4 on either side
