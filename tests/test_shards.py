"""Paths in shards: no interruption and no number of processes changes what comes out."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image
from quick import run_on_processes, start_command

import vitprune
from vitprune.cli import main
from vitprune.discovery.run import RUN_FILES
from vitprune.discovery.shards import Shards, share, write_shard
from vitprune.files import CARD_FILE, held
from vitprune.processes import Processes

MORE = ["--batch-size", "2", "--shard-size", "3", "--top-k", "2"]


def command(saved_vit, image_folder, output, *more):
    given = ["discover", str(saved_vit), "--data", str(image_folder), "-o", str(output), *MORE, *map(str, more)]
    return [*given, "--quadrature", "gauss-legendre:3"]


@pytest.fixture(scope="module")
def whole(saved_vit, image_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards") / "whole"
    assert main(command(saved_vit, image_folder, folder)) == 0
    return folder


def kill_after(wanted, arguments, shards):
    """Start a search in another process, and kill it when so many shards are there."""
    process = start_command(arguments)
    while len(list(shards.glob("shard-*"))) < wanted and process.is_alive():
        time.sleep(0.005)
    process.kill()
    process.join()


def assert_same_files(got, whole):
    assert {file.name for file in got.iterdir()} == RUN_FILES | {CARD_FILE}
    for name in RUN_FILES:
        assert (got / name).read_bytes() == (whole / name).read_bytes(), name
    assert not got.with_name(f"{got.name}.shards").exists()


def test_shards_equal_one_search_in_memory(whole, saved_vit, image_folder):
    found = vitprune.load_run(whole).found
    model = vitprune.load(saved_vit)
    batches = vitprune.ImageBatches(vitprune.find_images(image_folder, 5), model, batch_size=2)
    direct = vitprune.discover(model, batches, top_k=2, quadrature="gauss-legendre:3")
    assert torch.equal(found.neurons, direct.neurons)
    assert torch.equal(found.joint_scores, direct.joint_scores)
    for name, scores in direct.class_scores.items():
        torch.testing.assert_close(found.class_scores[name], scores)


def test_a_search_killed_again_and_again_ends_with_the_same_bytes(whole, saved_vit, image_folder, tmp_path, capsys):
    shards = tmp_path / "killed.shards"
    for wanted in (1, 2, 4):
        kill_after(wanted, command(saved_vit, image_folder, tmp_path / "killed"), shards)
        assert not (tmp_path / "killed").exists()
    before = {path.name: path.stat().st_mtime_ns for path in shards.glob("shard-*")}
    assert 4 <= len(before) <= 5
    capsys.readouterr()
    assert main(command(saved_vit, image_folder, tmp_path / "killed")) == 0
    assert f"{len(before)} of 5 shards are there already" in capsys.readouterr().err
    assert_same_files(tmp_path / "killed", whole)


def test_finished_shards_are_not_searched_again(whole, saved_vit, image_folder, tmp_path, monkeypatch):
    from vitprune.discovery import shards as module

    searched = []
    find_part = module.find_part
    monkeypatch.setattr(module, "find_part", lambda *a, **k: searched.append(1) or find_part(*a, **k))
    stop = iter([False, False, True])
    write = module.write_shard
    monkeypatch.setattr(module, "write_shard", lambda *a, **k: write(*a, **k) if not next(stop, False) else interrupt())
    assert main(command(saved_vit, image_folder, tmp_path / "r")) == 130
    assert len(list((tmp_path / "r.shards").glob("shard-*"))) == 2
    searched.clear()
    assert main(command(saved_vit, image_folder, tmp_path / "r")) == 0
    assert len(searched) == 3
    assert_same_files(tmp_path / "r", whole)


def interrupt():
    raise KeyboardInterrupt


@pytest.fixture
def interrupted(saved_vit, image_folder, tmp_path, monkeypatch):
    """Three of five shards of images that may be changed."""
    from vitprune.discovery import shards as module

    images = tmp_path / "images"
    shutil.copytree(image_folder, images)
    with monkeypatch.context() as patched:
        stop, write = iter([False] * 3), module.write_shard
        patched.setattr(module, "write_shard", lambda *a, **k: interrupt() if next(stop, True) else write(*a, **k))
        assert main(command(saved_vit, images, tmp_path / "r")) == 130
    return images


def test_a_changed_image_makes_its_shard_stale(interrupted, saved_vit, tmp_path, capsys):
    file = interrupted / vitprune.find_images(interrupted, 5).files[1]
    Image.open(file).rotate(90).save(file)
    capsys.readouterr()
    assert main(command(saved_vit, interrupted, tmp_path / "r")) == 0
    assert "2 of 5 shards are there already" in capsys.readouterr().err
    assert main(command(saved_vit, interrupted, tmp_path / "clean")) == 0
    for name in RUN_FILES:
        assert (tmp_path / "r" / name).read_bytes() == (tmp_path / "clean" / name).read_bytes(), name


def test_another_list_of_images_is_refused(interrupted, saved_vit, tmp_path, capsys):
    Image.new("RGB", (32, 32)).save(interrupted / "class0" / "new.png")
    assert main(command(saved_vit, interrupted, tmp_path / "r")) == 2
    assert "was made with another list of images" in capsys.readouterr().err


def test_a_strict_run_does_not_take_what_a_lenient_one_skipped(saved_vit, image_folder, tmp_path, capsys, monkeypatch):
    from vitprune.discovery import shards as module

    images = tmp_path / "images"
    shutil.copytree(image_folder, images)
    (images / vitprune.find_images(images, 5).files[0]).write_text("no image")
    with monkeypatch.context() as patched:
        stop, write = iter([False] * 3), module.write_shard
        patched.setattr(module, "write_shard", lambda *a, **k: interrupt() if next(stop, True) else write(*a, **k))
        assert main(command(saved_vit, images, tmp_path / "r")) == 130
    assert main(command(saved_vit, images, tmp_path / "r", "--strict")) == 2
    assert "cannot be decoded" in capsys.readouterr().err
    assert main(command(saved_vit, images, tmp_path / "r")) == 0


def test_leftovers_go_and_other_files_stay(interrupted, saved_vit, tmp_path):
    folder = tmp_path / "r.shards"
    (folder / ".shard-000004.safetensors.left.safetensors").write_text("half")
    (folder / "notes.txt").write_text("mine")
    assert main(command(saved_vit, interrupted, tmp_path / "r")) == 0
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_a_second_program_on_the_same_output_is_refused(interrupted, saved_vit, tmp_path, capsys):
    with held(tmp_path / "r.shards.lock", what="r"):
        assert main(command(saved_vit, interrupted, tmp_path / "r")) == 2
    assert "another process works on" in capsys.readouterr().err
    assert not (tmp_path / "r.shards.lock").exists()


def test_shards_of_another_request_are_not_taken(image_folder, tmp_path):
    images = vitprune.find_images(image_folder, 5)
    mine, other = (Shards(tmp_path, {"top_k": k}, images, batch_size=3, batches_per_shard=2) for k in (1, 2))
    write_shard(mine.path(0), None, [], [], identity=other.identity(0), hashes=[])
    write_shard(mine.path(1), None, [], [], identity=mine.identity(1), hashes=[])
    mine.path(2).write_bytes(mine.path(1).read_bytes()[:30])
    assert mine.missing() == [0, 2, 3]


def test_an_image_that_is_a_broken_link_is_skipped(saved_vit, image_folder, tmp_path, capsys):
    images = tmp_path / "images"
    shutil.copytree(image_folder, images)
    (images / "class2" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    assert main(command(saved_vit, images, tmp_path / "r", "--json")) == 0
    assert json.loads(capsys.readouterr().out)["skipped"] == ["class2/gone.png"]


def test_a_target_is_named_like_a_class(saved_vit, image_folder, tmp_path):
    for number in range(5):
        shutil.copytree(image_folder / f"class{number}", tmp_path / "images" / str((number + 1) % 5 + 1))
    (tmp_path / "classes.txt").write_text("1\n2\n3\n4\n5\n")
    numbered = ("--class-map", str(tmp_path / "classes.txt"))
    targets = {}
    for asked in ("3", "0", "predicted"):  # folders 1 .. 5 are classes 0 .. 4
        assert main(command(saved_vit, tmp_path / "images", tmp_path / asked, "--target", asked, *numbered)) == 0
        targets[asked] = vitprune.load_run(tmp_path / asked).found.target
    assert targets == {"3": 2, "0": 0, "predicted": "predicted"}


def test_the_output_may_be_the_working_folder(saved_vit, image_folder, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert main(command(saved_vit, image_folder, ".")) == 0
    assert vitprune.load_run(tmp_path / "here").found.neurons.shape == (20, 3, 2)


def test_two_processes_find_the_same(whole, saved_vit, image_folder, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    asked = [*torchrun, "-m", "vitprune", *command(saved_vit, image_folder, tmp_path / "two", "--json")]
    done = subprocess.run(asked, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["num_images"] == 20
    two, one = vitprune.load_run(tmp_path / "two").found, vitprune.load_run(whole).found
    assert torch.equal(two.neurons, one.neurons)
    torch.testing.assert_close(two.joint_scores, one.joint_scores)
    assert not (tmp_path / "two.shards").exists()


def test_a_rank_that_dies_loses_its_unfinished_shard_only(saved_vit, image_folder, tmp_path):
    """The second process meets an image that it refuses; what both had finished is used when it is repaired."""
    images = tmp_path / "images"
    for path in sorted(image_folder.rglob("class*/*.*")):
        target = images / path.relative_to(image_folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    files = vitprune.find_images(images, 5).files
    broken = images / files[13]  # in the fourth shard, the second process's second
    whole_bytes = broken.read_bytes()
    broken.write_bytes(whole_bytes[:20])
    arguments = command(saved_vit, images, tmp_path / "two", "--strict")
    went_well, told = run_on_processes(2, arguments, tmp_path)
    assert not went_well
    assert "cannot be decoded" in told
    finished = {path.name for path in (tmp_path / "two.shards").glob("shard-*")}
    assert "shard-000001.safetensors" in finished
    assert "shard-000003.safetensors" not in finished
    broken.write_bytes(whole_bytes)
    went_well, told = run_on_processes(2, arguments, tmp_path)
    assert went_well, told
    assert f"{len(finished)} of 5 shards are there already" in told
    assert main(command(saved_vit, images, tmp_path / "one")) == 0
    two, one = (vitprune.load_run(tmp_path / name).found for name in ("two", "one"))
    assert torch.equal(two.neurons, one.neurons)


@pytest.mark.parametrize(("more", "named"), [(["--top-k", "1"], "top_k"), (["--target", "predicted"], "target")])
def test_other_arguments_over_unfinished_shards_are_refused(more, named, saved_vit, image_folder, tmp_path, capsys):
    kill_after(1, command(saved_vit, image_folder, tmp_path / "r"), tmp_path / "r.shards")
    arguments = command(saved_vit, image_folder, tmp_path / "r", *more)
    assert main(arguments) == 2
    assert f"was made with another {named}" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0
    assert main(command(saved_vit, image_folder, tmp_path / "clean", *more)) == 0
    for name in RUN_FILES:
        assert (tmp_path / "r" / name).read_bytes() == (tmp_path / "clean" / name).read_bytes(), name


def test_a_shard_without_a_single_image(saved_vit, image_folder, tmp_path, capsys):
    images = tmp_path / "images"
    for index in range(5):
        (images / f"class{index}").mkdir(parents=True)
    for index in range(4):
        (images / "class0" / f"{index}.png").write_text("no image")
    Image.new("RGB", (32, 32)).save(images / "class3" / "x.png")
    assert main(command(saved_vit, images, tmp_path / "r", "--json")) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["num_images"] == 1
    assert answer["skipped"] == [f"class0/{index}.png" for index in range(4)]
    (images / "class3" / "x.png").write_text("no image either")
    assert main(command(saved_vit, images, tmp_path / "r2")) == 2
    assert "no image could be decoded" in capsys.readouterr().err


def test_more_names_than_a_header_holds_are_refused_beforehand(saved_vit, image_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("vitprune.discovery.discover_run.MOST_NAME_BYTES", 100)
    assert main(command(saved_vit, image_folder, tmp_path / "r")) == 2
    assert "20 images are too many to name in one run" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_shares_no_images_runs_on_one_process(saved_vit, image_folder, tmp_path, capsys, monkeypatch):
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("MASTER_ADDR", "localhost")):
        monkeypatch.setenv(name, value)
    assert main(["elastic", str(saved_vit), "--data", str(image_folder), "-o", str(tmp_path / "p")]) == 2
    assert "'elastic' runs on one process" in capsys.readouterr().err


def test_every_shard_has_one_process():
    numbers = list(range(7))
    for count in (1, 2, 3, 10):
        parts = [share(numbers, Processes(rank, count)) for rank in range(count)]
        assert sorted(number for part in parts for number in part) == numbers
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_the_number_of_shards(tmp_path, image_folder):
    images = vitprune.find_images(image_folder, 5)
    shards = Shards(tmp_path, {}, images, batch_size=3, batches_per_shard=2)
    assert (len(shards), shards.images_per_shard, shards.missing()) == (4, 6, [0, 1, 2, 3])
    assert [len(shards.places(number)) for number in range(4)] == [6, 6, 6, 2]
