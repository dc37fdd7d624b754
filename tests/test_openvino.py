"""OpenVINO's own files: written, checked against torch, quantised, timed and evaluated."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch
from conftest import make_vit as make_double
from torch import nn

from vitprune import bench, export_onnx, set_merging
from vitprune.cli.commands import main
from vitprune.errors import VitpruneError
from vitprune.evaluation.open_model import Source, open_model
from vitprune.export import onnx_file
from vitprune.export.openvino_file import (
    _products_of_merging,
    make_openvino_runner,
    open_openvino,
    read_openvino,
)
from vitprune.seen_images import hash_pixels
from vitprune.speed.alignment import FfnShape, find_round_to
from vitprune.speed.bench import Setting, make_backend_runner
from vitprune.speed.fit_latency import Format, Writer, fit_latency
from vitprune.speed.speed_candidates import open_as
from vitprune.views import data_config


def make_vit():
    return make_double().float()


def batches_for(model, count=6, seed=0):
    images = torch.randn(count, *data_config(model)["input_size"], generator=torch.Generator().manual_seed(seed))
    return [(images[:4], torch.zeros(4, dtype=torch.int64)), (images[4:], torch.zeros(count - 4, dtype=torch.int64))]


def test_a_float32_file_answers_as_torch_does(tmp_path):
    model = make_vit()
    report = export_onnx(model, tmp_path / "m.xml", batches_for(model))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.bin", "m.xml"]
    assert report.max_abs_diff < 1e-4
    opened = open_model(Source(str(tmp_path / "m.xml")))
    images = batches_for(model, seed=3)[0][0]
    torch.testing.assert_close(opened(images), model(images).detach(), rtol=1e-3, atol=1e-4)
    assert (opened.num_classes, opened.batch_size) == (model.num_classes, None)


def test_a_fixed_batch_is_filled_up(tmp_path):
    model = make_vit()
    export_onnx(model, tmp_path / "m.xml", batches_for(model), batch_size=4)
    opened, images = open_openvino(tmp_path / "m.xml"), batches_for(model, seed=3)[0][0][:3]
    assert opened.batch_size == 4
    torch.testing.assert_close(opened(images), model(images).detach(), rtol=1e-3, atol=1e-4)
    with pytest.raises(VitpruneError, match="4 images at a time, not 1"):
        make_openvino_runner(tmp_path / "m.xml", 1, 1)


def test_images_that_quantised_a_file_are_refused_later(tmp_path):
    model = make_vit()
    batches = batches_for(model)
    report = export_onnx(model, tmp_path / "m.xml", batches, precision="int8")
    assert report.precision == "int8"
    assert report.float32.max_abs_diff < 1e-4
    assert report.max_abs_diff > report.float32.max_abs_diff
    seen = open_openvino(tmp_path / "m.xml").calibration
    assert {name for images, _labels in batches for name in hash_pixels(images)} <= seen
    first = (tmp_path / "m.bin").read_bytes()
    export_onnx(model, tmp_path / "again.xml", batches, precision="int8")
    assert (tmp_path / "again.bin").read_bytes() == first


def test_tokens_are_compared_and_averaged_in_float32(tmp_path):
    """Of the products of two activations, attention's alone are quantised."""
    model = set_merging(make_vit(), (3, 0, 6))
    export_onnx(model, tmp_path / "m.xml", batches_for(model), precision="int8")

    def is_quantised(product):
        makers = [product.input_value(place).get_node().get_type_name() for place in range(2)]
        return "FakeQuantize" in makers

    products = {
        op.get_friendly_name(): op
        for op in read_openvino(tmp_path / "m.xml").get_ops()
        if op.get_type_name() == "MatMul"
    }
    export_onnx(model, tmp_path / "exact.xml", batches_for(model))
    left_out = _products_of_merging(read_openvino(tmp_path / "exact.xml"))
    assert left_out
    assert not any(is_quantised(products[name]) for name in left_out)
    assert sum(map(is_quantised, products.values())) >= 4 * len(model.blocks)
    dense = make_vit()
    export_onnx(dense, tmp_path / "dense.xml", batches_for(dense))
    assert _products_of_merging(read_openvino(tmp_path / "dense.xml")) == []


def test_an_8_bit_file_of_it_is_one_of_the_formats_to_choose_from(tmp_path):
    model, wanted = make_vit(), Format("openvino", "int8")
    fitted = fit_latency(model, [wanted], num_samples=1)
    assert fitted.reference == Format("openvino")
    assert fitted.models[wanted].predict(model) > 0
    batches = batches_for(model)
    opened = open_as(model, wanted, Writer(tmp_path, batches), "model")
    report = export_onnx(model, tmp_path / "m.xml", batches, precision="int8")
    images = batches_for(model, seed=3)[0][0]
    torch.testing.assert_close(opened(images), open_openvino(report.path)(images))


def test_signals_are_handled_after_models_were_closed_in_any_order(tmp_path):
    """In a process of its own, which the signal of a child that ended would otherwise end."""
    model = make_vit()
    export_onnx(model, tmp_path / "m.xml", batches_for(model))
    code = """if True:
        import gc, signal, subprocess, sys
        from vitprune.export.openvino_file import make_openvino_runner, open_openvino
        signal.signal(signal.SIGCHLD, lambda *_: print("handled", flush=True))
        first = open_openvino(sys.argv[1])
        second = make_openvino_runner(sys.argv[1], 1, 1)
        del first
        gc.collect()
        del second
        gc.collect()
        print("closed", flush=True)
        subprocess.run([sys.executable, "-c", ""])
    """
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "m.xml"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.endswith("closed\nhandled\n")) == (0, True), done.stderr


def test_nothing_is_left_where_weights_differ(tmp_path, monkeypatch):
    model = make_vit()
    trace = onnx_file._trace

    def other_weights(given, *args):
        # A copy: the graph shares memory with the model that it was traced from.
        other = copy.deepcopy(given)
        with torch.no_grad():
            weight = other.blocks[0].mlp.fc1.weight
            weight += 1e-2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
        return trace(other, *args)

    monkeypatch.setattr(onnx_file, "_trace", other_weights)
    for merging in (model, set_merging(model, [3] * len(model.blocks))):
        for name in ("m.xml", "m.onnx"):
            with pytest.raises(VitpruneError, match="differs from torch"):
                export_onnx(merging, tmp_path / name, batches_for(model))
    assert not list(tmp_path.iterdir())


def test_a_merge_of_other_tokens_is_refused(tmp_path, monkeypatch):
    model = make_vit()
    merging, other = (set_merging(model, [r] * len(model.blocks)) for r in (3, 2))
    trace = onnx_file._trace
    monkeypatch.setattr(onnx_file, "_trace", lambda _given, *args: trace(other, *args))
    with pytest.raises(VitpruneError, match="differs from torch"):
        export_onnx(merging, tmp_path / "m.onnx", batches_for(model))


class Tie(nn.Module):
    """Answers by the sign of the mean of an image: an image of zeros is a tie."""

    def forward(self, images):
        return (images.mean((1, 2, 3)) > 0).float()[:, None].repeat(1, 2)


def test_only_an_image_whose_answer_rounding_decides_may_differ():
    tie, sure = torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8)
    asked = Tie()
    given, other = asked(torch.cat([tie, sure])), torch.ones(2, 2)
    assert onnx_file._decided_by_rounding(asked, tie, given[:1], other[:1]).all()
    assert not onnx_file._decided_by_rounding(asked, sure, given[1:], 0 * other[1:]).any()
    assert not onnx_file._decided_by_rounding(asked, tie, given[:1], 1.5 * other[:1]).any()


def test_models_and_files_are_timed_on_it_against_one_baseline(tmp_path):
    model = make_vit()
    export_onnx(model, tmp_path / "m.xml", batches_for(model), precision="int8")
    models = {"dense": model, "int8": tmp_path / "m.xml"}
    rows = bench(
        models,
        backends=["onnxruntime-cpu", "openvino"],
        baseline="dense@onnxruntime-cpu",
        batch_sizes=[1],
        num_threads=[1],
        seconds=0.02,
    )
    assert [(row.model, row.backend) for row in rows] == [
        ("dense", "onnxruntime-cpu"),
        ("dense", "openvino"),
        ("int8", "openvino"),
    ]
    assert (rows[0].speedup, rows[2].precision, rows[2].speedup_ceiling) == (1, "int8", None)
    assert rows[1].speedup != 1
    with pytest.raises(VitpruneError, match="baseline 'x' is none of what is timed: dense@onnxruntime-cpu"):
        bench(models, backends=["onnxruntime-cpu", "openvino"], baseline="x")
    with pytest.raises(VitpruneError, match="int8 is an OpenVINO file: onnxruntime-cpu cannot run it"):
        bench(models, backends=["onnxruntime-cpu"])


def test_models_are_quantised_for_it_to_be_timed():
    model, options = make_vit(), {"batch_sizes": [1], "num_threads": [1], "seconds": 0.02}
    backends = ["onnxruntime-cpu", "openvino"]
    rows = bench({"a": model}, backends=backends, precisions=["float32", "int8"], baseline="a@openvino", **options)
    assert [(row.backend, row.precision) for row in rows] == [
        (backend, precision) for backend in backends for precision in ("float32", "int8")
    ]
    (reference,) = (row for row in rows if row.speedup == 1)
    assert (reference.backend, reference.precision) == ("openvino", "float32")
    # Times of other precisions have no ceiling by multiply-accumulates.
    assert all((row.speedup_ceiling is None) == (row.precision == "int8") for row in rows)


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_the_doctor_looks_at_its_files(precision, tmp_path, capsys):
    model = make_vit()
    export_onnx(model, tmp_path / "m.xml", batches_for(model), precision=precision)
    assert main(["doctor", str(tmp_path / "m.xml"), "--seconds", "0.05", "--threads", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    findings = {finding["name"]: finding for finding in found["findings"]}
    assert {"threads", "kernels", "attention", "precision", "int8", "metadata", "batch"} <= set(findings)
    assert (found["backend"], found["ffn_share"]) == ("openvino", None)
    assert found["macs"] > 0
    assert findings["precision"]["text"].startswith(precision)
    assert findings["metadata"]["verdict"] == "fine"
    assert ("quantised already" in findings["int8"]["text"]) == (precision == "int8")
    if precision == "float32":
        assert " x as fast" in findings["int8"]["text"]


def test_the_doctor_refuses_what_such_a_file_cannot_be_asked(tmp_path, capsys):
    model = make_vit()
    export_onnx(model, tmp_path / "m.xml", batches_for(model), batch_size=2)
    path = str(tmp_path / "m.xml")
    for arguments, said in (
        (["--backend", "onnxruntime-cpu"], "is an OpenVINO file, which runs there alone; leave --backend out"),
        (["--checkpoint", "x.safetensors"], "holds its own weights; leave --checkpoint out"),
        (["--image-size", "64"], "where this is fixed; leave --image-size out"),
        ([], "runs 2 images at a time, not 1; pass 2 as --batch-size"),
    ):
        assert main(["doctor", path, *arguments]) == 2
        assert said in capsys.readouterr().err
    assert main(["doctor", str(tmp_path / "absent.xml")]) == 2
    assert "no such file" in capsys.readouterr().err


def test_operators_of_onnx_runtime_are_refused_in_one_line(tmp_path):
    model = make_vit()
    export_onnx(model, tmp_path / "own.onnx", batches_for(model))
    export_onnx(model, tmp_path / "standard.onnx", batches_for(model), operators="standard")
    with pytest.raises(VitpruneError, match="MultiHeadAttention.*`operators` standard") as caught:
        make_backend_runner(tmp_path / "own.onnx", Setting("openvino"))
    assert "\n" not in str(caught.value)
    make_backend_runner(tmp_path / "standard.onnx", Setting("openvino", num_threads=1))()


def test_without_the_package_one_line_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    model = make_vit()
    with pytest.raises(VitpruneError, match=r"python -m pip install 'vitprune\[openvino\]'"):
        export_onnx(model, tmp_path / "m.xml", batches_for(model))
    with pytest.raises(VitpruneError, match="pip install"):
        bench({"a": model}, backends=["openvino"])


def test_widths_asked_for_openvino_are_not_timed_elsewhere():
    with pytest.raises(VitpruneError, match="not measured on openvino"):
        find_round_to(FfnShape(4, 8, 16), 0.5, backend="openvino")
