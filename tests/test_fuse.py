"""Fused graphs give the same answers, are fused where they can be, and only there."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import timm
import torch
from conftest import TINY, make_vit
from torch import nn

from vitprune.export.fuse import fuse_attention, skip_unread_tokens, unspread_biases
from vitprune.export.fuse_merging import fuse_merging
from vitprune.export.graph import read_graph
from vitprune.export.onnx_file import quiet, save_graph
from vitprune.models.left_out import Bias
from vitprune.models.merging import drop_unread_merge, set_merging

SMALL = {key: TINY[key] for key in ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "num_classes")}


def export_plainly(model, path, *, dynamo=True, opset=None):
    """Write the file that torch alone writes, without a fused attention kernel."""
    for module in model.modules():
        if getattr(module, "fused_attn", False):
            module.fused_attn = False
    dynamic = {"dynamic_shapes": ({0: torch.export.Dim("batch", min=1, max=1000)},)}
    if not dynamo:
        dynamic = {"dynamic_axes": {"images": {0: "batch"}}}
    with quiet():
        torch.onnx.export(
            model, (torch.randn(2, 3, 32, 32),), str(path), dynamo=dynamo, input_names=["images"],
            output_names=["logits"], opset_version=opset, verbose=False, **dynamic,
        )  # fmt: skip
    return path


def run(model, path, images, **options):
    ir.save(model, path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"], **options)
    return session.run(None, {"images": images})[0]


FAMILIES = {
    # name, arguments, attentions that are fused (of 3), matrix products that got smaller
    "class token": ("vit_tiny_patch16_224", {}, 3, 4),
    "two class tokens": ("deit_tiny_distilled_patch16_224", {}, 3, 4),
    "average of the patches": ("vit_tiny_patch16_224", {"global_pool": "avg"}, 3, 0),
    "norm of queries and keys": ("vit_tiny_patch16_224", {"qk_norm": True}, 0, 3),
    "gated FFN": ("vit_tiny_patch16_224", {"mlp_layer": timm.layers.SwiGLUPacked}, 3, 4),
    "registers": ("vit_tiny_patch16_224", {"reg_tokens": 4}, 3, 4),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("count", [1, 3])
def test_fused_graphs_give_the_same_logits(family, count, tmp_path):
    name, arguments, num_fused, num_smaller = FAMILIES[family]
    torch.manual_seed(0)
    model = timm.create_model(name, **SMALL, **arguments).eval()
    path = export_plainly(model, tmp_path / "plain.onnx")
    images = np.random.default_rng(0).standard_normal((count, 3, 32, 32), dtype=np.float32)
    graph = read_graph(path)
    expected = run(graph, tmp_path / "read.onnx", images)
    with torch.no_grad():
        np.testing.assert_allclose(expected, model(torch.from_numpy(images)).numpy(), rtol=1e-3, atol=1e-4)
    assert fuse_attention(graph) == num_fused
    np.testing.assert_allclose(run(graph, tmp_path / "fused.onnx", images), expected, rtol=1e-4, atol=1e-5)
    assert skip_unread_tokens(graph) == num_smaller
    np.testing.assert_allclose(run(graph, tmp_path / "smaller.onnx", images), expected, rtol=1e-4, atol=1e-5)


def test_unread_tokens_go_without_fused_attention_as_well(tmp_path):
    graph = read_graph(export_plainly(make_vit().float(), tmp_path / "plain.onnx"))
    images = np.random.default_rng(0).standard_normal((2, 3, 32, 32), dtype=np.float32)
    expected = run(graph, tmp_path / "read.onnx", images)
    assert skip_unread_tokens(graph) == 3
    np.testing.assert_allclose(run(graph, tmp_path / "smaller.onnx", images), expected, rtol=1e-4, atol=1e-5)


def test_files_of_torchs_older_exporter_are_fused_too(tmp_path):
    graph = read_graph(export_plainly(make_vit().float(), tmp_path / "plain.onnx", dynamo=False, opset=17))
    images = np.random.default_rng(0).standard_normal((2, 3, 32, 32), dtype=np.float32)
    expected = run(graph, tmp_path / "read.onnx", images)
    assert fuse_attention(graph) == 3
    assert skip_unread_tokens(graph) == 4
    np.testing.assert_allclose(run(graph, tmp_path / "fused.onnx", images), expected, rtol=1e-4, atol=1e-5)


def test_the_last_block_runs_for_the_class_token_alone(tmp_path):
    graph = read_graph(export_plainly(make_vit().float(), tmp_path / "plain.onnx"))
    fuse_attention(graph)
    skip_unread_tokens(graph)
    widths = [node.outputs[0] for node in graph.graph if node.op_type in ("MatMul", "MultiHeadAttention")]
    graph.graph.outputs.extend(widths)
    ir.save(graph, tmp_path / "open.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "open.onnx"), providers=["CPUExecutionProvider"])
    results = session.run(None, {"images": np.zeros((2, 3, 32, 32), np.float32)})[1:]
    # Three blocks of queries, keys, values, attention, proj, fc1, fc2; of the last one all tokens' keys and values.
    assert sorted(result.shape[1] for result in results) == [1] * 5 + [17] * 16


def test_a_path_that_masks_attention_is_left_alone(tmp_path):
    graph = read_graph(export_plainly(make_vit().float(), tmp_path / "plain.onnx"))
    softmax = next(node for node in graph.graph if node.op_type == "Softmax")
    bias = ir.node("Add", [softmax.inputs[0], next(iter(graph.graph.initializers.values()))], num_outputs=1)
    bias.outputs[0].shape = softmax.inputs[0].shape
    graph.graph.insert_before(softmax, bias)
    softmax.replace_input_with(0, bias.outputs[0])
    assert fuse_attention(graph) == 2


MERGING = {
    # arguments, schedule (of 3 blocks with 16 patches), attentions with sizes
    "class token": ({}, (3, 0, 6), 2),
    "two class tokens": ({"name": "deit_tiny_distilled_patch16_224"}, (3, 0, 6), 2),
    "average of the patches": ({"global_pool": "avg"}, (3, 0, 6), 2),
    "a merge in every block": ({}, (4, 4, 3), 2),
    "one merge at the end": ({"global_pool": "avg"}, (0, 0, 5), 0),
}


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """Return merging models and the files that torch writes of them, each made once."""
    made = {}

    def make(kind):
        if kind not in made:
            arguments, schedule, _num_sized = MERGING[kind]
            model = set_merging(make_vit(**arguments), schedule).float()
            made[kind] = model, export_plainly(model, tmp_path_factory.mktemp("merged") / "plain.onnx")
        return made[kind]

    return make


def assert_answers(graph, model, path):
    for count in (1, 3):
        images = np.random.default_rng(0).standard_normal((count, 3, 32, 32), dtype=np.float32)
        with torch.no_grad():
            expected = model(torch.from_numpy(images)).numpy()
        np.testing.assert_allclose(run(graph, path, images), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", MERGING)
def test_merging_graphs_give_the_same_logits(kind, merged, tmp_path):
    model, path = merged(kind)
    graph = read_graph(path)
    for number, rewrite in enumerate((fuse_merging, fuse_attention, skip_unread_tokens)):
        rewrite(graph)
        # No stale shape is left either.
        save_graph(graph, tmp_path / f"{number}.onnx")
        assert_answers(graph, model, tmp_path / "run.onnx")
    assert [fuse_merging(graph), fuse_attention(graph), skip_unread_tokens(graph)] == [0, 0, 0]


@pytest.mark.parametrize("kind", MERGING)
def test_sizes_ride_as_one_more_dimension_of_queries_and_keys(kind, merged):
    graph, num_sized = read_graph(merged(kind)[1]), MERGING[kind][2]
    fuse_merging(graph)
    assert fuse_attention(graph) == 3
    fused = [node for node in graph.graph if node.op_type == "MultiHeadAttention"]
    widths = sorted(tuple(value.shape[2] for value in node.inputs) for node in fused)
    assert widths == [(24, 24, 24)] * (3 - num_sized) + [(27, 27, 24)] * num_sized
    assert "Softmax" not in {node.op_type for node in graph.graph}


def test_keys_are_computed_once_for_attention_and_comparison(merged):
    graph = read_graph(merged("a merge in every block")[1])
    products = sum(node.op_type == "MatMul" and node.inputs[1].is_initializer() for node in graph.graph)
    fuse_merging(graph)
    fuse_attention(graph)
    assert sum(node.op_type == "MatMul" and node.inputs[1].is_initializer() for node in graph.graph) == products


def test_without_simpler_merging_attention_is_fused_all_the_same(merged, tmp_path):
    model, path = merged("a merge in every block")
    graph = read_graph(path)
    assert fuse_attention(graph) == 3
    assert_answers(graph, model, tmp_path / "fused.onnx")


def test_merging_takes_few_operators(merged):
    graph = read_graph(merged("class token")[1])
    # Lengths of keys in two merges, and sizes of 1 in the first: tokens times them, and their sum.
    assert fuse_merging(graph) == 4
    counts = Counter(node.op_type for node in graph.graph)
    assert (counts["LpNormalization"], counts["ReduceL2"], counts["Clip"], counts["ReduceSum"]) == (2, 0, 0, 1)


def test_keys_of_zero_are_like_no_other(tmp_path):
    """ONNX leaves open what a direction of no length is; ONNX Runtime says 0, as torch does here."""
    model = set_merging(make_vit(), (3, 0, 0)).float()
    with torch.no_grad():
        model.blocks[0].attn.k.weight[:8].zero_()
        model.blocks[0].attn.k.bias[:8].zero_()
    graph = read_graph(export_plainly(model, tmp_path / "plain.onnx"))
    fuse_merging(graph)
    assert_answers(graph, model, tmp_path / "run.onnx")


def test_the_last_block_of_a_merging_model_runs_for_the_class_token_alone(tmp_path):
    model = set_merging(make_vit(), (3, 4, 3)).float()
    drop_unread_merge(model)
    graph = read_graph(export_plainly(model, tmp_path / "plain.onnx"))
    fuse_merging(graph)
    fuse_attention(graph)
    # Queries, projection and both of the FFN; keys and values are all read.
    assert skip_unread_tokens(graph) == 4
    assert_answers(graph, set_merging(make_vit(), (3, 4, 3)).float(), tmp_path / "run.onnx")


def test_narrow_attention_of_merged_tokens_is_fused(tmp_path):
    model = set_merging(make_vit(), (3, 4, 0)).float()
    for block in model.blocks:
        for name in ("q", "k"):
            linear = getattr(block.attn, name)
            setattr(block.attn, name, nn.Linear(linear.in_features, 3 * 5))
    graph = read_graph(export_plainly(model.eval(), tmp_path / "plain.onnx"))
    fuse_merging(graph)
    assert fuse_attention(graph) == 3
    assert_answers(graph, model, tmp_path / "run.onnx")


def test_a_bias_in_place_of_a_layer_is_one_addition(tmp_path):
    model = make_vit().float()
    model.blocks[1].mlp, model.blocks[2].attn = Bias(torch.randn(24)), Bias(torch.randn(24))
    graph = read_graph(export_plainly(model, tmp_path / "plain.onnx"))
    assert unspread_biases(graph) == 2
    assert sum(node.op_type == "Expand" for node in graph.graph) == 1  # the class token
    assert_answers(graph, model, tmp_path / "run.onnx")
