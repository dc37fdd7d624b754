"""Images that had a say are recorded by the library itself, and refused by whichever door one measures accuracy."""

from __future__ import annotations

import json
import shutil

import pytest
from conftest import TINY, make_vit
from PIL import Image

import vitprune
from vitprune.cli import main
from vitprune.seen_images import WatchedBatches, hash_pixels, seen_by

OVERLAP = "of .* evaluation images were calibration images"


@pytest.fixture(scope="module")
def model():
    model = make_vit().float()
    model.model_args = TINY
    return model


@pytest.fixture(scope="module")
def other_folder(image_folder, tmp_path_factory):
    """The same classes with other pictures."""
    root = tmp_path_factory.mktemp("other")
    for file in sorted(image_folder.rglob("*.*g")):
        (root / file.parent.name).mkdir(exist_ok=True)
        Image.open(file).rotate(90).save(root / file.parent.name / f"{file.stem}.png")
    return root


def read(folder, model, **options):
    return vitprune.ImageBatches(vitprune.find_images(folder, 5), model, batch_size=8, **options)


def evaluate_typed(target, folder, capsys, *options):
    capsys.readouterr()
    code = main(["evaluate", str(target), "--data", str(folder), "--json", *options])
    captured = capsys.readouterr()
    return json.loads(captured.out) if code == 0 else (code, captured.err)


def test_the_readmes_python_example_then_both_evaluations(model, image_folder, other_folder, tmp_path, capsys):
    batches = read(image_folder, model)
    pruned, plan = vitprune.prune(model, batches, pruning_ratio=0.5)
    vitprune.save(pruned, tmp_path / "half", plan=plan)
    vitprune.export_onnx(pruned, tmp_path / "half.onnx", read(other_folder, model))
    for each in (pruned, vitprune.load(tmp_path / "half"), vitprune.open_onnx(tmp_path / "half.onnx")):
        with pytest.raises(vitprune.VitpruneError, match=f"20 {OVERLAP}"):
            vitprune.evaluate(each, batches)
        assert vitprune.evaluate(each, read(other_folder, model)).num_overlap == 0
        assert vitprune.evaluate(each, batches, allow_overlap=True).num_overlap == 20
    for target in (tmp_path / "half", tmp_path / "half.onnx"):
        code, message = evaluate_typed(target, image_folder, capsys)
        assert code == 2
        assert "20 of 20 evaluation images were calibration images" in message
        assert evaluate_typed(target, other_folder, capsys)["num_images"] == 20
        assert evaluate_typed(target, image_folder, capsys, "--allow-overlap")["num_overlap"] == 20


def test_images_in_memory_and_copies_in_another_format_are_known(model, image_folder, tmp_path):
    pruned, _plan = vitprune.prune(model, list(read(image_folder, model)), criterion="variance", compensation="ridge")
    with pytest.raises(vitprune.VitpruneError, match=f"8 {OVERLAP}"):
        vitprune.evaluate(pruned, list(read(image_folder, model)))
    for file in image_folder.rglob("*.*g"):
        (tmp_path / file.parent.name).mkdir(exist_ok=True)
        Image.open(file).save(tmp_path / file.parent.name / f"{file.stem}.bmp")
    with pytest.raises(vitprune.VitpruneError, match=OVERLAP):
        vitprune.evaluate(pruned, list(read(tmp_path, model)))


def test_one_image_among_others_is_found(model, image_folder, other_folder, tmp_path):
    pruned, _plan = vitprune.prune(model, read(image_folder, model), criterion="variance", compensation="ridge")
    shutil.copytree(other_folder, tmp_path / "val")
    shutil.copy(image_folder / "class3" / "1.png", tmp_path / "val" / "class3" / "another.png")
    with pytest.raises(vitprune.VitpruneError, match=r"1 of 21 .*class3/another.png"):
        vitprune.evaluate(pruned, read(tmp_path / "val", model))
    assert vitprune.evaluate(pruned, read(tmp_path / "val", model), allow_overlap=True).num_overlap == 1


@pytest.mark.parametrize("with_plan", [True, False])
def test_a_saved_model_remembers_with_its_plan_and_without(with_plan, model, image_folder, tmp_path):
    pruned, plan = vitprune.prune(model, read(image_folder, model), criterion="variance", compensation="bias")
    vitprune.save(pruned, tmp_path / "m", plan=plan if with_plan else None)
    again = vitprune.load(tmp_path / "m")
    assert seen_by(again) == seen_by(pruned) == plan.calibration
    twice, later = vitprune.prune(again, criterion="magnitude", compensation="none", pruning_ratio=0.2)
    assert later.calibration == seen_by(twice) == plan.calibration


def test_scores_of_a_discovery_are_a_say(model, image_folder, other_folder):
    found = vitprune.discover(model, read(image_folder, model), method="activation")
    pruned, plan = vitprune.prune(model, found=found, criterion="jas", compensation="none")
    assert plan.facts.calibration.files == found.seen.files
    with pytest.raises(vitprune.VitpruneError, match=OVERLAP):
        vitprune.evaluate(pruned, read(image_folder, model))
    assert vitprune.evaluate(pruned, read(other_folder, model)).num_images == 20


def test_elastic_files_and_onnx_files_remember(model, image_folder, other_folder, tmp_path):
    options = {"criterion": "variance", "compensation": "ridge"}
    elastic = vitprune.make_elastic(model, read(image_folder, model), ratios=[0.5], **options)
    vitprune.save_elastic(model, elastic, tmp_path / "e.safetensors")
    with pytest.raises(vitprune.VitpruneError, match=f"20 {OVERLAP}"):
        vitprune.evaluate(vitprune.load(tmp_path / "e.safetensors", ratio=0.3), read(image_folder, model))
    vitprune.export_onnx(model, tmp_path / "dense.onnx", read(other_folder, model))
    _pruned, plan = vitprune.prune(model, criterion="magnitude", compensation="none")
    batches = read(image_folder, vitprune.open_onnx(tmp_path / "dense.onnx"))
    vitprune.prune_onnx(tmp_path / "dense.onnx", plan, tmp_path / "half.onnx", compensation="ridge", batches=batches)
    half = vitprune.open_onnx(tmp_path / "half.onnx")
    with pytest.raises(vitprune.VitpruneError, match=f"20 {OVERLAP}"):
        vitprune.evaluate(half, read(image_folder, half))


def test_nobody_had_a_say_where_no_image_was_read(model, image_folder):
    pruned, plan = vitprune.prune(model, read(image_folder, model), criterion="magnitude", compensation="none")
    assert not plan.calibration
    assert vitprune.evaluate(pruned, read(image_folder, model)).num_overlap == 0


def test_a_pass_that_was_broken_off_is_not_taken_for_whole(model, image_folder):
    watched = WatchedBatches(read(image_folder, model))
    next(iter(watched))
    assert not watched.seen
    pixels = [digest for images, _labels in watched for digest in hash_pixels(images)]
    assert len(watched.seen.files) == 20
    assert set(pixels) < watched.seen.sha256
