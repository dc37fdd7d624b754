"""Units of attention and whole layers: masking equals removal, turning changes no answer, and what is refused."""

from __future__ import annotations

import pytest
import timm
import torch
from conftest import make_vit
from families import FAMILIES

import vitprune
from vitprune import Plan, VitpruneError, find_groups, mask_neurons, masked, remove_neurons
from vitprune.models.attention import check_attention, split_attention
from vitprune.models.units import KINDS
from vitprune.pruning.plan import fit_plan

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
