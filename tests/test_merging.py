"""Token merging against a program that follows the paper's description token by token."""

from __future__ import annotations

import copy
import json

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from conftest import make_vit
from families import FAMILIES, build

import vitprune
from vitprune.errors import VitpruneError
from vitprune.models.attention import split_attention
from vitprune.models.macs import count_macs
from vitprune.models.merge_schedule import choose_schedule, parse_schedule
from vitprune.models.merging import (
    Matching,
    MergingBlock,
    describe_merging,
    follow,
    match_tokens,
    merge_with,
    pool,
    set_merging,
    why_no_merging,
)
from vitprune.models.saved_folder import build_dense
from vitprune.seal import seal

SCHEDULE = (3, 0, 6)
KINDS = {
    "class token": {},
    "LayerScale": {"init_values": 0.5},
    "distilled": {"name": "deit_tiny_distilled_patch16_224"},
    "registers": {"reg_tokens": 2, "no_embed_class": True},
    "odd patches": {"img_size": 40},
    "mean of patches": {"global_pool": "avg"},
    "mean of normalised patches": {"global_pool": "avg", "fc_norm": False, "class_token": False},
}


def images_for(model, count=3):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, *model.patch_embed.img_size, dtype=torch.float64, generator=generator)


def attend_slowly(attention, z, size):
    """Attention of one image, head by head and query by query; a token counts as often as its size says."""
    query, key, value = (attention.qkv(z)).chunk(3, dim=-1)
    width = z.shape[1] // attention.num_heads
    out, keys = torch.zeros_like(z), []
    for head in range(attention.num_heads):
        part = slice(head * width, (head + 1) * width)
        keys.append(key[:, part])
        for token in range(len(z)):
            weights = [size[j] * torch.exp(query[token, part] @ key[j, part] / width**0.5) for j in range(len(z))]
            out[token, part] = sum(w * value[j, part] for j, w in enumerate(weights)) / sum(weights)
    return attention.proj(out), keys


def merge_slowly(x, size, keys, r, num_prefix):
    """Let the r tokens of the first set that are most like one of the second be absorbed by it."""
    first, second = (range(num_prefix + start, len(x), 2) for start in (0, 1))

    def likeness(a, b):
        cosines = [float(k[a] @ k[b] / k[a].norm() / k[b].norm()) for k in keys]
        return sum(cosines) / len(cosines)

    pairs = sorted((max((likeness(a, b), b) for b in second), a) for a in first)[::-1][:r] if r else []
    groups = {token: [token] for token in range(len(x))}
    for (_likeness, b), a in pairs:
        groups[b] += groups.pop(a)
    sizes = [sum(size[token] for token in group) for group in groups.values()]
    means = [sum(size[t] * x[t] for t in group) / n for group, n in zip(groups.values(), sizes, strict=True)]
    return torch.stack(means), sizes


@torch.no_grad()
def run_slowly(model, image, schedule):
    x = model.norm_pre(model._pos_embed(model.patch_embed(image[None])))[0]
    size = [1.0] * len(x)
    for block, r in zip(model.blocks, schedule, strict=True):
        y, keys = attend_slowly(block.attn, block.norm1(x), size)
        x, size = merge_slowly(x + block.ls1(y), size, keys, r, model.num_prefix_tokens)
        x = x + block.ls2(block.mlp(block.norm2(x)))
    x = model.norm(x)
    if model.global_pool == "token":
        return model.forward_head(x[None])[0], size
    patches = range(model.num_prefix_tokens, len(x))
    mean = sum(size[t] * x[t] for t in patches) / sum(size[t] for t in patches)
    return model.head(model.fc_norm(mean)), size


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_merging_is_what_the_paper_describes(kind):
    model = make_vit(**KINDS[kind])
    images = images_for(model)
    wanted = torch.stack([run_slowly(model, image, SCHEDULE)[0] for image in images])
    torch.testing.assert_close(set_merging(model, SCHEDULE)(images), wanted, rtol=1e-9, atol=1e-12)


def run_with_sizes(model, images):
    """Return the logits, and what each merge was given and gave."""
    seen = []
    handles = [
        block.merge.register_forward_hook(lambda _module, args, output: seen.append((args, output)))
        for block in model.blocks
        if getattr(block, "merge", None) is not None
    ]
    logits = model(images)
    for handle in handles:
        handle.remove()
    return logits, seen


@pytest.mark.parametrize("kind", ["class token", "distilled", "registers"])
@torch.no_grad()
def test_sizes_count_the_patches_and_prefix_tokens_stay(kind):
    model = make_vit(**KINDS[kind])
    images, num_prefix = images_for(model), model.num_prefix_tokens
    _logits, merges = run_with_sizes(set_merging(model, SCHEDULE), images)
    for (x_BND, _size, _keys), (merged_BMD, size_BM1, _matching) in merges:
        assert torch.equal(size_BM1[:, :num_prefix], torch.ones_like(size_BM1[:, :num_prefix]))
        assert torch.equal(size_BM1[:, num_prefix:].sum((1, 2)), torch.full((3,), 16.0, dtype=torch.float64))
        assert torch.equal(merged_BMD[:, :num_prefix], x_BND[:, :num_prefix])
    assert merges[-1][1][0].shape[1] == num_prefix + 16 - sum(SCHEDULE)


@torch.no_grad()
def test_without_merges_nothing_changes(tiny_vit, tiny_images):
    model = set_merging(tiny_vit, (0, 0, 0))
    assert describe_merging(model) is None
    assert torch.equal(model(tiny_images), tiny_vit(tiny_images))


@torch.no_grad()
def test_blocks_before_the_first_merge_are_timms_and_merging_can_be_taken_back(tiny_vit, tiny_images):
    merged = set_merging(tiny_vit, (0, 0, 2))
    assert [type(block) is MergingBlock for block in merged.blocks] == [False, False, True]
    assert merged.blocks[1].attn.qkv.weight.equal(tiny_vit.blocks[1].attn.qkv.weight)
    back = set_merging(merged, (0, 0, 0))
    torch.testing.assert_close(back(tiny_images), tiny_vit(tiny_images), rtol=1e-12, atol=1e-12)
    again = set_merging(set_merging(tiny_vit, (5, 0, 3)), (0, 0, 2))
    torch.testing.assert_close(again(tiny_images), merged(tiny_images), rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_neither_the_order_of_images_nor_their_number_matters(tiny_vit):
    model, images = set_merging(tiny_vit, SCHEDULE), images_for(tiny_vit, 5)
    logits = model(images)
    torch.testing.assert_close(model(images.flip(0)).flip(0), logits, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.cat([model(image[None]) for image in images]), logits, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_the_source_of_tokens_through_several_merges():
    """Tokens of a dense stream, averaged at once, are what merging them step by step gives."""
    generator = torch.Generator().manual_seed(0)
    x_BND = torch.randn(2, 11, 4, dtype=torch.float64, generator=generator)
    merged, size, source = x_BND, torch.ones(2, 11, 1, dtype=torch.float64), None
    for r in (3, 2):
        keys = torch.randn(2, 3, merged.shape[1], 5, dtype=torch.float64, generator=generator)
        matching = match_tokens(keys, r, num_prefix=1)
        merged, size = merge_with(matching, merged, size)
        source = follow(matching, source)
    torch.testing.assert_close(pool(source, x_BND, num_left=6), merged, rtol=1e-12, atol=1e-12)
    assert torch.equal(torch.nn.functional.one_hot(source).sum(1).double(), size[..., 0])


def test_equal_patches_merge_as_many_as_asked_for():
    matching = match_tokens(torch.ones(1, 2, 9, 4), r=4, num_prefix=1)
    assert matching.num_left == 5
    assert sorted(set(matching.place_BN[0].tolist())) == [0, 1, 2, 3, 4]


def test_merging_is_linear_in_the_tokens():
    matching = Matching(torch.tensor([[0, 1, 1, 2]]), num_left=3)
    a, b, size = torch.randn(1, 4, 3), torch.randn(1, 4, 3), torch.tensor([[[1.0], [3.0], [1.0], [2.0]]])
    both = merge_with(matching, a + 2 * b, size)[0]
    torch.testing.assert_close(both, merge_with(matching, a, size)[0] + 2 * merge_with(matching, b, size)[0])


class TokenWise(torch.nn.Module):
    """Stands where attention was left out."""

    def forward(self, x, attn_mask=None, is_causal=False):
        return 0.1 * x


def test_a_block_without_attention_runs_after_a_merge_but_merges_nothing(tiny_vit, tiny_images):
    tiny_vit.blocks[1].attn = TokenWise()
    assert set_merging(tiny_vit, (3, 0, 6))(tiny_images).shape == (3, 5)
    with pytest.raises(VitpruneError, match=r"blocks.1: no token can merge where attention is left out"):
        set_merging(tiny_vit, (0, 3, 0))


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ((1, 2), "the model has 3 blocks, the schedule is for 2"),
        ((4, 7, 0), "blocks.1: 7 of 12 patches cannot merge at once, at most 6 can"),
        ((0, -1, 0), "blocks.1: -1 of 16 patches cannot merge"),
    ],
)
def test_schedules_that_do_not_fit_are_refused(schedule, message, tiny_vit):
    with pytest.raises(VitpruneError, match=message):
        set_merging(tiny_vit, schedule)


@pytest.mark.parametrize("name", FAMILIES)
def test_families_that_cannot_merge_say_why(name):
    can = {"vit_tiny", "deit_tiny", "deit_tiny_distilled", "deit3_small", "vit_small_patch14_reg4_dinov2"}
    can |= {"vit_base_patch16_siglip_224"}
    reason = why_no_merging(build(name))
    assert (reason is None) == (name in can or name.removesuffix("_patch16_224") in can), reason


def test_normalised_keys_and_other_blocks_are_refused():
    with pytest.raises(VitpruneError, match=r"blocks.0.attn: Attention normalises queries and keys"):
        set_merging(make_vit(qk_norm=True), SCHEDULE)
    parallel = make_vit(block_fn=timm.models.vision_transformer.ParallelThingsBlock)
    with pytest.raises(VitpruneError, match=r"blocks.0 is a ParallelThingsBlock, not timm's Block"):
        set_merging(parallel, SCHEDULE)


@torch.no_grad()
@pytest.mark.parametrize("schedule", [SCHEDULE, None])
def test_a_saved_folder_loads_bit_for_bit(schedule, saved_vit, tmp_path):
    model = vitprune.load(saved_vit)
    images = torch.randn(2, 3, 32, 32)
    small = set_merging(model, schedule) if schedule else split_attention(model, ["blocks.1.attn"])
    vitprune.save(small, tmp_path / "small")
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert config.get("merge") == (list(schedule) if schedule else None)
    assert ("merge" in config) == bool(schedule)
    loaded = vitprune.load(tmp_path / "small")
    assert describe_merging(loaded) == describe_merging(small)
    assert torch.equal(loaded(images), small(images))
    assert type(build_dense(tmp_path / "small").blocks) is torch.nn.Sequential
    vitprune.save(model, tmp_path / "dense")
    assert not {"merge", "attention"} & json.loads((tmp_path / "dense" / "config.json").read_text()).keys()


@torch.no_grad()
def test_narrow_attention_and_neurons_of_a_merging_model_are_kept_in_a_folder(saved_vit, tmp_path):
    model = set_merging(vitprune.load(saved_vit), SCHEDULE)
    for name, rows in (("q", 12), ("k", 12), ("v", 9)):
        linear = model.blocks[0].attn.get_submodule(name)
        linear.weight, linear.bias = (
            torch.nn.Parameter(value[:rows].clone()) for value in (linear.weight, linear.bias)
        )
        linear.out_features = rows
    proj = model.blocks[0].attn.proj
    proj.weight, proj.in_features = torch.nn.Parameter(proj.weight[:, :9].clone()), 9
    vitprune.save(model, tmp_path / "narrow")
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(vitprune.load(tmp_path / "narrow")(images), model(images))


def test_a_description_that_cannot_be_is_refused(saved_vit, tmp_path):
    vitprune.save(set_merging(vitprune.load(saved_vit), SCHEDULE), tmp_path / "merged")
    path = tmp_path / "merged" / "config.json"
    path.write_text(json.dumps(seal({**json.loads(path.read_text()), "merge": [9, 0, 0]})))
    with pytest.raises(VitpruneError, match=r"config.json: .*blocks.0: 9 of 16 patches"):
        vitprune.load(tmp_path / "merged")


def test_gradients_flow_to_every_patch_and_training_works(tiny_images):
    model = set_merging(make_vit(init_values=0.5, drop_path_rate=0.1), SCHEDULE).train()
    images = tiny_images.requires_grad_()
    copy.deepcopy(model)(images).square().sum().backward()
    assert (images.grad.abs().amax(1) > 0).all()
    model.eval()(images).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_it_compiles_whole(tiny_vit, tiny_images):
    model = set_merging(tiny_vit, SCHEDULE)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(tiny_images), model(tiny_images))


def test_blocks_that_others_chain_are_refused(tiny_vit, tiny_images):
    model = set_merging(tiny_vit, SCHEDULE)
    for ask in (
        lambda: model.forward_intermediates(tiny_images, indices=[1]),
        lambda: model.forward_intermediates(tiny_images, indices=[0], stop_early=True),
        lambda: model.get_intermediate_layers(tiny_images),
    ):
        with pytest.raises(VitpruneError, match="hand each other sizes"):
            ask()
    model.train().set_grad_checkpointing(True)
    with pytest.raises(VitpruneError, match="gradient checkpointing"):
        model(tiny_images)


@torch.no_grad()
def test_onnx_runtime_answers_alike_at_any_batch_size(tmp_path):
    model = set_merging(make_vit(global_pool="avg"), SCHEDULE).float()
    images = images_for(model, 5).float()
    vitprune.export_onnx(model, tmp_path / "merged.onnx", [(images[:2], torch.zeros(2, dtype=torch.int64))])
    session = onnxruntime.InferenceSession(tmp_path / "merged.onnx", providers=["CPUExecutionProvider"])
    for count in (1, 5):
        (logits,) = session.run(None, {session.get_inputs()[0].name: images[:count].numpy()})
        np.testing.assert_allclose(logits, model(images[:count]).numpy(), rtol=1e-3, atol=1e-4)


def test_macs_are_those_counted_by_hand(tiny_vit):
    width, hidden, keys = 24, 48, 24
    patches, tokens, macs = 16, 17, 16 * 3 * 64 * width + width * 5
    for r in SCHEDULE:
        macs += 4 * tokens * width**2 + 2 * tokens**2 * width
        second = (tokens - 1) // 2
        if r:
            macs += (tokens - 1 - second) * second * keys + (tokens - r) * tokens * (width + 1)
        tokens -= r
        macs += 2 * tokens * width * hidden
    assert tokens == 1 + patches - sum(SCHEDULE)
    assert count_macs(set_merging(tiny_vit, SCHEDULE)) == macs


@pytest.mark.parametrize(
    ("text", "schedule"),
    [
        ("constant:2", (2, 2, 2)),
        ("constant:7", (7, 4, 2)),
        ("every2:3", (3, 0, 3)),
        ("1:4", (0, 4, 0)),
        ("2:1,0:5", (5, 0, 1)),
        ("0,3,0", (0, 3, 0)),
    ],
)
def test_schedules_as_they_are_written(text, schedule, tiny_vit):
    assert parse_schedule(text, tiny_vit) == schedule


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("half", "merging 'half': expected 'constant:13'"),
        ("every0:3", "merging 'every0:3': expected"),
        ("3:1", "there is no block 3, the model has 3"),
        ("1:2,1:3", "a block is named twice"),
        ("1,2", "the model has 3 blocks, the schedule is for 2"),
        ("0:9", "blocks.0: 9 of 16 patches cannot merge at once, at most 8 can"),
    ],
)
def test_schedules_that_mean_nothing_are_refused(text, message, tiny_vit):
    with pytest.raises(VitpruneError, match=message):
        parse_schedule(text, tiny_vit)


def test_the_chosen_schedule_meets_the_share_with_the_least_loss_of_those_measured(tiny_vit):
    batches = [(images_for(tiny_vit, 4), torch.zeros(4))]
    schedule = choose_schedule(tiny_vit, batches, 0.8, max_merges=2)
    assert schedule == choose_schedule(tiny_vit, batches, 0.8, max_merges=2)
    assert count_macs(set_merging(tiny_vit, schedule)) <= 0.8 * count_macs(tiny_vit)

    @torch.no_grad()
    def loss(schedule):
        dense, merged = (model(batches[0][0]).log_softmax(-1) for model in (tiny_vit, set_merging(tiny_vit, schedule)))
        return (dense.exp() * (dense - merged)).sum(-1).mean().item()

    def share(schedule):
        return count_macs(set_merging(tiny_vit, schedule)) / count_macs(tiny_vit)

    guesses = [(r, s, 0) for r in (4, 5, 6) for s in (4, 5) if 0.75 < share((r, s, 0)) <= 0.8]
    assert guesses
    assert loss(schedule) <= min(map(loss, guesses))


@pytest.mark.parametrize(
    ("share", "message"), [(1.5, "`macs_share` must be in"), (0.1, "no 3 merges leave at most 0.1")]
)
def test_a_share_that_cannot_be_met_is_refused(share, message, tiny_vit):
    with pytest.raises(VitpruneError, match=message):
        choose_schedule(tiny_vit, [(images_for(tiny_vit, 1), torch.zeros(1))], share)
