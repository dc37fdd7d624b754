"""Evaluations: every answer is kept, two models are compared on the same images, and what is written reads back."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import TINY, make_vit
from PIL import Image

import vitprune
from vitprune.cli import main
from vitprune.data import digest_images, hash_images
from vitprune.evaluation.accuracy import collect_answers
from vitprune.evaluation.evaluation_folder import flipped, load_evaluation, save_evaluation


@pytest.fixture(scope="module")
def second_vit(tmp_path_factory):
    model = make_vit(seed=4).float()
    model.model_args = TINY
    folder = tmp_path_factory.mktemp("models") / "second"
    vitprune.save(model, folder)
    return folder


@pytest.fixture(scope="module")
def evaluated(saved_vit, second_vit, image_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluations") / "both"
    given = ["evaluate", str(second_vit), "--against", str(saved_vit), "--data", str(image_folder), "-o", str(folder)]
    assert main(given) == 0
    return folder


def answer_of(capsys, *arguments, code=0):
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == code
    captured = capsys.readouterr()
    return json.loads(captured.out) if code == 0 else captured.err.strip().splitlines()[-1]


def test_answers_are_those_of_a_slow_loop(tiny_vit, tiny_images):
    labels = torch.tensor([4, 0, 2])
    answers = collect_answers(tiny_vit, [(tiny_images[:2], labels[:2]), (tiny_images[2:], labels[2:])])
    for place, (image, label) in enumerate(zip(tiny_images, labels, strict=True)):
        logits = tiny_vit(image[None])[0]
        assert answers.predictions[place] == logits.argmax()
        assert answers.probabilities[place].item() == pytest.approx(
            logits.exp()[label].item() / logits.exp().sum().item()
        )
    assert answers.among_five.all()
    assert torch.equal(answers.labels, labels)


def test_every_answer_is_kept(evaluated, saved_vit, second_vit, image_folder):
    rows = [json.loads(line) for line in (evaluated / "images.jsonl").read_text().splitlines()]
    images = vitprune.find_images(image_folder, 5)
    assert [row["file"] for row in rows] == list(images.files)
    for prefix, folder in (("", second_vit), ("against_", saved_vit)):
        model = vitprune.load(folder)
        answers = collect_answers(model, vitprune.ImageBatches(images, model))
        assert [row[f"{prefix}prediction"] for row in rows] == answers.predictions.tolist()
        got = torch.tensor([row[f"{prefix}probability"] for row in rows], dtype=torch.float64)
        torch.testing.assert_close(got, answers.probabilities, rtol=1e-4, atol=1e-6)


def test_both_are_measured_as_each_alone_and_compared_as_pairs(evaluated, saved_vit, second_vit, image_folder):
    written = json.loads((evaluated / "evaluation.json").read_text())
    images = vitprune.find_images(image_folder, 5)
    accuracies = []
    for folder in (saved_vit, second_vit):
        model = vitprune.load(folder)
        accuracies.append(vitprune.evaluate(model, vitprune.ImageBatches(images, model)))
    before, after = accuracies
    assert (written["top1"], written["against"]["top1"]) == (after.top1, before.top1)
    assert written["against"]["drop"] == pytest.approx(before.top1 - after.top1)
    assert written["against"]["p_value"] == vitprune.compare(before, after).p_value
    lost = [name for name, was, now in zip(images.files, before.correct, after.correct, strict=True) if was and not now]
    assert written["against"]["lost_images"] == lost
    assert len(written["against"]["gained_images"]) == vitprune.compare(before, after).gained
    assert written["images_sha256"] == digest_images(hash_images(images))
    assert written["models"]["model"]["weights_sha256"] != written["models"]["against"]["weights_sha256"]
    assert written["per_class"].keys() == written["against"]["per_class"].keys()


def test_an_evaluation_reads_back_as_it_was_written(evaluated, tmp_path):
    evaluation = load_evaluation(evaluated)
    assert len(flipped(evaluation)[0]) == len(
        json.loads((evaluated / "evaluation.json").read_text())["against"]["lost_images"]
    )
    save_evaluation(evaluation, tmp_path / "again")
    for name in ("evaluation.json", "images.jsonl"):
        assert (tmp_path / "again" / name).read_bytes() == (evaluated / name).read_bytes()
    lines = (tmp_path / "again" / "images.jsonl").read_text().splitlines()
    (tmp_path / "again" / "images.jsonl").write_text("\n".join(lines[1:]))
    with pytest.raises(vitprune.VitpruneError, match=r"is of 20 images, images.jsonl of 19"):
        load_evaluation(tmp_path / "again")
    with pytest.raises(vitprune.VitpruneError, match=r"is no evaluation: it has no evaluation.json"):
        load_evaluation(tmp_path)


def test_one_model_alone_has_nothing_to_compare(saved_vit, image_folder, tmp_path, capsys):
    answer = answer_of(capsys, "evaluate", saved_vit, "--data", image_folder, "-o", tmp_path / "e", "--json")
    assert answer["against"] is None
    evaluation = load_evaluation(tmp_path / "e")
    assert evaluation.against is None
    with pytest.raises(vitprune.VitpruneError, match="compare it with another one"):
        flipped(evaluation)


def test_a_specialist_is_compared_on_the_images_of_its_classes(saved_vit, image_folder, tmp_path, capsys):
    prune = ["prune", saved_vit, "--data", image_folder, "--keep-classes", "class1", "class3", "--step", 1]
    answer_of(capsys, *prune, "--criterion", "magnitude", "--compensate", "none", "-o", tmp_path / "two", "--json")
    asked = ["evaluate", tmp_path / "two", "--against", saved_vit, "--data", image_folder, "-o", tmp_path / "e"]
    assert answer_of(capsys, *asked, "--json")["num_images"] == 8
    evaluation = load_evaluation(tmp_path / "e")
    assert set(evaluation.judged.answers.labels.tolist()) == {0, 1}
    assert set(evaluation.against.answers.labels.tolist()) == {1, 3}
    assert evaluation.judged.class_names == {0: "class1", 1: "class3"}
    # The other way round there are images that the second model has no class for.
    backwards = ["evaluate", saved_vit, "--against", tmp_path / "two", "--data", image_folder]
    assert "has no class for class0/0.jpg and 11 more images" in answer_of(capsys, *backwards, code=2)


def test_an_onnx_file_is_compared_with_torch(saved_vit, image_folder, tmp_path, capsys):
    exported = tmp_path / "m.onnx"
    answer_of(capsys, "export", saved_vit, exported, "--data", image_folder, "--json")
    answer = answer_of(capsys, "evaluate", exported, "--against", saved_vit, "--data", image_folder, "--json")
    assert answer["against"]["lost_images"] == answer["against"]["gained_images"] == []
    assert answer["against"]["p_value"] == 1


def test_neither_model_may_have_seen_the_images(saved_vit, image_folder, tmp_path, capsys):
    prune = ["prune", saved_vit, "--data", image_folder, "--step", 1, "-o", tmp_path / "half", "--json"]
    answer_of(capsys, *prune)
    for first, second in ((saved_vit, tmp_path / "half"), (tmp_path / "half", saved_vit)):
        line = answer_of(capsys, "evaluate", first, "--against", second, "--data", image_folder, code=2)
        assert f"20 of 20 evaluation images were calibration images of {tmp_path / 'half'}" in line


def test_an_image_that_cannot_be_decoded_is_in_neither(saved_vit, second_vit, image_folder, tmp_path, capsys):
    images = tmp_path / "images"
    for index in range(5):
        (images / f"class{index}").mkdir(parents=True)
        Image.open(image_folder / f"class{index}" / "0.jpg").save(images / f"class{index}" / "a.png")
    (images / "class2" / "b.png").write_text("no image")
    asked = ["evaluate", saved_vit, "--against", second_vit, "--data", images, "-o", tmp_path / "e", "--json"]
    answer = answer_of(capsys, *asked)
    assert answer["skipped"] == ["class2/b.png"]
    assert len(load_evaluation(tmp_path / "e").files) == answer["num_images"] == answer["against"]["num_images"] == 5
