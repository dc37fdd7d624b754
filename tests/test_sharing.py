"""Commands whose images several processes share come to what one process comes to."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import TINY, make_vit, photos
from quick import run_on_processes

import vitprune
from vitprune.cli import main
from vitprune.pruning.sequential import _of_parity
from vitprune.sharing import _current

CLASSES = ["ant", "bee", "cat", "dog", "elk"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A model, an encoder, two folders of 35 and 23 photos, a run and a pruned folder."""
    root = tmp_path_factory.mktemp("shared")
    for name, num_classes in (("dense", 5), ("encoder", 0)):
        model = make_vit(num_classes=num_classes).float()
        model.model_args = {**TINY, "num_classes": num_classes}
        vitprune.save(model, root / name)
    photos(root / "photos", CLASSES, count=7, seed=1)
    photos(root / "others", CLASSES, count=5, seed=2)
    for left_out in ("ant/0.png", "elk/4.png"):
        (root / "others" / left_out).unlink()
    dense, data = str(root / "dense"), str(root / "photos")
    assert main(["discover", dense, "--data", data, "-o", str(root / "run")]) == 0
    assert main(["prune", dense, "--data", data, "-o", str(root / "half")]) == 0
    return root


PRUNED, EVALUATED = ["model.safetensors"], ["evaluation.json"]
# Command, with the files that must be the same.
COMMANDS = {
    "prune dense --data photos": PRUNED,
    "prune dense --data photos --criterion taylor --compensate ridge": PRUNED,
    "prune dense --data photos --criterion integrated-gradients --compensate none": PRUNED,
    "prune run --criterion jas --compensate bias": PRUNED,
    "prune dense --data photos --ratio 0.3 --parts ffn qk vo heads layers": PRUNED,
    "prune dense --data photos --target-macs 0.5 --parts ffn qk vo tokens pixels": PRUNED,
    "prune dense --data photos --merge 1:3": PRUNED,
    "prune encoder --data photos --parts ffn qk": PRUNED,
    "evaluate half --against dense --data others": EVALUATED,
    "evaluate encoder --knn photos --data others": EVALUATED,
    "curve dense --data photos --eval-data others --ratios 0.25 0.5 --criteria obs variance": ["curve.json"],
    "analyze run --data others --experiments scores manipulation transfer top-images topk-mask --top-k 1 5": [
        "analysis.json"
    ],
}


def arguments_of(command, inputs, output):
    return [
        *(str(inputs / word) if (inputs / word).exists() else word for word in command.split()),
        *("-o", str(output), "--batch-size", "4", "--device", "cpu"),
    ]


def numbers_in(value, key=""):
    if isinstance(value, dict):
        return {k: v for name, below in value.items() for k, v in numbers_in(below, f"{key}.{name}").items()}
    if isinstance(value, list):
        return {k: v for place, below in enumerate(value) for k, v in numbers_in(below, f"{key}.{place}").items()}
    return {key: value}


def assert_same(one, other, names):
    for name in names:
        if name.endswith(".json"):
            first, second = (numbers_in(json.loads((folder / name).read_text())) for folder in (one, other))
            assert first.keys() == second.keys()
            for key, value in first.items():
                if "sha256" in key or key == ".model.source" or ".name" in key:
                    continue
                expected = pytest.approx(value, rel=1e-4, abs=1e-5) if isinstance(value, float) else value
                assert second[key] == expected, key
            continue
        assert name == PRUNED[0]
        first, second = (vitprune.load(folder) for folder in (one, other))
        before, after = (vitprune.read_plan(folder) for folder in (one, other))
        assert {key: keep.tolist() for key, keep in before.keep.items()} == {
            key: keep.tolist() for key, keep in after.keep.items()
        }
        # Dimensions of attention are turned: what is nearly as large may stand in another basis, and answer the same.
        size = first.patch_embed.img_size
        images = torch.randn(4, 3, *size, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            torch.testing.assert_close(second(images), first(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_come_to_what_one_comes_to(command, count, inputs, tmp_path):
    one, several = tmp_path / "one", tmp_path / "several"
    assert main(arguments_of(command, inputs, one)) == 0
    went_well, told = run_on_processes(count, arguments_of(command, inputs, several), tmp_path)
    assert went_well, told
    # What a killed analysis goes on from is kept of one process alone.
    assert {file.name for file in several.iterdir()} == {file.name for file in one.iterdir()} - {"passes"}
    assert_same(one, several, COMMANDS[command])


def test_an_odd_number_of_processes_divides_halves_and_seeds_alike(inputs, tmp_path):
    one, three = tmp_path / "one", tmp_path / "three"
    command = "prune dense --data photos --parts ffn vo --ratio 0.4"
    assert main(arguments_of(command, inputs, one)) == 0
    went_well, told = run_on_processes(3, arguments_of(command, inputs, three), tmp_path)
    assert went_well, told
    assert_same(one, three, PRUNED)


def test_images_of_all_processes_are_refused_by_evaluate(inputs, tmp_path, capsys):
    went_well, told = run_on_processes(
        2, arguments_of("prune dense --data photos", inputs, tmp_path / "half"), tmp_path
    )
    assert went_well, told
    assert main(["evaluate", str(tmp_path / "half"), "--data", str(inputs / "photos")]) == 2
    assert "35 of 35 evaluation images were calibration images" in capsys.readouterr().err


def test_torchrun_prints_one_answer(inputs, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    asked = arguments_of("evaluate half --data others --json", inputs, tmp_path / "out")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*torchrun, "-m", "vitprune", *asked], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["num_images"] == 23


def test_a_process_that_meets_a_broken_image_ends_all_with_its_reason(inputs, tmp_path):
    shutil.copytree(inputs / "photos", tmp_path / "photos")
    broken = sorted((tmp_path / "photos").rglob("*.png"))[13]
    broken.write_bytes(broken.read_bytes()[:30])
    asked = ["prune", str(inputs / "dense"), "--data", str(tmp_path / "photos"), "-o", str(tmp_path / "out")]
    went_well, told = run_on_processes(2, asked, tmp_path)
    assert not went_well
    (line,) = [line for line in told.splitlines() if line.startswith("vitprune:") and "stops because" not in line]
    assert "cannot be decoded" in line
    assert "several processes share the images" in line
    assert "Traceback" not in told
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_what_is_wrong_for_all_is_told_once(inputs, tmp_path):
    went_well, told = run_on_processes(2, ["prune", str(inputs / "dense"), "--data", "nowhere", "-o", "out"], tmp_path)
    assert not went_well
    assert told == "vitprune: nowhere: no such data folder\n"


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("prune dense --data photos --compensate distill", "compensation distill runs on one process"),
        ("prune dense --data photos --speedup 1.5", "--speedup: what is timed runs on one process"),
        (
            "curve dense --data photos --eval-data others --speedups 1.5",
            "--speedups: what is timed runs on one process",
        ),
        ("info dense", "'info' runs on one process"),
    ],
)
def test_what_several_processes_cannot_do_is_refused(command, told, inputs, tmp_path):
    asked = (
        arguments_of(command, inputs, tmp_path / "out") if "info" not in command else ["info", str(inputs / "dense")]
    )
    went_well, said = run_on_processes(2, asked, tmp_path)
    assert not went_well
    assert told in said


def test_python_shares_images_as_the_command_line_does(inputs, tmp_path):
    script = tmp_path / "prune.py"
    script.write_text(
        "import sys, vitprune\n"
        "dense, photos, output = sys.argv[1:]\n"
        "with vitprune.share_images() as processes:\n"
        "    model = vitprune.load(dense)\n"
        "    batches = vitprune.ImageBatches(vitprune.find_images(photos, 5), model, batch_size=4)\n"
        "    pruned, plan = vitprune.prune(model, batches)\n"
        "    if processes.rank == 0:\n"
        "        vitprune.save(pruned, output, plan=plan)\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    places = [str(inputs / "dense"), str(inputs / "photos"), str(tmp_path / "out")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*torchrun, script, *places], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert_same(inputs / "half", tmp_path / "out", PRUNED)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_halves_go_by_the_place_among_all_images(count):
    for rank in range(count):
        _current.append(vitprune.processes.Processes(rank, count))
        try:
            for before in (0, 1, 4, 7):
                own = [(before + place) * count + rank for place in range(6)]
                for parity in (0, 1):
                    assert own[_of_parity(parity, before)] == [place for place in own if place % 2 == parity]
        finally:
            _current.pop()
