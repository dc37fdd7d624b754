"""Every shipped recipe, run on real weights and a few real photos by its keys."""

from __future__ import annotations

import json
import re

import pytest
import timm
import yaml
from conftest import shared
from test_cli import RECIPES

import vitprune
from vitprune.cli import main
from vitprune.demo import DATA_CONFIG, MODEL_ARGS
from vitprune.recipe.read import KEY_NAME

SHIPPED = {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}
CHEAP = ["criterion=magnitude", "compensate=bias"]
BENCH = ["backends=[onnxruntime-cpu]", "batch_sizes=[1]", "seconds=0.05"]
GIVEN = {
    "curve_deit_tiny": ["ratios=[0.25]", "criteria=[magnitude]", "compensations=[none, bias]", "step=1.0"],
    "deit_tiny_half": [*CHEAP, *BENCH],
    "finetune_and_prune": [*CHEAP, "epochs=1", "recover_epochs=1", "batch_size=4", "target_macs=0.8", "parts=[ffn]"],
    "paper_jas_scores": ["images_per_class=1"],
    "paper_manipulation": ["images_per_class=2", "quadrature=riemann:2"],
    "paper_similarity": ["images_per_class=2", "pairs=2"],
    "paper_topk_mask": ["images_per_class=1", "top_k=[1, 5]", "mask_share=[1.0]"],
    "specialist_10_classes": [*CHEAP, *BENCH],
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Links to two photos of each of three classes, other ones in 'val'."""
    root = tmp_path_factory.mktemp("photos")
    for split in ("train", "val"):
        for folder in sorted(shared(f"data/imagenette/{split}").iterdir())[:3]:
            (root / split / folder.name).mkdir(parents=True)
            for file in sorted(folder.iterdir())[:2]:
                (root / split / folder.name / file.name).symlink_to(file)
    return root


@pytest.fixture
def run_small(photos, tmp_path, monkeypatch, capsys):
    """Run a recipe on them; return its JSON answer."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(name, *given):
        asked = yaml.safe_load(SHIPPED[name].read_text())["keys"]
        known = {
            "checkpoint": shared("weights/deit_tiny_patch16_224.safetensors"),
            "data": photos / "train",
            "eval_data": photos / "val",
            "out": tmp_path / "out",
        }
        keys = [f"{key}={value}" for key, value in known.items() if key in asked]
        capsys.readouterr()
        assert main(["run", str(SHIPPED[name]), *keys, *given, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


@pytest.mark.parametrize("name", GIVEN)
def test_a_recipe_runs_in_small_and_not_again(name, run_small):
    first = run_small(name, *GIVEN[name])
    assert not any(first["cached"])
    again = run_small(name, *GIVEN[name])
    assert all(again["cached"])
    assert again["answers"] == first["answers"]


def test_the_demo_runs(run_small, tmp_path):
    """With a model that is not trained, in the place of the one that the demo keeps."""
    model = timm.create_model("vit_tiny_patch16_224", pretrained_cfg_overlay=DATA_CONFIG, **MODEL_ARGS)
    model.model_args = MODEL_ARGS
    vitprune.save(model, tmp_path / "cache/vitprune/digits-vit-seed0")
    (answer,) = run_small("demo")["answers"]
    assert answer["pruning_ratio"] == pytest.approx(0.5, abs=0.01)
    assert (tmp_path / "out/demo/pruned.onnx").is_file()


def test_every_recipe_is_run_here():
    assert SHIPPED.keys() == {*GIVEN, "demo"}


@pytest.mark.parametrize("path", SHIPPED.values(), ids=SHIPPED)
def test_a_header_says_what_a_reader_needs(path):
    text = path.read_text()
    assert max(map(len, text.splitlines())) <= 120
    header = text[: text.index("keys:")]
    for title in ("Shows", "Images", "Model", "Expects", "Time", "Command"):
        assert re.search(rf"^# {title}:  +\S", header, re.MULTILINE), title
    assert f"vitprune run recipes/{path.name}" in header
    keys = re.search(r"^keys:\n((?:  .*\n)+)", text, re.MULTILINE).group(1)
    for line in keys.splitlines():
        assert re.fullmatch(rf"  {KEY_NAME}: .+  # \S.+", line), line


@pytest.mark.parametrize("name", [name for name in SHIPPED if name.startswith("paper_")])
def test_the_models_of_the_paper_are_named_as_timm_knows_them(name):
    lines = re.findall(r"^#.* model=(vit\S+)(?: checkpoint=(\S+))?", SHIPPED[name].read_text(), re.MULTILINE)
    assert [model.split("_patch")[0] for model, _file in lines] == ["vit_base"] * 4 + ["vit_large"] * 2 + ["vit_base"]
    for model, file in lines:
        cfg = timm.get_pretrained_cfg(model, allow_unregistered=False)
        assert file or (cfg.num_classes == 1000 and cfg.hf_hub_id)
        assert cfg.mean == ((0.485, 0.456, 0.406) if model.endswith(".mae") else (0.5, 0.5, 0.5))
        assert cfg.input_size == ((3, 384, 384) if "_384" in model else (3, 224, 224))
