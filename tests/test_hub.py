"""Models go to the hub and come back: the same weights, pinned, with a card; against a hub on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import TINY, make_vit, photos
from hub_server import serve_hub

import vitprune
from vitprune import VitpruneError
from vitprune.evaluation.accuracy import count_right
from vitprune.evaluation.evaluation_folder import load_evaluation, save_evaluation
from vitprune.hub.push import describe_measured, push
from vitprune.speed.bench import BenchRow
from vitprune.speed.bench_folder import BenchRecord, save_bench


@pytest.fixture(scope="module")
def hub():
    with serve_hub() as served:
        yield served


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A pruned model, an evaluation of it against its dense self, and a benchmark."""
    folder = tmp_path_factory.mktemp("made")
    names = tuple(f"class{number}" for number in range(5))
    for kind, seed in (("calibration", 0), ("val", 1)):
        photos(folder / kind, names, count=3, seed=seed)
    model = make_vit().float()
    model.model_args, model.label_names = dict(TINY), names
    vitprune.save(model, folder / "dense")
    dense = vitprune.load(folder / "dense")
    batches = vitprune.ImageBatches(vitprune.find_images(folder / "calibration", 5, label_names=names), dense)
    pruned, plan = vitprune.prune(dense, batches, ratio=0.5, parts=["ffn", "qk"], allocation="uniform")
    vitprune.save(pruned, folder / "half", plan=plan)
    return folder


def run(address, home, *argv, code=0, token="secret"):
    """Run a command with its hub at an address; a process of its own, since the client reads it once."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": address,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "*",
    }
    environment.pop("HF_TOKEN", None)
    if token:
        environment["HF_TOKEN"] = token
    command = [sys.executable, "-m", "vitprune", *map(str, argv)]
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert told.returncode == code, told.stderr
    return told.stderr.strip().splitlines()[-1] if code else json.loads(told.stdout)


def test_a_pruned_model_goes_there_and_comes_back(hub, made, tmp_path):
    served, address = hub
    data = ("--data", made / "val", "--json")
    run(address, tmp_path, "evaluate", made / "half", *data, "--against", made / "dense", "-o", tmp_path / "val")
    timed = ("--backend", "torch-eager", "--batch-size", 1, "--seconds", 0.05)
    run(address, tmp_path, "bench", made / "half", *timed, "--json", "-o", tmp_path / "bench")
    measured = ("--measured", tmp_path / "val", tmp_path / "bench")
    pushed = run(address, tmp_path, "push", made / "half", "me/half", *measured, "--json")
    assert pushed["files"] == ["README.md", "config.json", "model.safetensors", "plan.safetensors"]
    revision, files = served.find("me/half", "main")
    assert pushed["model"] == f"hf-hub:me/half@{revision}"
    card = files["README.md"].decode()
    assert "library_name: vitprune" in card
    assert "pipeline_tag: image-classification" in card
    assert "FFN neurons (50%)" in card
    assert "95 % interval" in card
    assert "torch-eager" in card
    assert 'vitprune.load("hf-hub:me/half")' in card
    everything = b"".join(files.values())
    assert str(made).encode() not in everything, "where files lie on this machine is nobody's business"
    # Another commit changes nothing for whoever asks for the first one.
    served.add("me/half", {"README.md": b"changed"})
    answer = run(address, tmp_path / "other", "evaluate", pushed["model"], *data)
    local = load_evaluation(tmp_path / "val").judged
    assert answer["top1"] == count_right(local.answers).top1
    assert set(answer["per_class"]) == set(local.class_names.values())
    line = run(address, tmp_path / "other", "evaluate", "hf-hub:me/half", "--data", made / "calibration", code=2)
    assert "15 of 15 evaluation images were calibration images" in line
    without_images = ("--criterion", "magnitude", "--compensate", "none", "--ratio", 0.1)
    run(address, tmp_path / "other", "prune", "hf-hub:me/half", *without_images, "--json", "-o", tmp_path / "again")
    opened = vitprune.read_plan(tmp_path / "again").facts.opened
    assert opened["model"].startswith("hf-hub:me/half@")
    assert len(opened["model"].partition("@")[2]) == 40


def test_a_model_of_transformers_is_fetched(hub, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    served, address = hub
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    config = transformers.ViTConfig(**shape, image_size=32, patch_size=16, num_labels=5)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "model")
    files = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    served.add("google/tiny", {**files, "tf_model.h5": b"not asked for"})
    told = run(address, tmp_path / "home", "info", "hf-hub:google/tiny", "--json")
    assert told["num_classes"] == 5
    assert not any("tf_model" in request for request in served.requests)
    assert "it could not be fetched from the hub" in run(address, tmp_path, "info", "hf-hub:google/none", code=2)


def test_what_the_hub_refuses_is_one_line(hub, made, tmp_path):
    _served, address = hub
    line = run(address, tmp_path, "push", made / "half", "me/half", code=2, token="wrong")
    assert "the hub does not take it" in line
    line = run("http://127.0.0.1:9", tmp_path, "push", made / "half", "me/half", code=2)
    assert "the hub does not take it" in line


def test_only_figures_of_this_very_model_come_onto_its_card(made, tmp_path):
    evaluation, _images = vitprune.judge(vitprune.Source(str(made / "dense")), vitprune.ImageChoice(str(made / "val")))
    save_evaluation(evaluation, tmp_path / "of-dense")
    with pytest.raises(VitpruneError, match="was measured of .*dense, not of .*half"):
        describe_measured(made / "half", [tmp_path / "of-dense"])
    assert "top-1" in describe_measured(made / "dense", [tmp_path / "of-dense"])[0]
    with pytest.raises(VitpruneError, match="holds neither an evaluation"):
        describe_measured(made / "half", [tmp_path])
    row = BenchRow("other", "torch-eager", "float32", 1, 1, 1.0, 1.0, 1000.0, 1.0, 1.0, 1.0, None, None)
    save_bench(BenchRecord((row,), {"processor": "a CPU"}), tmp_path / "bench")
    with pytest.raises(VitpruneError, match="timed no model called half"):
        describe_measured(made / "half", [tmp_path / "bench"])
    with pytest.raises(VitpruneError, match="it is called OWNER/NAME"):
        push(made / "half", "half")


def test_the_card_of_a_folder(made):
    dense, half = ((made / name / "README.md").read_text() for name in ("dense", "half"))
    assert "What was removed" not in dense
    assert "query/key dimensions (50%)" in half
    assert "from 15 calibration images" in half
    assert "| parameters |" in half
    assert "Nothing was measured" in half
    vitprune.save(vitprune.load(made / "half"), made / "copy")
    assert torch.equal(vitprune.load(made / "copy").head.weight, vitprune.load(made / "half").head.weight)
