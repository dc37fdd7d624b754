"""Criteria against closed forms, finite differences and a loop."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import make_vit
from timm.layers import SwiGLUPacked
from torch.nn.functional import cross_entropy

import vitprune
from vitprune.calibration.criteria import REGISTRY, integrated_gradients, jas, magnitude, random, score_neurons
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
    batches = [(tiny_images[:2], LABELS[:2]), (tiny_images[2:], LABELS[2:])]
    got = score_neurons(tiny_vit, "activation", batches=batches)["blocks.2.mlp"]
    torch.testing.assert_close(got, seen[0].abs().mean((0, 1)))


def test_variance_and_wanda_are_what_they_say(tiny_vit, tiny_images):
    seen = []
    handle = tiny_vit.blocks[2].mlp.fc2.register_forward_pre_hook(lambda _m, x: seen.append(x[0].flatten(0, 1)))
    with torch.no_grad():
        tiny_vit(tiny_images)
    handle.remove()
    columns = tiny_vit.blocks[2].mlp.fc2.weight.detach().T
    batches = [(tiny_images, LABELS)]
    got = {name: score_neurons(tiny_vit, name, batches=batches)["blocks.2.mlp"] for name in ("variance", "wanda")}
    expected_variance = seen[0].var(0, unbiased=False) * columns.norm(dim=1) ** 2
    torch.testing.assert_close(got["variance"], expected_variance)
    torch.testing.assert_close(got["wanda"], seen[0].square().mean(0).sqrt() * columns.norm(p=1, dim=1))


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
    got = score_neurons(tiny_vit, "taylor", batches=[(tiny_images, LABELS)])["blocks.1.mlp"][neuron].item()
    assert got == pytest.approx(expected, rel=1e-4)


def test_taylor_works_with_frozen_parameters(tiny_vit, tiny_images):
    batches = [(tiny_images, LABELS)]
    expected = score_neurons(tiny_vit, "taylor", batches=batches)
    got = score_neurons(tiny_vit.requires_grad_(False), "taylor", batches=batches)
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_fisher_is_half_the_mean_square_slope_with_the_models_own_labels(tiny_vit, tiny_images):
    """Drawn again and again, the mean is the exact sum over all labels by their probability."""
    neuron, fc2 = 11, tiny_vit.blocks[0].mlp.fc2
    expected = 0.0
    for image in tiny_images:
        factor = torch.ones(48, dtype=torch.float64, requires_grad=True)
        handle = fc2.register_forward_pre_hook(lambda _m, x, factor=factor: (x[0] * factor,))
        log_likelihood = tiny_vit(image[None])[0].log_softmax(-1)
        handle.remove()
        for class_log in log_likelihood:
            slope = torch.autograd.grad(class_log, factor, retain_graph=True)[0][neuron]
            expected += 0.5 * (class_log.exp() * slope**2).item() / len(tiny_images)
    draws = [score_neurons(tiny_vit, "fisher", batches=[(tiny_images, LABELS)], seed=seed) for seed in range(400)]
    values = torch.stack([draw["blocks.0.mlp"][neuron] for draw in draws])
    assert abs(values.mean().item() - expected) < 4 * values.std().item() / 20


def test_integrated_gradients_are_those_of_a_fine_sum_and_complete(tiny_vit, tiny_images):
    losses, totals = {}, torch.zeros(3, 48, dtype=torch.float64)
    for index in range(3):
        for middle in [*((torch.arange(200) + 0.5) / 200).tolist(), 0.0, 1.0]:
            factor = torch.full((48,), middle, dtype=torch.float64, requires_grad=True)
            handle = tiny_vit.blocks[1].mlp.fc2.register_forward_pre_hook(lambda _m, x, c=factor: (x[0] * c,))
            losses[index, middle] = cross_entropy(tiny_vit(tiny_images[index : index + 1]), LABELS[index : index + 1])
            handle.remove()
            if 0 < middle < 1:
                totals[index] += torch.autograd.grad(losses[index, middle], factor)[0] / 200
        assert totals[index].sum().item() == pytest.approx((losses[index, 1.0] - losses[index, 0.0]).item(), rel=1e-4)
    got = integrated_gradients(tiny_vit, [(tiny_images, LABELS)], quadrature="gauss-legendre:12")["blocks.1.mlp"]
    torch.testing.assert_close(got, totals.abs().mean(0), rtol=1e-3, atol=1e-7)


def test_jas_is_the_mean_over_classes_above_the_weakest_neuron(tiny_vit, tiny_images):
    found = vitprune.discover(tiny_vit, [(tiny_images, torch.tensor([2, 2, 4]))])
    assert found.classes == (2, 4)
    scores = found.class_scores["blocks.0.mlp"]
    mean = (scores[0] + scores[1]) / 2
    torch.testing.assert_close(jas(found)["blocks.0.mlp"], mean - mean.min())
    # What all neurons of an FFN have in common says nothing about them.
    shifted = replace(found, class_scores={name: each + 7 for name, each in found.class_scores.items()})
    for name, scores_H in jas(shifted).items():
        torch.testing.assert_close(scores_H, jas(found)[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("criterion", "message"), [("jas", "needs the scores of a run"), ("taylor", "needs calib")])
def test_a_criterion_says_what_it_lacks(criterion, message, tiny_vit):
    with pytest.raises(vitprune.VitpruneError, match=message):
        score_neurons(tiny_vit, criterion)


def test_an_empty_data_set_is_refused(tiny_vit):
    for criterion in ("activation", "taylor", "integrated-gradients", "obs"):
        with pytest.raises(vitprune.VitpruneError, match="no calibration images"):
            score_neurons(tiny_vit, criterion, batches=[])
