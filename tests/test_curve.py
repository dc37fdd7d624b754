"""Curves: nested walks equal separate prunings, finished points are kept, and the paired bound covers."""

from __future__ import annotations

import csv
import json
import time

import numpy as np
import pytest
import torch
from quick import start_command

import vitprune
from vitprune.card import read_card
from vitprune.cli import main
from vitprune.evaluation import curve as curve_module
from vitprune.evaluation.accuracy import Accuracy, drop_bound
from vitprune.evaluation.curve import Curve, find_largest_ratio, measure_curve, parse_ratios

IMAGES = torch.randn(40, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
CALIBRATION = [(IMAGES[:12], torch.arange(12) % 5)]
EVALUATION = [(IMAGES[12:], torch.arange(28) % 5)]


def answer(correct):
    return Accuracy(sum(correct) / len(correct), 1.0, len(correct), (0.0, 1.0), {}, {}, tuple(map(bool, correct)))


def test_the_bound_without_any_change_is_the_known_one():
    bound = drop_bound(answer([1] * 100), answer([1] * 100))
    assert bound == pytest.approx(1.6448536**2 / (100 + 1.6448536**2), rel=1e-6)


@pytest.mark.parametrize(("count", "lost", "gained"), [(200, 0.05, 0.02), (500, 0.03, 0.02), (300, 0.01, 0.01)])
def test_the_bound_misses_as_seldom_as_it_says(count, lost, gained):
    generator = np.random.default_rng(0)
    misses = 0
    for _ in range(1000):
        only_dense, only_pruned, rest = generator.multinomial(count, [lost, gained, 1 - lost - gained])
        dense = answer([1] * only_dense + [0] * only_pruned + [1] * rest)
        pruned = answer([0] * only_dense + [1] * only_pruned + [1] * rest)
        misses += drop_bound(dense, pruned) < lost - gained
    assert misses / 1000 < 0.07


@pytest.mark.parametrize("compensation", ["ridge", "none", "sequential"])
def test_a_walk_through_all_ratios_prunes_like_each_ratio_alone(compensation, tiny_vit):
    plan = Curve(["obs"], ["global"], [compensation], step=0.2)
    points = measure_curve(tiny_vit, CALIBRATION, EVALUATION, plan, ratios=[0.5, 0.3, 0.6])
    assert [point.criterion for point in points] == ["dense", "obs", "obs", "obs"]
    for ratio, point in zip([0.3, 0.5, 0.6], points[1:], strict=True):
        pruned, made = vitprune.prune(tiny_vit, CALIBRATION, pruning_ratio=ratio, step=0.2, compensation=compensation)
        assert point.pruning_ratio == pytest.approx(made.pruning_ratio)
        assert point.top1 == vitprune.evaluate(pruned, EVALUATION).top1
        assert point.num_parameters == sum(parameter.numel() for parameter in pruned.parameters())


def test_finished_points_are_not_measured_again(tiny_vit, tmp_path, monkeypatch):
    plan = Curve(["variance", "random"], ["uniform"], ["none", "ridge"], step=1.0, folder=tmp_path)
    first = measure_curve(tiny_vit, CALIBRATION, EVALUATION, plan, ratios=[0.25, 0.5])
    (tmp_path / "random-uniform-ridge-0.500000.json").unlink()
    calls = []
    evaluate = curve_module.evaluate
    monkeypatch.setattr(curve_module, "evaluate", lambda *a: calls.append(1) or evaluate(*a))
    assert measure_curve(tiny_vit, CALIBRATION, EVALUATION, plan, ratios=[0.25, 0.5]) == first
    assert len(calls) == 1


def test_the_largest_ratio_is_the_last_that_holds(tiny_vit):
    plan = Curve(["magnitude"], ["global"], ["none"])
    ratio, points = find_largest_ratio(tiny_vit, CALIBRATION, EVALUATION, plan, max_drop=0.13)
    tried = {round(point.pruning_ratio, 3): point.drop_bound for point in points[1:]}
    holding = [share for share, bound in tried.items() if bound <= 0.13]
    assert max(holding, default=0) == pytest.approx(ratio, abs=0.01)
    assert any(bound > 0.13 for bound in tried.values()) or ratio >= 0.9


@pytest.mark.parametrize("text", ["a", "0.1:0.2", "0.3:0.1:0.1", "1.0", "0.1:0.3:0"])
def test_ratios_that_are_none_are_refused(text):
    with pytest.raises(vitprune.VitpruneError, match="ratios"):
        parse_ratios([text])


def arguments(saved_vit, image_folder, output):
    classes = ["--classes", "class0", "class1"]
    given = ["curve", str(saved_vit), "--data", str(image_folder), *classes, "--step", "0.25", "-o", str(output)]
    return [*given, "--eval-data", str(image_folder.parent / "others"), "--ratios", "0.25:0.5:0.25"]


@pytest.fixture(scope="module")
def other_images(image_folder):
    from PIL import Image

    for path in image_folder.rglob("class*/*.*"):
        target = image_folder.parent / "others" / path.relative_to(image_folder).with_suffix(".png")
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(target)


def test_the_command_writes_tables_and_pictures(saved_vit, image_folder, other_images, tmp_path, capsys):
    given = arguments(saved_vit, image_folder, tmp_path / "c")
    assert main([*given, "--criteria", "obs", "random", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    rows = list(csv.DictReader((tmp_path / "c" / "curve.csv").open()))
    assert [row["criterion"] for row in rows] == ["dense", "obs", "obs", "random", "random"]
    assert [float(row["top1"]) for row in rows] == [point["top1"] for point in printed["points"]]
    assert {row["num_images"] for row in rows} == {"20"}
    assert (tmp_path / "c" / "curve.png").stat().st_size > 10_000
    assert (tmp_path / "c" / "curve.svg").read_text().startswith("<?xml")
    assert main([*given, "--seed", "1"]) == 2
    assert "was made with another" in capsys.readouterr().err


def test_calibration_images_are_not_evaluated_on(saved_vit, image_folder, tmp_path, capsys):
    given = arguments(saved_vit, image_folder, tmp_path / "c")
    assert main([*given, "--eval-data", str(image_folder)]) == 2
    assert "evaluation images were calibration images" in capsys.readouterr().err


def test_other_labels_are_another_request(saved_vit, image_folder, other_images, tmp_path, capsys):
    """Same images, same weights; only what they are called has changed."""
    names = [f"class{index}" for index in range(5)]
    for order, code in ((names, 0), (names[::-1], 2)):
        (tmp_path / "map.txt").write_text("\n".join(order))
        given = [*arguments(saved_vit, image_folder, tmp_path / "c"), "--class-map", str(tmp_path / "map.txt")]
        assert main([*given, "--criteria", "random", "--compensations", "none"]) == code
    assert "made with another calibration images, evaluation images" in capsys.readouterr().err


def test_images_of_a_runs_scores_are_not_evaluated_on(saved_vit, image_folder, other_images, tmp_path, capsys):
    others = str(image_folder.parent / "others")
    assert main(["discover", str(saved_vit), "--data", others, "-o", str(tmp_path / "run")]) == 0
    given = ["curve", str(tmp_path / "run"), "--data", str(image_folder), "--eval-data", others]
    assert main([*given, "-o", str(tmp_path / "c")]) == 2
    assert "20 of 20 evaluation images were calibration images" in capsys.readouterr().err


def test_the_seed_reaches_the_search_for_the_largest_ratio(tiny_vit):
    plan = Curve(["random"], ["global"], ["none"], seed=3)
    _ratio, points = find_largest_ratio(tiny_vit, CALIBRATION, EVALUATION, plan, max_drop=0.2)
    ratio = points[1].pruning_ratio
    pruned, _ = vitprune.prune(tiny_vit, pruning_ratio=0.1, criterion="random", compensation="none", seed=3)
    assert ratio == pytest.approx(0.1, abs=0.01)
    assert points[1].top1 == vitprune.evaluate(pruned, EVALUATION).top1


def test_a_budget_from_the_command_line(saved_vit, image_folder, other_images, tmp_path, capsys):
    given = arguments(saved_vit, image_folder, tmp_path / "c")[:-2]
    few = ["--eval-images-per-class", "2"]
    assert main([*given, *few, "--max-drop", "0.9", "--criteria", "magnitude", "--compensations", "none"]) == 0
    shown = capsys.readouterr().out
    assert "largest ratio that costs at most 0.9 top-1, at 95 % confidence: 0.9" in shown
    # A terminal of 80 columns shows the whole table where one way to prune was asked for.
    assert "accuracy against size, magnitude, global, none" in shown
    assert max(len(line.rstrip()) for line in shown.splitlines() if line.startswith(("┃", "│"))) <= 80
    written = json.loads((tmp_path / "c" / "curve.json").read_text())
    assert written["largest_ratio"] == pytest.approx(0.9)
    assert {point["num_images"] for point in written["points"]} == {10}
    drawn = (tmp_path / "c" / "curve.svg").read_text()
    assert "<!-- budget -->" in drawn
    assert "<!-- vit_tiny_patch16_224, 10 images, no retraining -->" in drawn


def test_overwriting_spares_what_the_command_does_not_write(saved_vit, image_folder, other_images, tmp_path, capsys):
    given = [*arguments(saved_vit, image_folder, tmp_path / "c"), "--criteria", "random", "--compensations", "none"]
    assert main(given) == 0
    (tmp_path / "c" / "notes.txt").write_text("mine")
    assert main([*given, "--seed", "1", "--overwrite"]) == 2
    assert "holds notes.txt, which this command does not write" in capsys.readouterr().err
    (tmp_path / "c" / "notes.txt").unlink()
    assert "--seed" not in read_card(tmp_path / "c").command
    assert main([*given, "--seed", "1", "--overwrite"]) == 0
    assert "--seed 1" in read_card(tmp_path / "c").command


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(saved_vit, image_folder, other_images, tmp_path):
    criteria = ["--criteria", "obs", "fisher", "random", "variance", "--compensations", "none", "sequential"]

    def command(output):
        return [*arguments(saved_vit, image_folder, output), *criteria]

    assert main(command(tmp_path / "whole")) == 0
    for wanted in (2, 5):
        process = start_command(command(tmp_path / "killed"))
        while len(list((tmp_path / "killed").glob("points/*.json"))) < wanted and process.is_alive():
            time.sleep(0.01)
        process.kill()
        process.join()
    assert main(command(tmp_path / "killed")) == 0
    for name in ("curve.csv", "curve.png", "curve.svg"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
