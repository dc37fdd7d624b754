"""The engine against a slow reference that shares no code with it, and properties that hold whatever the weights."""

from __future__ import annotations

import copy
import statistics
from dataclasses import replace

import pytest
import reference
import torch
from conftest import make_vit
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import forward_ad
from torch.nn import functional

from vitprune.discovery import engine
from vitprune.discovery.baselines import influence_pattern_paths, knowledge_neuron_paths
from vitprune.discovery.best import find_doubtful
from vitprune.discovery.engine import score_paths, search_paths
from vitprune.discovery.objective import Objective
from vitprune.discovery.quadrature import parse_quadrature
from vitprune.discovery.search import Search
from vitprune.discovery.tangents import LeanTangents
from vitprune.models.path_layers import find_path_layers
from vitprune.models.trunk import check_trunk

GAUSS = parse_quadrature("gauss-legendre:3")
ADAPTIVE = parse_quadrature("adaptive")
PRECISIONS = ("float32", "bf16")

# name -> (model arguments, token scopes): every kind of trunk that the engine knows, small.
TRUNKS = {
    "vit": ("vit_tiny_patch16_224", {}, ("cls", "patch", "all")),
    "average-pooled vit": ("vit_tiny_patch16_224", {"global_pool": "avg"}, ("cls", "patch", "all")),
    "layer-scaled vit": ("deit3_small_patch16_224", {}, ("cls", "patch")),
    "distilled deit": ("deit_tiny_distilled_patch16_224", {}, ("cls", "patch")),
    "registers": ("vit_small_patch14_reg4_dinov2", {}, ("cls", "patch")),
    "attention-pooled": ("vit_base_patch16_siglip_224", {}, ("patch",)),
    "relative position bias": ("beit_base_patch16_224", {}, ("cls", "patch")),
    "rotary, packed gate": ("eva02_tiny_patch14_224", {}, ("cls", "patch")),
    "rotary, gate": ("vit_small_plus_patch16_dinov3", {}, ("cls", "patch")),
}
CASES = [(trunk, scope) for trunk, (_, _, scopes) in TRUNKS.items() for scope in scopes]


def build(trunk):
    name, model_args, _ = TRUNKS[trunk]
    return make_vit(name, **model_args)


def ask(model, *, scope, top_k=2, quadrature=GAUSS, kinds=("ffn",), **more):
    return Search(tuple(find_path_layers(model, kinds)), "jas", top_k, scope, quadrature, **more)


def search(model, images, labels, *, chunk_rows=32, complete=False, **asked):
    return search_paths(model, ask(model, **asked), images, labels, chunk_rows=chunk_rows, complete=complete)


LABELS = torch.tensor([0, 3, 1])


BOTH = ("ffn", "attention")


@pytest.mark.parametrize(("trunk", "scope"), CASES)
@pytest.mark.parametrize(("top_k", "complete"), [(1, False), (5, False), (5, True)])
@pytest.mark.parametrize("kinds", [("ffn",), BOTH, ("attention",)], ids=["ffn", "both", "attention"])
def test_search_equals_the_slow_reference(trunk, scope, top_k, complete, kinds, tiny_images):
    model = build(trunk)
    check_trunk(model, find_path_layers(model, kinds), tiny_images)
    tokens = reference.token_slice(model, scope)
    paths = search(model, tiny_images, LABELS, scope=scope, top_k=top_k, complete=complete, kinds=kinds)
    rule = (GAUSS.nodes, GAUSS.weights, tokens)
    for index, label in enumerate(LABELS.tolist()):
        image = tiny_images[index : index + 1]
        neurons, scores = reference.search(model, image, label, top_k, *rule, complete=complete, kinds=kinds)
        for layer, score_H in enumerate(scores):
            torch.testing.assert_close(paths.scores[layer][index], score_H, rtol=1e-9, atol=1e-9)
        # The last layer's patch neurons do not reach a class-token head: all scores tie there, order is noise.
        reached = [layer for layer, score_H in enumerate(scores) if score_H.unique().numel() > 2]
        got = paths.neurons_BLK[index].tolist()
        first = len(scores) * 2 // 3
        assert [got[at] for at in reached if at < first] == [neurons[at] for at in reached if at < first]
        expected = reference.complete_score if complete else reference.joint_attribution_score
        joint = expected(model, image, label, got, *rule, kinds=kinds)
        assert paths.joint_scores_B[index].item() == pytest.approx(joint, abs=1e-9)
        if complete:
            gap = reference.completeness_gap(model, image, label, got, *rule, kinds=kinds)
            assert paths.completeness_errors_B[index].item() == pytest.approx(gap, abs=1e-9)


@pytest.mark.parametrize("scope", ["cls", "patch", "all"])
@pytest.mark.parametrize("top_k", [1, 5])
def test_any_k_equals_the_slow_reference(scope, top_k, tiny_images):
    model = make_vit(global_pool="avg")
    tokens = reference.token_slice(model, scope)
    paths = search(model, tiny_images[:1], LABELS[:1], scope=scope, top_k=top_k)
    neurons, _ = reference.search(model, tiny_images[:1], 0, top_k, GAUSS.nodes, GAUSS.weights, tokens)
    assert paths.neurons_BLK[0].tolist() == neurons


@pytest.mark.parametrize("kinds", [("ffn",), BOTH], ids=["ffn", "both"])
@pytest.mark.parametrize("scope", ["cls", "all"])
def test_influence_pattern_equals_the_slow_reference(scope, kinds, tiny_vit, tiny_images):
    paths = influence_pattern_paths(tiny_vit, ask(tiny_vit, scope=scope, kinds=kinds), tiny_images, LABELS)
    tokens = reference.token_slice(tiny_vit, scope)
    for index, label in enumerate(LABELS.tolist()):
        expected = reference.influence_pattern(tiny_vit, tiny_images[index : index + 1], label, 2, tokens, kinds)
        assert paths.neurons_BLK[index].tolist() == expected


@pytest.mark.parametrize("kinds", [("ffn",), BOTH], ids=["ffn", "both"])
@pytest.mark.parametrize("scope", ["cls", "all"])
def test_knowledge_neurons_equal_the_slow_reference(scope, kinds, tiny_vit, tiny_images):
    paths = knowledge_neuron_paths(tiny_vit, ask(tiny_vit, scope=scope, kinds=kinds), tiny_images, LABELS)
    rule = (GAUSS.nodes, GAUSS.weights, reference.token_slice(tiny_vit, scope))
    for index, label in enumerate(LABELS.tolist()):
        image = tiny_images[index : index + 1]
        for layer, score_H in enumerate(reference.integrated_gradients(tiny_vit, image, label, *rule, kinds=kinds)):
            torch.testing.assert_close(paths.scores[layer][index], score_H, rtol=1e-9, atol=1e-9)
        chosen = paths.neurons_BLK[index].tolist()
        expected = reference.joint_attribution_score(tiny_vit, image, label, chosen, *rule, kinds=kinds)
        assert paths.joint_scores_B[index].item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("target", ["label", "predicted", 4])
@pytest.mark.parametrize("quantity", ["probability", "logit"])
@pytest.mark.parametrize("scope", ["cls", "all"])
def test_any_objective_equals_the_slow_reference(target, quantity, scope, tiny_vit, tiny_images):
    tokens = reference.token_slice(tiny_vit, scope)
    paths = search(tiny_vit, tiny_images, LABELS, scope=scope, objective=Objective(target, quantity))
    answer = reference.softmax if quantity == "probability" else lambda logits: logits
    for index, label in enumerate(LABELS.tolist()):
        image = tiny_images[index : index + 1]
        predicted = tiny_vit(image).argmax().item()
        of_class = {"label": label, "predicted": predicted}.get(target, target)
        rule = (GAUSS.nodes, GAUSS.weights, tokens)
        neurons, scores = reference.search(tiny_vit, image, of_class, 2, *rule, answer=answer)
        assert paths.neurons_BLK[index].tolist() == neurons
        for layer, score_H in enumerate(scores):
            torch.testing.assert_close(paths.scores[layer][index], score_H, rtol=1e-9, atol=1e-9)
        expected = reference.joint_attribution_score(tiny_vit, image, of_class, neurons, *rule, answer=answer)
        assert paths.joint_scores_B[index].item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("scope", ["cls", "patch"])
@pytest.mark.parametrize("rows", [1, 4, 1000])
def test_chunks_do_not_change_the_result(scope, rows, tiny_vit, tiny_images):
    whole = search(tiny_vit, tiny_images, LABELS, scope=scope)
    chunked = search(tiny_vit, tiny_images, LABELS, scope=scope, chunk_rows=rows)
    assert torch.equal(whole.neurons_BLK, chunked.neurons_BLK)
    torch.testing.assert_close(whole.joint_scores_B, chunked.joint_scores_B, rtol=1e-10, atol=1e-12)


def test_images_of_a_batch_do_not_see_each_other(tiny_vit, tiny_images):
    together = search(tiny_vit, tiny_images, LABELS, scope="cls")
    for index in range(3):
        alone = search(tiny_vit, tiny_images[index : index + 1], LABELS[index : index + 1], scope="cls")
        assert torch.equal(alone.neurons_BLK[0], together.neurons_BLK[index])


@pytest.mark.parametrize("scope", ["cls", "patch"])
@pytest.mark.parametrize("complete", [False, True])
def test_what_is_never_settled_takes_the_finest_rule(scope, complete, tiny_vit, tiny_images, monkeypatch):
    monkeypatch.setattr(engine, "NODE_DOUBT", float("inf"))
    monkeypatch.setattr(engine, "RULE_DOUBT", float("inf"))
    finest = ADAPTIVE.rules()[-1]
    got = search(tiny_vit, tiny_images, LABELS, scope=scope, complete=complete, quadrature=ADAPTIVE)
    expected = search(tiny_vit, tiny_images, LABELS, scope=scope, complete=complete, quadrature=finest)
    assert torch.equal(got.neurons_BLK[:, :-1], expected.neurons_BLK[:, :-1])
    for scores, expected_scores in zip(got.scores, expected.scores, strict=True):
        torch.testing.assert_close(scores, expected_scores, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("scope", "nodes"), [("cls", 2), ("patch", 5)])
def test_what_is_settled_at_once_takes_the_first_rule(scope, nodes, tiny_vit, tiny_images, monkeypatch):
    monkeypatch.setattr(engine, "NODE_DOUBT", 0.0)
    monkeypatch.setattr(engine, "RULE_DOUBT", 0.0)
    (first,) = (rule for rule in ADAPTIVE.rules() if len(rule.nodes) == nodes)
    got = search(tiny_vit, tiny_images, LABELS, scope=scope, quadrature=ADAPTIVE)
    expected = search(tiny_vit, tiny_images, LABELS, scope=scope, quadrature=replace(first, finer=None))
    torch.testing.assert_close(got.joint_scores_B, expected.joint_scores_B, rtol=1e-9, atol=1e-9)
    for scores, expected_scores in zip(got.scores, expected.scores, strict=True):
        torch.testing.assert_close(scores, expected_scores, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scope", ["cls", "patch"])
def test_a_doubtful_image_does_not_change_another(scope, tiny_vit, tiny_images, monkeypatch):
    for share, constant in ((0.0, "NODE_DOUBT"), (0.0, "RULE_DOUBT")):
        monkeypatch.setattr(engine, constant, share)
    settled = search(tiny_vit, tiny_images, LABELS, scope=scope, quadrature=ADAPTIVE)
    monkeypatch.setattr(engine, "NODE_DOUBT", 1.0)
    monkeypatch.setattr(engine, "RULE_DOUBT", 1000.0)
    together = search(tiny_vit, tiny_images, LABELS, scope=scope, quadrature=ADAPTIVE)
    again = [(a != b).any(1) for a, b in zip(together.scores, settled.scores, strict=True)]
    assert any(images.any() and not images.all() for images in again)  # images go different ways
    for index in range(len(tiny_images)):
        one = slice(index, index + 1)
        alone = search(tiny_vit, tiny_images[one], LABELS[one], scope=scope, quadrature=ADAPTIVE)
        for scores, alone_scores in zip(together.scores, alone.scores, strict=True):
            torch.testing.assert_close(scores[one], alone_scores, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scope", ["cls", "patch"])
def test_what_lower_precision_leaves_in_doubt_is_scored_again(scope, tiny_images, monkeypatch):
    model, images = make_vit().float(), tiny_images.float()
    own, low = (search(model, images, LABELS, scope=scope, quadrature=ADAPTIVE, precision=each) for each in PRECISIONS)
    assert any((a - b).abs().max() > 1e-3 * a.abs().max() for a, b in zip(own.scores, low.scores, strict=True))
    monkeypatch.setitem(engine.NOISE, "bf16", float("inf"))
    again = search(model, images, LABELS, scope=scope, quadrature=ADAPTIVE, precision="bf16")
    for scores, own_scores in zip(again.scores, own.scores, strict=True):
        torch.testing.assert_close(scores, own_scores, rtol=1e-5, atol=1e-7)


@given(st.integers(0, 2**31), st.integers(1, 4), st.sampled_from([0, 0.2]))
def test_doubt_is_what_pair_by_pair_says(seed, top_k, noise):
    variants_VBH = torch.randn(3, 2, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    score_BH = variants_VBH.mean(0)
    doubtful = find_doubtful(score_BH, variants_VBH, top_k, share=0.3, noise=noise).tolist()
    for image in range(2):
        ranked = score_BH[image].argsort(descending=True).tolist()
        pairs = [(best, other) for best in ranked[:top_k] for other in ranked[top_k:]]
        margins = [[float(scores[image, i] - scores[image, j]) for scores in variants_VBH] for i, j in pairs]
        floor = noise * statistics.stdev(score_BH[image].tolist())
        assert (image in doubtful) == any(sum(each) / 3 < 0.3 * (max(each) - min(each)) + floor for each in margins)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attn_mask": torch.linspace(-2, 2, 25).view(1, 5, 5).double()},
        {"attn_mask": torch.ones(5, 5).tril() > 0},
        {"is_causal": True, "scale": 0.7},
    ],
)
def test_tangents_of_attention_equal_finite_differences(options):
    generator = torch.Generator().manual_seed(0)
    inputs, moved = torch.randn(2, 3, 4, 2, 5, 8, dtype=torch.float64, generator=generator)  # of q, k and v each

    def attend(query, key, value):
        return functional.scaled_dot_product_attention(query, key, value, **options)

    step = 1e-5
    expected = (attend(*(inputs + step * moved)) - attend(*(inputs - step * moved))) / (2 * step)
    with forward_ad.dual_level(), LeanTangents():
        answer = forward_ad.unpack_dual(attend(*map(forward_ad.make_dual, inputs, moved)))
    torch.testing.assert_close(answer.primal, attend(*inputs))
    torch.testing.assert_close(answer.tangent, expected, rtol=1e-6, atol=1e-8)


def test_permuting_neurons_permutes_the_path(tiny_vit, tiny_images):
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    permuted = copy.deepcopy(tiny_vit)
    with torch.no_grad():
        for block in permuted.blocks:
            block.mlp.fc1.weight.copy_(block.mlp.fc1.weight[order])
            block.mlp.fc1.bias.copy_(block.mlp.fc1.bias[order])
            block.mlp.fc2.weight.copy_(block.mlp.fc2.weight[:, order])
    before = search(tiny_vit, tiny_images, LABELS, scope="cls").neurons_BLK
    after = search(permuted, tiny_images, LABELS, scope="cls").neurons_BLK
    assert torch.equal(order[after], before)


def test_completeness_error_falls_with_the_nodes(tiny_vit, tiny_images):
    errors = []
    for nodes in (2, 6, 24):
        rule = parse_quadrature(f"gauss-legendre:{nodes}")
        found = search(tiny_vit, tiny_images, LABELS, scope="cls", complete=True, quadrature=rule)
        errors.append(found.completeness_errors_B.max().item())
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-9


@pytest.mark.parametrize("scope", ["cls", "patch"])
def test_the_search_leaves_the_model_as_it_was(scope, tiny_vit, tiny_images):
    before = copy.deepcopy(tiny_vit)
    search(tiny_vit, tiny_images, LABELS, scope=scope)
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), tiny_vit.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in tiny_vit.parameters())
    assert [module._forward_pre_hooks for module in tiny_vit.modules() if module._forward_pre_hooks] == []
    assert tiny_vit.blocks[0].attn.fused_attn == before.blocks[0].attn.fused_attn


def test_hooks_go_even_when_the_model_fails(tiny_vit):
    with pytest.raises((RuntimeError, AssertionError)):
        search(tiny_vit, torch.zeros(1, 3, 7, 7).double(), LABELS[:1], top_k=1, scope="cls")
    assert not any(module._forward_pre_hooks for module in tiny_vit.modules())


def test_score_of_given_paths_equals_the_slow_reference(tiny_vit, tiny_images):
    neurons = torch.tensor([[[1, 4], [0, 7], [30, 2]]] * 3)
    for scope in ("cls", "all"):
        got = score_paths(tiny_vit, ask(tiny_vit, scope=scope), tiny_images, LABELS, neurons)
        tokens = reference.token_slice(tiny_vit, scope)
        expected = reference.joint_attribution_score(
            tiny_vit, tiny_images[:1], 0, neurons[0].tolist(), GAUSS.nodes, GAUSS.weights, tokens
        )
        assert got[0].item() == pytest.approx(expected, abs=1e-9)
