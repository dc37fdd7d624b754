"""The command line as a program would use it: exit codes, one line for a mistake, JSON, nothing half-written."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import TINY, make_vit
from safetensors.torch import save_file

import vitprune
from vitprune import options
from vitprune.cli import main
from vitprune.files import CARD_FILE
from vitprune.models.macs import count_parameters
from vitprune.progress import log_lines

RECIPES = Path(__file__).resolve().parents[1] / "recipes"


def run(*arguments, code=0, capsys=None):
    """Run the command line in this process; return its JSON answer, or the one line of a refusal."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == code
    captured = capsys.readouterr()
    if code == 0:
        return json.loads(captured.out)
    lines = captured.err.strip().splitlines()
    assert captured.out == ""
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("vitprune: ")
    return lines[0]


@pytest.fixture(scope="module")
def run_folder(saved_vit, image_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "vit"
    assert main(["discover", str(saved_vit), "--data", str(image_folder), "-o", str(folder), "--top-k", "2"]) == 0
    return folder


@pytest.fixture(scope="module")
def pruned_folder(run_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pruned") / "vit"
    assert main(["prune", str(run_folder), "--ratio", "0.5", "-o", str(folder)]) == 0
    return folder


def other_images(image_folder, root):
    """Write the same classes with other pictures."""
    from PIL import Image

    for folder in sorted(image_folder.iterdir()):
        (root / folder.name).mkdir(parents=True)
        for file in folder.iterdir():
            Image.open(file).rotate(90).save(root / folder.name / f"{file.stem}.png")
    return root


def test_the_main_job_from_end_to_end(saved_vit, image_folder, tmp_path, capsys):
    found = run(
        "discover", saved_vit, "--data", image_folder, "--images-per-class", 2, "-o", tmp_path / "run", "--json",
        capsys=capsys,
    )  # fmt: skip
    assert found["num_images"] == 10
    assert Path(found["paths"]).is_file()
    assert len(found["class_paths"]["class3"]) == 3
    assert found["class_num_images"]["class3"] == 2 >= found["class_num_correct"]["class3"]
    for mode in ("remove", "mask"):
        pruned = run(
            "prune", tmp_path / "run", "--ratio", 0.5, "--mode", mode, "-o", tmp_path / mode, "--json", capsys=capsys
        )
        assert pruned["num_neurons"] == sum(pruned["widths"].values()) == 72
        assert pruned["num_neurons_dense"] == 144
        assert pruned["pruning_ratio"] == 0.5
    images = other_images(image_folder, tmp_path / "other")
    measured = {
        name: run("evaluate", model, "--data", images, "--json", capsys=capsys)
        for name, model in (("dense", saved_vit), ("remove", tmp_path / "remove"), ("mask", tmp_path / "mask"))
    }
    assert measured["remove"] == measured["mask"]
    assert measured["dense"]["num_images"] == 20
    assert 0 <= measured["dense"]["top1"] <= measured["dense"]["top5"] == 1
    exported = run("export", tmp_path / "remove", tmp_path / "m.onnx", "--json", capsys=capsys)
    assert exported["top1_agreement"] == 1
    assert exported["size_bytes"] == (tmp_path / "m.onnx").stat().st_size
    onnx = run("evaluate", tmp_path / "m.onnx", "--data", images, "--json", capsys=capsys)
    assert onnx["top1"] == measured["remove"]["top1"]
    rows = run(
        "bench", tmp_path / "remove", "--batch-size", 1, 2, "--seconds", 0.05, "--json", capsys=capsys
    )["rows"]  # fmt: skip
    assert {(row["backend"], row["batch_size"]) for row in rows} == {
        (backend, size) for backend in ("torch-eager", "onnxruntime-cpu") for size in (1, 2)
    }
    assert {"median_ms", "p95_ms", "images_per_second"} <= set(rows[0])


def test_the_same_seed_gives_the_same_bytes(saved_vit, image_folder, tmp_path):
    for name in ("a", "b"):
        common = ["--data", str(image_folder), "--images-per-class", "2", "--seed", "5"]
        assert main(["discover", str(saved_vit), *common, "-o", str(tmp_path / name / "run")]) == 0
        assert main(["prune", str(tmp_path / name / "run"), "-o", str(tmp_path / name / "pruned")]) == 0
    files = [file for file in sorted((tmp_path / "a").rglob("*.*")) if file.name != CARD_FILE]
    assert len(files) == 7
    for file in files:
        assert file.read_bytes() == (tmp_path / "b" / file.relative_to(tmp_path / "a")).read_bytes(), file


@pytest.mark.parametrize("criterion", list(options.CRITERIA))
@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_every_criterion_prunes_a_run(criterion, allocation, run_folder, tmp_path, capsys):
    answer = run(
        "prune", run_folder, "--criterion", criterion, "--allocation", allocation, "--ratio", 0.25, "--round-to", 4,
        "--compensate", "bias", "-o", tmp_path / "p", "--json",
        capsys=capsys,
    )  # fmt: skip
    assert answer["pruning_ratio"] >= 0.25
    assert all(width % 4 == 0 for width in answer["widths"].values())


def test_a_plan_is_applied_to_another_checkpoint(pruned_folder, saved_vit, tmp_path, capsys):
    common = ("--plan", pruned_folder, "--compensate", "none", "--json")
    other = make_vit(seed=9).float()
    other.model_args = TINY
    vitprune.save(other, tmp_path / "other")
    run("prune", tmp_path / "other", *common, "-o", tmp_path / "a", capsys=capsys)
    plan, pruned = vitprune.read_plan(pruned_folder), vitprune.load(tmp_path / "a")
    assert {ffn.name: ffn.num_neurons for ffn in vitprune.find_feed_forwards(pruned)} == plan.widths
    kept = plan.kept("blocks.1.mlp")
    assert torch.equal(pruned.blocks[1].mlp.fc2.weight, other.blocks[1].mlp.fc2.weight[:, kept])


def test_options_come_from_a_file_too(saved_vit, image_folder, tmp_path, capsys):
    (tmp_path / "o.yaml").write_text(yaml.safe_dump({"data": str(image_folder), "top_k": 3, "images_per_class": 1}))
    out = tmp_path / "run"
    run("discover", saved_vit, "--config", tmp_path / "o.yaml", "--top-k", 1, "-o", out, "--json", capsys=capsys)
    assert vitprune.load_run(out).found.neurons.shape == (5, 3, 1)


def test_progress_goes_to_a_log_as_lines(saved_vit, image_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("vitprune.cli.terminal.SECONDS_BETWEEN_LINES", 0)
    command = ["prune", saved_vit, "--data", image_folder, "--batch-size", 5, "-o", tmp_path / "p", "--ratio", 0.2]
    assert main(list(map(str, command))) == 0
    lines = capsys.readouterr().err.splitlines()
    first = "calibrate: 2 rankings, then compensation"
    begun = [line.partition(",")[0] for line in lines]
    assert [f"rank neurons (step {step} of 2) 3/3" in begun for step in (1, 2)] == [True, True]
    for passed in ("", " (pass 2)"):
        rests = [line.removeprefix(f"{first}{passed} ") for line in lines]
        counts = [rest.partition(",")[0] for rest in rests if rest[0].isdigit()]
        assert counts == ["1/4", "2/4", "3/4", "4/4"], (passed, lines)
    assert any(line.endswith(" left") and "so far, about 0:00:" in line for line in lines)


def test_skipped_images_are_counted(saved_vit, image_folder, tmp_path, capsys):
    images = other_images(image_folder, tmp_path / "images")
    (images / "class0" / "0.png").write_text("no image")
    command = ["discover", saved_vit, "--data", images, "-o", tmp_path / "run", "--json"]
    answer = run(*command, capsys=capsys)
    assert answer["skipped"] == ["class0/0.png"]
    assert answer["num_images"] == len(vitprune.load_run(tmp_path / "run").images) == 19
    assert main([*map(str, command), "--strict", "--overwrite"]) == 2
    assert "class0/0.png: cannot be decoded" in capsys.readouterr().err.splitlines()[-1]
    assert vitprune.load_run(tmp_path / "run").found.neurons.shape[0] == 19


def test_evaluation_images_must_not_be_calibration_images(run_folder, pruned_folder, image_folder, tmp_path, capsys):
    """Whichever way the images had a say: compensation, the run's scores, an earlier pruning, and as ONNX file."""
    other = other_images(image_folder, tmp_path / "other")
    scores_only = ("--criterion", "jas", "--compensate", "none", "--json")
    run("prune", run_folder, *scores_only, "-o", tmp_path / "jas", capsys=capsys)
    run("prune", run_folder, "--criterion", "jas", "--data", other, "-o", tmp_path / "both", "--json", capsys=capsys)
    run("prune", pruned_folder, "--data", other, "-o", tmp_path / "twice", "--json", capsys=capsys)
    run("export", pruned_folder, tmp_path / "m.onnx", "--json", capsys=capsys)
    for model in (pruned_folder, tmp_path / "jas", tmp_path / "both", tmp_path / "twice", tmp_path / "m.onnx"):
        line = run("evaluate", model, "--data", image_folder, code=2, capsys=capsys)
        assert "20 of 20 evaluation images were calibration images" in line


def test_only_the_neurons_of_the_class_paths_stay(run_folder, image_folder, tmp_path, capsys):
    found = vitprune.load_run(run_folder).found
    answer = run("prune", run_folder, "--keep-paths", 3, "--json", "-o", tmp_path / "paths", capsys=capsys)
    plan = vitprune.read_plan(tmp_path / "paths")
    paths = vitprune.class_paths(found, 3).values()
    for position, name in enumerate(found.layers):
        assert set(plan.kept(name).tolist()) == {int(each) for path in paths for each in path[position]}
    assert answer["widths"] == plan.widths
    assert plan.facts.keep_paths == 3
    line = run("evaluate", tmp_path / "paths", "--data", image_folder, code=2, capsys=capsys)
    assert "20 of 20 evaluation images were calibration images" in line
    few_classes = ("--keep-classes", "class0", "class1", "--compensate", "none", "--json")
    few = run("prune", run_folder, "--keep-paths", 3, *few_classes, "-o", tmp_path / "two", capsys=capsys)
    assert few["classes"] == ["class0", "class1"]
    assert all(width <= 6 for width in few["widths"].values())
    assert run("report", tmp_path / "paths", "-o", tmp_path / "report.html", "--json", capsys=capsys)
    assert "the paths of the classes, 3 neurons of each in each FFN" in (tmp_path / "report.html").read_text()
    line = run("prune", run_folder, "--keep-paths", 999, "-o", tmp_path / "x", code=2, capsys=capsys)
    assert "must be in [1, " in line


def test_a_model_without_classifier_is_pruned_and_exported(image_folder, tmp_path, capsys):
    model = make_vit(num_classes=0).float()
    model.model_args = {**TINY, "num_classes": 0}
    vitprune.save(model, tmp_path / "headless")
    images = ("--data", image_folder, "--json")
    run("prune", tmp_path / "headless", "--criterion", "activation", *images, "-o", tmp_path / "half", capsys=capsys)
    answer = run("export", tmp_path / "half", tmp_path / "half.onnx", "--json", capsys=capsys)
    assert answer["max_abs_diff"] < 1e-4
    for command in (
        ("prune", tmp_path / "headless", "-o", tmp_path / "x", "--criterion", "taylor"),
        ("discover", tmp_path / "headless", "-o", tmp_path / "x"),
        ("evaluate", tmp_path / "half"),
    ):
        assert "classifier" in run(*command, *images, code=2, capsys=capsys)


@pytest.mark.parametrize("target", ["params", "macs", "latency"])
def test_a_target_is_met(target, saved_vit, image_folder, tmp_path, capsys):
    model = vitprune.load(saved_vit)
    dense = {"params": count_parameters(model), "macs": vitprune.count_macs(model), "latency": 1e3}[target]
    images = ("--data", image_folder, "--step", 0.5, "--parts", "ffn", "--json")
    limit = ("--target-" + target, 0.85 * dense)
    if target == "latency":  # any machine runs the dense model in less than a second
        assert main([*map(str, ("prune", saved_vit, *limit, *images, "-o", tmp_path / "p"))]) == 2
        assert capsys.readouterr().err.splitlines()[-1].endswith("already")
        return
    answer = run("prune", saved_vit, *limit, *images, "-o", tmp_path / "p", capsys=capsys)
    got = answer["num_parameters"] if target == "params" else answer["macs"]
    assert got == answer["target"]["predicted"] <= 0.85 * dense
    assert answer["pruning_ratio"] > 0


def test_top_k_masking_from_the_command_line(run_folder, image_folder, tmp_path, capsys):
    other = other_images(image_folder, tmp_path / "other")
    chosen = ["--experiments", "topk-mask", "--tokens", "cls", "all", "--top-k", 3, "--mask-share", 0, 1]
    rows = run("analyze", run_folder, "--data", other, *chosen, "--json", capsys=capsys)["topk_mask"]
    assert len(rows) == 1 + 2 * 2 * 2
    unmasked = [row["probability"] for row in rows if row["mask_share"] == 0]
    assert unmasked == pytest.approx([rows[0]["probability"]] * 5)
    assert {row["num_neurons_masked"] for row in rows if row["mask_share"] == 1} == {3 * 45}


MISTAKES = [
    ("discover deit_tny_patch16_224 --data {data} -o {out}", "did you mean deit_tiny_patch16_224"),
    ("discover {vit} --data {out}/absent -o {out}", "no such data folder"),
    ("discover {vit} --data {empty} -o {out}", "holds no class folders"),
    ("discover {vit} --data {data} --classes x -o {out}", "class 'x' is neither a folder"),
    ("discover {vit} --data {data} --top-k 999 -o {out}", "top_k must be in [1, 48]"),
    ("discover {vit} --data {data} --method magic -o {out}", "invalid choice: 'magic'"),
    ("discover {vit} --data {data} --quadrature x:3 -o {out}", "quadrature must be"),
    ("discover {vit} --data {data} --images-per-class 0 -o {out}", "images_per_class must be at least 1"),
    ("discover {vit} --data {data} --batch-size 0 -o {out}", "batch_size must be at least 1"),
    ("discover {vit} --data {data} --model-args depth=2 -o {out}", "leave --model-args out"),
    ("discover {vit} --data {data} --device cuda:77 -o {out}", "device 'cuda:77' cannot be used here"),
    ("discover resnet18 --checkpoint {resnet} --data {data} --class-map {map} -o {out}", "no supported FFN"),
    ("discover vit_tiny_patch16_224 --checkpoint {resnet} --data {data} -o {out}", "does not fit"),
    ("discover vit_tiny_patch16_224 --checkpoint {map} --data {data} -o {out}", "not a plain state dict"),
    ("discover {vit} --data {data} --topk 1 -o {out}", "did you mean '--top-k'?"),
    ("discover {vit} --data {data}", "the following arguments are required: output"),
    ("prune {run} --ratio 1.2 -o {out}", "ratio must be in [0, 1), got 1.2"),
    ("prune {run} --ratio -0.1 -o {out}", "ratio must be in [0, 1)"),
    ("prune {run} --ratio 0.99 -o {out}", "empty; ask for less"),
    ("prune {run} --ridge 0 -o {out}", "ridge must be positive"),
    ("prune {run} --floor 3 -o {out}", "floor must be in [0, 1]"),
    ("prune {run} --step 0 -o {out}", "step must be in (0, 1]"),
    ("prune {run} --ratio 0.5 --target-macs 1e5 -o {out}", "one target at a time"),
    ("prune {run} --target-params 10 -o {out}", "with one unit in each group the model still has"),
    ("prune {run} --target-macs 1e15 -o {out}", "already"),
    ("prune {run} --backend onnxruntime-cpu -o {out}", "go with --target-latency"),
    ("prune {run} --target-latency 1 --backend x -o {out}", "backend must be one of"),
    ("prune {run} --merge twice -o {out}", "merging 'twice': expected 'constant:13'"),
    ("prune {run} --merge 0:999 -o {out}", "patches cannot merge at once"),
    ("prune {run} --merge auto -o {out}", "say which share of the multiply-accumulates"),
    ("prune {run} --image-size 30 -o {out}", "are no whole patches of 8 x 8"),
    ("prune {run} --image-size 8 8 8 -o {out}", "takes one number, or height and width"),
    ("prune {run} --parts ffn tokens --ratio 0.5 -o {out}", "part tokens needs a target and images"),
    ("prune {run} --parts tokens --target-params 1e4 -o {out}", "part tokens saves multiply-accumulates"),
    ("elastic {run} --parts tokens -o {out}.safetensors", "invalid choice: 'tokens'"),
    ("evaluate {vit} --merge 99:1 --data {data}", "there is no block 99"),
    ("evaluate {vit} --merge auto:0.5 --data {data}", "merging 'auto:0.5': expected"),
    ("prune {run} --parts neck -o {out}", "invalid choice: 'neck'"),
    ("prune {run} --parts qk --mode mask -o {out}", "mode mask is for neurons alone"),
    ("prune {run} --speedup 2 --merge constant:1 -o {out}", "choose how tokens merge"),
    ("prune {run} --max-drop 0.01 -o {out}", "--max-drop is judged on --eval-data DIR"),
    ("prune {run} --eval-data x -o {out}", "--max-drop is judged on --eval-data DIR"),
    ("prune {run} --max-drop 0.01 --speedup 2 --eval-data x -o {out}", "one target at a time"),
    ("prune {run} --speedup 1 -o {out}", "speedup must be above 1"),
    ("prune {run} --speedup 2 --backend torch-eager --allow int8 -o {out}", "torch-eager has no int8"),
    ("prune {run} --speedup 2 --backend x -o {out}", "backend must be one of"),
    ("prune {run} --speedup 2 --export {out}.pt -o {out}", "ends in .onnx"),
    ("prune {run} --speedup 2 --ratio 0.5 -o {out}", "one target at a time"),
    ("prune {run} --ratio 0.5 --allow int8 -o {out}", "go with --speedup or --target-latency"),
    ("prune {vit} --plan {pruned} --merge constant:1 -o {out}", "leave merge out"),
    ("prune {run} --keep-classes data -o {out}", "takes the classes of --data DIR"),
    ("prune {run} --keep-classes class0 -o {out}", "keep at least two different classes"),
    ("curve {vit} --eval-data {data} -o {out}", "curve needs calibration images"),
    ("curve {vit} --data {data} --eval-data {data} -o {out}", "20 of 20 evaluation images were calibration images"),
    ("curve {vit} --data {data} --eval-data {data} --max-drop 0.1 --ratios 0.5 -o {out}", "leave --ratios out"),
    (
        "curve {vit} --data {data} --eval-data {data} --max-drop 0.1 --criteria obs random -o {out}",
        "name one of --crit",
    ),
    ("prune {run} --allocation uniform --floor 0.2 -o {out}", "--floor is for --allocation global"),
    ("prune {run} --criterion random --step 0.2 -o {out}", "do not change on the way"),
    ("curve {run} --eval-data {data} --ratios 2 -o {out}", "ratios must be in [0, 1)"),
    ("analyze {vit} --data {data}", "is no run"),
    ("analyze {run} --data {data}", "evaluation images were calibration images"),
    ("prune {vit} -o {out}", "pass --data DIR"),
    ("prune {vit} --criterion jas --data {data} -o {out}", "criterion jas needs the scores of a run"),
    ("prune {vit} --plan {otherplan} -o {out}", "plan does not fit this model"),
    ("prune {vit} --plan {map} -o {out}", "not a safetensors file"),
    ("prune {run} -o {pruned}", "exists; choose another output"),
    ("prune {run} --overwrite -o {data}", "holds class0, which this command does not write"),
    ("prune {run} --overwrite -o {run}", "which this command does not write"),
    ("prune {pruned} --data {data} --overwrite -o {pruned}", "is the model itself"),
    ("prune {run} --classes class1 -o {out}", "choose among the images of --data DIR"),
    ("prune {vit} --plan {pruned} --ratio 0.3 -o {out}", "leave pruning_ratio out"),
    ("prune {vit} --seed 99999999999999999999 --data {data} -o {out}", "seed must be in"),
    ("discover {vit} --data {data} --overwrite -o {map}", "is a file; choose another output"),
    ("discover {vit} --data {data} -o {map}/run", "is not a folder"),
    ("discover {vit} --data {data} --device meta -o {out}", "device 'meta' cannot be used here"),
    ("export {pruned} {data} --overwrite", "is a folder; choose another output"),
    ("bench {vit} {vit}", "models must be different"),
    ("bench {vit} --checkpoint {map}", "leave --checkpoint out"),
    ("evaluate {vit} --against-checkpoint {map} --data {data}", "has the weights of --against MODEL"),
    ("evaluate {vit} --against {run} --data {data}", "is a run, not a model"),
    ("evaluate {vit} --data {data} -o {run}", "exists; choose another output"),
    ("evaluate hf-hub:a/b --checkpoint {map} --data {data}", "brings its own weights"),
    ("evaluate {out}/absent.onnx --data {data}", "no such file"),
    ("evaluate {empty} --data {data}", "is no saved model"),
    ("export {vit} {out}.onnx", "parity needs real images"),
    ("export {pruned} {out} --num-images 0", "num_images must be at least 1"),
    ("bench {vit} --backend tensorrt", "backend must be one of"),
    ("bench {vit} --threads 0", "thread counts must be at least 1"),
    ("bench {out}/a.onnx", "a.onnx: no such file"),
    ("evaluate {run} --data {data}", "is a run, not a model"),
    ("demo -o {run}", "which this command does not write"),
    ("run {out}/absent.yaml", "no such file"),
    ("discove {vit}", "did you mean 'discover'?"),
]


@pytest.mark.parametrize(("command", "message"), MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(
    command, message, saved_vit, image_folder, run_folder, pruned_folder, tmp_path, capsys
):
    (tmp_path / "empty").mkdir()
    (tmp_path / "map.txt").write_text("".join(f"class{index}\n" for index in range(5)))
    places = {
        "vit": saved_vit,
        "data": image_folder,
        "run": run_folder,
        "pruned": pruned_folder,
        "out": tmp_path / "out",
        "empty": tmp_path / "empty",
        "map": tmp_path / "map.txt",
        "resnet": tmp_path / "resnet.safetensors",
        "otherplan": tmp_path / "plan.safetensors",
    }
    if "{resnet}" in command:
        import timm

        save_file(timm.create_model("resnet18").state_dict(), places["resnet"])
    if "{otherplan}" in command:
        vitprune.Plan({"blocks.0.mlp": torch.ones(7, dtype=torch.bool)}).write(places["otherplan"])
    line = run(*command.format(**places).split(), code=2, capsys=capsys)
    assert message in line
    assert not places["out"].exists()
    assert not [entry for entry in tmp_path.iterdir() if entry.name.startswith(".")]


def test_scores_of_other_weights_are_refused(image_folder, tmp_path, capsys):
    model = make_vit().float()
    model.model_args = TINY
    vitprune.save(model, tmp_path / "vit")
    run("discover", tmp_path / "vit", "--data", image_folder, "-o", tmp_path / "run", "--json", capsys=capsys)
    with torch.no_grad():
        model.head.bias += 1
    vitprune.save(model, tmp_path / "vit")
    line = run("prune", tmp_path / "run", "-o", tmp_path / "out", code=2, capsys=capsys)
    assert "its scores are of other weights" in line


# Ctrl-C works even where this was started in the background, which ignores it; progress is told from the first image.
INTERRUPTIBLE = """
import signal, sys
from vitprune.cli import main, terminal
signal.signal(signal.SIGINT, signal.default_int_handler)
terminal.SECONDS_BETWEEN_LINES = 0
sys.exit(main(sys.argv[1:]))
"""


def test_ctrl_c_exits_130_and_leaves_nothing(saved_vit, image_folder, tmp_path):
    command = [sys.executable, "-c", INTERRUPTIBLE, "discover", str(saved_vit), "--data", str(image_folder)]
    command += ["--quadrature", "riemann:100000", "--batch-size", "1", "-o", str(tmp_path / "run")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        patience = threading.Timer(300, process.kill)
        patience.start()
        told = next((line for line in process.stderr if "discover 0/20" in line), "")
        assert told, process.communicate()
        process.send_signal(signal.SIGINT)
        _out, err = process.communicate()
        patience.cancel()
    assert process.returncode == 130
    assert "interrupted" in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_a_bug_keeps_its_traceback(saved_vit, monkeypatch):
    monkeypatch.setattr("vitprune.models.load.load_folder", lambda folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["evaluate", str(saved_vit), "--data", "."])


def test_images_are_answered_by_name(saved_vit, image_folder, tmp_path, capsys):
    model = vitprune.load(saved_vit)
    model.label_names = tuple(f"class{index}" for index in range(5))
    vitprune.save(model, tmp_path / "named")
    photo, folder = image_folder / "class1" / "1.png", image_folder / "class2"
    assert main(["predict", str(tmp_path / "named"), str(photo), str(folder), "--top-k", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["predictions"]
    assert [Path(each["file"]).parent.name for each in found] == ["class1", *["class2"] * 4]
    images = vitprune.find_images(image_folder, 5).only(["class1/1.png"])
    ((pixels, _labels),) = vitprune.ImageBatches(images, model)
    with torch.no_grad():
        shares = model(pixels)[0].softmax(0)
    assert found[0]["classes"] == shares.topk(2).indices.tolist()
    assert found[0]["probabilities"] == pytest.approx(shares.topk(2).values.tolist())
    assert found[0]["names"] == [f"class{index}" for index in found[0]["classes"]]
    assert main(["predict", str(saved_vit), str(photo)]) == 0
    assert capsys.readouterr().out.startswith(f"{photo}: 0.")
    assert main(["predict", str(saved_vit), str(tmp_path / "absent.jpg")]) == 2
    assert "absent.jpg: no such image or folder" in capsys.readouterr().err


def test_people_get_tables(run_folder, pruned_folder, saved_vit, image_folder, tmp_path, capsys):
    images = other_images(image_folder, tmp_path / "images")
    assert main(["evaluate", str(pruned_folder), "--data", str(images)]) == 0
    assert main(["bench", str(pruned_folder), "--batch-size", "1", "--seconds", "0.05"]) == 0
    out = capsys.readouterr().out
    assert "top-1" in out
    assert "95 % interval" in out
    assert "ceiling" in out


def test_help_is_what_was_written_and_real_defaults(capsys):
    from vitprune.cli.commands import COMMANDS

    for command in COMMANDS:
        with pytest.raises(SystemExit):
            main([command, "--help"])
        told = capsys.readouterr().out
        assert not any(noise in told for noise in ("(type:", "type: str", "default: null", "default: False")), command
        assert "common to all commands:" in told
    with pytest.raises(SystemExit):
        main(["predict", "--help"])
    assert "images at once (16)" in capsys.readouterr().out


def test_what_all_commands_take(saved_vit, image_folder, tmp_path, capsys, monkeypatch):
    from vitprune.cli import evaluate

    asked = ["evaluate", str(saved_vit), "--data", str(image_folder)]
    assert main(asked) == 0
    loud = capsys.readouterr()
    assert "images of" in loud.err
    assert main([*asked, "--quiet"]) == 0
    quiet = capsys.readouterr()
    assert (quiet.out, quiet.err) == (loud.out, "")
    before, seen = torch.get_num_threads(), []
    real = evaluate.run
    monkeypatch.setattr(evaluate, "run", lambda **given: seen.append(torch.get_num_threads()) or real(**given))
    assert main([*asked, "--threads", "1", "-q"]) == 0
    assert (seen, torch.get_num_threads()) == ([1], before)
    capsys.readouterr()
    assert "threads must be at least 1, got 0" in run(*asked, "--threads", "0", code=2, capsys=capsys)


def test_columns_that_are_empty_are_left_out(capsys):
    from vitprune.cli.terminal import print_table

    print_table("title", ("name", "nothing", "number"), [("a", "", "1"), ("b", "", "2")])
    told = capsys.readouterr().out
    assert "nothing" not in told
    assert "number" in told


def test_help_and_import_need_no_torch():
    code = (
        "import sys, vitprune, vitprune.cli\n"
        "try: vitprune.cli.main(['prune', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'timm', 'onnxruntime', 'matplotlib', 'scipy', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "--round-to" in result.stdout


def test_every_public_name_is_there():
    for name in vitprune.__all__:
        assert getattr(vitprune, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'bogus'"):
        vitprune.bogus  # noqa: B018


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_are_valid(recipe, image_folder, capsys):
    keys = yaml.safe_load(recipe.read_text()).get("keys", {})
    given = [f"{name}={image_folder}" for name in keys if name in ("data", "eval_data")]
    answer = run("run", recipe, *given, "--dry-run", "--json", capsys=capsys)
    assert answer["steps"]
    assert answer["answers"] == []


def test_a_recipe_runs_and_its_mistakes_are_all_named(saved_vit, image_folder, tmp_path, capsys):
    discover = {"model": str(saved_vit), "data": str(image_folder), "images_per_class": 1, "output": "{out}/run"}
    steps = [{"discover": discover}, {"prune": {"source": "{out}/run", "ratio": 0.25, "output": "{out}/pruned"}}]
    (tmp_path / "good.yaml").write_text(yaml.safe_dump({"steps": steps}).replace("{out}", str(tmp_path)))
    answer = run("run", tmp_path / "good.yaml", "--json", capsys=capsys)
    assert answer["steps"] == ["discover", "prune"]
    assert answer["answers"][1]["num_neurons"] == 108
    assert vitprune.load(tmp_path / "pruned") is not None
    steps = [{"discover": {**discover, "topk": 2}}, {"prun": {}}, {"prune": {"source": "x", "ratio": "much"}}]
    steps += [{"discover": 3}, {"bench": {"models": "x"}}, {"evaluate": {"config": "x.yaml"}}]
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump({"steps": steps}))
    line = run("run", tmp_path / "bad.yaml", code=2, capsys=capsys)
    assert "step 1: discover: " in line
    assert "did you mean 'top_k'?" in line
    assert "step 2: unknown command 'prun'" in line
    assert "step 3: prune: " in line
    assert "step 4: discover: expected its options as a mapping" in line
    assert "step 5: bench: models: expected a list" in line
    assert "step 6: evaluate: 'config' is for the command line" in line


def test_the_first_line_of_progress_does_not_wait_for_an_item(capsys, monkeypatch):
    monkeypatch.setattr("vitprune.progress.SECONDS_BEFORE_A_LINE", 0.01)
    said = ""

    def items():
        nonlocal said
        until = time.monotonic() + 30
        while not said and time.monotonic() < until:
            said = capsys.readouterr().err
        yield from "ab"

    assert list(log_lines(items(), "decode", 2)) == ["a", "b"]
    assert said == "decode 0/2 ...\n"
    assert capsys.readouterr().err == "decode 2/2, 0:00:00\n"
