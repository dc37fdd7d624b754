"""Compensation against ordinary least squares, and where it must be exact."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from families import half_plan

import vitprune
from vitprune.calibration.statistics import MOMENTS, Statistics, measure_statistics
from vitprune.models.units import find_feed_forwards, hook_hidden
from vitprune.pruning.compensate import compensate, reconstruct

LABELS = torch.zeros(3, dtype=torch.long)


def hidden_of(model, images):
    seen = {}
    with torch.no_grad(), hook_hidden(model, find_feed_forwards(model), lambda name, h: seen.update({name: h})):
        model(images)
    return {name: h.flatten(0, 1) for name, h in seen.items()}


def test_streamed_moments_are_those_of_all_tokens_at_once(tiny_vit, tiny_images):
    batches = [(tiny_images[:2], LABELS[:2]), (tiny_images[2:], LABELS[2:])]
    moments = measure_statistics(tiny_vit, find_feed_forwards(tiny_vit), batches, {MOMENTS})
    for name, rows in hidden_of(tiny_vit, tiny_images).items():
        assert moments[name].num_tokens == len(rows)
        torch.testing.assert_close(moments[name].mean_H, rows.mean(0))
        expected = torch.from_numpy(np.cov(rows.numpy().T, bias=True))
        torch.testing.assert_close(moments[name].covariance_HH, expected, rtol=1e-9, atol=1e-12)


def test_ridge_is_least_squares_on_the_calibration_tokens(tiny_vit, tiny_images):
    images = torch.randn(20, 3, 32, 32, dtype=torch.float64)
    rows = hidden_of(tiny_vit, images)["blocks.1.mlp"]
    batches = [(images, torch.zeros(20))]
    moments = measure_statistics(tiny_vit, find_feed_forwards(tiny_vit), batches, {MOMENTS})["blocks.1.mlp"]
    keep = torch.rand(48, generator=torch.Generator().manual_seed(0)) > 0.5
    centred = (rows - rows.mean(0)).numpy()
    expected = np.linalg.lstsq(centred[:, keep.numpy()], centred[:, ~keep.numpy()], rcond=None)[0].T
    np.testing.assert_allclose(reconstruct(moments, keep, ridge=1e-12).numpy(), expected, rtol=1e-5, atol=1e-7)


@torch.no_grad()
def test_neurons_that_others_can_stand_in_for_cost_nothing(tiny_vit, tiny_images):
    """The second half of each FFN computes copies of the first half: ridge restores the dense logits."""
    for block in tiny_vit.blocks:
        block.mlp.fc1.weight[24:] = block.mlp.fc1.weight[:24]
        block.mlp.fc1.bias[24:] = block.mlp.fc1.bias[:24]
    keep = torch.arange(48) < 24
    plan = vitprune.Plan({ffn.name: keep for ffn in find_feed_forwards(tiny_vit)})
    batches = [(torch.randn(16, 3, 32, 32, dtype=torch.float64), torch.zeros(16))]
    pruned = vitprune.apply_plan(tiny_vit, plan, compensation="ridge", ridge=1e-9, batches=batches)
    torch.testing.assert_close(pruned(tiny_images), tiny_vit(tiny_images), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_bias_restores_the_mean_output(tiny_vit, tiny_images):
    """With one FFN pruned, its mean output over the calibration tokens is the dense one."""
    plan = half_plan(tiny_vit)
    plan = vitprune.Plan({name: keep | (name != "blocks.2.mlp") for name, keep in plan.keep.items()})
    outputs = []
    pruned = vitprune.apply_plan(tiny_vit, plan, compensation="bias", batches=[(tiny_images, LABELS)])
    for model in (tiny_vit, pruned):
        handle = model.blocks[2].mlp.register_forward_hook(lambda _m, _x, y: outputs.append(y.mean((0, 1))))
        model(tiny_images)
        handle.remove()
    torch.testing.assert_close(outputs[0], outputs[1])


@torch.no_grad()
@pytest.mark.parametrize("compensation", ["bias", "ridge", "sequential-ffn", "sequential", "distill"])
def test_masking_equals_removal_after_compensation(compensation, tiny_vit, tiny_images):
    plan, batches = half_plan(tiny_vit), [(tiny_images, LABELS)]
    removed, masked = (
        vitprune.apply_plan(tiny_vit, plan, mode=mode, compensation=compensation, batches=batches)
        for mode in ("remove", "mask")
    )
    torch.testing.assert_close(removed(tiny_images), masked(tiny_images), rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_dead_and_duplicate_neurons_keep_the_solution_finite():
    covariance = torch.zeros(4, 4, dtype=torch.float64)
    covariance[:2, :2] = 1.0  # two copies of one neuron, two dead ones
    zeros = torch.zeros(4, dtype=torch.float64)
    moments = Statistics(1, 10, mean_H=zeros, covariance_HH=covariance)
    assert reconstruct(moments, torch.tensor([True, False, True, False])).isfinite().all()
    dead = Statistics(1, 10, mean_H=zeros, covariance_HH=torch.zeros(4, 4, dtype=torch.float64))
    assert torch.equal(reconstruct(dead, torch.tensor([True, False, True, True])), torch.zeros(1, 3).double())


@torch.no_grad()
def test_an_output_projection_without_bias_gets_one(tiny_vit, tiny_images, tmp_path):
    for block in tiny_vit.blocks:
        block.mlp.fc2.bias = None
    dense = copy.deepcopy(tiny_vit)
    plan, ffns = half_plan(tiny_vit), find_feed_forwards(tiny_vit)
    result = compensate(tiny_vit, plan, measure_statistics(tiny_vit, ffns, [(tiny_images, LABELS)], {MOMENTS}))
    assert all(block.mlp.fc2.bias is not None for block in result.blocks)
    assert all(block.mlp.fc2.bias is None for block in tiny_vit.blocks)
    torch.testing.assert_close(tiny_vit(tiny_images), dense(tiny_images), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"compensation": "ridge"}, "needs calibration images"), ({"compensation": "obs"}, "must be one of none, bias")],
)
def test_refuses(arguments, message, tiny_vit):
    with pytest.raises(vitprune.VitpruneError, match=message):
        vitprune.apply_plan(tiny_vit, half_plan(tiny_vit), **arguments)


def test_a_plan_for_another_model_is_refused(tiny_vit):
    plan = half_plan(tiny_vit)
    other = plan.with_facts(architecture="deit_tiny_patch16_224")
    with pytest.raises(vitprune.VitpruneError, match="it is for deit_tiny_patch16_224, the model is vit_tiny"):
        vitprune.apply_plan(tiny_vit, other)
    narrow = vitprune.Plan({name: keep[:11] for name, keep in plan.keep.items()})
    with pytest.raises(vitprune.VitpruneError, match=r"blocks\.0\.mlp has 48 neurons, the plan covers 11"):
        vitprune.apply_plan(tiny_vit, narrow)
    short = vitprune.Plan({"blocks.0.mlp": plan.keep["blocks.0.mlp"]})
    with pytest.raises(vitprune.VitpruneError, match="it covers 1 FFNs .* the model has 3 FFNs"):
        vitprune.apply_plan(tiny_vit, short)
    empty = vitprune.Plan({name: torch.zeros_like(keep) for name, keep in plan.keep.items()})
    with pytest.raises(vitprune.VitpruneError, match=r"leaves blocks\.0\.mlp without neurons"):
        vitprune.apply_plan(tiny_vit, empty)
