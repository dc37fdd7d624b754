"""Merging shares a target with units: every mixture meets it, the least loss wins, and what cannot be is refused."""

from __future__ import annotations

import pytest
import torch
from conftest import TINY, make_vit

import vitprune
from vitprune import VitpruneError, count_macs, split_attention, target_macs
from vitprune.calibration.layer_losses import mean_divergence
from vitprune.models.merging import describe_merging, set_merging
from vitprune.pruning.choose_tokens import choose_tokens, reduce_tokens_first
from vitprune.pruning.prune import prune_as_planned
from vitprune.pruning.target import target_parameters

SIZES = {"embed_dim": 48, "patch_size": 4, "depth": 3}
OPTIONS = {"ridge": 1e-3, "allocation": "global", "round_to": 1, "floor": 0.05}
KINDS = ["ffn", "qk", "vo"]


def make_model():
    model = make_vit(**SIZES)
    model.model_args = {**TINY, **SIZES}
    return model


def make_batches(num_batches=2, num_images=32):
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randn(num_images, 3, 32, 32, dtype=torch.float64, generator=generator), torch.arange(num_images) % 5)
        for _ in range(num_batches)
    ]


def make_target(model, share, kinds=KINDS):
    return target_macs(split_attention(model), share * count_macs(model), kinds=kinds)


def test_the_mixture_of_least_loss_on_images_kept_back_wins():
    model, batches = make_model(), make_batches(4)
    tried = choose_tokens(model, batches, make_target(model, 0.6), ("ffn", "qk", "vo", "layers"), **OPTIONS)
    assert len(tried) > 2
    assert any(each.schedule is None for each in tried)
    assert [each.loss for each in tried] == sorted(each.loss for each in tried)
    for each in tried:
        if each.schedule is not None:
            assert count_macs(set_merging(model, each.schedule)) <= each.share * count_macs(model)


def test_merging_alone_is_measured_on_the_images_kept_back():
    model, batches = make_model(), make_batches(4)
    (only,) = choose_tokens(model, batches, make_target(model, 0.7), (), **OPTIONS)
    assert only.share == pytest.approx(0.7)
    assert only.loss == mean_divergence(model, set_merging(model, only.schedule), [batches[3][0]])


@pytest.mark.parametrize(
    "parts", [["tokens"], ["ffn", "tokens"], ["ffn", "qk", "vo", "layers", "tokens"]], ids="+".join
)
def test_the_target_holds_whatever_merges(parts, tmp_path):
    model, batches = make_model(), make_batches()
    limit = 0.65 * count_macs(model)
    pruned, plan = vitprune.prune(model, batches, target=make_target(model, 0.65), parts=parts, step=0.3)
    assert count_macs(pruned) <= limit
    assert plan.facts.sizes_dense.macs == count_macs(model)
    assert plan.facts.target.limit == limit
    assert plan.facts.target.predicted == pytest.approx(count_macs(pruned))
    if parts == ["tokens"]:
        assert plan.num_neurons == plan.num_neurons_dense
    assert (plan.facts.merge is None) == (describe_merging(pruned) is None)
    again, _plan = prune_as_planned(model, plan, batches)
    vitprune.save(pruned, tmp_path / "pruned", plan=plan)
    loaded = vitprune.load(tmp_path / "pruned")
    with torch.no_grad():
        assert torch.equal(again(batches[0][0]), pruned(batches[0][0]))
        assert torch.equal(loaded(batches[0][0]), pruned(batches[0][0]))


def test_what_is_left_of_the_target_is_for_units():
    model, batches = make_model(), make_batches()
    shaped, left, parts = reduce_tokens_first(
        model, batches, make_target(model, 0.5), ("ffn", "qk", "tokens"), **OPTIONS
    )
    assert left.limit == 0.5 * count_macs(model)
    if parts == ("ffn", "qk"):
        assert left.dense == pytest.approx(count_macs(shaped))
        assert set(left.costs) == set(make_target(model, 0.5).costs)
    else:
        assert parts == ("ffn",)
        assert left.share == 0


def test_what_cannot_be_is_refused():
    model, batches = make_model(), make_batches()
    with pytest.raises(VitpruneError, match="part tokens needs a target and images"):
        vitprune.prune(model, batches, pruning_ratio=0.5, parts=["ffn", "tokens"])
    with pytest.raises(VitpruneError, match="part tokens saves multiply-accumulates"):
        limit = 0.8 * sum(each.numel() for each in model.parameters())
        vitprune.prune(model, batches, target=target_parameters(model, limit), parts=["ffn", "tokens"])
    with pytest.raises(VitpruneError, match="tokens of this model merge already"):
        merged = set_merging(model, (0, 8, 0))
        vitprune.prune(merged, batches, target=make_target(merged, 0.7), parts=["tokens"])
    with pytest.raises(VitpruneError, match="neither merging nor units can meet the target; no schedule goes"):
        choose_tokens(model, batches, make_target(model, 0.2), (), **OPTIONS)
    with pytest.raises(VitpruneError, match="cannot merge tokens: it adds a position bias"):
        beit = make_vit("beit_base_patch16_224")
        vitprune.prune(beit, batches, target=target_macs(beit, 0.8 * count_macs(beit)), parts=["tokens"])
