"""Deployment from the command line: bench, doctor, int8, plans on ONNX files, elastic files, latency targets."""

from __future__ import annotations

import json

import pytest
from families import half_plan
from test_cli import other_images, pruned_folder, run, run_folder  # noqa: F401 (fixtures)

import vitprune
from vitprune.cli import main
from vitprune.models.facts import Asked
from vitprune.speed.latency_target import measure_reached


def test_bench_writes_tables_and_pictures(pruned_folder, tmp_path, capsys):  # noqa: F811
    folder = tmp_path / "bench"
    answer = run(
        "bench", pruned_folder, "--backend", "onnxruntime-cpu", "--precision", "float32", "int8", "--batch-size", 1,
        "--threads", 1, "--seconds", 0.05, "-o", folder, "--json", capsys=capsys,
    )  # fmt: skip
    assert [(row["model"], row["precision"]) for row in answer["rows"]] == [
        (name, precision) for name in ("dense", str(pruned_folder)) for precision in ("float32", "int8")
    ]
    assert all(row["peak_bytes"] > 0 and row["num_threads"] == 1 for row in answer["rows"])
    assert sorted(file.name for file in folder.iterdir()) == [
        "bench.csv", "bench.json", "bench.png", "bench.svg", "card.json",
    ]  # fmt: skip
    assert main(["bench", str(pruned_folder), "--seconds", "0.05", "--batch-size", "1"]) == 0
    assert "ceiling" in capsys.readouterr().out
    assert "bench exists; choose another output" in run("bench", pruned_folder, "-o", folder, code=2, capsys=capsys)
    assert "device cuda:9 is for torch" in run(
        "bench", pruned_folder, "--backend", "onnxruntime-cpu", "--device", "cuda:9", code=2, capsys=capsys
    )


def test_an_int8_file_is_reported_beside_its_float32_graph(pruned_folder, image_folder, tmp_path, capsys):  # noqa: F811
    path = tmp_path / "int8.onnx"
    answer = run("export", pruned_folder, path, "--int8", "--json", capsys=capsys)
    assert answer["precision"] == "int8"
    assert answer["float32"]["max_abs_diff"] < answer["max_abs_diff"]
    images = other_images(image_folder, tmp_path / "other")
    assert run("evaluate", path, "--data", images, "--json", capsys=capsys)["num_images"] == 20
    rows = run("bench", path, "--seconds", 0.05, "--batch-size", 1, "--json", capsys=capsys)["rows"]
    assert [(row["backend"], row["precision"]) for row in rows] == [("onnxruntime-cpu", "int8")]


def test_the_doctor_answers_for_folders_and_files(pruned_folder, tmp_path, capsys):  # noqa: F811
    answer = run("doctor", pruned_folder, "--seconds", 0.2, "--threads", 1, "--json", capsys=capsys)
    assert {"threads", "widths", "attention", "ffns"} <= {finding["name"] for finding in answer["findings"]}
    assert answer["path"] == str(pruned_folder)
    assert main(["export", str(pruned_folder), str(tmp_path / "m.onnx"), "--operators", "standard"]) == 0
    capsys.readouterr()
    assert main(["doctor", str(tmp_path / "m.onnx"), "--seconds", "0.2", "--threads", "1"]) == 0
    assert "3 attentions are computed" in " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_a_plan_is_applied_to_the_dense_models_onnx_file(saved_vit, pruned_folder, image_folder, tmp_path, capsys):  # noqa: F811
    images = other_images(image_folder, tmp_path / "other")
    dense, small = tmp_path / "dense.onnx", tmp_path / "small.onnx"
    run("export", saved_vit, dense, "--data", images, "--json", capsys=capsys)
    answer = run("prune", dense, "--plan", pruned_folder, "-o", small, "--json", capsys=capsys)
    assert (answer["num_neurons"], answer["compensation"]) == (72, "sequential")
    assert answer["donor_max_abs_diff"] < 1e-4
    of_file, of_folder = (
        run("evaluate", model, "--data", images, "--json", capsys=capsys) for model in (small, pruned_folder)
    )
    assert of_file == of_folder
    anew = run(
        "prune", dense, "--plan", pruned_folder / "plan.safetensors", "--data", images, "-o", tmp_path / "r.onnx",
        "--json", capsys=capsys,
    )  # fmt: skip
    assert (anew["compensation"], anew["donor_max_abs_diff"]) == ("ridge", None)
    assert "were calibration images" in run(
        "evaluate", tmp_path / "r.onnx", "--data", images, code=2, capsys=capsys
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "x.onnx"], "an ONNX file is pruned by a plan; pass --plan"),
        (["--plan", "PLAN", "-o", "folder"], "of an ONNX file comes an ONNX file"),
        (["--plan", "PLAN/plan.safetensors", "-o", "x.onnx"], "has no compensated weights: pass the pruned folder"),
        (["--plan", "PLAN", "--mode", "mask", "-o", "x.onnx"], "mode mask: not for ONNX files"),
        (["--plan", "PLAN", "--device", "cpu", "-o", "x.onnx"], "device: not for ONNX files"),
        (["--plan", "PLAN", "--data", "x", "-o", "x.onnx"], "brings its own compensation; leave --data out"),
        (["--plan", "PLAN", "--backend", "torch-eager", "-o", "x.onnx"], "go with --target-latency"),
        (["--plan", "PLAN", "--compensate", "distill", "-o", "x.onnx"], "distill cannot be computed in an ONNX graph"),
    ],
)
def test_what_an_onnx_file_cannot_have_is_refused(arguments, message, exported_vit, pruned_folder, tmp_path, capsys):  # noqa: F811
    arguments = [argument.replace("PLAN", str(pruned_folder)) for argument in arguments]
    arguments[-1] = str(tmp_path / arguments[-1])
    assert message in run("prune", exported_vit, *arguments, code=2, capsys=capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def exported_vit(saved_vit, image_folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "dense.onnx"
    assert main(["export", str(saved_vit), str(path), "--data", str(image_folder)]) == 0
    return path


def test_an_elastic_file_is_evaluated_and_exported_at_any_ratio(saved_vit, image_folder, tmp_path, capsys):
    images, path = other_images(image_folder, tmp_path / "other"), tmp_path / "vit.safetensors"
    made = run(
        "elastic", saved_vit, "--data", image_folder, "--ratios", 0.25, 0.5, "-o", path, "--json", capsys=capsys
    )  # fmt: skip
    assert made["ratios"] == [0.25, 0.5]
    assert made["size_bytes"] == path.stat().st_size
    evaluated = run("evaluate", path, "--ratio", 0.5, "--data", images, "--json", capsys=capsys)
    run("export", path, tmp_path / "m.onnx", "--ratio", 0.5, "--json", capsys=capsys)
    assert run("evaluate", tmp_path / "m.onnx", "--data", images, "--json", capsys=capsys) == evaluated
    assert "were calibration images" in run("evaluate", path, "--data", image_folder, code=2, capsys=capsys)
    assert "0.5" in run("evaluate", path, "--ratio", 0.9, "--data", images, code=2, capsys=capsys)
    assert "ends in .safetensors" in run(
        "elastic", saved_vit, "--data", image_folder, "-o", tmp_path / "x", code=2, capsys=capsys
    )
    assert "has one width only" in run("evaluate", saved_vit, "--ratio", 0.5, "--data", images, code=2, capsys=capsys)


def test_an_elastic_file_of_parts_merges_its_tokens_when_it_is_opened(saved_vit, image_folder, tmp_path, capsys):
    images, path = other_images(image_folder, tmp_path / "other"), tmp_path / "parts.safetensors"
    made = run(
        "elastic", saved_vit, "--data", image_folder, "--ratios", 0.5, "--parts", "ffn", "qk", "layers",
        "--criterion", "variance", "--compensate", "ridge", "-o", path, "--json", capsys=capsys,
    )  # fmt: skip
    assert {name.rpartition(".")[2] for name in made["widths"]["0.5"]} == {"mlp", "qk"}
    assert len(made["left_out"]["0.5"]) == len(vitprune.load(saved_vit).blocks)
    merged = ["--ratio", 0.5, "--merge", "0:3"]
    evaluated = run("evaluate", path, *merged, "--data", images, "-o", tmp_path / "e", "--json", capsys=capsys)
    assert json.loads((tmp_path / "e" / "evaluation.json").read_text())["models"]["model"]["merge"][0] == 3
    run("export", path, tmp_path / "m.onnx", *merged, "--json", capsys=capsys)
    assert run("evaluate", tmp_path / "m.onnx", "--data", images, "--json", capsys=capsys) == {
        **evaluated,
        "output": None,
    }
    assert "fixed in such a file" in run(
        "evaluate", tmp_path / "m.onnx", "--merge", "0:3", "--data", images, code=2, capsys=capsys
    )


def test_what_a_latency_target_made_is_timed_beside_the_dense_model(tiny_vit):
    pruned = vitprune.remove_neurons(tiny_vit, half_plan(tiny_vit))
    asked = Asked("latency", 2.0, predicted=2.0, dense=3.0)
    measured = measure_reached(tiny_vit, pruned, asked, backend="onnxruntime-cpu", batch_size=2)
    assert (measured.backend, measured.batch_size, measured.predicted_speedup) == ("onnxruntime-cpu", 2, 1.5)
    assert measured.median_ms > 0
    assert measured.dense_median_ms > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--round-to", "some"], "round_to must be a number of at least 1, or auto; got some"),
        (["--target-latency", 1, "--mode", "mask"], "--target-latency is for --mode remove"),
        (["--target-latency", 1, "--latency-batch-size", 0], "latency_batch_size must be at least 1"),
        (["--backend", "torch-eager"], "go with --target-latency, --speedup or --round-to auto"),
    ],
)
def test_latency_targets_that_make_no_sense_are_refused(arguments, message, saved_vit, image_folder, tmp_path, capsys):
    refusal = run("prune", saved_vit, "--data", image_folder, *arguments, "-o", tmp_path / "a", code=2, capsys=capsys)
    assert message in refusal
    assert list(tmp_path.iterdir()) == []


def test_widths_are_rounded_to_what_is_fast_here(saved_vit, image_folder, tmp_path, capsys):
    answer = run(
        "prune", saved_vit, "--data", image_folder, "--round-to", "auto", "-o", tmp_path / "c", "--json", capsys=capsys
    )
    assert answer["pruning_ratio"] >= 0.5
