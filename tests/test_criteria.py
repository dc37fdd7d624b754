"""Criteria against closed forms, finite differences and a loop."""

from __future__ import annotations

import pytest
import torch
from conftest import make_vit
from timm.layers import SwiGLUPacked
from torch.nn.functional import cross_entropy

import vitprune
from vitprune.discovery.criteria import REGISTRY, activation, jas, magnitude, random, score_neurons, taylor
from vitprune.options import CRITERIA

LABELS = torch.tensor([0, 3, 1])


def test_the_registry_and_the_help_name_the_same_criteria():
    assert list(REGISTRY) == list(CRITERIA)


def test_random_depends_on_the_seed_alone(tiny_vit):
    first, again, other = random(tiny_vit, seed=1), random(tiny_vit, seed=1), random(tiny_vit, seed=2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["blocks.0.mlp"], other["blocks.0.mlp"])


def test_magnitude_is_the_norm_of_everything_removal_takes(tiny_vit):
    mlp = tiny_vit.blocks[1].mlp
    owned = torch.cat([mlp.fc1.weight[5], mlp.fc1.bias[5:6], mlp.fc2.weight[:, 5]])
    assert magnitude(tiny_vit)["blocks.1.mlp"][5].item() == pytest.approx(owned.norm().item(), rel=1e-6)


def test_magnitude_counts_both_rows_of_a_packed_gate():
    model = make_vit(mlp_layer=SwiGLUPacked)
    mlp = model.blocks[0].mlp
    width = mlp.fc2.in_features
    owned = torch.cat(
        [mlp.fc1.weight[3], mlp.fc1.weight[3 + width], mlp.fc1.bias[[3, 3 + width]], mlp.fc2.weight[:, 3]]
    )
    assert magnitude(model)["blocks.0.mlp"][3].item() == pytest.approx(owned.norm().item(), rel=1e-6)


def test_activation_is_the_mean_absolute_input_of_fc2(tiny_vit, tiny_images):
    seen = []
    handle = tiny_vit.blocks[2].mlp.fc2.register_forward_pre_hook(lambda _m, x: seen.append(x[0]))
    with torch.no_grad():
        tiny_vit(tiny_images)
    handle.remove()
    got = activation(tiny_vit, [(tiny_images[:2], LABELS[:2]), (tiny_images[2:], LABELS[2:])])["blocks.2.mlp"]
    torch.testing.assert_close(got, seen[0].abs().mean((0, 1)).float(), rtol=1e-6, atol=0)


def test_taylor_is_the_slope_of_the_loss_along_a_neuron(tiny_vit, tiny_images):
    neuron, step, expected = 7, 1e-5, 0.0
    fc2 = tiny_vit.blocks[1].mlp.fc2
    column = fc2.weight[:, neuron].detach().clone()
    with torch.no_grad():
        for index in range(3):
            losses = []
            for factor in (1 + step, 1 - step):
                fc2.weight[:, neuron] = column * factor
                losses.append(cross_entropy(tiny_vit(tiny_images[index : index + 1]), LABELS[index : index + 1]))
            expected += abs((losses[0] - losses[1]).item() / (2 * step)) / 3
        fc2.weight[:, neuron] = column
    got = taylor(tiny_vit, [(tiny_images, LABELS)])["blocks.1.mlp"][neuron].item()
    assert got == pytest.approx(expected, rel=1e-4)


def test_taylor_works_with_frozen_parameters(tiny_vit, tiny_images):
    expected = taylor(tiny_vit, [(tiny_images, LABELS)])
    got = taylor(tiny_vit.requires_grad_(False), [(tiny_images, LABELS)])
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_jas_is_the_mean_over_classes(tiny_vit, tiny_images):
    found = vitprune.discover(tiny_vit, [(tiny_images, torch.tensor([2, 2, 4]))])
    assert found.classes == (2, 4)
    scores = found.class_scores["blocks.0.mlp"]
    torch.testing.assert_close(jas(found)["blocks.0.mlp"], (scores[0] + scores[1]) / 2)


@pytest.mark.parametrize(("criterion", "message"), [("jas", "needs the scores of a run"), ("taylor", "needs calib")])
def test_a_criterion_says_what_it_lacks(criterion, message, tiny_vit):
    with pytest.raises(vitprune.VitpruneError, match=message):
        score_neurons(tiny_vit, criterion)


def test_an_empty_data_set_is_refused(tiny_vit):
    for criterion in ("activation", "taylor"):
        with pytest.raises(vitprune.VitpruneError, match="no calibration images"):
            score_neurons(tiny_vit, criterion, batches=[])
