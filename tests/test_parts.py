"""Units of attention and whole layers: masking equals removal, turning changes no answer, and what is refused."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from conftest import TINY, make_vit
from families import build

import vitprune
from vitprune import Plan, VitpruneError, count_macs, find_groups, mask_neurons, masked, remove_neurons, target_macs
from vitprune.answer_loss import measure_divergence
from vitprune.calibration.attention_moments import QueryKeySums, measure_query_key_losses
from vitprune.calibration.layer_losses import StandIn, fit_stand_ins, measure_stand_ins
from vitprune.calibration.statistics import measure_statistics
from vitprune.models.attention import check_attention, split_attention
from vitprune.models.left_out import describe_left_out
from vitprune.models.merging import describe_merging, set_merging
from vitprune.models.trunk import check_trunk
from vitprune.models.units import KINDS, kind_of
from vitprune.pruning.decide import Decision, check_parts, decide
from vitprune.pruning.prune import prune_as_planned
from vitprune.pruning.rotate import _eliminate_heads, rotate_queries_keys, rotate_values, sort_heads
from vitprune.pruning.target import Target, target_parameters
from vitprune.pruning.turn import layers_that_can_go

ATTENTION_MODELS = {
    "vit_tiny_patch16_224": {},
    "deit_tiny_distilled_patch16_224": {},
    "deit3_small_patch16_224": {},
    "vit_small_patch14_reg4_dinov2": {},
    "vit_base_patch16_siglip_224": {},
}


def random_plan(model, kinds, seed=0, share=0.5):
    """Keep a random half of every group, and leave out the attention of block 1 and the FFN of block 2."""
    generator = torch.Generator().manual_seed(seed)
    keep = {}
    groups = find_groups(model, kinds)
    for group in groups:
        if group.kind == "layers":
            keep[group.name] = torch.tensor([group.module not in ("blocks.1.attn", "blocks.2.mlp")])
        else:
            order = torch.rand(group.num_units, generator=generator).argsort()
            keep[group.name] = torch.zeros(group.num_units, dtype=torch.bool)
            keep[group.name][order[: max(1, int(group.num_units * share))]] = True
    return Plan(keep, kinds={group.name: group.kind for group in groups if group.kind != "ffn"})


@pytest.mark.parametrize("kind", ["qk", "vo", "heads", "layers", "all"])
@pytest.mark.parametrize("name", ATTENTION_MODELS)
def test_masking_equals_removal_for_every_kind(name, kind, tiny_images):
    model = split_attention(make_vit(name, **ATTENTION_MODELS[name]))
    plan = random_plan(model, list(KINDS) if kind == "all" else [kind])
    by_mask = mask_neurons(model, plan)(tiny_images)
    assert not torch.allclose(by_mask, model(tiny_images))
    torch.testing.assert_close(remove_neurons(model, plan)(tiny_images), by_mask, rtol=1e-9, atol=1e-10)
    before = model(tiny_images)
    with masked(model, plan):
        torch.testing.assert_close(model(tiny_images), by_mask, rtol=0, atol=0)
    assert torch.equal(model(tiny_images), before)


@pytest.mark.parametrize("name", ATTENTION_MODELS)
def test_split_attention_answers_as_before(name, tiny_images):
    model = make_vit(name, **ATTENTION_MODELS[name])
    torch.testing.assert_close(split_attention(model)(tiny_images), model(tiny_images), rtol=1e-12, atol=1e-12)


def make_batches(num_batches=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randn(6, 3, 32, 32, dtype=dtype, generator=generator), torch.arange(6) % 5) for _ in range(num_batches)
    ]


def moments_by_hand(model, name, batches):
    """Second moments of queries and of keys less their mean in each image, one head and one image at a time."""
    attention = model.get_submodule(name)
    queries, keys = [], []
    for images, _labels in batches:
        for image in images:
            seen = {}
            handle = attention.register_forward_pre_hook(lambda _module, inputs, seen=seen: seen.update(x=inputs[0][0]))
            model(image[None])
            handle.remove()
            query = seen["x"] @ attention.q.weight.T + attention.q.bias
            key = seen["x"] @ attention.k.weight.T + attention.k.bias
            queries.append(query)
            keys.append(key - key.mean(0))
    width = attention.qk_width
    heads = [slice(width * head, width * (head + 1)) for head in range(attention.num_heads)]
    rows_q, rows_k = torch.cat(queries), torch.cat(keys)
    return [
        (rows_q[:, head].T @ rows_q[:, head] / len(rows_q), rows_k[:, head].T @ rows_k[:, head] / len(rows_k))
        for head in heads
    ]


@torch.no_grad()
def test_query_key_moments_are_centred_within_the_image():
    model, batches = split_attention(make_vit()), make_batches()
    sums = QueryKeySums()
    with sums.watching(model, ["blocks.1.attn"]):
        for images, _labels in batches:
            model(images)
    found = sums.finish()["blocks.1.attn"]
    for head, (of_queries, of_keys) in enumerate(moments_by_hand(model, "blocks.1.attn", batches)):
        torch.testing.assert_close(found.query_hqq[head], of_queries, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found.key_hqq[head], of_keys, rtol=1e-9, atol=1e-12)


def turned(model, batches):
    """Turn queries, keys and values of a split model."""
    names = [f"blocks.{block}.attn" for block in range(len(model.blocks))]
    groups = find_groups(model, ["vo"])
    sums = QueryKeySums()
    with sums.watching(model, names):
        statistics = measure_statistics(model, groups, batches, {"moments", "gradients"})
    model = rotate_queries_keys(model, sums.finish())
    return rotate_values(model, {group.module: statistics[group.name] for group in groups})


def test_turning_changes_no_answer_and_orders_the_dimensions(tiny_images):
    model, batches = split_attention(make_vit()), make_batches()
    result, statistics, losses = turned(model, batches)
    with torch.no_grad():
        torch.testing.assert_close(result(tiny_images), model(tiny_images), rtol=1e-9, atol=1e-10)
    assert all(bool((loss_H[:-1] >= loss_H[1:]).all()) for loss_H in losses.values())
    # Values of one head are uncorrelated, each with variance 1, in the new basis.
    of_head = statistics["blocks.0.attn"].covariance_HH[:8, :8]
    torch.testing.assert_close(of_head, torch.eye(8, dtype=torch.float64), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_fewer_dimensions_are_the_best_of_their_rank():
    """No other pair of rank 4 comes nearer to the centred logits: the error is that of the singular values left out."""
    model, batches = split_attention(make_vit()), make_batches()
    result, _statistics, _losses = turned(model, batches)
    attention, name = result.blocks[1].attn, "blocks.1.attn"
    error = total = 0.0
    for images, _labels in batches:
        seen = {}
        handle = attention.register_forward_pre_hook(lambda _module, inputs, seen=seen: seen.update(x=inputs[0]))
        result(images)
        handle.remove()
        query, key = attention.split(attention.q(seen["x"])), attention.split(attention.k(seen["x"]))
        key = key - key.mean(2, keepdim=True)
        error += (query[..., 4:] @ key[..., 4:].transpose(-2, -1)).square().sum((0, 2, 3))
        total += images.shape[0] * query.shape[2] ** 2
    for head, (of_queries, of_keys) in enumerate(moments_by_hand(model, name, batches)):
        values, vectors = torch.linalg.eigh(of_queries)
        root = vectors * values.clamp_min(0).sqrt() @ vectors.T
        singular = torch.linalg.eigvalsh(root @ of_keys @ root).clamp_min(0).flip(0)
        # The mean over images of |q k^T|^2 is that of the moments where they are the same in every image: nearly.
        assert error[head] / total <= 1.5 * singular[4:].sum()


def test_what_the_last_queries_and_keys_cost_is_the_rise_of_the_loss_to_second_order():
    """For a vanishing share of the dimensions: the loss with them scaled, against the Fisher information."""
    model, batches = split_attention(make_vit()), make_batches(1)
    images = batches[0][0]
    estimates = torch.stack(
        [measure_query_key_losses(model, ["blocks.1.attn"], batches, seed=seed)["blocks.1.attn"] for seed in range(60)]
    ).mean(0)
    with torch.no_grad():
        dense = model(images).log_softmax(-1)
        share = 1e-3
        attention = model.blocks[1].attn
        attention.q.weight.unflatten(0, (3, -1))[:, 4:] *= 1 - share
        attention.q.bias.unflatten(0, (3, -1))[:, 4:] *= 1 - share
        other = model(images).log_softmax(-1)
    rise = (dense.exp() * (dense - other)).sum(-1).mean() / share**2
    assert estimates[4] == pytest.approx(float(rise), rel=0.35)


def test_a_decision_leaves_out_what_is_dear_for_its_worth():
    """On paper: layer a saves 4 for a loss of 0.1, where four units of b would cost 0.4."""
    losses = {"a": torch.full((4,), 5.0), "b": torch.full((8,), 0.1)}
    costs = {name: torch.arange(len(loss_H) + 1.0) for name, loss_H in losses.items()}
    target = Target("macs", limit=8, fixed=0, costs=costs)
    options = {"allocation": "global", "round_to": {"a": 1, "b": 1}, "floor": 0.0}
    assert decide(losses, target, **options).widths == {"a": 4, "b": 4}
    cheap = [StandIn("a", "bias", torch.nn.Identity(), 0.1)]
    assert decide(losses, target, cheap, **options) == Decision({"b": 8, "a": 0}, {"a": cheap[0]}, 0.1)
    assert decide(losses, target, [replace(cheap[0], loss=0.5)], **options).left_out == {}


def test_layers_alone_meet_a_target_or_it_is_refused():
    """Nothing else may go: the layer that costs least for what it saves goes first, then the next."""
    costs = {name: torch.arange(5.0) for name in ("a", "b", "c")}
    stand_ins = [
        StandIn(name, "bias", torch.nn.Identity(), loss) for name, loss in (("a", 3.0), ("b", 1.0), ("c", 2.0))
    ]
    options = {"allocation": "global", "round_to": {}, "floor": 0.0}
    decision = decide({}, Target("macs", limit=4, fixed=0, costs=costs), stand_ins, **options)
    assert set(decision.left_out) == {"b", "c"}
    with pytest.raises(VitpruneError, match="cannot be met by what may go"):
        decide({}, Target("macs", limit=1, fixed=2, costs=costs), stand_ins, **options)


def test_heads_compete_with_dimensions():
    """One of two heads is worth next to nothing: it goes, and takes half of what its dimensions cost."""
    losses = {
        "a.heads": torch.tensor([5.0, 0.01]),
        "a.qk": torch.full((4,), 2.0),
        "a.vo": torch.full((4,), 2.0),
        "b": torch.full((8,), 0.1),
    }
    costs = {name: torch.arange(len(loss_H) + 1.0) for name, loss_H in losses.items() if name != "a.heads"}
    target = Target("macs", limit=12, fixed=0, costs=costs)
    options = {"allocation": "global", "round_to": dict.fromkeys(costs, 1), "floor": 0.0}
    assert decide(losses, target, **options).widths == {"a.heads": 1, "a.qk": 4, "a.vo": 4, "b": 8}


@torch.no_grad()
def test_sorting_heads_changes_no_answer_and_the_dead_head_is_last(tiny_images):
    model = split_attention(make_vit())
    model.blocks[1].attn.proj.weight[:, :8] *= 1e-3
    batches = make_batches()
    statistics = measure_statistics(model, find_groups(model, ["vo"]), batches, {"moments", "gradients"})
    result, sorted_statistics, _moments, losses = sort_heads(model, statistics, {})
    torch.testing.assert_close(result(tiny_images), model(tiny_images), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(result.blocks[1].attn.proj.weight[:, 16:], model.blocks[1].attn.proj.weight[:, :8])
    assert losses["blocks.1.attn"][2] < 1e-3 * losses["blocks.1.attn"][1]
    again = measure_statistics(result, find_groups(result, ["vo"]), batches, {"moments"})["blocks.1.attn.vo"]
    torch.testing.assert_close(sorted_statistics["blocks.1.attn.vo"].covariance_HH, again.covariance_HH)


def test_what_a_head_costs_is_what_is_left_after_the_others_were_refitted():
    """Against least squares on rows whose second moments are the covariance."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(500, 6, dtype=torch.float64, generator=generator) @ torch.randn(6, 6, dtype=torch.float64)
    rows = rows - rows.mean(0)
    weight = torch.randn(4, 6, dtype=torch.float64, generator=generator)
    order, losses = _eliminate_heads(weight, rows.T @ rows / len(rows), 3, 1e-12)
    left, target = [0, 1, 2], rows @ weight.T
    for head, _loss in zip(order.flip(0).tolist()[:2], losses.flip(0).tolist()[:2], strict=True):
        found = {}
        for gone in left:
            columns = [2 * each + place for each in left if each != gone for place in (0, 1)]
            fit = torch.linalg.lstsq(rows[:, columns], target).solution
            found[gone] = 0.5 * float((rows[:, columns] @ fit - target).square().sum() / len(rows))
        assert min(found, key=found.get) == head
        left.remove(head)
    assert losses[2] == pytest.approx(
        min(
            0.5
            * float((rows[:, keep] @ torch.linalg.lstsq(rows[:, keep], target).solution - target).square().sum() / 500)
            for keep in ([2, 3, 4, 5], [0, 1, 4, 5], [0, 1, 2, 3])
        ),
        rel=1e-6,
    )


PARTS = ["ffn", "qk", "vo", "layers"]


@pytest.mark.parametrize("merge", [None, (0, 4, 0)], ids=["unmerged", "merged"])
def test_the_target_holds_over_all_parts_and_the_plan_gives_the_same_model_again(merge, tmp_path):
    dense, batches = make_vit(embed_dim=48), make_batches()
    dense.model_args = {**TINY, "embed_dim": 48}
    model = dense if merge is None else set_merging(dense, merge)
    limit = 0.6 * count_macs(dense)
    target = target_macs(split_attention(model), limit, kinds=["ffn", "qk", "vo"])
    pruned, plan = vitprune.prune(model, batches, target=target, parts=PARTS, dense=dense)
    assert 0.9 * limit < count_macs(pruned) <= limit
    assert plan.facts.target.predicted == pytest.approx(count_macs(pruned))
    assert plan.facts.sizes_dense.macs == count_macs(dense)
    assert plan.facts.merge == merge
    again, planned = prune_as_planned(dense, plan, batches)
    assert planned.widths == plan.widths
    images = batches[0][0]
    with torch.no_grad():
        torch.testing.assert_close(again(images), pruned(images), rtol=0, atol=0)
        vitprune.save(pruned, tmp_path / "pruned", plan=plan)
        loaded = vitprune.load(tmp_path / "pruned")
        assert torch.equal(loaded(images), pruned(images))
    assert describe_merging(loaded) == describe_merging(pruned)
    assert describe_left_out(loaded) == (plan.facts.stand_ins or {})
    read = vitprune.read_plan(tmp_path / "pruned")
    assert read.widths == plan.widths
    assert read.facts == plan.facts


def test_a_target_of_parameters_counts_all_parts():
    model = split_attention(make_vit())
    target = target_parameters(model, sum(each.numel() for each in model.parameters()), kinds=["ffn", "qk", "vo"])
    plan = random_plan(model, ["ffn", "qk", "vo"])
    widths = plan.widths
    assert target.predict(widths) == sum(parameter.numel() for parameter in remove_neurons(model, plan).parameters())


@pytest.mark.parametrize("part", ["qk", "vo", "heads"])
def test_a_ratio_takes_that_share_of_every_part(part):
    model = make_vit(embed_dim=48, num_heads=2)
    pruned, plan = vitprune.prune(model, make_batches(), pruning_ratio=0.5, parts=[part], allocation="uniform")
    widths = {name: width for name, width in plan.widths.items() if name.endswith(part)}
    assert set(widths.values()) == {1 if part == "heads" else 12}
    assert pruned.blocks[0].attn.scale == model.blocks[0].attn.scale
    assert plan.pruning_ratio == 0


def test_every_part_of_a_model_without_classifier_can_go():
    model, batches = make_vit(num_classes=0), make_batches(4)
    pruned, _plan = vitprune.prune(model, batches, ratio=0.5, parts=["qk"], allocation="uniform", criterion="variance")
    assert pruned.blocks[0].attn.qk_width == 4
    parts = ["ffn", "qk", "vo", "heads", "layers"]
    target = target_macs(split_attention(model), 0.6 * count_macs(model), kinds=["ffn", "qk", "vo"])
    pruned, plan = vitprune.prune(model, batches, target=target, parts=parts)
    assert {kind_of(name) for name in plan.widths} == set(parts)
    assert count_macs(pruned) <= 0.6 * count_macs(model)


@torch.no_grad()
def test_compensation_brings_a_merged_model_back_to_the_dense_stream():
    """On its own calibration images, the merged stream comes nearer to the mean of the tokens that it stands for."""
    dense, batches = make_vit(), make_batches(4)
    merged = set_merging(dense, (0, 6, 0))
    steered, _plan = vitprune.prune(merged, batches, pruning_ratio=0.0)
    images = torch.cat([images for images, _labels in batches])
    expected = dense(images)
    before, after = (merged(images) - expected).square().mean(), (steered(images) - expected).square().mean()
    assert after < 0.8 * before


def test_the_path_search_follows_narrow_attention_and_refuses_merged_tokens(tiny_images):
    model, batches = make_vit(), make_batches()
    pruned, _plan = vitprune.prune(model, batches, pruning_ratio=0.5, parts=["qk", "vo"], allocation="uniform")
    check_trunk(pruned, vitprune.find_feed_forwards(pruned), tiny_images)
    merged = set_merging(model, (0, 4, 0))
    with pytest.raises(VitpruneError, match="its tokens merge, and a path goes through all of them"):
        check_trunk(merged, vitprune.find_feed_forwards(merged), tiny_images)


@torch.no_grad()
def test_narrow_attention_compiles_whole(tiny_images):
    model = split_attention(make_vit())
    narrow = remove_neurons(model, random_plan(model, list(KINDS)))
    compiled = torch.compile(narrow, backend="eager", fullgraph=True)
    assert torch.equal(compiled(tiny_images), narrow(tiny_images))


def test_narrow_attention_trains():
    model = remove_neurons(split_attention(make_vit()), random_plan(split_attention(make_vit()), list(KINDS)))
    model.train()(make_batches()[0][0]).sum().backward()
    # What stands in the place of a layer reads nothing: the norm before it has no say.
    unread = ("blocks.1.norm1", "blocks.2.norm2")
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert {name for name, _parameter in model.named_parameters() if not name.startswith(unread)} == trained


REFUSED = {
    "beit_base_patch16_224": "BEiT's attention adds a bias for the positions of two tokens",
    "vit_small_plus_patch16_dinov3": "EvaAttention turns queries and keys by rotary position embeddings",
    "eva02_tiny_patch14_224": "EvaAttention turns queries and keys by rotary position embeddings",
    "swin_tiny_patch4_window7_224": "WindowAttention adds a position bias within windows",
    "cait_xxs24_224": "TalkingHeadAttn mixes its heads",
    "xcit_nano_12_p16_224": "XCA normalises queries and keys and attends to channels",
    "samvit_base_patch16": "SAM's attention adds a bias for the positions of two tokens",
}


@pytest.mark.parametrize("name", REFUSED)
def test_attention_that_cannot_be_cut_is_refused_with_the_reason(name):
    for kind in ("qk", "vo", "heads"):
        with pytest.raises(VitpruneError) as refused:
            check_attention(build(name), [kind])
        assert str(refused.value).startswith(f"part {kind}: ")
        assert REFUSED[name] in str(refused.value)


def test_normalised_queries_and_keys_are_refused_and_values_are_not():
    model = make_vit(qk_norm=True)
    with pytest.raises(VitpruneError, match=r"part qk: blocks\.0\.attn: Attention normalises queries and keys"):
        check_parts(model, ["qk"])


def test_parts_are_refused_by_name():
    with pytest.raises(VitpruneError, match="parts must be one of"):
        check_parts(make_vit(), ["neck"])
    with pytest.raises(VitpruneError, match="mode mask is for neurons alone"):
        check_parts(make_vit(), ["ffn", "qk"], mode="mask")
    with pytest.raises(VitpruneError, match="built for other parts|other parts than these"):
        model = make_vit()
        vitprune.prune(model, make_batches(), target=target_macs(model, 0.9 * count_macs(model)), parts=["qk"])


@pytest.mark.parametrize("merge", [None, (0, 4, 0)], ids=["unmerged", "merged"])
@torch.no_grad()
def test_what_a_layer_costs_is_measured_on_the_whole_model(merge):
    """Blocks before it are not run again; the loss is that of the whole model with the layer replaced."""
    model, batches = make_vit(), make_batches()
    model = model if merge is None else set_merging(model, merge)
    fitted = fit_stand_ins(model, layers_that_can_go(model), batches)
    assert ("blocks.1.attn" in fitted) == (merge is None)
    for each in measure_stand_ins(model, fitted, batches):
        replaced = copy.deepcopy(model)
        replaced.set_submodule(each.layer, each.module)
        losses = [measure_divergence(model(images).log_softmax(-1), replaced(images)) for images, _labels in batches]
        assert each.loss == pytest.approx(float(torch.cat(losses).mean()), rel=1e-6)
