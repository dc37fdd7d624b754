"""Elimination with blocked downdates against one that solves every problem anew."""

from __future__ import annotations

import itertools

import pytest
import torch

import vitprune
from vitprune.answer_loss import draw_class_directions
from vitprune.calibration import second_order
from vitprune.calibration.second_order import eliminate, obs
from vitprune.calibration.statistics import GRADIENTS, MOMENTS, measure_statistics
from vitprune.models.units import find_feed_forwards

IMAGES = torch.randn(12, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
BATCHES = [(IMAGES[:5], torch.zeros(5)), (IMAGES[5:], torch.zeros(7))]


def draw(num_neurons, width=5):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(3 * num_neurons, num_neurons, dtype=torch.float64, generator=generator)
    rows = rows @ torch.randn(num_neurons, num_neurons, dtype=torch.float64, generator=generator)
    return torch.randn(width, num_neurons, dtype=torch.float64, generator=generator), rows.T @ rows / len(rows)


def eliminate_anew(a_DH, covariance_HH, ridge):
    """For every candidate, refit the output on the neurons that would stay; remove the cheapest."""
    damped = covariance_HH + ridge * covariance_HH.diagonal().mean() * torch.eye(len(covariance_HH)).double()
    total = torch.einsum("di,ij,dj->", a_DH, damped, a_DH)
    alive, order, losses = list(range(len(damped))), [], [0.0]
    while alive:
        left = {}
        for candidate in alive:
            stay = [neuron for neuron in alive if neuron != candidate]
            target = damped[stay] @ a_DH.T
            left[candidate] = total - (target * torch.linalg.solve(damped[stay][:, stay], target)).sum()
        best = min(left, key=left.get)
        order.append(best)
        losses.append(left[best].item())
        alive.remove(best)
    return order, [0.5 * (after - before) for before, after in itertools.pairwise(losses)]


@pytest.mark.parametrize("block", [1, 3, 64])
def test_elimination_equals_solving_anew(block, monkeypatch):
    monkeypatch.setattr(second_order, "BLOCK", block)
    a_DH, covariance_HH = draw(14)
    order, costs = eliminate(a_DH, covariance_HH, ridge=1e-3)
    expected_order, expected_costs = eliminate_anew(a_DH, covariance_HH, 1e-3)
    assert order.tolist() == expected_order
    assert costs.tolist() == pytest.approx(expected_costs, rel=1e-6)


def test_a_copy_goes_first_and_costs_nothing():
    a_DH, covariance_HH = draw(8)
    expand = torch.cat([torch.eye(8), torch.eye(8)[:1]]).double()  # neuron 8 is a copy of neuron 0
    order, costs = eliminate(torch.cat([a_DH, a_DH[:, :1]], 1), expand @ covariance_HH @ expand.T, ridge=1e-9)
    assert order[0].item() in (0, 8)
    assert costs[0] < 1e-6 * costs[1]


def test_dead_neurons_keep_the_elimination_finite():
    order, costs = eliminate(torch.ones(2, 6).double(), torch.zeros(6, 6).double())
    assert sorted(order.tolist()) == list(range(6))
    assert costs.isfinite().all()


def test_scores_rise_along_the_elimination(tiny_vit):
    statistics = measure_statistics(tiny_vit, find_feed_forwards(tiny_vit), BATCHES, {MOMENTS, GRADIENTS})
    scores = obs(tiny_vit, statistics)["blocks.1.mlp"]
    assert scores.dtype == torch.float64
    assert len(scores.unique()) == 48
    assert (scores > 0).all()


def test_directions_have_the_fisher_information_as_second_moment():
    logits = torch.tensor([[2.0, 0.0, -1.0, 0.5]], dtype=torch.float64).expand(20000, 4)
    drawn = draw_class_directions(logits, torch.Generator().manual_seed(0))
    share = logits[0].softmax(0)
    expected = torch.diag(share) - torch.outer(share, share)
    torch.testing.assert_close(drawn.T @ drawn / 20000, expected, rtol=0, atol=0.01)


def test_output_gradients_are_those_of_the_exact_fisher_information(tiny_vit):
    """Every class in turn, weighted by its probability, image by image; the estimate is averaged over seeds."""
    expected = torch.zeros(24, 24, dtype=torch.float64)
    for image in IMAGES:
        outputs = []
        handle = tiny_vit.blocks[2].mlp.register_forward_hook(lambda _m, _x, y, outputs=outputs: outputs.append(y))
        logits = tiny_vit(image[None])[0].log_softmax(-1)
        handle.remove()
        for class_log in logits:
            rows = torch.autograd.grad(class_log, outputs[0], retain_graph=True)[0][0]
            expected += class_log.detach().exp() * rows.T @ rows / len(IMAGES)
    ffns = find_feed_forwards(tiny_vit)
    draws = [measure_statistics(tiny_vit, ffns, BATCHES, {GRADIENTS}, seed=seed) for seed in range(300)]
    values = torch.stack([draw["blocks.2.mlp"].gradient_DD for draw in draws])
    error = (values.mean(0) - expected).abs() / (values.std(0) / 300**0.5 + 1e-12)
    assert error.max() < 5
    assert (values.mean(0) - expected).norm() < 0.05 * expected.norm()


def test_predicted_cost_is_the_loss_of_removing_one_neuron(tiny_vit):
    """Closed form: with one neuron removed and the rest refitted, half tr(G W Cov(residual) Wᵀ)."""
    ffns = find_feed_forwards(tiny_vit)
    statistics = measure_statistics(tiny_vit, ffns, BATCHES, {MOMENTS, GRADIENTS})
    moments, gradients = statistics["blocks.0.mlp"], statistics["blocks.0.mlp"].gradient_DD
    scores = obs(tiny_vit, statistics)["blocks.0.mlp"]
    first = int(scores.argmin())
    column = tiny_vit.blocks[0].mlp.fc2.weight[:, first].detach()
    damped = moments.covariance_HH + 1e-3 * moments.covariance_HH.diagonal().mean() * torch.eye(48).double()
    residual = 1 / torch.linalg.inv(damped)[first, first]
    assert scores[first].item() == pytest.approx(0.5 * float(column @ gradients @ column * residual), rel=1e-6)


def test_sixteen_bit_models_are_summed_in_float32(tiny_vit):
    ffns = find_feed_forwards(tiny_vit)
    exact = measure_statistics(tiny_vit, ffns, BATCHES, {MOMENTS, GRADIENTS})["blocks.0.mlp"]
    half = measure_statistics(tiny_vit.bfloat16(), ffns, BATCHES, {MOMENTS, GRADIENTS})["blocks.0.mlp"]
    assert (half.covariance_HH - exact.covariance_HH).norm() < 0.05 * exact.covariance_HH.norm()
    assert half.gradient_DD.dtype == torch.float64


def test_progress_sees_every_ffn_at_every_stop(tiny_vit):
    seen = []

    def track(items, description):
        seen.append((description, len(items)))
        return items

    vitprune.prune(tiny_vit, BATCHES, pruning_ratio=0.5, step=0.25, compensation="ridge", track=track)
    assert seen == [("rank neurons (step 1 of 2)", 3), ("rank neurons (step 2 of 2)", 3)]
