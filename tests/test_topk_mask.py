"""Masking the neurons that a class needs least."""

from __future__ import annotations

import pytest
import torch
from conftest import make_vit

import vitprune
from vitprune.analysis.topk_mask import CLEAN, ONE_PLAN, ORACLE, measure_topk_mask

LABELS = torch.tensor([2, 4, 4])


@pytest.fixture
def found(tiny_vit, tiny_images):
    return vitprune.discover(tiny_vit, [(tiny_images + 0.1, LABELS)])


@torch.no_grad()
def test_equals_zeroing_columns_for_each_class(tiny_vit, tiny_images, found):
    rows = measure_topk_mask(tiny_vit, [(tiny_images, LABELS)], found, top_ks=[5], mask_shares=[0.5], tokens=["all"])
    oracle = next(row for row in rows if row.mask == ORACLE)
    expected = 0.0
    for image, label in zip(tiny_images, LABELS, strict=True):
        scores = {name: of_class[found.classes.index(int(label))] for name, of_class in found.class_scores.items()}
        keep = {}
        for name, score in scores.items():
            keep[name] = torch.zeros(48, dtype=torch.bool)
            keep[name][score.sort(descending=True, stable=True).indices[: 48 - round(0.5 * 43)]] = True
        with vitprune.masked(tiny_vit, vitprune.Plan(keep)):
            expected += float(tiny_vit(image[None]).softmax(-1)[0, label]) / 3
    assert oracle.probability == pytest.approx(expected, abs=1e-6)
    assert oracle.num_neurons_masked == 3 * round(0.5 * 43)


@torch.no_grad()
def test_the_class_token_alone_is_masked_where_it_is_asked_for(tiny_vit, tiny_images, found):
    """A hook of its own that zeroes the first token's neurons, one image after another."""
    rows = measure_topk_mask(tiny_vit, [(tiny_images, LABELS)], found, top_ks=[5], mask_shares=[1.0], tokens=["cls"])
    expected = 0.0
    for image, label in zip(tiny_images, LABELS, strict=True):
        handles = []
        for name, scores in found.class_scores.items():
            gone = scores[found.classes.index(int(label))].sort(descending=True, stable=True).indices[5:]

            def zero(_module, inputs, gone=gone):
                hidden = inputs[0].clone()
                hidden[0, 0, gone] = 0
                return (hidden,)

            handles.append(tiny_vit.get_submodule(name).fc2.register_forward_pre_hook(zero))
        expected += float(tiny_vit(image[None]).softmax(-1)[0, label]) / 3
        for handle in handles:
            handle.remove()
    assert next(row for row in rows if row.mask == ORACLE).probability == pytest.approx(expected, abs=1e-6)


def test_masking_nothing_is_the_clean_model_and_one_plan_is_one_for_all(tiny_vit, tiny_images, found):
    batches = [(tiny_images, LABELS)]
    rows = measure_topk_mask(tiny_vit, batches, found, top_ks=[3], mask_shares=[0.0, 1.0], tokens=["cls", "all"])
    clean = rows[0]
    assert clean.mask == CLEAN
    assert {round(row.probability, 12) for row in rows if row.mask_share == 0} == {round(clean.probability, 12)}
    same = vitprune.Discovery(
        **{**vars(found), "class_scores": {n: s.mean(0).expand_as(s) for n, s in found.class_scores.items()}}
    )
    again = measure_topk_mask(tiny_vit, batches, same, top_ks=[3], mask_shares=[1.0], tokens=["all"])
    wanted = [row for row in rows if (row.mask, row.tokens, row.mask_share) == (ONE_PLAN, "all", 1.0)]
    assert [row.probability for row in again[1:]] == pytest.approx([wanted[0].probability] * 2)


@torch.no_grad()
def test_depth_limits_the_masking(tiny_vit, tiny_images, found):
    batches = [(tiny_images, LABELS)]
    shallow = measure_topk_mask(tiny_vit, batches, found, top_ks=[1], mask_shares=[1.0], tokens=["all"], depth=1)
    assert {row.num_neurons_masked for row in shallow[1:]} == {47}


def test_a_class_token_that_is_not_there_cannot_be_masked(tiny_images):
    model = make_vit(global_pool="avg", class_token=False)
    found = vitprune.discover(model, [(tiny_images, LABELS)])
    with pytest.raises(vitprune.VitpruneError, match="has no class token"):
        measure_topk_mask(model, [(tiny_images, LABELS)], found, top_ks=[5])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"mask_shares": [1.5]}, "mask share"), ({"top_ks": [49]}, "top_k"), ({"depth": 4, "top_ks": [1]}, "depth")],
)
def test_refuses(arguments, message, tiny_vit, tiny_images, found):
    with pytest.raises(vitprune.VitpruneError, match=message):
        measure_topk_mask(tiny_vit, [(tiny_images, LABELS)], found, **arguments)


def test_a_class_without_scores_is_refused(tiny_vit, tiny_images, found):
    with pytest.raises(vitprune.VitpruneError, match="class 0 has images but no scores"):
        measure_topk_mask(tiny_vit, [(tiny_images, torch.zeros(3, dtype=torch.long))], found, top_ks=[1])
