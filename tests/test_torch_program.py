"""Programs of torch.export: they run with torch alone, at any batch size."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from conftest import TINY, make_vit

import vitprune
from vitprune import VitpruneError
from vitprune.cli import main
from vitprune.export.torch_program import read_program_facts

ALONE = """
import sys
sys.modules["timm"] = sys.modules["vitprune"] = sys.modules["torchvision"] = None
import torch
program = torch.export.load(sys.argv[1])
for images, expected in torch.load(sys.argv[2]):
    assert torch.allclose(program.module()(images), expected, rtol=1e-4, atol=1e-5), images.shape
"""


def make_batches(size: int = 32):
    images = torch.randn(6, 3, size, size, generator=torch.Generator().manual_seed(0))
    return [(images[:4], torch.arange(4)), (images[4:], torch.arange(2))]


def run_alone(path, images, model, folder):
    """Run a program in a Python that has neither timm nor vitprune."""
    with torch.no_grad():
        torch.save([(each, model(each)) for each in images], folder / "expected.pt")
    subprocess.run([sys.executable, "-W", "ignore", "-c", ALONE, path, folder / "expected.pt"], check=True, cwd=folder)


@pytest.mark.parametrize("parts", [("ffn",), ("ffn", "qk", "vo")])
def test_a_pruned_model_runs_with_torch_alone(parts, tmp_path):
    model = make_vit().float()
    pruned, plan = vitprune.prune(model, make_batches(), ratio=0.5, parts=parts, allocation="uniform")
    report = vitprune.export_program(pruned, tmp_path / "half.pt2", make_batches(), plan=plan)
    assert report.max_abs_diff < 1e-5
    assert report.top1_agreement == 1
    run_alone(tmp_path / "half.pt2", [torch.randn(count, 3, 32, 32) for count in (1, 3)], pruned, tmp_path)
    facts = read_program_facts(tmp_path / "half.pt2")
    assert facts["num_classes"] == 5
    assert facts["data_config"]["input_size"] == [3, 32, 32]
    assert facts["calibration_sha256"]


def test_merging_tokens_are_written(tmp_path):
    merged = vitprune.set_merging(make_vit().float(), (0, 4, 0))
    vitprune.export_program(merged, tmp_path / "merged.pt2", make_batches())
    run_alone(tmp_path / "merged.pt2", [make_batches()[0][0]], merged, tmp_path)


def test_a_program_that_answers_otherwise_is_not_written(tmp_path, monkeypatch):
    model = make_vit().float()
    monkeypatch.setattr("vitprune.export.torch_program._trace", lambda _model, _dynamic: traced_other())
    with pytest.raises(VitpruneError, match="the exported graph differs from torch"):
        vitprune.export_program(model, tmp_path / "other.pt2", make_batches())
    assert not list(tmp_path.iterdir())


def traced_other():
    dims = ({0: torch.export.Dim("batch", min=1, max=64)},)
    return torch.export.export(make_vit(seed=1).float(), (torch.zeros(2, 3, 32, 32),), dynamic_shapes=dims)


def test_programs_from_the_command_line(saved_vit, image_folder, tmp_path, capsys):
    said = ("--data", image_folder, "--json")

    def run(*argv, code=0):
        assert main([*map(str, argv)]) == code
        told = capsys.readouterr()
        return told.err.strip().splitlines()[-1] if code else json.loads(told.out)

    answer = run("export", saved_vit, tmp_path / "model.pt2", *said)
    assert answer["max_abs_diff"] < 1e-4
    assert "ends in .onnx" in run("export", saved_vit, tmp_path / "model.bin", *said, code=2)
    for extra, told in (
        (("--int8",), "--int8 is of ONNX"),
        (("--opset", 18), "--opset is of ONNX"),
        (("--format", "onnx"), "ends in .onnx"),
        (("--format", "transformers"), "writes a folder"),
    ):
        assert told in run("export", saved_vit, tmp_path / "x.pt2", *said, *extra, code=2)
    line = run("export", saved_vit, tmp_path / "x", *said, "--format", "transformers", "--dynamic-size", code=2)
    assert "--dynamic-size is of files" in line
    line = run("export", saved_vit, tmp_path / "x", *said, "--format", "transformers", code=2)
    assert "was not loaded from transformers" in line
    assert not (tmp_path / "x").exists()


def test_files_that_are_no_programs(tmp_path):
    (tmp_path / "x.pt2").write_text("no zip")
    with pytest.raises(VitpruneError, match="is no program that vitprune wrote"):
        read_program_facts(tmp_path / "x.pt2")
    with pytest.raises(VitpruneError, match=r"ends in \.pt2"):
        vitprune.export_program(make_vit().float(), tmp_path / "x.pt", make_batches())


def test_encoders_are_written(tmp_path):
    model = make_vit(num_classes=0).float()
    model.model_args = {**TINY, "num_classes": 0}
    report = vitprune.export_program(model, tmp_path / "encoder.pt2", make_batches())
    assert report.mean_cosine > 0.99999
