"""The same seed gives the same bytes, however many loader processes there are; other batches keep the same units."""

from __future__ import annotations

import faults
import pytest
import torch
from conftest import TINY, make_vit, photos

import vitprune
from vitprune.cli import main

MORE = {
    "prune distill": "prune DENSE --data PHOTOS --compensate distill",
    "prune tokens": "prune DENSE --data PHOTOS --target-macs 0.6 --parts ffn qk vo tokens",
    "finetune": "finetune DENSE --data PHOTOS --epochs 1 --batch-size 4",
}
COMMANDS = {name: command.replace(" --strict", "") for name, command in (faults.COMMANDS | MORE).items()}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("determinism")
    model = make_vit(depth=2).float()
    model.model_args = {**TINY, "depth": 2}
    vitprune.save(model, folder / "dense")
    for name, seed in (("photos", 1), ("others", 2)):
        photos(folder / name, faults.CLASSES, count=4, seed=seed)
    for name, command in (("run", "discover"), ("half", "prune")):
        assert run(command, folder, folder / name) == 0
    return folder


def run(command, folder, output, *more):
    words = {"DENSE": "dense", "PHOTOS": "photos", "OTHERS": "others", "RUN": "run", "HALF": "half"}
    given = [str(folder / words[word]) if word in words else word for word in COMMANDS[command].split()]
    name = f"{output}.safetensors" if command == "elastic" else str(output)
    return main([*given, "-o", name, "--device", "cpu", *more])


@pytest.mark.parametrize("command", COMMANDS)
def test_the_same_seed_gives_the_same_bytes(command, root, tmp_path):
    outputs = [tmp_path / name / "out" for name in ("one", "two")]
    for output in outputs:
        output.parent.mkdir()
        assert run(command, root, output) == 0
    if command != "analyze":
        third = tmp_path / "three" / "out"
        third.parent.mkdir()
        assert run(command, root, third, "--workers", "2") == 0
        outputs.append(third)
    first, *others = (faults.output_of(command, output) for output in outputs)
    for other in others:
        assert faults.same_files(other, first) is None


@pytest.mark.parametrize("command", ["prune", "prune parts", "prune tokens"])
def test_another_batch_size_keeps_the_same_units(command, root, tmp_path):
    for size in ("4", "7"):
        assert run(command, root, tmp_path / size, "--batch-size", size) == 0
    one, other = (vitprune.load(str(tmp_path / size)) for size in ("4", "7"))
    plans = [vitprune.read_plan(tmp_path / size) for size in ("4", "7")]
    assert plans[0].keep.keys() == plans[1].keep.keys()
    assert all(torch.equal(keep, plans[1].keep[name]) for name, keep in plans[0].keep.items())
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(other(images), one(images), rtol=1e-4, atol=1e-5)


def test_another_batch_size_finds_the_same_paths(root, tmp_path):
    for size in ("2", "7"):
        asked = ["discover", str(root / "dense"), "--data", str(root / "photos"), "--batch-size", size]
        assert main([*asked, "-o", str(tmp_path / size), "--device", "cpu"]) == 0
    one, other = (vitprune.load_run(tmp_path / size).found for size in ("2", "7"))
    assert torch.equal(one.neurons, other.neurons)
    torch.testing.assert_close(one.joint_scores, other.joint_scores, rtol=1e-5, atol=1e-6)
