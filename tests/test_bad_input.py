"""Damaged files are read rightly or refused by name: the short form of ``bad_input``, and what hypothesis chooses."""

from __future__ import annotations

import random
import struct
import zlib

import bad_input
import pytest
from conftest import shared
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import vitprune
from vitprune.cli import main
from vitprune.data import ImageChoice
from vitprune.errors import VitpruneError

NUM_INPUTS = 25
NAMES = [
    *bad_input.KINDS,
    *(f"{name}: {file}" for name, file in (
        ("evaluation", "evaluation.json"), ("evaluation", "images.jsonl"), ("curve", "curve.json"),
        ("analysis", "analysis.json"), ("bench", "bench.json"), ("run", "run.json"), ("run", "paths.safetensors"),
        ("pruned", "plan.safetensors"), ("pruned", "config.json"), ("pruned", "model.safetensors"),
    )),
    "plan", "elastic file", "ONNX file", "image (.png, RGB)", "image (.jpg, CMYK)", "image (.tiff, F)",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_damaged_files_are_read_or_refused_by_name(name):
    bad_input.prepare()
    outcome = bad_input.try_kind(name, NUM_INPUTS, seed=1)
    assert not outcome.failures
    assert outcome.read + outcome.refused == NUM_INPUTS


@pytest.fixture(scope="module")
def plan_bytes(tmp_path_factory):
    bad_input.prepare()
    _read, target = bad_input.KINDS["plan"].make(tmp_path_factory.mktemp("plan"))
    return target.read_bytes()


@pytest.fixture(scope="module")
def good_plan(plan_bytes, tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "plan.safetensors"
    path.write_bytes(plan_bytes)
    return repr(vitprune.read_plan(path))


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_no_flipped_bit_of_a_plan_goes_unnoticed(plan_bytes, good_plan, tmp_path_factory, place, bit):
    changed = bytearray(plan_bytes)
    changed[int(place * len(changed))] ^= 1 << bit
    path = tmp_path_factory.getbasetemp() / "flipped.safetensors"
    path.write_bytes(bytes(changed))
    # Refused by name, or it was the name of the seal itself, which says nothing of the plan.
    assert read_or_refuse(path) in (good_plan, "refused")


def read_or_refuse(path):
    """Return a plan as text; ``refused`` where it is refused by its name."""
    try:
        return repr(vitprune.read_plan(path))
    except VitpruneError as error:
        return "refused" if path.name in str(error) else str(error)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_no_flipped_bit_of_weights_goes_unnoticed(tmp_path_factory, place, bit):
    folder = tmp_path_factory.getbasetemp() / "weights"
    if not folder.exists():
        vitprune.save(vitprune.load(str(bad_input.dense())), folder)
    good = (bad_input.dense() / "model.safetensors").read_bytes()
    changed = bytearray(good)
    changed[int(place * len(changed))] ^= 1 << bit
    (folder / "model.safetensors").write_bytes(bytes(changed))
    try:
        model = vitprune.load(str(folder))
    except VitpruneError:
        return
    # A bit of the header that says nothing of the tensors, such as the name of the seal itself.
    before = vitprune.load(str(bad_input.dense())).state_dict()
    assert all(bool((value == before[key]).all()) for key, value in model.state_dict().items())


def test_an_image_that_unpacks_to_gigabytes_is_left_out(tmp_path):
    """30,000 x 30,000 pixels in a few bytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    (tmp_path / "photos" / "ant").mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(tmp_path / "photos" / "ant" / "good.png")
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 0, 0, 0, 0))
    rows = zlib.compress(bytes(30_001) * 1000, 9)
    bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    (tmp_path / "photos" / "ant" / "bomb.png").write_bytes(bomb)
    model = vitprune.load(str(bad_input.dense()))
    before = bad_input.peak_bytes()
    batches = vitprune.ImageBatches(ImageChoice(tmp_path / "photos").find(model, labels_matter=False), model)
    assert sum(len(images) for images, _labels in batches) == 1
    assert [name for name, _reason in batches.skipped] == ["ant/bomb.png"]
    assert bad_input.peak_bytes() - before < 2**28


def test_folders_of_links_that_go_round_are_walked_once(tmp_path):
    (tmp_path / "photos" / "ant").mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(tmp_path / "photos" / "ant" / "1.png")
    (tmp_path / "photos" / "ant" / "round").symlink_to(tmp_path / "photos", target_is_directory=True)
    (tmp_path / "photos" / "ant" / "self.png").symlink_to(tmp_path / "photos" / "ant" / "self.png")
    model = vitprune.load(str(bad_input.dense()))
    with bad_input.limited(20):
        found = ImageChoice(tmp_path / "photos").find(model, labels_matter=False)
    assert "ant/1.png" in found.files


def test_real_photos_cut_anywhere_are_left_out_or_decoded(tmp_path):
    photo = next(shared("data/imagenette/val").rglob("*.JPEG")).read_bytes()
    rng = random.Random(0)
    (tmp_path / "photos" / "ant").mkdir(parents=True)
    for number in range(30):
        (tmp_path / "photos" / "ant" / f"{number}.jpg").write_bytes(photo[: rng.randrange(1, len(photo))])
    (tmp_path / "photos" / "ant" / "whole.jpg").write_bytes(photo)
    model = vitprune.load(str(bad_input.dense()))
    batches = vitprune.ImageBatches(ImageChoice(tmp_path / "photos").find(model, labels_matter=False), model)
    decoded = sum(len(images) for images, _labels in batches)
    assert decoded + len(batches.skipped) == 31
    assert "ant/whole.jpg" in batches.files_read


def test_a_file_that_was_changed_by_hand_says_how_to_read_it(tmp_path, capsys):
    bad_input.prepare()
    read, target = bad_input.KINDS["pruned: config.json"].make(tmp_path)
    target.write_text(target.read_text().replace('"mean"', '"Mean"'))
    asked = ["info", str(read)]
    assert main(asked) == 2
    assert "take that line out" in capsys.readouterr().err
