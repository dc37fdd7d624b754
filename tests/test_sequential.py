"""Sequential compensation against a program that solves every block by ordinary least squares on stored states."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from conftest import make_vit
from families import half_plan
from timm.layers import SwiGLU

import vitprune
from vitprune.models.block_calls import study_blocks
from vitprune.pruning import sequential
from vitprune.pruning.sequential import compensate_sequentially, weigh_tokens

IMAGES = torch.randn(12, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
BATCHES = [(IMAGES[:5], torch.zeros(5)), (IMAGES[5:], torch.zeros(7))]
SWIN = {"img_size": 32, "patch_size": 2, "embed_dim": 12, "depths": (2, 1), "num_heads": (2, 2), "window_size": 4}


def solve_ridge(rows, targets, penalty, weights=None):
    """Weighted ridge regression on centred rows as least squares with extra rows."""
    weights = np.ones(len(rows)) if weights is None else weights
    root = np.sqrt(weights)[:, None]
    centred = root * (rows - np.average(rows, axis=0, weights=weights))
    aim = root * (targets - np.average(targets, axis=0, weights=weights))
    extra = np.sqrt(penalty * weights.sum()) * np.eye(rows.shape[1])
    stacked = np.concatenate([aim, np.zeros((rows.shape[1], targets.shape[1]))])
    return np.linalg.lstsq(np.concatenate([centred, extra]), stacked, rcond=None)[0]


def steer_slowly(block, states, drift, ridge, weights):
    """What of the drift behind the attention its heads' outputs explain, and its mean."""
    attention = block.attn
    shape = (*states.shape[:2], 3, attention.num_heads, -1)
    query, key, value = attention.qkv(block.norm1(states)).reshape(shape).permute(2, 0, 3, 1, 4)
    heads = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1) @ value
    rows = heads.transpose(1, 2).reshape(len(weights), -1).numpy()
    aim = drift.flatten(0, 1).numpy()
    centred = rows - np.average(rows, axis=0, weights=weights)
    scale = np.average(centred**2, axis=0, weights=weights).mean()
    gain = block.ls1.gamma.numpy() if hasattr(block.ls1, "gamma") else 1.0
    steer = gain * (centred @ solve_ridge(rows, aim / gain, ridge * scale, weights))
    return torch.from_numpy(steer + np.average(aim, axis=0, weights=weights)).view_as(states)


@torch.no_grad()
def compensate_slowly(model, plan, images, *, towards_stream, ridge, drift_ridge, weights):
    """Every block by itself on states kept whole; returns the logits of the compensated model on the same images."""
    start = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    dense = pruned = start
    for index, block in enumerate(model.blocks):
        keep = plan.keep[f"blocks.{index}.mlp"].numpy()
        gain = block.ls2.gamma.numpy() if hasattr(block.ls2, "gamma") else 1.0
        weight, bias = block.mlp.fc2.weight.numpy(), block.mlp.fc2.bias.numpy()
        weight_N = np.tile(weights[f"blocks.{index}.mlp"].numpy(), len(images))
        wanted = dense + block.ls1(block.attn(block.norm1(dense)))
        dense = block(dense)
        attended = pruned + block.ls1(block.attn(block.norm1(pruned)))
        if towards_stream and index:
            attended = attended + steer_slowly(block, pruned, wanted - attended, drift_ridge, weight_N)
        hidden = block.mlp.act(block.mlp.fc1(block.norm2(attended))).flatten(0, 1).numpy()
        flat = attended.flatten(0, 1).numpy()
        drift = (dense.flatten(0, 1).numpy() - flat - gain * (hidden @ weight.T + bias)) / gain

        def average(rows, weight_N=weight_N):
            return np.average(rows, axis=0, weights=weight_N)

        scale = average((hidden - average(hidden)) ** 2).mean()
        stand_in = solve_ridge(hidden[:, keep], hidden[:, ~keep], ridge * scale, weight_N)
        kept = hidden[:, keep] - average(hidden[:, keep])
        output = kept @ (weight[:, keep].T + stand_in @ weight[:, ~keep].T) + average(hidden @ weight.T + bias)
        if towards_stream:
            output = output + kept @ solve_ridge(hidden[:, keep], drift, drift_ridge * scale, weight_N) + average(drift)
        pruned = torch.from_numpy(flat + gain * output).view_as(attended)
    return model.forward_head(model.norm(pruned))


@pytest.mark.parametrize("towards_stream", [True, False])
@pytest.mark.parametrize("model_args", [{}, {"init_values": 0.3}], ids=["plain", "layerscale"])
def test_equals_the_slow_program(towards_stream, model_args):
    model = make_vit(**model_args)
    plan = half_plan(model)
    weights = {name: torch.linspace(0.5, 1.5, 17, dtype=torch.float64) for name in plan.keep}
    options = {"towards_stream": towards_stream, "ridge": 1e-3, "weights": weights}
    with torch.no_grad():
        got = compensate_sequentially(model, plan, BATCHES, **options, drift_ridges=[0.1])(IMAGES)
    expected = compensate_slowly(model, plan, IMAGES, **options, drift_ridge=0.1)
    torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-8)


def test_the_drift_ridge_chosen_explains_most_of_the_images_it_was_not_fitted_to():
    """From the rows themselves: fit on one half, sum the squares left on the other, both ways."""
    generator = torch.Generator().manual_seed(2)
    halves, rows = [], []
    gain = torch.tensor([1.0, 1.0, 0.5, 1e-3, 2.0, 0.1], dtype=torch.float64)
    for _ in range(2):
        hidden = torch.randn(40, 1, 12, dtype=torch.float64, generator=generator)
        drift = hidden[..., :3] @ torch.ones(3, 6).double() + 4 * torch.randn(40, 1, 6, generator=generator)
        half = sequential._DriftMoments(gain, torch.full((12,), 0.1, dtype=torch.float64))
        half.add(hidden[:25], drift[:25], None)
        half.add(hidden[25:], drift[25:], None)
        halves.append(half.finish())
        rows.append((hidden.squeeze(1).numpy(), drift.squeeze(1).numpy()))
    keep, grid = torch.arange(12) != 5, [0.001, 0.1, 1.0, 3.0, 100.0, float("inf")]
    left = []
    for ridge in grid:
        total = 0.0
        for (fit_h, fit_e), (test_h, test_e) in (rows, rows[::-1]):
            steer = np.zeros((11, 6))
            if np.isfinite(ridge):
                steer = solve_ridge(fit_h[:, keep.numpy()], fit_e, ridge * fit_h.var(0).mean())
            rest = test_e - test_e.mean(0) - (test_h - test_h.mean(0))[:, keep.numpy()] @ steer
            total += (rest**2).sum()
        left.append(total)
    assert sequential._choose_ridge(keep, gain, halves, grid) == grid[int(np.argmin(left))]
    assert grid[int(np.argmin(left))] not in (grid[0], grid[-1])


def test_the_class_token_weighs_what_the_loss_makes_of_it(tiny_vit):
    """The head reads the class token alone: behind the last block nothing else has a gradient."""
    ffns = vitprune.find_feed_forwards(tiny_vit)
    statistics = vitprune.measure_statistics(tiny_vit, ffns, BATCHES, {"gradients"})
    last = weigh_tokens(tiny_vit, statistics)["blocks.2.mlp"]
    assert last[0].item() == pytest.approx(0.5 + 0.5 * 17)
    assert last[1:].tolist() == pytest.approx([0.5] * 16)
    first = weigh_tokens(tiny_vit, statistics)["blocks.0.mlp"]
    assert first.mean().item() == pytest.approx(1.0)
    assert len(first[1:].unique()) == 1
    assert first[0] > first[1] > 0.5


@torch.no_grad()
def test_with_nothing_removed_the_model_stays_itself(tiny_vit):
    plan = vitprune.Plan({name: torch.ones(48, dtype=torch.bool) for name in half_plan(tiny_vit).keep})
    got = compensate_sequentially(tiny_vit, plan, BATCHES, towards_stream=True)
    torch.testing.assert_close(got(IMAGES), tiny_vit(IMAGES), rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_the_size_of_the_batches_does_not_matter(tiny_vit):
    plan = half_plan(tiny_vit)
    whole = compensate_sequentially(tiny_vit, plan, [(IMAGES, torch.zeros(12))], towards_stream=True)
    parts = compensate_sequentially(tiny_vit, plan, BATCHES, towards_stream=True)
    torch.testing.assert_close(whole(IMAGES), parts(IMAGES), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_stages_with_something_between_them_read_the_images_again():
    """Between the stages of a Swin Transformer lies a patch merging that belongs to no block."""
    model = make_swin()
    plan = half_plan(model)
    calls = study_blocks(model, vitprune.find_feed_forwards(model), BATCHES)
    assert [call.follows for call in calls.values()] == [False, True, False]
    walked = compensate_sequentially(model, plan, BATCHES, towards_stream=True)
    each = {name: replace(call, follows=False) for name, call in calls.items()}
    anew = compensate_sequentially(model, plan, BATCHES, towards_stream=True, calls=each)
    torch.testing.assert_close(walked(IMAGES), anew(IMAGES), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_attention_within_windows_does_not_steer():
    """Its output projection sees tokens in another order than the residual stream, or at least no whole images."""
    flat = {"img_size": (32, 16), "depths": (2, 2)}
    for model, size in ((make_swin(), (32, 32)), (make_swin(**flat), (32, 16))):
        images = torch.randn(4, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        calls = study_blocks(model, vitprune.find_feed_forwards(model), [(images, torch.zeros(4))])
        assert all(call.attention is None for call in calls.values())
    assert study_blocks(make_vit(), vitprune.find_feed_forwards(make_vit()), BATCHES)["blocks.1.mlp"].attention


def make_swin(name="swin_tiny_patch4_window7_224", **model_args):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **{**SWIN, **model_args}).double().eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model


def test_an_ffn_whose_output_is_normalised_first_is_refused():
    model = make_swin("swinv2_tiny_window8_256")
    with pytest.raises(vitprune.VitpruneError, match="does not add its FFN's output to the residual stream"):
        vitprune.prune(model, BATCHES)


def test_no_hook_survives(tiny_vit):
    work = compensate_sequentially(tiny_vit, half_plan(tiny_vit), BATCHES, towards_stream=True)
    assert not has_hooks(tiny_vit)
    assert not has_hooks(work)


@torch.no_grad()
def test_no_hook_survives_an_exception(tiny_vit):
    """The second batch of states is too wide for the block."""
    call = study_blocks(tiny_vit, vitprune.find_feed_forwards(tiny_vit), BATCHES)["blocks.1.mlp"]
    states = [torch.zeros(2, 17, 24, dtype=torch.float64), torch.zeros(2, 17, 25, dtype=torch.float64)]
    work = copy.deepcopy(tiny_vit)
    with pytest.raises(RuntimeError):
        sequential._steer_attention(
            tiny_vit, work, call, states, list(map(sequential._State, states)), weights_N=None, drift_ridges=[1.0]
        )
    assert not has_hooks(tiny_vit)
    assert not has_hooks(work)


def has_hooks(model):
    return any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@torch.no_grad()
def test_a_channel_that_hardly_reaches_the_stream_does_not_steer():
    model = make_vit(init_values=0.3)
    for block in model.blocks:
        block.ls1.gamma[:3] = 1e-9
        block.ls2.gamma[3:6] = 1e-9
    work = compensate_sequentially(model, half_plan(model), BATCHES, towards_stream=True)
    for before, after in zip(model.blocks, work.blocks, strict=True):
        assert torch.equal(after.attn.proj.weight[:3], before.attn.proj.weight[:3])
        assert after.attn.proj.bias.abs().max() < 10
        assert after.mlp.fc2.bias.abs().max() < 10


@torch.no_grad()
def test_distilling_brings_the_answers_nearer_and_touches_output_projections_alone(tiny_vit):
    plan = half_plan(tiny_vit)
    images, others = torch.randn(2, 96, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    options = {"num_steps": 40, "learning_rate": 1e-2}
    learned = vitprune.distill(tiny_vit, tiny_vit, plan, [(images, torch.zeros(96))], **options)

    def gap(model):
        expected, got = (each(others).log_softmax(-1) for each in (tiny_vit, vitprune.mask_neurons(model, plan)))
        return torch.nn.functional.kl_div(got, expected, log_target=True, reduction="batchmean")

    assert gap(learned) < 0.5 * gap(tiny_vit)
    again = vitprune.distill(tiny_vit, tiny_vit, plan, [(images, torch.zeros(96))], **options)
    assert all(torch.equal(a, b) for a, b in zip(learned.parameters(), again.parameters(), strict=True))
    pairs = zip(learned.named_parameters(), tiny_vit.parameters(), strict=True)
    changed = {name for (name, after), before in pairs if not torch.equal(after, before)}
    assert changed == {f"blocks.{index}.mlp.fc2.{what}" for index in range(3) for what in ("weight", "bias")}


FAMILIES = {
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "beit": ("beit_base_patch16_224", {}),
    "eva": ("eva02_tiny_patch14_224", {"patch_size": 8}),
    "swiglu": ("vit_tiny_patch16_224", {"mlp_layer": SwiGLU}),
    "average": ("vit_tiny_patch16_224", {"global_pool": "avg", "class_token": False}),
}


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_attention_brings_the_stream_behind_it_nearer(family):
    """Where it is fitted, and on the calibration images: behind the second block's attention."""
    name, model_args = FAMILIES[family]
    model = make_vit(name, **model_args)
    plan = half_plan(model)
    calls = study_blocks(model, vitprune.find_feed_forwards(model), BATCHES)
    alone = {ffn: replace(call, attention=None) for ffn, call in calls.items()}
    options = {"towards_stream": True, "drift_ridges": [1e-3]}
    both, without = (compensate_sequentially(model, plan, BATCHES, **options, calls=each) for each in (calls, alone))
    assert measure_gap(model, both, "blocks.1.norm2") < 0.9 * measure_gap(model, without, "blocks.1.norm2")


def measure_gap(model, other, reader):
    """Mean squared difference of what a module of both models reads."""
    streams = []
    for subject in (model, other):
        hook = subject.get_submodule(reader).register_forward_pre_hook(
            lambda _module, inputs: streams.append(inputs[0])
        )
        subject(IMAGES)
        hook.remove()
    return (streams[1] - streams[0]).square().mean()


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_drift_behind_the_last_block_is_smaller_than_without_steering(family):
    """On the calibration images themselves: steering is a regression with a constant, so it cannot do harm there."""
    name, model_args = FAMILIES[family]
    model = make_vit(name, **model_args)
    plan = half_plan(model)
    steered, alone = (
        compensate_sequentially(model, plan, BATCHES, towards_stream=towards_stream, drift_ridges=[1e-3])
        for towards_stream in (True, False)
    )
    assert measure_gap(model, steered, "norm") < 0.9 * measure_gap(model, alone, "norm")
