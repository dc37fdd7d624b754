"""ONNX files: torch's answers, any batch size, no trace of this machine; and the bench on top of them."""

from __future__ import annotations

import base64
import copy
import csv
import json

import numpy as np
import onnx
import pytest
import torch
from conftest import TINY, make_vit
from families import half_plan
from onnx import TensorProto
from timm.layers import SwiGLUPacked

import vitprune
from vitprune.export import onnx_file
from vitprune.export.runtime import open_onnx
from vitprune.figures.bench_figure import draw_bench
from vitprune.figures.style import save_figure
from vitprune.files import write_table
from vitprune.models.facts import Facts
from vitprune.models.left_out import Bias
from vitprune.models.merging import describe_merging, set_merging
from vitprune.pruning.plan import Plan
from vitprune.seen_images import SeenImages
from vitprune.speed.bench import BenchRow


@pytest.fixture(scope="module")
def exported(tmp_path_factory, image_folder):
    """A pruned float32 model, its ONNX file and the report."""
    model = make_vit(mlp_layer=SwiGLUPacked).float()
    pruned = vitprune.remove_neurons(model, half_plan(model))
    images = vitprune.ImageBatches(vitprune.find_images(image_folder, 5), pruned, batch_size=8)
    path = tmp_path_factory.mktemp("onnx") / "pruned.onnx"
    return pruned, path, vitprune.export_onnx(pruned, path, images)


def test_onnx_runtime_gives_torchs_logits_at_any_batch_size(exported):
    model, path, report = exported
    opened = open_onnx(path)
    for count in (1, 2, 5):
        images = torch.randn(count, 3, 32, 32)
        with torch.no_grad():
            torch.testing.assert_close(opened(images), model(images), rtol=1e-3, atol=1e-4)
    assert report.num_images == 20
    assert report.top1_agreement == 1
    assert report.max_abs_diff < 1e-4
    assert report.size_bytes == path.stat().st_size


def test_the_file_knows_its_transform_and_not_this_machine(exported):
    _model, path, _report = exported
    opened = open_onnx(path)
    assert opened.num_classes == 5
    assert opened.data_config["input_size"] == [3, 32, 32]
    content = path.read_bytes()
    assert b".py" not in content
    assert b"site-packages" not in content
    onnx.checker.check_model(onnx.load(path), full_check=True)
    assert [file.name for file in path.parent.iterdir()] == ["pruned.onnx"]


def test_the_batch_dimension_has_a_name(exported):
    _model, path, _report = exported
    graph = onnx.load(path).graph
    for value in (*graph.input, *graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"


def test_accuracy_of_the_file_is_the_models(exported, image_folder):
    model, path, report = exported
    images = vitprune.find_images(image_folder, 5)
    of_torch = vitprune.evaluate(model, vitprune.ImageBatches(images, model, batch_size=6))
    opened = open_onnx(path)
    of_onnx = vitprune.evaluate(opened, vitprune.ImageBatches(images, opened, batch_size=6))
    assert of_torch.correct == of_onnx.correct
    assert report.top1 == of_onnx.top1


def test_a_graph_that_differs_is_an_error_and_leaves_no_file(exported, tmp_path, monkeypatch):
    model, path, _report = exported
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.head.bias[2] += 0.5
    images = [(torch.randn(2, 3, 32, 32), torch.zeros(2))]
    with pytest.raises(
        vitprune.VitpruneError, match=r"differs from torch: a logit is .* in ONNX Runtime and .* in torch"
    ):
        onnx_file.measure_parity(other, open_onnx(path), images, exact=True)
    with pytest.raises(vitprune.VitpruneError, match="no images to compare"):
        vitprune.export_onnx(model, tmp_path / "m.onnx", [])
    assert list(tmp_path.iterdir()) == []


def test_an_int8_file_is_small_and_still_checked_in_float32(exported, image_folder, tmp_path):
    model, path, report = exported
    images = vitprune.ImageBatches(vitprune.find_images(image_folder, 5), model, batch_size=8)
    made = vitprune.export_onnx(model, tmp_path / "int8.onnx", images, precision="int8")
    assert made.float32.max_abs_diff == pytest.approx(report.max_abs_diff, abs=1e-5)
    assert made.float32.num_images == made.num_images == 20
    assert 0 < made.max_abs_diff < 1
    assert made.speedup.low <= made.speedup.ratio <= made.speedup.high
    assert (report.speedup, report.float32) == (None, None)
    operators = {node.op_type for node in onnx.load(made.path).graph.node}
    assert {"DynamicQuantizeLinear", "MatMulInteger"} <= operators
    assert open_onnx(made.path).data_config == open_onnx(path).data_config


def test_a_float16_file_computes_in_half_the_bits(exported, image_folder, tmp_path):
    model, path, report = exported
    images = vitprune.ImageBatches(vitprune.find_images(image_folder, 5), model, batch_size=8)
    made = vitprune.export_onnx(model, tmp_path / "half.onnx", images, precision="float16")
    assert made.float32.max_abs_diff == pytest.approx(report.max_abs_diff, abs=1e-5)
    assert 1e-6 < made.max_abs_diff < 0.05
    graph = onnx.load(made.path).graph
    assert {tensor.data_type for tensor in graph.initializer} == {TensorProto.FLOAT16, TensorProto.INT64}
    assert graph.input[0].type.tensor_type.elem_type == TensorProto.FLOAT16
    assert made.size_bytes < 0.7 * report.size_bytes
    # Whoever opens it feeds what it takes.
    opened = open_onnx(made.path)
    assert opened.data_config == open_onnx(path).data_config
    assert vitprune.evaluate(opened, images).top1 == made.top1
    (row,) = vitprune.bench({"half": made.path}, backends=["onnxruntime-cpu"], batch_sizes=[2], seconds=0.05)
    assert row.precision == "float16"


def test_static_quantisation_is_of_onnx_alone_and_its_images_are_refused(exported, image_folder, tmp_path):
    model, _path, report = exported
    images = vitprune.ImageBatches(vitprune.find_images(image_folder, 5), model, batch_size=8)
    options = {"precision": "int8-static", "operators": "standard"}
    made = vitprune.export_onnx(model, tmp_path / "static.onnx", images, **options)
    assert made.float32.max_abs_diff == pytest.approx(report.max_abs_diff, abs=1e-5)
    assert 0 < made.max_abs_diff < 1
    graph = onnx.load(made.path).graph
    operators = {node.op_type for node in graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= operators
    assert {node.domain for node in graph.node} <= {"", "ai.onnx"}
    weights = {tensor.name for tensor in graph.initializer if tensor.data_type == TensorProto.INT8}
    assert len(weights) >= 4 * len(model.blocks)
    with pytest.raises(vitprune.VitpruneError, match="20 of 20 evaluation images were calibration images"):
        vitprune.evaluate(open_onnx(made.path), images)


def test_comparisons_of_tokens_stay_float32_in_statically_quantised_files(tmp_path):
    model = set_merging(make_vit(), (3, 0, 6)).float()
    images = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    batches = [(images, torch.zeros(5))]
    options = {"precision": "int8-static", "operators": "standard", "batch_size": 2}
    made = vitprune.export_onnx(model, tmp_path / "static.onnx", batches, **options)
    graph = onnx.load(made.path).graph
    makers = {name: node for node in graph.node for name in node.output}
    (chosen,) = (node for node in graph.node if node.op_type == "TopK")
    ancestors, waiting = set(), [chosen.input[0]]
    for _step in range(3):
        waiting = [name for each in waiting if each in makers for name in makers[each].input]
        ancestors |= {makers[name].op_type for name in waiting if name in makers}
    assert "DequantizeLinear" not in ancestors
    assert made.max_abs_diff < 1


@pytest.mark.parametrize("opset", [18, 23])
def test_a_version_of_the_operators_can_be_asked_for(opset, exported, image_folder, tmp_path):
    model, _path, _report = exported
    images = vitprune.ImageBatches(vitprune.find_images(image_folder, 5), model, batch_size=8)
    made = vitprune.export_onnx(model, tmp_path / "m.onnx", images, opset=opset)
    assert {each.domain: each.version for each in onnx.load(made.path).opset_import}[""] == opset
    assert made.max_abs_diff < 1e-4


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("m.onnx", {"opset": 17}, "opset must be in 18 .. 23, got 17"),
        ("m.onnx", {"precision": "int4"}, "precision must be one of float32, float16, int8, int8-static"),
        ("m.xml", {"precision": "float16"}, "OpenVINO's files are float32 or int8"),
        ("m.xml", {"opset": 20}, "have no `opset`"),
    ],
)
def test_numbers_and_operators_that_there_are_not(name, options, message, exported, tmp_path):
    model, _path, _report = exported
    with pytest.raises(vitprune.VitpruneError, match=message):
        vitprune.export_onnx(model, tmp_path / name, [], **options)
    assert list(tmp_path.iterdir()) == []


def test_a_fixed_batch_runs_any_number_of_images(exported, image_folder, tmp_path):
    model, _path, _report = exported
    images = vitprune.ImageBatches(vitprune.find_images(image_folder, 5), model, batch_size=7)
    made = vitprune.export_onnx(model, tmp_path / "fixed.onnx", images, batch_size=4)
    opened = open_onnx(made.path)
    assert opened.batch_size == 4
    photos = torch.randn(6, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(opened(photos), model(photos), rtol=1e-3, atol=1e-4)
    with pytest.raises(vitprune.VitpruneError, match="batch_size must be in"):
        vitprune.export_onnx(model, tmp_path / "none.onnx", images, batch_size=0)


def test_standard_operators_are_onnxs_own(exported, image_folder, tmp_path):
    model, path, _report = exported
    images = vitprune.ImageBatches(vitprune.find_images(image_folder, 5), model, batch_size=8)
    made = vitprune.export_onnx(model, tmp_path / "standard.onnx", images, operators="standard")
    assert {node.domain for node in onnx.load(made.path).graph.node} == {""}
    assert "com.microsoft" in {node.domain for node in onnx.load(path).graph.node}


def test_weights_beyond_the_limit_go_into_a_file_beside_it(exported, image_folder, tmp_path, monkeypatch):
    model, _path, report = exported
    monkeypatch.setattr(onnx_file, "LARGEST_FILE_BYTES", 1000)
    images = vitprune.ImageBatches(vitprune.find_images(image_folder, 5), model, batch_size=8)
    made = vitprune.export_onnx(model, tmp_path / "large.onnx", images)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["large.onnx", "large.onnx.data"]
    assert made.size_bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    assert made.max_abs_diff == report.max_abs_diff
    photos = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(open_onnx(made.path)(photos), model(photos), rtol=1e-3, atol=1e-4)


def test_large_int8_files_hold_no_float32_weights_and_replace_no_strangers_file(
    exported, image_folder, tmp_path, monkeypatch
):
    model, _path, _report = exported
    monkeypatch.setattr(onnx_file, "LARGEST_FILE_BYTES", 1000)
    images = vitprune.ImageBatches(vitprune.find_images(image_folder, 5), model, batch_size=8)
    large = vitprune.export_onnx(model, tmp_path / "a.onnx", images)
    small = vitprune.export_onnx(model, tmp_path / "b.onnx", images, precision="int8")
    assert small.size_bytes < large.size_bytes + 20_000
    assert sorted(file.name for file in tmp_path.iterdir() if file.name.startswith("b")) == ["b.onnx", "b.onnx.data"]
    (tmp_path / "c.onnx.data").write_text("mine")
    with pytest.raises(vitprune.VitpruneError, match=r"c.onnx.data exists; choose another output"):
        vitprune.export_onnx(model, tmp_path / "c.onnx", images)
    assert (tmp_path / "c.onnx.data").read_text() == "mine"
    assert not (tmp_path / "c.onnx").exists()


@pytest.mark.parametrize("precision", ["float16", "int8-static"])
def test_large_files_of_narrower_numbers_answer_as_small_ones_do(
    precision, exported, image_folder, tmp_path, monkeypatch
):
    model, _path, _report = exported
    images = vitprune.ImageBatches(vitprune.find_images(image_folder, 5), model, batch_size=8)
    small = vitprune.export_onnx(model, tmp_path / "small.onnx", images, precision=precision)
    monkeypatch.setattr(onnx_file, "LARGEST_FILE_BYTES", 1000)
    large = vitprune.export_onnx(model, tmp_path / "large.onnx", images, precision=precision)
    assert {file.name for file in tmp_path.iterdir()} == {"small.onnx", "large.onnx", "large.onnx.data"}
    assert large.max_abs_diff == small.max_abs_diff
    assert open_onnx(large.path).data_config == open_onnx(small.path).data_config


def test_the_file_says_what_it_was_pruned_by(image_folder, tmp_path):
    model = make_vit().float()
    plan = vitprune.plan_pruning(
        model, vitprune.score_neurons(model, "magnitude"), criterion="magnitude", pruning_ratio=0.5
    )
    plan = plan.with_facts(calibration=SeenImages(frozenset({"ab"}), "/home/me/photos"))
    images = vitprune.ImageBatches(vitprune.find_images(image_folder, 5), model, batch_size=8)
    made = vitprune.export_onnx(vitprune.remove_neurons(model, plan), tmp_path / "m.onnx", images, plan=plan)
    opened = open_onnx(made.path)
    facts = json.loads(opened.session.get_modelmeta().custom_metadata_map["vitprune"])
    assert facts["plan"]["criterion"] == "magnitude"
    assert facts["vitprune"] == vitprune.__version__
    assert opened.calibration == {"ab"}
    assert b"photos" not in made.path.read_bytes()
    for name, keep in plan.keep.items():
        bits = np.unpackbits(np.frombuffer(base64.b64decode(facts["plan"]["keep"][name]), np.uint8))[: len(keep)]
        assert bits.astype(bool).tolist() == keep.tolist()


def read_own_facts(path):
    return json.loads(open_onnx(path).session.get_modelmeta().custom_metadata_map["vitprune"])


@pytest.mark.parametrize("arguments", [{}, {"batch_size": 2}, {"precision": "int8"}], ids=str)
def test_merging_models_are_exported_and_say_where_they_merge(arguments, tmp_path):
    model = set_merging(make_vit(), (3, 0, 6)).float()
    images = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    made = vitprune.export_onnx(model, tmp_path / "m.onnx", [(images, torch.zeros(5))], **arguments)
    facts = read_own_facts(made.path)
    assert (facts["merge"], facts["image_size"]) == ([3, 0, 6], [32, 32])
    assert facts["precision"] == arguments.get("precision", "float32")
    assert describe_merging(model) == [3, 0, 6]
    operators = [node.op_type for node in onnx.load(made.path).graph.node]
    # Behind the last merge only the class token is read, which does not merge.
    assert (operators.count("TopK"), operators.count("MultiHeadAttention")) == (1, 3)
    assert made.max_abs_diff < (1e-4 if made.float32 is None else 1)


ALL_FFNS = ("blocks.0.mlp", "blocks.1.mlp", "blocks.2.mlp")


@pytest.mark.parametrize("layers", [("blocks.1.mlp",), ALL_FFNS, ("blocks.2.attn",)], ids="-".join)
def test_models_without_some_layers_are_exported(layers, tmp_path):
    model = make_vit().float()
    for name in layers:
        model.set_submodule(name, Bias(torch.randn(24)))
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    made = vitprune.export_onnx(model, tmp_path / "m.onnx", [(images, torch.zeros(2))])
    facts = read_own_facts(made.path)
    assert facts["left_out"] == dict.fromkeys(layers, "bias")
    assert set(facts["widths"]) == set(ALL_FFNS) - set(layers)


def test_the_file_says_which_parts_went():
    keep = {"blocks.0.mlp": torch.arange(4) < 2, "blocks.0.attn.qk": torch.arange(8) < 4}
    facts = Facts(merge=(3, 0, 6), image_size=(24, 24), stand_ins={"blocks.1.attn": "map"})
    described = onnx_file.describe_plan(Plan(keep, facts, {"blocks.0.attn.qk": "qk"}))
    assert described["kinds"] == {"blocks.0.attn.qk": "qk"}
    assert described["num_neurons_dense"] == {"blocks.0.mlp": 4, "blocks.0.attn.qk": 8}
    assert (described["merge"], described["image_size"]) == ((3, 0, 6), (24, 24))
    assert described["stand_ins"] == {"blocks.1.attn": "map"}


def test_files_that_cannot_be_opened_are_refused(tmp_path):
    with pytest.raises(vitprune.VitpruneError, match="no such file"):
        open_onnx(tmp_path / "absent.onnx")
    (tmp_path / "bad.onnx").write_text("no graph")
    with pytest.raises(vitprune.VitpruneError, match="ONNX Runtime cannot open it"):
        open_onnx(tmp_path / "bad.onnx")
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([], "g", [value], [value])
    foreign = onnx.helper.make_model(graph, ir_version=8, opset_imports=[onnx.helper.make_opsetid("", 17)])
    onnx.save(foreign, tmp_path / "foreign.onnx")
    with pytest.raises(vitprune.VitpruneError, match="does not say which transform"):
        open_onnx(tmp_path / "foreign.onnx")


def test_bench_has_a_row_for_every_model_backend_batch_size_and_number_of_threads():
    dense = make_vit(**TINY).float()
    models = {"dense": dense, "pruned": vitprune.remove_neurons(dense, half_plan(dense))}
    threads = torch.get_num_threads()
    rows = vitprune.bench(models, batch_sizes=[1, 3], num_threads=[1, 2], seconds=0.05)
    keys = [(row.model, row.backend, row.batch_size, row.num_threads) for row in rows]
    assert len(keys) == len(set(keys)) == 16
    for row in rows:
        assert row.p95_ms >= row.median_ms > 0
        assert row.images_per_second == pytest.approx(1000 * row.batch_size / row.median_ms)
        assert (row.model != "dense") or row.speedup == row.speedup_low == row.speedup_high == 1
        assert row.speedup_low <= row.speedup <= row.speedup_high
        assert row.ceiling_share == pytest.approx(row.speedup / row.speedup_ceiling)
        assert row.speedup_ceiling > 1 or row.model == "dense"
        assert row.peak_bytes is None
    assert torch.get_num_threads() == threads


def test_bench_times_precisions_against_the_first_and_measures_memory():
    rows = vitprune.bench(
        {"dense": make_vit(**TINY).float()},
        backends=["onnxruntime-cpu"],
        precisions=["float32", "int8", "float16"],
        batch_sizes=[2],
        seconds=0.05,
        memory=True,
    )
    assert [row.precision for row in rows] == ["float32", "int8", "float16"]
    assert rows[0].speedup == 1
    assert rows[1].ceiling_share is None
    for row in rows:
        # The interpreter and ONNX Runtime, but not torch.
        assert 10e6 < row.peak_bytes < 200e6


def test_bench_times_files_as_they_are(exported, tmp_path):
    _model, path, _report = exported
    rows = vitprune.bench({"a": path}, backends=["onnxruntime-cpu"], batch_sizes=[1], seconds=0.05)
    assert (rows[0].model, rows[0].precision, rows[0].speedup_ceiling) == ("a", "float32", 1)
    with pytest.raises(vitprune.VitpruneError, match="is an ONNX file: torch-eager cannot run it"):
        vitprune.bench({"a": path})


def test_bench_draws_its_rows_and_writes_them(tmp_path):
    models = {name: make_vit(**TINY, seed=seed).float() for seed, name in enumerate(("dense", "pruned"))}
    rows = vitprune.bench(models, backends=["torch-eager"], batch_sizes=[1], seconds=0.05)
    write_table(tmp_path / "bench.csv", rows, BenchRow)
    with (tmp_path / "bench.csv").open() as stream:
        assert [row["model"] for row in csv.DictReader(stream)] == ["dense", "pruned"]
    for suffix in ("png", "svg"):
        save_figure(draw_bench(rows, title="here"), tmp_path / f"bench.{suffix}")
        assert (tmp_path / f"bench.{suffix}").stat().st_size > 5000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backends": ["tensorrt"]}, "backend must be one of"),
        ({"backends": ["onnxruntime-tensorrt"]}, "onnxruntime-tensorrt is not here: onnxruntime .* has .*CPU"),
        ({"batch_sizes": [0]}, "batch sizes must be at least 1"),
        ({"num_threads": [0]}, "thread counts must be at least 1"),
        ({"precisions": ["int8"]}, "torch-eager runs .*, not 'int8'"),
        ({"precisions": ["tf32"], "backends": ["torch-eager"]}, "tf32 is a precision of GPUs"),
        ({"device": "cuda:99", "backends": ["torch-eager"]}, "device 'cuda:99' cannot be used here"),
    ],
)
def test_bench_refuses(arguments, message, tiny_vit):
    with pytest.raises(vitprune.VitpruneError, match=message):
        vitprune.bench({"a": tiny_vit}, **arguments)


def find_tie(model):
    """Return two images next to each other between which the choice of what merges changes, and the answer with it."""
    first, second = torch.randn(2, 1, 3, 32, 32, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        for _halving in range(40):
            middle = (first + second) / 2
            to_first, to_second = ((model(middle) - model(end)).abs().max() for end in (first, second))
            first, second = (middle, second) if to_second > to_first else (first, middle)
        assert (model(first) - model(second)).abs().max() > 1e-2
    return first, second


def test_an_image_where_rounding_decides_what_merges_is_counted_and_nothing_else_passes():
    model = set_merging(make_vit(depth=3), [4, 4, 4]).float()
    first, second = find_tie(model)
    others = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(8))
    batches = [(torch.cat([others[:3], first, others[3:]]), torch.zeros(7, dtype=torch.int64))]

    def other_kernel(images):
        """What a runtime answers that rounds to the other side of the tie."""
        same = (images == first).flatten(1).all(1)
        with torch.no_grad():
            return model(torch.where(same[:, None, None, None], second, images))

    parity = onnx_file.measure_parity(model, other_kernel, batches, exact=True)
    assert (parity.near_ties, parity.num_images) == (1, 7)
    assert parity.max_abs_diff < 1e-4
    assert "rounding decides" in str(parity)
    wrong = copy.deepcopy(model)
    with torch.no_grad():
        wrong.head.bias += 1e-2
    unmerged = set_merging(model, [0, 0, 0])
    for another, of in ((wrong, batches), (unmerged, batches), (unmerged, [(first, torch.zeros(1))])):
        with pytest.raises(vitprune.VitpruneError, match="differs from torch"):
            onnx_file.measure_parity(another, other_kernel, of, exact=True)
    with pytest.raises(vitprune.VitpruneError, match="differs from torch"):
        onnx_file.measure_parity(model, other_kernel, [(first, torch.zeros(1))], exact=True)
