"""Masking equals removal: the law of the package, on every FFN kind and on stock timm models."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import timm
import torch
from conftest import make_vit
from families import FAMILIES, build, example, half_plan, row
from timm.layers import GluMlp, Mlp, SwiGLU, SwiGLUPacked

import vitprune

PAGE = Path(__file__).resolve().parents[1] / "docs" / "families.md"
# Name -> what the message says.
REFUSED = {
    "eva02_base_patch14_224": "normalises its hidden",
    "convnextv2_atto": "no supported FFN",
    "convnext_atto": "no supported FFN",
    "resnet18": "no supported FFN",
    "coat_tiny": "one FFN that runs twice",
    "pvt_v2_b0": "has convolutions",
    "levit_128s": "LevitMlp is not supported",
    "fastvit_sa12": "has convolutions",
    "efficientformerv2_s0": "has convolutions",
    "coatnet_nano_cc_224": "has convolutions",
    "mobilevitv2_050": "has convolutions",
    "nextvit_small": "has convolutions",
}

IN_PARTS = ("twins_svt_small", "davit_tiny", "tnt_s_patch16_224", "hiera_tiny_224", "coat_lite_tiny", "mobilevit_xxs")
HIERARCHICAL = ("twins_svt_small", "davit_tiny", "hiera_tiny_224", "crossvit_tiny_240", "edgenext_xx_small")


def hook_mask(model, plan, images):
    """Zero the neurons with hooks of this test's own: nothing shared with vitprune's ways of masking."""
    handles = [
        model.get_submodule(f"{name}.fc2").register_forward_pre_hook(lambda _m, x, keep=keep: (x[0] * keep,))
        for name, keep in plan.keep.items()
    ]
    try:
        return model(images)
    finally:
        for handle in handles:
            handle.remove()


# Both tests of a model one after the other: it is built once.
of_every_family = pytest.mark.parametrize("name", FAMILIES, scope="module")


@torch.inference_mode()
@of_every_family
def test_masking_equals_removal_on_stock_models_or_they_are_refused(name):
    model = build(name)
    if name in REFUSED:
        with pytest.raises(vitprune.VitpruneError, match=REFUSED[name]):
            vitprune.find_feed_forwards(model)
        return
    images, plan = example(model), half_plan(model)
    if name == "caformer_s18":  # whose float32 rounds by more than this
        model, images = copy.deepcopy(model).double(), images.double()
    expected = hook_mask(model, plan, images)
    removed = vitprune.remove_neurons(model, plan)
    torch.testing.assert_close(removed(images), expected, rtol=1e-5, atol=1e-6)
    with vitprune.masked(model, plan):
        torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-6)
    assert {ffn.name: ffn.num_neurons for ffn in vitprune.find_feed_forwards(removed)} == plan.widths


@pytest.mark.parametrize("name", IN_PARTS)
def test_images_of_one_batch_are_told_apart_whatever_stands_in_the_first_dimension(name):
    """Two images together give the mean of what each gives alone: squares are taken of an image as a whole."""
    model = build(name)
    images, labels = example(model), torch.tensor([0, 1])
    ffns = vitprune.find_feed_forwards(model)
    together, *alone = (
        vitprune.measure_statistics(model, ffns, [(images[part], labels[part])], {"taylor"})
        for part in (slice(0, 2), slice(0, 1), slice(1, 2))
    )
    for ffn in ffns:
        mean = sum(each[ffn.name].taylor_H for each in alone) / 2
        torch.testing.assert_close(together[ffn.name].taylor_H, mean, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("name", HIERARCHICAL)
def test_other_families_are_pruned_and_loaded_again(name, tmp_path):
    model = build(name)
    model.model_args = FAMILIES[name]
    images = example(model)
    pruned, plan = vitprune.prune(model, [(images, torch.tensor([0, 1]))], ratio=0.5, compensate="ridge", step=1)
    assert plan.pruning_ratio >= 0.5
    assert vitprune.count_macs(pruned) < vitprune.count_macs(model)
    vitprune.save(pruned, tmp_path / "pruned", plan=plan)
    with torch.inference_mode():
        assert torch.equal(vitprune.load(tmp_path / "pruned")(images), pruned(images))


@pytest.mark.parametrize("name", ["twins_svt_small", "hiera_tiny_224", "crossvit_tiny_240"])
def test_other_families_take_the_default_compensation(name):
    model = build(name)
    _pruned, plan = vitprune.prune(model, [(example(model), torch.tensor([0, 1]))], ratio=0.5, step=1)
    assert plan.pruning_ratio >= 0.5


@pytest.mark.parametrize("name", ["davit_tiny", "tnt_s_patch16_224", "edgenext_xx_small"])
def test_blocks_that_cannot_be_run_one_at_a_time_name_another_compensation(name):
    model = build(name)
    with pytest.raises(vitprune.VitpruneError, match="compensate with ridge"):
        vitprune.prune(model, [(example(model), torch.tensor([0, 1]))], ratio=0.5, step=1)


@torch.inference_mode()
@pytest.mark.parametrize("mlp_layer", [Mlp, GluMlp, SwiGLUPacked, SwiGLU])
@pytest.mark.parametrize("num_kept", [1, 7, 23, 24])
def test_masking_equals_removal_for_every_ffn_kind(mlp_layer, num_kept, tiny_images):
    model = make_vit(mlp_layer=mlp_layer, mlp_ratio=2)
    ffns = vitprune.find_feed_forwards(model)
    generator = torch.Generator().manual_seed(0)
    keep = {ffn.name: torch.zeros(ffn.num_neurons, dtype=torch.bool) for ffn in ffns}
    for ffn in ffns:
        keep[ffn.name][torch.randperm(ffn.num_neurons, generator=generator)[:num_kept]] = True
    plan = vitprune.Plan(keep)
    expected = hook_mask(model, plan, tiny_images)
    for pruned in (vitprune.remove_neurons(model, plan), vitprune.mask_neurons(model, plan)):
        torch.testing.assert_close(pruned(tiny_images), expected, rtol=1e-12, atol=1e-12)


@torch.inference_mode()
def test_the_model_is_itself_again_after_masking(tiny_vit, tiny_images):
    before, state = tiny_vit(tiny_images), {key: value.clone() for key, value in tiny_vit.state_dict().items()}
    with pytest.raises(ZeroDivisionError), vitprune.masked(tiny_vit, half_plan(tiny_vit)):
        assert not torch.equal(tiny_vit(tiny_images), before)
        raise ZeroDivisionError
    assert torch.equal(tiny_vit(tiny_images), before)
    assert all(torch.equal(state[key], value) for key, value in tiny_vit.state_dict().items())


def test_removal_leaves_its_input_alone_and_shrinks_the_copy(tiny_vit):
    plan = half_plan(tiny_vit)
    removed = vitprune.remove_neurons(tiny_vit, plan)
    assert tiny_vit.blocks[0].mlp.fc1.out_features == 48
    assert removed.blocks[0].mlp.fc1.weight.shape == (24, 24)
    assert removed.blocks[0].mlp.fc1.out_features == removed.blocks[0].mlp.fc2.in_features == 24


@pytest.mark.filterwarnings("ignore:Unwrapped parameters")
def test_torch_prunings_own_graph_agrees(tiny_vit, tiny_images):
    import torch_pruning

    plan = half_plan(tiny_vit)
    ours = vitprune.remove_neurons(tiny_vit, plan)(tiny_images)
    graph = torch_pruning.DependencyGraph().build_dependency(tiny_vit, example_inputs=tiny_images)
    for name in plan.keep:
        group = graph.get_pruning_group(
            tiny_vit.get_submodule(f"{name}.fc2"),
            torch_pruning.prune_linear_in_channels,
            idxs=plan.removed(name).tolist(),
        )
        group.prune()
    torch.testing.assert_close(tiny_vit(tiny_images), ours, rtol=1e-12, atol=1e-12)


def test_a_subclass_of_a_known_ffn_is_refused():
    class Other(timm.layers.Mlp):
        pass

    model = make_vit()
    model.blocks[1].mlp.__class__ = Other
    with pytest.raises(vitprune.VitpruneError, match=r"blocks\.1\.mlp: FFN of type Other is not supported"):
        vitprune.find_feed_forwards(model)


@of_every_family
def test_the_page_of_families_says_what_works(name):
    assert row(name) in PAGE.read_text().splitlines()
