"""Numbers printed by the paper's authors' own program (arXiv:2503.09046); see the golden folder's README."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import shared
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer

from vitprune.analysis.interventions import measure_intervention
from vitprune.discovery.baselines import activation_paths, influence_pattern_paths
from vitprune.discovery.engine import score_paths, search_paths
from vitprune.discovery.quadrature import parse_quadrature
from vitprune.discovery.search import Search
from vitprune.models.units import find_feed_forwards

RIEMANN = parse_quadrature("riemann:20")


@pytest.fixture(scope="module")
def tiny():
    """The float64 model, its FFNs and the expected values."""
    model = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=48, depth=4, num_heads=3, mlp_ratio=2, num_classes=10
    ).double()
    model.load_state_dict(load_file(shared("golden/tiny_vit.safetensors")))
    model.eval()
    return model, find_feed_forwards(model), load_file(shared("golden/tiny_expected.safetensors"))


@pytest.fixture(scope="module")
def deit(deit_tiny):
    """Eight real photos, and the values expected of them."""
    expected = json.loads(shared("golden/deit_tiny_expected.json").read_text())
    images = load_file(shared("golden/deit_tiny_images.safetensors"))["images"].float()
    return deit_tiny, find_feed_forwards(deit_tiny), images, torch.tensor(expected["labels"]), expected


def ask(ffns):
    return Search(tuple(ffns), "jas", 1, "cls", RIEMANN)


def _search(find, model, ffns, images, labels):
    return find(model, ask(ffns), images, labels)


def test_tiny_search_is_exact(tiny):
    model, ffns, expected = tiny
    paths = _search(search_paths, model, ffns, expected["images"], expected["labels"])
    assert torch.equal(paths.neurons_BLK[..., 0], expected["jas_paths"])
    torch.testing.assert_close(paths.joint_scores_B, expected["jas_scores"], rtol=0, atol=1e-9)
    torch.testing.assert_close(paths.logits_BC.softmax(-1), expected["clean_probs"], rtol=0, atol=1e-9)


def test_tiny_score_of_the_found_path_is_the_search_score(tiny):
    model, ffns, expected = tiny
    neurons = expected["jas_paths"].unsqueeze(-1)
    scores = score_paths(model, ask(ffns), expected["images"], expected["labels"], neurons)
    torch.testing.assert_close(scores, expected["jas_scores"], rtol=0, atol=1e-9)


def test_tiny_activation_baseline(tiny):
    model, ffns, expected = tiny
    paths = _search(activation_paths, model, ffns, expected["images"], expected["labels"])
    assert torch.equal(paths.neurons_BLK[..., 0], expected["activation_paths"])
    torch.testing.assert_close(paths.joint_scores_B, expected["activation_path_jas"], rtol=0, atol=1e-9)


def test_tiny_influence_pattern_baseline(tiny):
    model, ffns, expected = tiny
    paths = _search(influence_pattern_paths, model, ffns, expected["images"], expected["labels"])
    assert torch.equal(paths.neurons_BLK[..., 0], expected["influence_pattern_paths"])


@pytest.mark.parametrize(("factor", "key"), [(0.0, "removed_probs"), (2.0, "doubled_probs")])
def test_tiny_interventions(tiny, factor, key):
    model, ffns, expected = tiny
    neurons = expected["jas_paths"].unsqueeze(-1)
    got = measure_intervention(model, ffns, expected["images"], neurons, factor=factor, tokens=slice(0, 1))
    torch.testing.assert_close(got, expected[key], rtol=0, atol=1e-9)


def test_deit_tiny_search_on_photos(deit):
    model, ffns, images, labels, expected = deit
    paths = _search(search_paths, model, ffns, images, labels)
    # The README allows near ties (relative margin below 1e-4) to differ; none does.
    assert paths.neurons_BLK[..., 0].tolist() == expected["jas_paths"]
    torch.testing.assert_close(paths.joint_scores_B, torch.tensor(expected["jas_scores"]), rtol=0, atol=1e-3)


def test_deit_tiny_activation_and_interventions_on_photos(deit):
    model, ffns, images, labels, expected = deit
    paths = _search(activation_paths, model, ffns, images, labels)
    assert paths.neurons_BLK[..., 0].tolist() == expected["activation_paths"]
    of_label = torch.arange(len(labels)), labels
    torch.testing.assert_close(
        paths.logits_BC.softmax(-1)[of_label], torch.tensor(expected["clean_probs"]), rtol=0, atol=1e-3
    )
    neurons = torch.tensor(expected["jas_paths"]).unsqueeze(-1)
    for factor, key in ((0.0, "removed_probs"), (2.0, "doubled_probs")):
        got = measure_intervention(model, ffns, images, neurons, factor=factor, tokens=slice(0, 1))
        torch.testing.assert_close(got[of_label], torch.tensor(expected[key]), rtol=0, atol=1e-3)
