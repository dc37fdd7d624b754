"""The paper's experiments on runs: from the command line, and the same in Python."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch

import vitprune
from vitprune.analysis.analysis_figures import analysis_figures, save_analysis_figures
from vitprune.analysis.analysis_folder import describe_analysis, load_analysis, save_analysis
from vitprune.analysis.analyze import load_runs
from vitprune.cli import main
from vitprune.data import find_images
from vitprune.discovery.run import load_run
from vitprune.options import EXPERIMENTS

METHODS = ("jas", "activation", "random")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, saved_vit, image_folder):
    folder = tmp_path_factory.mktemp("runs")
    for method in METHODS:
        arguments = ["--data", str(image_folder), "--method", method, "--tokens", "cls", "-o", str(folder / method)]
        assert main(["discover", str(saved_vit), *arguments]) == 0
    return [str(folder / method) for method in METHODS]


def analyze(capsys, *arguments):
    code = main(["analyze", *map(str, arguments), "--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out) if code == 0 else err


def test_every_experiment_and_its_figures(runs, other_folder, tmp_path, capsys):
    folder = tmp_path / "analysis"
    arguments = ("--data", other_folder, "--top-k", 1, "--mask-share", 1, "-o", folder)
    experiments = [name for name in EXPERIMENTS if name != "heads"]  # these paths go through FFNs
    code, answer = analyze(capsys, *runs, *arguments, "--experiments", *experiments)
    assert code == 0
    assert answer["experiments"] == experiments
    assert [row["method"] for row in answer["scores"]] == list(METHODS)
    for experiment, num_paths in (("manipulation", 1), ("halves", 2), ("transfer", 1)):
        rows = answer[experiment]
        assert len(rows) == num_paths * 2 * len(METHODS)
        assert {row["num_images"] for row in rows} == {10 if experiment == "transfer" else 20}
    for method, source in zip(METHODS, runs, strict=True):
        mean = load_run(source).found.joint_scores.view(5, 4).mean().item()
        score = next(row for row in answer["scores"] if row["method"] == method)
        assert score["joint_score"]["mean"] == pytest.approx(mean, rel=1e-5)
    assert set(answer["similarity"]) == set(METHODS)
    figures = analysis_figures(load_analysis(folder))
    files = {path.name for path in (folder / "figures").iterdir()}
    assert files == {name for figure in figures for name in figure.files}
    stems = {figure.stem for figure in figures}
    assert {"joint_scores", "deviations_own", "class_similarity_visits", "topk_mask", "top_images_0"} <= stems
    stored = json.loads((folder / "analysis.json").read_text())
    assert {key: stored[key] for key in stored if key not in ("kind", "version", "content_sha256")} == {
        key: answer[key] for key in answer if key != "output"
    }


def test_a_repeated_analysis_reads_no_image_again_and_gives_the_same_bytes(runs, tmp_path, capsys, image_folder):
    def contents(folder):
        files = (path for path in folder.rglob("*") if path.is_file() and path.name != "card.json")
        return {path.relative_to(folder): path.read_bytes() for path in files}

    folder = tmp_path / "analysis"
    arguments = (*runs, "--experiments", "manipulation", "halves", "-o", folder)
    assert analyze(capsys, *arguments)[0] == 0
    before = contents(folder)
    passes = {path.name: path.stat().st_mtime_ns for path in (folder / "passes").iterdir()}
    assert len(passes) == 1 + len(METHODS) * 2 * 3
    assert analyze(capsys, *arguments)[0] == 0
    assert contents(folder) == before
    assert {path.name: path.stat().st_mtime_ns for path in (folder / "passes").iterdir()} == passes
    (folder / "passes" / "own-jas-0-cls.safetensors").unlink()
    assert analyze(capsys, *arguments)[0] == 0
    assert contents(folder) == before


def test_without_an_output_it_prints(runs, capsys):
    assert main(["analyze", runs[0], "--experiments", "scores", "similarity"]) == 0
    out, _err = capsys.readouterr()
    assert "joint attribution score (20 images of 5 classes)" in out
    assert "share of path neurons" in out


def test_the_default_leaves_out_what_cannot_be_done(saved_vit, image_folder, tmp_path, capsys):
    run = tmp_path / "one"
    arguments = ["--data", str(image_folder), "--images-per-class", "1", "-o", str(run)]
    assert main(["discover", str(saved_vit), *arguments]) == 0
    capsys.readouterr()
    assert main(["analyze", str(run), "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["experiments"] == ["scores", "manipulation", "similarity", "top-images"]
    assert "left out halves and stability" in err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--experiments", "transfer"], "pass --data DIR"),
        (["--top-k", "3"], "--top-k: for the experiment topk-mask"),
        (["--experiments", "saliency"], "experiments must be one of scores"),
        (["--tokens", "dog"], "tokens must be one of cls"),
        (["--classes", "class1"], "choose among the images of --data"),
        (["--wordnet", "/nowhere", "--experiments", "similarity"], "/nowhere has no data.noun"),
    ],
)
def test_refusals(arguments, reason, runs, capsys, tmp_path):
    code, err = analyze(capsys, runs[0], *arguments, "-o", tmp_path / "out")
    assert code == 2
    assert reason in err
    assert len(err.strip().splitlines()) == 1


def test_runs_that_cannot_be_compared_are_refused(runs, saved_vit, image_folder, other_folder, tmp_path, capsys):
    code, err = analyze(capsys, runs[0], saved_vit)
    assert (code, "is no run" in err) == (2, True)
    run = tmp_path / "fewer"
    main(["discover", str(saved_vit), "--data", str(other_folder), "-o", str(run)])
    capsys.readouterr()
    code, err = analyze(capsys, runs[0], run)
    assert (code, "different images" in err) == (2, True)
    shutil.copytree(runs[0], tmp_path / "a" / "jas")
    code, err = analyze(capsys, runs[0], tmp_path / "a" / "jas")
    assert (code, "differ in method or in folder name" in err) == (2, True)
    code, err = analyze(capsys, runs[0], "--data", image_folder, "--experiments", "transfer")
    assert (code, "were calibration images" in err) == (2, True)


def test_python_gets_what_the_command_line_gets(runs, saved_vit, other_folder, tmp_path, capsys):
    experiments = ("manipulation", "similarity", "transfer")
    arguments = ("--data", other_folder, "--experiments", *experiments, "-o", tmp_path / "typed")
    _code, answer = analyze(capsys, *runs, *arguments)
    opened, folder = load_runs(runs), tmp_path / "called"
    analysis = vitprune.analyze(
        vitprune.load(saved_vit),
        opened,
        others=find_images(other_folder, 5),
        experiments=experiments,
        sources=dict(zip(opened, runs, strict=True)),
        folder=folder,
    )
    assert {"output": answer["output"], **describe_analysis(analysis)} == answer
    save_analysis(analysis, folder, runs=opened)
    save_analysis_figures(analysis, folder, runs=opened)
    for typed in (path for path in (tmp_path / "typed").rglob("*") if path.is_file() and path.name != "card.json"):
        assert (folder / typed.relative_to(tmp_path / "typed")).read_bytes() == typed.read_bytes()
    again = load_analysis(folder)
    assert all(torch.equal(again.cosines[of], analysis.cosines[of]) for of in ("visits", "scores"))
    assert replace(again, cosines={}) == replace(analysis, cosines={})


def test_a_killed_analysis_goes_on(runs, saved_vit, tmp_path):
    network, opened = vitprune.load(saved_vit), load_runs(runs[:2])

    def passes(stop_after=None):
        read = []

        def track(items, description):
            if len(read) == stop_after:
                raise KeyboardInterrupt
            read.append(description)
            return items

        try:
            vitprune.analyze(network, opened, experiments=["manipulation"], folder=tmp_path / "out", track=track)
        except KeyboardInterrupt:
            assert stop_after is not None
        return read

    assert passes(stop_after=2) == ["undisturbed", "own paths of jas"]
    assert passes() == ["own paths of activation"]
    with pytest.raises(vitprune.VitpruneError, match="was made with another runs, seed"):
        vitprune.analyze(network, load_runs(runs[:1]), seed=1, folder=tmp_path / "out")


def test_the_default_says_what_it_leaves_out(runs, saved_vit, image_folder):
    network, opened, notes = vitprune.load(saved_vit), load_runs(runs[:1]), []
    (name, run), *_ = opened.items()
    one = find_images(image_folder, 5, images_per_class=1)
    found = vitprune.discover(network, vitprune.ImageBatches(one, network), method="random")
    few = {name: replace(run, found=found, images=one)}
    assert "halves" not in vitprune.analyze(network, few, note=notes.append).experiments
    assert notes == ["left out halves and stability: some classes have one image in the run, which has no halves"]


def test_python_refuses_in_its_own_words(runs, saved_vit, image_folder, tmp_path):
    network, opened = vitprune.load(saved_vit), load_runs(runs[:2])
    (first, run), (second, other) = opened.items()
    gone = replace(run, images=replace(run.images, root=tmp_path / "gone"))
    mine = find_images(image_folder, 5)
    cases = (
        ({}, {}, "an analysis needs at least one run"),
        ({first: replace(run, weights_sha256="x")}, {}, "jas: its scores are of other weights than the model's"),
        (
            {**opened, second: replace(other, weights_sha256="x")},
            {},
            "and jas are runs of different weights",
        ),
        ({**opened, second: replace(other, images=mine.head(3))}, {}, "same folder, with the same `images_per_class`"),
        ({first: gone}, {}, "the images of jas are no longer at .*gone; put them back"),
        (opened, {"others": mine}, "20 of 20 evaluation images were calibration images of jas"),
        (opened, {"experiments": ["transfer"]}, "transfer tests on images other than the run's; pass `others`"),
        (opened, {"top_k": [3], "depth": 1}, "`top_k`, `depth`: for the experiment topk-mask; add topk-mask to"),
        (opened, {"batch_size": 0}, "batch_size must be at least 1, got 0"),
        (opened, {"num_workers": -1}, "`num_workers` must not be negative, got -1"),
    )
    for given, options, message in cases:
        with pytest.raises(vitprune.VitpruneError, match=message):
            vitprune.analyze(network, given, folder=tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()
