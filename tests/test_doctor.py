"""The doctor finds what is wrong with a bad export, and nothing wrong with a good one."""

from __future__ import annotations

import onnx
import pytest
import torch
from conftest import TINY, make_vit
from test_fuse import export_plainly

import vitprune
from vitprune.export.graph import read_graph
from vitprune.export.onnx_file import quiet
from vitprune.export.profile import NodeRun, count_graph_macs, count_node_macs, profile
from vitprune.models.merging import set_merging
from vitprune.speed.alignment import FfnShape, _fastest, find_round_to, measure_multiples, round_up
from vitprune.speed.bench import random_batch
from vitprune.speed.doctor import (
    COSTS,
    FINE,
    KNOW,
    VERDICTS,
    _about_leftovers,
    _about_precision,
    _count,
    _judge_absent,
    _make_variants,
    diagnose,
)
from vitprune.timing import Latency

CPU = "CPUExecutionProvider"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    model = make_vit().float()
    path = tmp_path_factory.mktemp("doctor") / "good.onnx"
    vitprune.export_onnx(model, path, [random_batch(model, 2)])
    return path


@pytest.fixture(scope="module")
def of_good(good):
    return diagnose(good, seconds=0.4, num_threads=1)


@pytest.fixture(scope="module")
def of_bad(tmp_path_factory):
    """An old opset, one fixed batch, and weights that are inputs, from torch's older exporter."""
    path = tmp_path_factory.mktemp("doctor") / "bad.onnx"
    model = make_vit().float()
    for module in model.modules():
        if getattr(module, "fused_attn", False):
            module.fused_attn = False
    with quiet():
        torch.onnx.export(
            model, (torch.randn(3, 3, 32, 32),), str(path), dynamo=False, opset_version=17,
            keep_initializers_as_inputs=True, input_names=["images"], verbose=False,
        )  # fmt: skip
    freed = onnx.load(path)
    weights = {value.name for value in freed.graph.initializer}
    assert weights <= {value.name for value in freed.graph.input}
    return diagnose(path, seconds=0.4, num_threads=1)


def named(found):
    return {finding.name: finding for finding in found.findings}


def test_a_good_export_has_nothing_that_could_be_fused(of_good, good):
    findings = named(of_good)
    for name in (
        "merging",
        "attention",
        "unread tokens",
        "weights as inputs",
        "norms",
        "gelu",
        "precision",
        "placement",
        "opset",
    ):
        assert findings[name].verdict == FINE, findings[name]
    assert findings["merging"].verdict == findings["metadata"].verdict == FINE
    assert "any batch size" in findings["batch"].text
    assert of_good.macs == count_graph_macs(good)
    assert 0.2 < of_good.ffn_share < 0.6
    assert of_good.median_ms > 0
    assert len(findings) == len(of_good.findings) == 15


def test_a_bad_export_is_told_what_is_wrong_with_it(of_bad):
    findings = named(of_bad)
    assert findings["weights as inputs"].verdict in (COSTS, KNOW)
    assert findings["attention"].text.startswith("3 attentions")
    assert findings["unread tokens"].text.startswith("4 products")
    assert findings["opset"].text.startswith("opset 17 has no Gelu")
    assert findings["batch"].text == "the file runs exactly 3 images at a time"
    assert of_bad.batch_size == 3
    assert findings["metadata"].verdict == KNOW
    for name in ("weights as inputs", "attention", "unread tokens", "int8"):
        assert findings[name].cost_ms is not None
        assert "x as fast" in findings[name].text


def test_findings_come_in_the_order_of_their_verdicts(of_bad):
    order = list(VERDICTS)
    assert [order.index(finding.verdict) for finding in of_bad.findings] == sorted(
        order.index(finding.verdict) for finding in of_bad.findings
    )
    costs = [finding.cost_ms for finding in of_bad.findings if finding.verdict == COSTS]
    assert costs == sorted(costs, reverse=True)
    assert all(finding.remedy for finding in of_bad.findings if finding.verdict == COSTS)


def test_norms_that_stay_decomposed_are_counted_with_their_time():
    names = ("ReduceMean", "Sub", "Pow", "ReduceMean", "Sqrt", "Div")
    nodes = [NodeRun("", name, CPU, 0.5, ((1, 5),), ((1, 5),), ("float",)) for name in names]
    found = _about_leftovers("norms", frozenset({"ReduceMean", "Pow", "Sqrt"}), nodes, "LayerNormalization")
    assert (found.verdict, found.cost_ms) == (COSTS, 2.0)
    pooled = [node for node in nodes if node.op_type == "ReduceMean"][:1]
    assert _about_leftovers("norms", frozenset({"ReduceMean", "Pow", "Sqrt"}), pooled, "").verdict == FINE


def test_attention_that_cannot_be_fused_is_told_of(tmp_path):
    path = export_plainly(make_vit(qk_norm=True).float(), tmp_path / "normed.onnx")
    finding = _judge_absent("attention", read_graph(path))
    assert (finding.verdict, finding.text[:26]) == (KNOW, "3 softmax are left as they")


def test_a_merging_file_has_nothing_that_could_be_fused(tmp_path):
    model = set_merging(make_vit(), (3, 0, 6)).float()
    path = tmp_path / "merged.onnx"
    vitprune.export_onnx(model, path, [random_batch(model, 2)])
    findings = named(diagnose(path, seconds=0.4, num_threads=1))
    for name in ("merging", "attention", "unread tokens", "precision", "norms"):
        assert findings[name].verdict == FINE, findings[name]
    vitprune.export_onnx(model, path, [random_batch(model, 2)], operators="standard")
    (tmp_path / "variants").mkdir()
    variants, _untried = _make_variants(path, read_graph(path), tmp_path / "variants")
    assert {name: variant.count for name, variant in variants.items()} == {"attention": 3, "int8": 1}


def test_double_numbers_cost_their_time():
    nodes = [NodeRun("", "MatMul", CPU, 3.0, ((2, 2),), ((2, 2),), ("double", "double"))]
    assert _about_precision(nodes).cost_ms == 3.0
    assert _about_precision([NodeRun("", "MatMul", CPU, 3.0, ((2, 2),), ((2, 2),), ("float",))]).verdict == FINE


def test_the_graphs_multiply_accumulates_are_torchs(tmp_path):
    model = make_vit().float()
    path = export_plainly(make_vit().float(), tmp_path / "plain.onnx")
    assert count_graph_macs(path) == vitprune.count_macs(model)


def test_fused_attention_has_the_multiply_accumulates_of_its_products(tmp_path):
    model = make_vit(global_pool="avg").float()
    path = tmp_path / "fused.onnx"
    vitprune.export_onnx(model, path, [random_batch(model, 2)])
    fused = [node for node in profile(path, optimized=False, num_runs=1) if node.op_type == "MultiHeadAttention"]
    assert [count_node_macs(node) for node in fused] == [2 * 17 * 17 * TINY["embed_dim"]] * 3
    assert count_graph_macs(path) == vitprune.count_macs(model)


@pytest.mark.parametrize("backend", ["onnxruntime-cpu", "torch-eager"])
def test_widths_are_timed_at_every_multiple_that_changes_them(backend):
    shapes = [FfnShape(5, 8, 16), FfnShape(5, 8, 31), FfnShape(3, 4, 20)]
    measured = measure_multiples(shapes, backend=backend, seconds=0.1)
    assert sorted(measured) == [1, 8, 16, 32, 64, 128]
    assert sorted(measure_multiples([FfnShape(5, 8, 64)], backend=backend, seconds=0.1)) == [1, 128]
    assert find_round_to(FfnShape(5, 8, 60), 0.5, backend=backend, seconds=0.1) == 1  # none fits a quarter of 30
    assert [round_up(width, 16) for width in (1, 16, 17)] == [16, 16, 32]


def test_the_fastest_multiple_is_taken_only_where_it_is_faster_for_sure():
    def timed(*rounds):
        return Latency(1.0, 1.0, len(rounds), rounds)

    slow, fast, unsure = timed(2.0, 2.1, 2.0), timed(1.0, 1.1, 1.0), timed(0.2, 3.9, 1.0)
    assert _fastest({1: slow}) == 1
    assert _fastest({1: slow, 8: fast, 16: timed(1.5, 1.6, 1.5)}) == 8
    assert _fastest({1: slow, 32: unsure}) == 1
    assert _fastest({1: fast, 8: slow}) == 1


def test_files_of_other_numbers_and_without_names_are_examined(good, tmp_path):
    nameless = onnx.load(good)
    for node in nameless.graph.node:
        node.name = ""
    onnx.save(nameless, tmp_path / "nameless.onnx")
    macs, _share, shapes = _count(read_graph(tmp_path / "nameless.onnx"), 1)
    assert macs == count_graph_macs(good)
    assert [shape.num_tokens for shape in shapes] == [17, 17, 1]
    path = tmp_path / "double.onnx"
    with quiet():
        torch.onnx.export(make_vit(), (torch.randn(1, 3, 32, 32).double(),), str(path), dynamo=True, verbose=False)
    variants, untried = _make_variants(path, read_graph(path), tmp_path)
    assert variants == {}
    assert untried["attention"] == untried["int8"] == "the weights are float64"


def test_what_is_no_image_model_is_refused(tmp_path, good):
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    output = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([node], "g", [value], [output])
    model = onnx.helper.make_model(graph, ir_version=8, opset_imports=[onnx.helper.make_opsetid("", 17)])
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(vitprune.VitpruneError, match=r"expected one input of images .* has x tensor\(float\)"):
        diagnose(tmp_path / "other.onnx")
    with pytest.raises(vitprune.VitpruneError, match="backend must be one of"):
        diagnose(good, backend="torch-eager")
    with pytest.raises(vitprune.VitpruneError, match="onnxruntime-tensorrt is not here"):
        diagnose(good, backend="onnxruntime-tensorrt")
