"""The images that excite a neuron most, against the whole matrix of activations."""

from __future__ import annotations

import pytest
import timm
import torch
from conftest import make_vit

import vitprune
from vitprune.analysis.top_images import find_top_images
from vitprune.models.trunk import scope_slice
from vitprune.models.units import hook_hidden

IMAGES = torch.randn(17, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
NEURONS = {"blocks.2.mlp": [40, 3], "blocks.0.mlp": [7]}


def batches(size):
    return [(part, torch.zeros(len(part), dtype=torch.int64)) for part in IMAGES.split(size)]


@torch.no_grad()
def activations(model, name, neuron, tokens):
    """One image after another; mean over its scoped tokens."""
    ffn = next(ffn for ffn in vitprune.find_feed_forwards(model) if ffn.name == name)
    seen = []
    with hook_hidden(model, [ffn], lambda _name, h_BNH: seen.append(h_BNH[0, tokens, neuron].mean().item())):
        for image in IMAGES:
            model(image[None])
    return seen


@pytest.mark.parametrize("tokens", ["cls", "patch", "all"])
def test_they_are_the_best_of_the_whole_matrix(tokens, tiny_vit):
    found = find_top_images(tiny_vit, batches(4), NEURONS, tokens=tokens, num_images=5)
    assert list(found) == [("blocks.2.mlp", 40), ("blocks.2.mlp", 3), ("blocks.0.mlp", 7)]
    for (name, neuron), top in found.items():
        values = activations(tiny_vit, name, neuron, scope_slice(tiny_vit, tokens))
        order = sorted(range(17), key=lambda place: -values[place])[:5]
        assert top.positions.tolist() == order
        assert top.activations.tolist() == pytest.approx([values[place] for place in order], rel=1e-9)


@pytest.mark.parametrize("size", [1, 5, 17])
def test_the_batch_size_does_not_matter(size, tiny_vit):
    found = find_top_images(tiny_vit, batches(size), NEURONS, num_images=17)
    expected = find_top_images(tiny_vit, batches(3), NEURONS, num_images=17)
    for key, top in found.items():
        assert top.positions.tolist() == expected[key].positions.tolist()


def test_one_pass_serves_all_neurons_and_leaves_no_hook(tiny_vit):
    passes = []
    handle = tiny_vit.register_forward_hook(lambda *_: passes.append(1))
    find_top_images(tiny_vit, iter(batches(6)), NEURONS)
    handle.remove()
    assert len(passes) == 3
    assert not any(module._forward_pre_hooks for module in tiny_vit.modules())


def test_equal_activations_stand_in_the_order_read(tiny_vit):
    same = [(IMAGES[:1], torch.zeros(1, dtype=torch.int64))] * 6
    [top] = find_top_images(tiny_vit, same, {"blocks.1.mlp": [0]}, num_images=4).values()
    assert top.positions.tolist() == [0, 1, 2, 3]


def test_fewer_images_than_asked_for_are_all_returned(tiny_vit):
    [top] = find_top_images(tiny_vit, batches(17), {"blocks.1.mlp": [0]}, num_images=50).values()
    assert sorted(top.positions.tolist()) == list(range(17))


def test_the_activation_baseline_selects_by_the_same_number(tiny_vit):
    found = vitprune.discover(tiny_vit, batches(6), method="activation", tokens="patch")
    top = find_top_images(tiny_vit, batches(6), {"blocks.1.mlp": range(48)}, tokens="patch", num_images=17)
    score_HI = torch.stack([each.activations[each.positions.argsort()] for each in top.values()])
    assert torch.equal(score_HI.argmax(0), found.neurons[:, 1, 0])


def test_a_model_without_an_isotropic_trunk_has_top_images_too():
    torch.manual_seed(0)
    model = timm.create_model("swin_tiny_patch4_window7_224", img_size=56, depths=(1, 1, 1, 1), embed_dim=24).eval()
    ffns = vitprune.find_feed_forwards(model)
    images = torch.randn(3, 3, 56, 56)
    found = find_top_images(model, [(images, torch.zeros(3))], {ffns[1].name: [5]})
    seen = []
    with torch.no_grad(), hook_hidden(model, [ffns[1]], lambda _name, hidden: seen.append(hidden.flatten(1, -2))):
        model(images)
    assert found[ffns[1].name, 5].activations[0].item() == pytest.approx(seen[0].mean(1)[:, 5].max().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("neurons", "arguments", "message"),
    [
        ({}, {}, "no neurons"),
        ({"blocks.0.mlp": []}, {}, "no neurons"),
        ({"blocks.9.mlp": [0]}, {}, "blocks.9.mlp is no FFN of this model; it has blocks.0.mlp"),
        ({"blocks.0.mlp": [48]}, {}, "blocks.0.mlp has neurons 0 to 47, not 48"),
        ({"blocks.0.mlp": [-1]}, {}, "blocks.0.mlp has neurons 0 to 47, not -1"),
        ({"blocks.0.mlp": [1]}, {"num_images": 0}, "num_images must be at least 1"),
        ({"blocks.0.mlp": [1]}, {"tokens": "class"}, "tokens must be one of"),
    ],
)
def test_refuses(neurons, arguments, message, tiny_vit):
    with pytest.raises(vitprune.VitpruneError, match=message):
        find_top_images(tiny_vit, batches(4), neurons, **arguments)


def test_no_images_are_refused(tiny_vit):
    with pytest.raises(vitprune.VitpruneError, match="no images"):
        find_top_images(tiny_vit, [], NEURONS)


def test_a_model_without_a_class_token_says_so():
    with pytest.raises(vitprune.VitpruneError, match="has no class token"):
        find_top_images(make_vit(global_pool="avg", class_token=False), batches(4), NEURONS, tokens="cls")
