"""Fused graphs give the same answers, are fused where they can be, and only there."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import timm
import torch
from conftest import TINY, make_vit

from vitprune.export.fuse import fuse_attention, skip_unread_tokens
from vitprune.export.graph import read_graph
from vitprune.export.onnx_file import quiet

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
