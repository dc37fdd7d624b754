"""Files that take images of any height and width, where timm builds the model so: the same answers at every size."""

from __future__ import annotations

import json

import onnx
import pytest
import torch
from conftest import make_vit
from test_torch_program import make_batches, run_alone

import vitprune
from vitprune import VitpruneError
from vitprune.cli import main
from vitprune.export.any_size import check_other_sizes
from vitprune.export.profile import count_graph_macs
from vitprune.export.runtime import open_onnx
from vitprune.export.torch_program import read_program_facts

# Images of whole patches of 8 x 8, none as large as the model's own 32 x 32 and the 32 x 40 that it is traced with.
SIZES = ((2, 3, 32, 48), (1, 3, 72, 40), (3, 3, 16, 24), (1, 3, 96, 128))


def make_any(**model_args):
    return make_vit(dynamic_img_size=True, **model_args).float()


def make_pruned(parts=("ffn", "qk", "vo")):
    return vitprune.prune(make_any(), make_batches(), ratio=0.5, parts=parts, allocation="uniform")


def check_sizes(answer, model):
    for size in SIZES:
        images = torch.randn(size, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            torch.testing.assert_close(answer(images), model(images), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("operators", ["onnxruntime", "standard"])
@pytest.mark.parametrize("is_pruned", [False, True])
def test_an_onnx_file_answers_as_torch_at_every_size(is_pruned, operators, tmp_path):
    model, plan = make_pruned() if is_pruned else (make_any(), None)
    path = tmp_path / "any.onnx"
    report = vitprune.export_onnx(model, path, make_batches(), plan=plan, operators=operators, dynamic_size=True)
    assert report.max_abs_diff < 1e-4
    opened = open_onnx(path)
    check_sizes(opened, model)
    with pytest.raises(VitpruneError, match=r"reads images \[3, None, None\]"):
        opened(torch.randn(1, 4, 32, 32))
    (images,) = onnx.load(path).graph.input
    assert [each.dim_param or each.dim_value for each in images.type.tensor_type.shape.dim] == [
        "batch", 3, "height", "width"
    ]  # fmt: skip


def test_it_computes_no_more_than_a_file_of_one_size(tmp_path):
    """Attention is one operator there as well, and the last block is computed for the tokens alone that are read."""
    model = make_any()
    for name, dynamic_size in (("one", False), ("any", True)):
        vitprune.export_onnx(model, tmp_path / f"{name}.onnx", make_batches(), dynamic_size=dynamic_size)
    assert count_graph_macs(tmp_path / "any.onnx") == count_graph_macs(tmp_path / "one.onnx")
    operators = [node.op_type for node in onnx.load(tmp_path / "any.onnx").graph.node]
    assert operators.count("MultiHeadAttention") == 3
    assert "Softmax" not in operators


@pytest.mark.parametrize("precision", ["int8", "int8-static", "float16"])
def test_narrow_numbers_at_every_size(precision, tmp_path):
    model, plan = make_pruned(("ffn",))
    path = tmp_path / "any.onnx"
    vitprune.export_onnx(model, path, make_batches(), plan=plan, precision=precision, dynamic_size=True)
    opened = open_onnx(path)
    images = torch.randn(64, 3, 48, 24, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = model(images)
    near = torch.nn.functional.cosine_similarity(opened(images), expected, dim=1)
    assert near.mean() > 0.98


def test_openvino_is_refused_with_the_reason(tmp_path):
    """Its files would answer otherwise: it ignores that positions are resized with antialiasing."""
    with pytest.raises(VitpruneError, match="without antialiasing"):
        vitprune.export_onnx(make_any(), tmp_path / "any.xml", make_batches(), dynamic_size=True)


def test_a_program_answers_as_torch_at_every_size(tmp_path):
    model = make_any()
    vitprune.export_program(model, tmp_path / "any.pt2", make_batches(), dynamic_size=True)
    run_alone(tmp_path / "any.pt2", [torch.randn(size) for size in SIZES], model, tmp_path)
    assert read_program_facts(tmp_path / "any.pt2")["dynamic_size"] is True


def test_an_encoder_of_any_size(tmp_path):
    model = make_any(num_classes=0)
    vitprune.export_onnx(model, tmp_path / "any.onnx", make_batches(), dynamic_size=True)
    check_sizes(open_onnx(tmp_path / "any.onnx"), model)


@pytest.mark.parametrize("name", ["one.onnx", "one.pt2"])
def test_models_of_one_size_are_refused(name, tmp_path):
    export = vitprune.export_program if name.endswith("pt2") else vitprune.export_onnx
    with pytest.raises(VitpruneError, match="takes images of one size"):
        export(make_vit().float(), tmp_path / name, make_batches(), dynamic_size=True)
    assert not list(tmp_path.iterdir())


def test_as_many_tokens_merge_at_every_size(tmp_path):
    """Of too few patches they cannot: the file says so and answers nothing."""
    merged = vitprune.set_merging(make_any(), (0, 2, 1))
    vitprune.export_onnx(merged, tmp_path / "merged.onnx", make_batches(), dynamic_size=True)
    check_sizes(open_onnx(tmp_path / "merged.onnx"), merged)
    operators = [node.op_type for node in onnx.load(tmp_path / "merged.onnx").graph.node]
    assert operators.count("MultiHeadAttention") == 3
    with pytest.raises(Exception, match="TopK"):
        open_onnx(tmp_path / "merged.onnx")(torch.randn(1, 3, 8, 16))


def test_a_program_whose_tokens_merge_is_refused(tmp_path):
    """Its guards want an even number of patches, as it was traced with."""
    merged = vitprune.set_merging(make_any(), (0, 2, 1))
    with pytest.raises(VitpruneError, match="is bound to the size that it was traced at"):
        vitprune.export_program(merged, tmp_path / "merged.pt2", make_batches(), dynamic_size=True)
    assert not list(tmp_path.iterdir())


def test_a_file_of_one_size_in_disguise_is_refused():
    """It shrinks what it is given to the one size that it knows."""
    model = make_any()

    def shrink(images):
        return model(torch.nn.functional.interpolate(images, size=(32, 32)))

    with pytest.raises(VitpruneError, match="the file answers otherwise than torch to images of 16 x 40 pixels"):
        check_other_sizes(model, shrink, what="the file")
    check_other_sizes(model, model, what="the file")


def test_what_reads_files_reads_such(image_folder, tmp_path, capsys):
    """From export to pruning in the graph, by commands."""
    model, plan = make_pruned(("ffn",))
    vitprune.save(model, tmp_path / "half", plan=plan)
    path, said = tmp_path / "any.onnx", ("--data", image_folder, "--json")

    def run(*argv):
        assert main([*map(str, argv)]) == 0
        return json.loads(capsys.readouterr().out)

    assert run("export", tmp_path / "half", path, "--dynamic-size", *said)["max_abs_diff"] < 1e-4
    assert run("evaluate", path, *said)["num_images"] == 20
    assert run("bench", path, "--backend", "onnxruntime-cpu", "--seconds", "0.01", "--json")
    assert run("doctor", path, "--json")
    dense = make_any()
    vitprune.export_onnx(dense, tmp_path / "dense.onnx", make_batches(), dynamic_size=True)
    vitprune.save(dense, tmp_path / "dense")
    _pruned, plan = vitprune.prune(dense, make_batches(), ratio=0.5, allocation="uniform", compensate="none")
    vitprune.save(vitprune.apply_plan(dense, plan), tmp_path / "planned", plan=plan)
    run("prune", tmp_path / "dense.onnx", "--plan", tmp_path / "planned", "--output", tmp_path / "cut.onnx", "--json")
    check_sizes(open_onnx(tmp_path / "cut.onnx"), vitprune.apply_plan(dense, plan))
