"""A model that answers only some classes, and folders that name them."""

from __future__ import annotations

import pytest
import timm
import torch
from conftest import make_vit

import vitprune
from vitprune.cli import main


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "beit_base_patch16_224"])
def test_answers_are_those_of_the_kept_classes(name, tiny_images):
    model = make_vit(name)
    reduced = vitprune.keep_classes(model, [4, 1, 2])
    torch.testing.assert_close(reduced(tiny_images), model(tiny_images)[:, [4, 1, 2]])
    assert (reduced.num_classes, model.num_classes) == (3, 5)


def test_a_classifier_inside_a_head_module_is_found():
    model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=6).eval()
    assert vitprune.keep_classes(model, [5, 0]).head.fc.out_features == 2


@pytest.mark.parametrize(
    ("classes", "message"), [([5, 1], "class 5 cannot be kept"), ([1, 1], "each once"), ([2], "two")]
)
def test_refuses(classes, message, tiny_vit):
    with pytest.raises(vitprune.VitpruneError, match=message):
        vitprune.keep_classes(tiny_vit, classes)


@torch.no_grad()
def test_names_survive_saving(saved_vit, tmp_path):
    model = vitprune.load(saved_vit)
    reduced = vitprune.keep_classes(model, [3, 0], label_names=["c", "a"])
    vitprune.save(reduced, tmp_path / "m")
    again = vitprune.load(tmp_path / "m")
    assert again.label_names == ("c", "a")
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(again(images), reduced(images))


def test_folders_are_numbered_as_the_model_does(image_folder):
    images = vitprune.find_images(image_folder, 2, label_names=("class4", "class1"))
    assert images.class_names == {1: "class1", 0: "class4"}
    assert len(images) == 8
    with pytest.raises(vitprune.VitpruneError, match="none of the model's 2 classes"):
        vitprune.find_images(image_folder, 2, label_names=("x", "y"))


def test_from_the_command_line_to_onnx(saved_vit, image_folder, tmp_path, capsys):
    pruned, graph = str(tmp_path / "few"), str(tmp_path / "few.onnx")
    data = ["--data", str(image_folder)]
    given = ["prune", str(saved_vit), *data, "--keep-classes", "class1", "4", "--step", "1", "--images-per-class", "2"]
    assert main([*given, "-o", pruned]) == 0
    assert "answers 2 classes: class1, class4" in capsys.readouterr().out
    plan = vitprune.read_plan(pruned)
    assert {name.partition("/")[0] for name in plan.facts.calibration.files} == {"class1", "class4"}
    assert main(["export", pruned, graph, *data]) == 0
    for model in (pruned, graph):
        assert main(["evaluate", model, *data]) == 2
        assert "calibration images" in capsys.readouterr().err


def test_images_of_few_classes_draw_a_warning(saved_vit, image_folder, tmp_path, capsys):
    given = ["prune", str(saved_vit), "--data", str(image_folder), "--criterion", "magnitude", "--compensate", "bias"]
    few = ["--classes", "class0", "class1"]
    for number, (extra, warned) in enumerate((([], False), (few, True), (["--keep-classes", "class1", "4"], False))):
        assert main([*given, *extra, "-o", str(tmp_path / str(number))]) == 0
        assert ("show 2 of the 5 classes" in capsys.readouterr().err) == warned


def test_a_class_without_images_is_refused(saved_vit, image_folder, tmp_path, capsys):
    given = ["prune", str(saved_vit), "--data", str(image_folder), "--keep-classes", "class1", "zebra"]
    assert main([*given, "-o", str(tmp_path / "few")]) == 2
    assert "no images of class 'zebra'" in capsys.readouterr().err
