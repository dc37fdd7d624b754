"""What version 0.1.0 wrote is still read: one file or folder of each kind, of a small random model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import vitprune
from vitprune.models.units import FFN, read_group

OLD = Path(__file__).parent / "fixtures" / "version_0_1_0"
EXPECTED = json.loads((OLD / "expected.json").read_text())
IMAGES = torch.linspace(-2, 2, 2 * 3 * 16 * 16).view(2, 3, 16, 16)


@torch.inference_mode()
def test_a_pruned_folder_gives_its_answers_and_says_who_had_a_say():
    model, plan = vitprune.load(OLD / "pruned"), vitprune.read_plan(OLD / "pruned")
    torch.testing.assert_close(model(IMAGES), torch.tensor(EXPECTED["pruned"]), rtol=1e-5, atol=1e-6)
    assert plan.widths == EXPECTED["widths"]
    assert (plan.facts.criterion, plan.facts.compensation, plan.facts.pruning_ratio_asked) == ("obs", "sequential", 0.5)
    assert plan.facts.target.kind == "neurons"
    assert len(plan.facts.calibration.files) == 9
    assert model.calibration == plan.calibration != frozenset()


@torch.inference_mode()
@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.4, 0.5])
def test_an_elastic_file_gives_its_answers(ratio):
    model = vitprune.load(OLD / "elastic.safetensors", ratio=ratio)
    torch.testing.assert_close(model(IMAGES), torch.tensor(EXPECTED[f"elastic {ratio}"]), rtol=1e-5, atol=1e-6)
    plan = vitprune.read_elastic_plan(OLD / "elastic.safetensors", ratio)
    assert {group.name: group.num_units for group in vitprune.find_groups(model)} == plan.widths
    assert plan.calibration == model.calibration


def test_an_onnx_file_gives_its_answers():
    opened = vitprune.open_onnx(OLD / "pruned.onnx")
    # rtol 1e-3 / atol 1e-4: another processor's kernels sum in another order.
    torch.testing.assert_close(opened(IMAGES), torch.tensor(EXPECTED["onnx"]), rtol=1e-3, atol=1e-4)
    assert opened.calibration == vitprune.read_plan(OLD / "pruned").calibration


def test_a_run_has_its_paths():
    run = vitprune.load_run(OLD / "run")
    assert run.found.neurons.tolist() == EXPECTED["paths"]
    assert run.found.seen.files == run.images.files
    assert not run.found.seen.sha256  # they were not recorded then


def test_the_ffns_of_then_are_groups_of_now():
    described = {"name": "a", "up_projs": ["a.fc1"], "down_proj": "a.fc2", "num_neurons": 4, "packed": True}
    group = read_group(described)
    assert (group.kind, group.num_units, group.read_by) == (FFN, 4, "a.fc2")
    assert group.owned[0].indices(torch.tensor([1]), 4).tolist() == [1, 5]
