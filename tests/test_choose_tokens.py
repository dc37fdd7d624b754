"""Merging shares a target with units: every mixture meets it, the least loss wins, and what cannot be is refused."""

from __future__ import annotations

import pytest
import torch
from conftest import TINY, make_vit, photos
from torch.nn import functional as F

import vitprune
from vitprune import VitpruneError, count_macs, split_attention, target_macs
from vitprune.answer_loss import mean_divergence
from vitprune.images.resized_batches import resize_batches
from vitprune.models.fewer_tokens import FewerTokens, reduce_tokens
from vitprune.models.image_size import smaller_sizes
from vitprune.models.merge_schedule import choose_schedules
from vitprune.models.merging import describe_merging, set_merging
from vitprune.pruning.choose_tokens import ask_dense, choose_tokens, reduce_tokens_first, weigh
from vitprune.pruning.prune import prune_as_planned
from vitprune.pruning.target import target_parameters
from vitprune.seen_images import hash_pixels

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


def choose(model, batches, target, parts):
    return choose_tokens(model, target, parts, weigh(model, batches, parts, ridge=1e-3), **OPTIONS)


def test_the_mixture_of_least_loss_on_images_kept_back_wins():
    model, batches = make_model(), make_batches(4)
    parts = ("ffn", "qk", "vo", "layers", "tokens")
    tried = choose(model, batches, make_target(model, 0.6), parts)
    assert len(tried) > 2
    assert any(each.fewer.schedule is None for each in tried)
    assert [each.loss for each in tried] == sorted(each.loss for each in tried)
    for each in tried:
        if each.fewer.schedule is not None:
            assert count_macs(reduce_tokens(model, each.fewer)) <= each.share * count_macs(model)


def test_merging_alone_is_measured_on_the_images_kept_back():
    model, batches = make_model(), make_batches(4)
    (only,) = choose(model, batches, make_target(model, 0.7), ("tokens",))
    assert only.share == pytest.approx(0.7)
    assert only.loss == mean_divergence(model, set_merging(model, only.fewer.schedule), [batches[3][0]])


def test_smaller_images_compete_by_the_same_loss_on_the_same_images():
    model, batches = make_model(), make_batches(4)
    tried = choose(model, batches, make_target(model, 0.6), ("ffn", "pixels"))
    sizes = {each.fewer.image_size for each in tried}
    assert len(sizes) > 1
    assert sizes <= {None, *smaller_sizes(model)}
    assert all(each.cost <= 0.6 * count_macs(model) for each in tried)
    alone = choose(model, batches, make_target(model, 0.3), ("tokens", "pixels"))
    assert any(each.fewer.image_size for each in alone)
    for each in (each for each in alone if each.fewer.image_size):
        images = batches[3][0]
        small = F.interpolate(images, each.fewer.image_size, mode="bicubic", antialias=True)
        with torch.no_grad():
            dense, other = model(images).log_softmax(-1), reduce_tokens(model, each.fewer)(small).log_softmax(-1)
        loss = F.kl_div(other, dense, log_target=True, reduction="batchmean").item()
        assert each.loss == pytest.approx(loss, rel=1e-9)


def test_sizes_that_lose_more_alone_than_a_mixture_before_are_not_tried():
    model, batches = make_model(), make_batches(4)
    alone = min(
        ask_dense(model, batches[3:]).loss_of(reduce_tokens(model, FewerTokens(size)), size)
        for size in smaller_sizes(model)
    )
    tried = choose(model, batches, make_target(model, 0.97), ("ffn", "pixels"))
    assert tried[0].loss < alone
    assert {each.fewer.image_size for each in tried} == {None}


def test_a_share_that_the_last_schedule_cannot_go_on_to_is_met_by_another():
    """Late merges leave too much at half of the cost, however many tokens merge there."""
    model, batches = make_vit(embed_dim=48, patch_size=4, depth=12), make_batches(1)
    late = [0, 0, 0, 0, 0, 0, 0, 0, 0, 20, 0, 0]
    shares = [0.95, 0.5, 0.35]
    found = choose_schedules(model, batches, shares, max_merges=5, max_candidates=2, max_varied=1, start=late)
    assert any(found[0])
    assert not any(found[0][:9])
    for share, schedule in zip(shares, found, strict=True):
        assert count_macs(set_merging(model, schedule)) <= share * count_macs(model)


@pytest.mark.parametrize(
    "parts",
    [
        ["tokens"],
        ["pixels"],
        ["ffn", "tokens"],
        ["ffn", "qk", "vo", "layers", "tokens"],
        ["ffn", "qk", "vo", "layers", "tokens", "pixels"],
    ],
    ids="+".join,
)
def test_the_target_holds_whatever_merges(parts, tmp_path):
    model, batches = make_model(), make_batches()
    limit = 0.65 * count_macs(model)
    pruned, plan = vitprune.prune(model, batches, target=make_target(model, 0.65), parts=parts, step=0.3)
    assert count_macs(pruned) <= limit
    assert plan.facts.sizes_dense.macs == count_macs(model)
    assert plan.facts.target.limit == limit
    assert plan.facts.target.predicted == pytest.approx(count_macs(pruned))
    if parts in (["tokens"], ["pixels"]):
        assert plan.num_neurons == plan.num_neurons_dense
    assert (plan.facts.merge is None) == (describe_merging(pruned) is None)
    assert plan.facts.image_size in (None, *smaller_sizes(model))
    if parts == ["pixels"]:
        assert plan.facts.image_size is not None
    small = [images for images, _labels in resize_batches(batches, pruned)]
    assert all({*hash_pixels(each)} <= plan.calibration for each in (batches[0][0], small[0]))
    again, _plan = prune_as_planned(model, plan, batches)
    vitprune.save(pruned, tmp_path / "pruned", plan=plan)
    loaded = vitprune.load(tmp_path / "pruned")
    with torch.no_grad():
        assert torch.equal(again(small[0]), pruned(small[0]))
        assert torch.equal(loaded(small[0]), pruned(small[0]))


def test_images_in_files_are_read_anew_at_another_size(tmp_path):
    """What the plan leaves is what the same plan leaves of images read by the smaller model's own transform."""
    model = make_model()
    images = vitprune.find_images(photos(tmp_path, ["a", "b"], count=8), None)
    batches = vitprune.ImageBatches(images, model)
    pruned, plan = vitprune.prune(model, batches, target=make_target(model, 0.5), parts=["ffn", "pixels"], step=1)
    assert plan.facts.image_size in smaller_sizes(model)
    own = vitprune.ImageBatches(images, reduce_tokens(model, FewerTokens(plan.facts.image_size)))
    again, _plan = prune_as_planned(model, plan, own)
    x = next(iter(own))[0].double()
    with torch.no_grad():
        assert torch.equal(again(x), pruned(x))
    with pytest.raises(VitpruneError, match="evaluation images were calibration images"):
        vitprune.evaluate(pruned, own)


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
    with pytest.raises(VitpruneError, match="neither fewer tokens nor units can meet the target; no schedule goes"):
        choose(model, batches, make_target(model, 0.1), ("tokens",))
    with pytest.raises(VitpruneError, match="part pixels needs a target and images.* name a size"):
        vitprune.prune(model, batches, pruning_ratio=0.5, parts=["ffn", "pixels"])
    with pytest.raises(VitpruneError, match="part pixels: resize the model before"):
        vitprune.make_elastic(model, batches, parts=["ffn", "pixels"])
    with pytest.raises(VitpruneError, match="cannot merge tokens: it adds a position bias"):
        beit = make_vit("beit_base_patch16_224")
        vitprune.prune(beit, batches, target=target_macs(beit, 0.8 * count_macs(beit)), parts=["tokens"])
