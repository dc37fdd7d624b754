"""What cannot be right is refused before a model is fetched or built: paths, folders, outputs, numbers."""

from __future__ import annotations

import subprocess
import sys

import pytest
import timm
import torch
from conftest import photos
from safetensors.torch import save_file

from vitprune.cli import main

MODEL = ["vit_tiny_patch16_224", "--checkpoint", "w.safetensors"]
UNWEIGHTED = ["vit_tiny_patch16_224", "--checkpoint", "nosuch.pth"]
DATA = ["--data", "photos"]
CASES = [
    (["discover", *MODEL, "--data", "nosuch", "-o", "o"], "nosuch: no such data folder"),
    (["discover", *MODEL, *DATA, "-o", "taken"], "taken exists"),
    (["discover", *UNWEIGHTED, *DATA, "-o", "o"], "checkpoint nosuch.pth: no such file"),
    (["discover", *MODEL, *DATA, "--images-per-class", "0", "-o", "o"], "images_per_class must be at least 1"),
    (["prune", *MODEL, "--data", "nosuch", "-o", "o"], "nosuch: no such data folder"),
    (["prune", *MODEL, *DATA, "-o", "taken"], "taken exists"),
    (["prune", *MODEL, *DATA, "-o", "/proc/x/y"], "cannot be written"),
    (["prune", *UNWEIGHTED, *DATA, "-o", "o"], "checkpoint nosuch.pth: no such file"),
    (["prune", *MODEL, *DATA, "--plan", "nosuch", "-o", "o"], "nosuch: no such file"),
    (["prune", *MODEL, *DATA, "--ratio", "1.5", "-o", "o"], "ratio must be in [0, 1), got 1.5"),
    (["prune", *MODEL, *DATA, "--speedup", "0.5", "-o", "o"], "speedup must be above 1, got 0.5"),
    (["prune", *MODEL, *DATA, "--target-macs", "-1", "-o", "o"], "target_macs must be above 0, got -1"),
    (["prune", *MODEL, *DATA, "--keep-paths", "0", "-o", "o"], "keep_paths must be at least 1"),
    (["prune", *MODEL, *DATA, "--keep-paths", "3", "-o", "o"], "--keep-paths takes the paths of a run"),
    (["prune", *MODEL, *DATA, "--keep-paths", "3", "--ratio", "0.5", "-o", "o"], "leave pruning_ratio out"),
    (["prune", *MODEL, *DATA, "--step", "0", "-o", "o"], "step must be in (0, 1], got 0"),
    (["prune", *MODEL, *DATA, "--max-drop", "0.01", "--eval-data", "nosuch", "-o", "o"], "nosuch: no such data folder"),
    (["prune", *MODEL, *DATA, "--speedup", "2", "--export", "o.zip", "-o", "o"], "an ONNX file ends in .onnx"),
    (["elastic", *MODEL, "--data", "nosuch", "--ratios", "0.2", "-o", "o.safetensors"], "nosuch: no such data folder"),
    (["elastic", *MODEL, *DATA, "--ratios", "0.2", "-o", "taken"], "ends in .safetensors"),
    (["curve", *MODEL, "--data", "nosuch", "--eval-data", "photos", "-o", "o"], "nosuch: no such data folder"),
    (["curve", *MODEL, *DATA, "--eval-data", "nosuch", "-o", "o"], "nosuch: no such data folder"),
    (["curve", *MODEL, *DATA, "--eval-data", "photos", "-o", "taken"], "taken exists"),
    (["curve", *MODEL, *DATA, "--eval-data", "photos", "--ratios", "2", "-o", "o"], "ratios must be in [0, 1)"),
    (["evaluate", *MODEL, "--data", "nosuch"], "nosuch: no such data folder"),
    (["evaluate", *MODEL, *DATA, "-o", "taken"], "taken exists"),
    (["evaluate", *MODEL, *DATA, "--against", "nosuch.onnx"], "nosuch.onnx: no such file"),
    (["evaluate", *MODEL, *DATA, "--class-map", "nosuch.json"], "nosuch.json: no such file"),
    (["evaluate", *MODEL, *DATA, "--batch-size", "0"], "batch_size must be at least 1"),
    (["export", MODEL[0], "taken", *MODEL[1:]], "taken is a folder"),
    (["export", MODEL[0], "o.zip", *MODEL[1:]], "an ONNX file ends in .onnx"),
    (["export", MODEL[0], "/proc/x/o.onnx", *MODEL[1:]], "cannot be written"),
    (["export", MODEL[0], "o.onnx", *MODEL[1:], "--data", "nosuch"], "nosuch: no such data folder"),
    (["bench", *UNWEIGHTED], "checkpoint nosuch.pth: no such file"),
    (["bench", *MODEL, "-o", "taken"], "taken exists"),
    (["bench", "nosuch.onnx"], "nosuch.onnx: no such file"),
    (["bench", *MODEL, "--batch-size", "1", "0"], "batch_size must be at least 1, got 0"),
    (["doctor", *UNWEIGHTED], "checkpoint nosuch.pth: no such file"),
    (["doctor", "nosuch.onnx"], "nosuch.onnx: no such file"),
    (["analyze", "nosuch", "-o", "o"], "nosuch"),
    (["report", "nosuch", "-o", "o.html"], "nosuch: no such folder"),
    (["predict", MODEL[0], "nosuch.jpg", *MODEL[1:]], "nosuch.jpg: no such image or folder"),
    (["finetune", *MODEL, "--data", "nosuch", "-o", "o"], "nosuch: no such data folder"),
    (["finetune", *MODEL, *DATA, "-o", "taken"], "taken exists"),
    (["finetune", *MODEL, *DATA, "--lr", "0", "-o", "o"], "lr must be positive, got 0"),
    (["recover", "dense", "--data", "nosuch", "-o", "o"], "nosuch: no such data folder"),
    (["recover", "dense", *DATA, "-o", "taken"], "taken exists"),
    (["recover", "dense", *DATA, "--losses", "answer", "-o", "o"], "answer"),
    (["recover", "dense", *DATA, "--shard-teacher", "-o", "o"], "shares a teacher out among processes"),
]


@pytest.fixture
def place(tmp_path, monkeypatch):
    photos(tmp_path / "photos", ["a", "b"])
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("mine")
    save_file({"x": torch.zeros(1)}, tmp_path / "w.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "said"), CASES, ids=[f"{number}-{arguments[0]}" for number, (arguments, _said) in enumerate(CASES)]
)
def test_it_is_refused_before_a_model_is_built(arguments, said, place, monkeypatch, capsys):
    def build(*_arguments, **_options):
        raise AssertionError("a model was built")

    monkeypatch.setattr(timm, "create_model", build)
    before = sorted(place.rglob("*"))
    assert main(arguments) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert said in told
    assert sorted(place.rglob("*")) == before


def test_a_report_of_nothing_needs_no_torch(tmp_path):
    program = (
        "import sys; from vitprune.cli import main; code = main(['report', 'nosuch', '-o', 'o.html']); "
        "sys.exit(9 if 'torch' in sys.modules else code)"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=False).returncode == 2
