"""Fronts: what is above is told by pairs, what is finished is not made again, and alternatives are what they say."""

from __future__ import annotations

import csv
import json

import pytest
import timm
import torch
from conftest import photos

import vitprune
from vitprune import VitpruneError
from vitprune.cli import main
from vitprune.evaluation import front, judged_models
from vitprune.evaluation.accuracy import Accuracy
from vitprune.evaluation.alternatives import list_alternatives
from vitprune.evaluation.front import ABOVE, BELOW, BEYOND, ON, load_front, measure_front, place_of
from vitprune.models.merging import describe_merging
from vitprune.pruning.latency_model import RATES, LatencyModel
from vitprune.speed import speed_candidates
from vitprune.speed.fit_latency import Fitted

NAMES = ("bird", "cat", "dog")


def answer(correct):
    return Accuracy(sum(correct) / len(correct), 1.0, len(correct), (0.0, 1.0), {}, {}, tuple(map(bool, correct)))


@pytest.mark.parametrize(
    ("others", "place"),
    [
        # Of 100 images the alternative has 80 right.
        ([(70, True)], ABOVE),
        ([(70, True), (78, True)], BELOW),  # two images of a hundred prove nothing
        ([(70, True), (95, False)], ABOVE),  # the accurate one is slower
        ([(95, False)], BEYOND),
        ([(80, True)], BELOW),
        ([(90, True)], BELOW),
    ],
)
def test_above_is_what_everything_as_fast_is_less_accurate_than(others, place):
    models = [(answer([1] * right + [0] * (100 - right)), is_as_fast) for right, is_as_fast in others]
    assert place_of(answer([1] * 80 + [0] * 20), models) == place


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"img_size": 64, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 3}
    return timm.create_model("vit_tiny_patch16_224", **sizes).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    return photos(root / "calibration", NAMES, count=6, size=64), photos(root / "val", NAMES, count=5, seed=1, size=64)


@pytest.fixture
def sets(model, folders):
    return [vitprune.ImageBatches(vitprune.find_images(folder, None), model, batch_size=9) for folder in folders]


def test_alternatives_are_what_they_say(model):
    images = [(torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(2)), torch.zeros(8).long())] * 2
    made = {(each.lever, each.name): each.make()[0] for each in list_alternatives(model, images)}
    assert [lever for lever, _name in made] == ["pixels"] * 3 + ["merging"] * 3 + ["neurons"] * 2 + ["variance"] * 2
    assert made["pixels", "56 px"].patch_embed.img_size == (56, 56)
    assert describe_merging(made["merging", "15 tokens in every block"]) == [15, 15, 15, 9]
    half = made["neurons", "50% of the units"]
    assert sum(block.mlp.fc1.out_features for block in half.blocks) == 4 * 192 / 2
    assert {block.attn.qk_width for block in made["variance", "50% of the units"].blocks} == {8}
    dense = vitprune.count_macs(model)
    assert all(vitprune.count_macs(each) < dense for each in made.values())


class Machine:
    """Answers at once how fast a model is, by its multiply-accumulates."""

    def __init__(self, monkeypatch, model):
        self.pruned = []
        products = {"projections": 1e-6, "attention": 1e-6, "ffn": 1e-6}
        rates = tuple(products.get(name, 0.0) for name in RATES)

        def fit(dense, formats, **_options):
            models = {
                each: LatencyModel(each.backend, each.precision, rates, reads_last_block=True) for each in formats
            }
            return Fitted(models[formats[0]].predict(dense), models, vitprune.Format(formats[0].backend))

        monkeypatch.setattr(judged_models, "fit_latency", fit)
        macs = vitprune.count_macs(model)
        monkeypatch.setattr(
            speed_candidates.Timer,
            "speedups",
            lambda timer, other, _format: (macs / vitprune.count_macs(other),) * len(timer.batch_sizes),
        )
        prune = judged_models.prune_for_speed

        def count(*arguments, **options):
            self.pruned.append(arguments[2])
            return prune(*arguments, **options)

        monkeypatch.setattr(judged_models, "prune_for_speed", count)


def test_a_killed_front_goes_on_and_a_finished_one_is_read(model, sets, tmp_path, monkeypatch):
    machine = Machine(monkeypatch, model)
    options = {"formats": [vitprune.Format("torch-eager")], "parts": ["ffn", "tokens"]}

    def stop(*_arguments, **_options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("vitprune.evaluation.front.judge_alternatives", stop)
        with pytest.raises(KeyboardInterrupt):
            measure_front(model, *sets, [1.2, 50.0], tmp_path / "front", **options)
    assert machine.pruned == [1.2, 50.0]
    made = measure_front(model, *sets, [50.0, 1.2], tmp_path / "front", **options)
    assert machine.pruned == [1.2, 50.0]
    assert list(made.unreached) == ["50 x, torch-eager float32"]
    assert "out of reach" in made.unreached["50 x, torch-eager float32"]
    assert (made.rows[0].lever, made.rows[0].speedup, made.rows[0].drop) == ("dense", 1.0, 0.0)
    (ours,) = (row for row in made.rows if row.lever == "budget")
    assert (ours.name, ours.place, ours.macs_share < 1 / 1.1) == ("1.2 x", ON, True)
    assert [row.place in (ABOVE, BELOW, BEYOND) for row in made.rows[2:]] == [True] * 10
    assert {path.name for path in (tmp_path / "front").iterdir()} >= {"front.csv", "front.png", "front.svg", "models"}
    assert not (tmp_path / "front" / "points").exists()
    kept = vitprune.load(str(tmp_path / "front" / "models" / "1.2x-torch-eager-float32"))
    assert vitprune.evaluate(kept, sets[1]).top1 == ours.top1
    with (tmp_path / "front" / "front.csv").open() as stream:
        assert [row["name"] for row in csv.DictReader(stream)] == [row.name for row in made.rows]
    # The same again is read, something else is refused.
    assert measure_front(model, *sets, [1.2, 50.0], tmp_path / "front", **options) == load_front(tmp_path / "front")
    assert load_front(tmp_path / "front") == made
    with pytest.raises(VitpruneError, match="made with another speedups"):
        measure_front(model, *sets, [1.3], tmp_path / "front", **options)


def test_calibration_images_are_no_evaluation_images(model, sets, tmp_path):
    with pytest.raises(VitpruneError, match="18 of 18 evaluation images were calibration images"):
        measure_front(model, sets[0], sets[0], [1.2], tmp_path / "front")
    assert not (tmp_path / "front").exists()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["--speedups", "0.5"], "speedups must be above 1, got 0.5"),
        (["--speedups", "fast"], "speedups: 'fast' is no number and no FIRST:LAST:STEP"),
        (["--speedups", "2", "--ratios", "0.5"], "leave --ratios out"),
        (["--speedups", "2", "--criteria", "obs", "--step", "1"], "leave --criteria, --step out"),
        (["--allow", "int8"], "--parts, --backend, --allow and --latency-batch-size go with --speedups"),
        (["--speedups", "2", "--backend", "torch-eager", "--allow", "int8"], "torch-eager has no int8"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(asked, message, model, folders, tmp_path, capsys):
    vitprune.save(model, tmp_path / "model")
    calibration, val = map(str, folders)
    images = ["--data", calibration, "--eval-data", val, "-o", str(tmp_path / "front")]
    assert main(["curve", str(tmp_path / "model"), *images, *asked]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "front").exists()


def test_the_command_says_what_lies_where(model, folders, tmp_path, monkeypatch, capsys):
    Machine(monkeypatch, model)
    monkeypatch.setattr(front, "list_alternatives", lambda *_arguments, **_options: [])
    vitprune.save(model, tmp_path / "model")
    calibration, val = map(str, folders)
    images = ["--data", calibration, "--eval-data", val, "-o", str(tmp_path / "front"), "--parts", "tokens"]
    asked = ["--speedups", "1.2", "--allow", "int8", "--latency-batch-size", "1", "2", "--json"]
    assert main(["curve", str(tmp_path / "model"), *images, *asked]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["batch_sizes"] == [1, 2]
    assert {(row["lever"], row["precision"]) for row in content["rows"]} >= {
        (lever, precision) for lever in ("dense", "budget") for precision in ("float32", "int8")
    }
    assert main(["curve", str(tmp_path / "model"), *images, *asked[:-1]]) == 0
    told = capsys.readouterr().out
    assert "accuracy against speed on 15 images, batch size 1 and 2" in told
    assert "wrote" in told.splitlines()[-1]
