"""Cards: what made a folder, enough to make it again; and nothing in a folder depends on them."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time

import pytest
import yaml

import vitprune
from vitprune.card import make_card, read_card, write_card
from vitprune.cli import main
from vitprune.data import digest_images, hash_images
from vitprune.files import CARD_FILE, open_resumable


def discover(saved_vit, image_folder, output, *more):
    given = ["discover", str(saved_vit), "--data", str(image_folder), "--images-per-class", "2", "-o", str(output)]
    return main([*given, *more])


def content_of(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != CARD_FILE}


def test_the_command_on_a_card_makes_the_same_folder(saved_vit, image_folder, tmp_path):
    (tmp_path / "options.yaml").write_text(yaml.safe_dump({"top_k": 2, "classes": ["class1", "class3"]}))
    started = time.perf_counter()
    assert discover(saved_vit, image_folder, tmp_path / "a b", "--config", str(tmp_path / "options.yaml")) == 0
    seconds = time.perf_counter() - started
    card, before = read_card(tmp_path / "a b"), content_of(tmp_path / "a b")
    assert 0 < card.seconds <= seconds
    assert card.arguments["batch_size"] == 8
    program, *typed = shlex.split(card.command)
    assert program == "vitprune"
    assert "--batch-size" not in typed
    assert main([*typed, "--overwrite"]) == 0
    assert content_of(tmp_path / "a b") == before


def test_a_card_names_the_machine_and_the_versions(saved_vit, image_folder, tmp_path):
    assert discover(saved_vit, image_folder, tmp_path / "run") == 0
    card = read_card(tmp_path / "run")
    assert {"python", "vitprune", "torch", "timm", "numpy"} <= set(card.versions)
    assert card.versions["vitprune"] == vitprune.__version__
    assert card.hardware["processor"]
    assert card.hardware["cores"] >= card.hardware["usable_cores"] >= 1
    assert card.hardware["threads"] >= 1
    assert card.hardware["memory_bytes"] > card.peak_memory_bytes > 1e7


def test_a_card_loads_no_library_for_itself(tmp_path):
    code = (
        "import sys\n"
        "from vitprune.card import make_card, write_card\n"
        f"write_card(make_card('vitprune x', {{}}, seconds=1), {str(tmp_path)!r})\n"
        "assert not {'torch', 'onnxruntime', 'timm', 'numpy'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert read_card(tmp_path).hardware["threads"] is None


def test_a_folder_without_a_card_has_none_and_a_broken_one_is_refused(tmp_path):
    assert read_card(tmp_path) is None
    (tmp_path / CARD_FILE).write_text(json.dumps({"kind": "bench"}))
    with pytest.raises(vitprune.VitpruneError, match="expected a vitprune file of kind 'card'"):
        read_card(tmp_path)


def test_steps_of_a_recipe_have_cards_with_their_own_commands(saved_vit, image_folder, tmp_path):
    given = {"model": str(saved_vit), "data": str(image_folder), "images_per_class": 1, "output": str(tmp_path / "run")}
    prune = {"source": str(tmp_path / "run"), "step": 1.0, "output": str(tmp_path / "pruned")}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"steps": [{"discover": given}, {"prune": prune}]}))
    assert main(["run", str(tmp_path / "r.yaml")]) == 0
    typed = [shlex.split(read_card(tmp_path / name).command) for name in ("run", "pruned")]
    assert [words[1:3] for words in typed] == [["discover", str(saved_vit)], ["prune", str(tmp_path / "run")]]


def test_a_resumable_folder_keeps_its_card(tmp_path):
    folder = open_resumable(tmp_path / "c", {"seed": 0}, owned=frozenset({"points"}), overwrite=False)
    write_card(make_card("vitprune curve", {}, seconds=1), folder)
    (folder / f".{CARD_FILE}.half").touch()
    open_resumable(folder, {"seed": 0}, owned=frozenset({"points"}), overwrite=False)
    assert sorted(path.name for path in folder.iterdir()) == [CARD_FILE, "request.json"]
    open_resumable(folder, {"seed": 1}, owned=frozenset({"points"}), overwrite=True)
    assert [path.name for path in folder.iterdir()] == ["request.json"]


def test_a_run_knows_the_content_of_its_images(saved_vit, image_folder, tmp_path):
    assert discover(saved_vit, image_folder, tmp_path / "run", "--shard-size", "3") == 0
    run = vitprune.load_run(tmp_path / "run")
    assert run.images_sha256 == digest_images(hash_images(run.images))
    others = vitprune.find_images(image_folder, 5, classes=["class0"])
    assert run.images_sha256 != digest_images(hash_images(others))
    assert run.model_transform["input_size"] == [3, 32, 32]
