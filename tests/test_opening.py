"""How a model was opened is remembered by what is made of it, and said once."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from conftest import TINY, make_vit

import vitprune
from vitprune.cli import main
from vitprune.models.identity import hash_weights

NAME = "vit_tiny_patch16_224"
SAID = [
    "--model-args",
    "num_heads=3",
    "--mean",
    "0.2",
    "--std",
    "0.3",
    "0.4",
    "0.5",
    "--crop",
    "1",
    "--interpolation",
    "bilinear",
]


@pytest.fixture
def checkpoint(tmp_path):
    """Weights of a model whose heads cannot be told from its shapes."""
    torch.manual_seed(0)
    torch.save({"net": make_vit().float().state_dict(), "loss": torch.zeros(1)}, tmp_path / "tuned.pth")
    return str(tmp_path / "tuned.pth")


def run(capsys, *words):
    status = main([*map(str, words)])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def batches_of(model, folder):
    vitprune.models.transform.set_transform(
        model, mean=0.2, std=[0.3, 0.4, 0.5], crop_pct=1.0, interpolation="bilinear"
    )
    return vitprune.ImageBatches(vitprune.find_images(folder, model.num_classes), model)


def test_a_run_remembers_how_its_model_was_opened(checkpoint, image_folder, tmp_path, capsys):
    words = ("discover", NAME, "--checkpoint", checkpoint, *SAID, "--data", image_folder, "--method", "activation")
    status, _out, said = run(capsys, *words, "-o", tmp_path / "run")
    assert status == 0, said
    assert said.count("images: 32 x 32, crop 1, bilinear, mean 0.2 0.2 0.2, std 0.3 0.4 0.5") == 1
    assert said.count("left out 1 (loss: 1) tensors") == 1
    options = ("--ratio", "0.5", "--criterion", "magnitude", "--compensate", "none")
    status, _out, said = run(capsys, "prune", tmp_path / "run", *options, "-o", tmp_path / "pruned")
    assert status == 0, said
    assert vitprune.data.data_config(vitprune.load(tmp_path / "pruned"))["mean"] == [0.2, 0.2, 0.2]
    status, _out, said = run(capsys, "prune", tmp_path / "run", "--mean", "0.5", "-o", tmp_path / "other")
    assert (status, "leave --mean out" in said) == (2, True)


def test_the_checkpoint_of_a_dense_model_need_not_be_said_again(checkpoint, image_folder, tmp_path, capsys):
    words = ("prune", NAME, "--checkpoint", checkpoint, *SAID, "--ratio", "0.5", "--criterion", "magnitude")
    status, _out, said = run(capsys, *words, "--compensate", "none", "-o", tmp_path / "pruned")
    assert status == 0, said
    against = ("evaluate", tmp_path / "pruned", "--data", image_folder, "--against", NAME, "--json")
    status, out, said = run(capsys, *against)
    assert status == 0, said
    dense = vitprune.load(NAME, checkpoint=checkpoint, model_args={"num_heads": 3})
    answers = vitprune.evaluate(dense, batches_of(dense, image_folder))
    assert json.loads(out)["against"]["top1"] == answers.top1
    state = torch.load(checkpoint, weights_only=True)
    state["net"]["head.bias"] += 1
    torch.save(state, checkpoint)
    status, _out, said = run(capsys, *against)
    assert (status, "holds other weights than when" in said) == (2, True)
    (tmp_path / "tuned.pth").rename(tmp_path / "moved.pth")
    status, _out, said = run(capsys, *against)
    assert status == 2
    assert "which is gone; say where they are with --against-checkpoint" in said


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_folders_of_half_precision_are_searched_in_single(dtype, image_folder, tmp_path, capsys):
    model = make_vit().to(dtype)
    model.model_args = TINY
    vitprune.save(model, tmp_path / "half")
    words = ("discover", tmp_path / "half", "--data", image_folder, "--images-per-class", "1", "-o", tmp_path / "run")
    status, _out, said = run(capsys, *words, "--quadrature", "gauss-legendre:2")
    assert status == 0, said
    assert "paths are computed in float32" in said
    found, opened = vitprune.discovery.run.open_run(tmp_path / "run")
    assert hash_weights(opened) == found.weights_sha256 == hash_weights(model)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--model-args", "num_heads"), "--model-args takes KEY=VALUE, such as num_heads=4; got num_heads"),
        (("--mean", "127"), "--mean is of pixels in [0, 1]"),
        (("--crop", "3"), "--crop must be in (0, 1], got 3.0"),
        (("--class-names", "absent.txt"), "--class-names absent.txt: no such file"),
        (("--checkpoint-key", "teacher"), "--checkpoint-key 'teacher'"),
    ],
)
def test_mistakes_beside_a_model_name_the_option(words, message, checkpoint, image_folder, capsys):
    given = ("evaluate", NAME, "--checkpoint", checkpoint, *SAID[:2], "--data", image_folder)
    if words[0] == "--model-args":
        given = given[:4] + given[6:]
    status, _out, said = run(capsys, *given, *words)
    assert status == 2
    assert message in said


def commands(model, output, data):
    return {
        "discover": ("discover", model, "--data", data, "-o", output),
        "prune": ("prune", model, "--data", data, "-o", output),
        "elastic": ("elastic", model, "--data", data, "-o", output.with_suffix(".safetensors")),
        "curve": ("curve", model, "--data", data, "--eval-data", data, "-o", output),
        "evaluate": ("evaluate", model, "--data", data, "-o", output),
        "export": ("export", model, output.with_suffix(".onnx"), "--data", data),
        "bench": ("bench", model, "-o", output),
        "report": ("report", model, "-o", output.with_suffix(".html")),
        "demo": ("demo", "-o", output),
        "convert": ("convert", "a.args.json", "--model", model, "--data", data, "-o", output),
    }


@pytest.fixture
def _nothing_is_loaded(monkeypatch):
    def refuse(*_args, **_said):
        raise AssertionError("a model was loaded before the output was looked at")

    monkeypatch.setattr("vitprune.models.load.load", refuse)
    monkeypatch.setattr("vitprune.evaluation.open_model.load", refuse)
    monkeypatch.setattr(timm, "create_model", refuse)


@pytest.mark.parametrize("command", commands("m", Path("o"), "d"))
@pytest.mark.usefixtures("_nothing_is_loaded")
def test_an_output_that_cannot_be_written_is_noticed_first(command, image_folder, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    status, _out, said = run(capsys, *commands(NAME, tmp_path / "file" / "below" / "o", image_folder)[command])
    assert status == 2
    assert "cannot be written" in said
    assert "is not a folder" in said


@pytest.mark.parametrize("command", ["discover", "prune", "elastic", "curve", "evaluate", "export", "convert"])
@pytest.mark.usefixtures("_nothing_is_loaded")
def test_images_that_are_not_there_are_noticed_first(command, tmp_path, capsys):
    status, _out, said = run(capsys, *commands(NAME, tmp_path / "o", tmp_path / "absent")[command])
    assert status == 2
    assert "absent: no such data folder" in said or command == "convert"


def test_an_onnx_file_is_called_that(saved_vit, tmp_path, capsys):
    status, _out, said = run(capsys, "export", saved_vit, tmp_path / "model.pt")
    assert status == 2
    assert "model.pt: an ONNX file ends in .onnx" in said
    assert not (tmp_path / "model.pt").exists()


def test_a_report_about_nothing_ends_before_torch_is_imported():
    code = (
        "import sys\n"
        "from vitprune.cli import main\n"
        "assert main(['report', 'nosuch']) == 2\n"
        "assert not {'torch', 'timm', 'matplotlib'} & set(sys.modules)\n"
    )
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    assert time.perf_counter() - started < 5  # of a machine that is busy with other tests


@pytest.mark.parametrize("output", ["/proc/absent/o", "n" * 300])
@pytest.mark.usefixtures("_nothing_is_loaded")
def test_a_place_for_no_files_and_a_name_too_long_are_noticed_first(output, image_folder, capsys):
    status, _out, said = run(capsys, "prune", NAME, "--data", image_folder, "-o", output)
    assert status == 2
    assert "cannot be written" in said
