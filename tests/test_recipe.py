"""Recipes: what is refused before anything runs, what is not run again, and what no kill can spoil."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import time
from pathlib import Path

import jsonschema
import pytest
import yaml
from PIL import Image
from quick import start_command
from test_cli import RECIPES, run

import vitprune
from vitprune.cli import main
from vitprune.cli.commands import COMMANDS, build_parser
from vitprune.errors import VitpruneError
from vitprune.progress import untracked
from vitprune.recipe.command_options import KINDS, command_line, describe_options
from vitprune.recipe.contents import Contents, is_there
from vitprune.recipe.read import read_recipe

PARSER, PARSERS = build_parser()
SHIPPED = sorted(RECIPES.glob("*.yaml"))
DISCOVER = {"model": "${model}", "data": "${data}", "images_per_class": "${images}", "output": "${out}/run"}
CURVE = {"source": "${out}/run", "eval_data": "${other}", "ratios": [0.25, 0.5], "criteria": ["taylor", "random"]}
STEPS = [
    {"discover": DISCOVER | {"shard_size": 2, "batch_size": 2, "quadrature": "gauss-legendre:3"}},
    {"prune": {"source": "${out}/run", "ratio": "${ratio}", "output": "${out}/pruned"}},
    {"curve": CURVE | {"step": 0.25, "output": "${out}/curve"}},
    {"evaluate": {"model": "${out}/pruned", "data": "${other}"}},
]
KEYS = {"model": "vit", "checkpoint": None, "data": "data", "other": "other", "images": 2, "ratio": 0.5, "out": "out"}


def write(path, steps, keys=None, output=None):
    content = {"keys": keys, "output": output, "steps": steps}
    path.write_text(yaml.safe_dump({name: value for name, value in content.items() if value is not None}))
    return path


def read(path, *given):
    return read_recipe(path, {name: parser for name, parser in PARSERS.items() if name != "run"}, given)


def refusal(path, *given):
    with pytest.raises(VitpruneError) as caught:
        read(path, *given)
    return str(caught.value)


@pytest.fixture
def place(tmp_path, saved_vit, image_folder, monkeypatch):
    """A folder with a model, images, other images of the same classes, and a recipe of four steps on them."""
    shutil.copytree(image_folder, tmp_path / "data")
    for file in image_folder.rglob("class*/*"):
        target = tmp_path / "other" / file.parent.name / f"{file.stem}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.open(file).rotate(90).save(target)
    shutil.copytree(saved_vit, tmp_path / "vit")
    keys = {name: value for name, value in KEYS.items() if name != "checkpoint"}
    write(tmp_path / "r.yaml", STEPS, keys, "${out}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def answer(capsys, *given):
    """Run the recipe; return its JSON answer."""
    return run("run", "r.yaml", *given, "--json", capsys=capsys)


def reasons(capsys, *given):
    """Return why each step would run; nothing where it would not."""
    return [step["reason"] for step in answer(capsys, *given, "--dry-run")["plan"]]


def files(folder):
    """Return name -> bytes of what a recipe made, but for cards, which tell when."""
    found = sorted(path for path in folder.rglob("*") if path.is_file() and ".recipe" not in path.parts)
    return {path.relative_to(folder): path.read_bytes() for path in found if path.name != "card.json"}


# What comes with the package, and what must be there.


def test_recipes_are_known_by_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    listed = run("run", "--json", capsys=capsys)["recipes"]
    repository = Path(__file__).resolve().parents[1] / "recipes"
    assert listed == {path.stem: str(path) for path in sorted(repository.glob("*.yaml"))}
    assert main(["run"]) == 0
    assert "scanned digits" in capsys.readouterr().out
    assert run("run", "demo", "--dry-run", "--json", capsys=capsys)["plan"]
    # A file of one's own goes first.
    (tmp_path / "demo.yaml").write_text("steps: [{info: {model: deit_tiny_patch16_224}}]")
    (only,) = run("run", "demo.yaml", "--dry-run", "--json", capsys=capsys)["plan"]
    assert "info deit_tiny_patch16_224" in only["command"]


def test_the_wheel_holds_what_is_known_by_name():
    project = (Path(__file__).resolve().parents[1] / "pyproject.toml").read_text()
    assert '"share/vitprune" = ["docs/serve.py"]' in project
    assert '"share/vitprune/recipes" = ["recipes/*.yaml", "recipes/*.json"]' in project


@pytest.mark.parametrize("arguments", [[], ["--dry-run"]], ids=["run", "dry run"])
def test_what_is_read_is_looked_for_before_anything_runs(arguments, place, capsys):
    steps = [
        *STEPS,
        {"evaluate": {"model": "${out}/nothing/model", "data": "nowhere"}},
        {"prune": {"source": "vit", "checkpoint": "w.pth", "plan": "${out}/pruned", "output": "${out}/again"}},
        {"doctor": {"model": "gone.onnx"}},
    ]
    write(place / "r.yaml", steps, {name: value for name, value in KEYS.items() if name != "checkpoint"}, "${out}")
    shutil.rmtree(place / "other")
    assert main(["run", "r.yaml", *arguments]) == 2
    said = capsys.readouterr().err
    for missing in (
        "step 3: curve: eval_data other is not there",
        "step 4: evaluate: data other is not there",
        "step 5: evaluate: model out/nothing/model is not there",
        "step 5: evaluate: data nowhere is not there",
        "step 6: prune: checkpoint w.pth is not there",
        "step 7: doctor: model gone.onnx is not there",
    ):
        assert missing in said
    assert "pruned is not there" not in said
    assert "step 1" not in said
    assert not (place / "out").exists()


# What a recipe says.


def test_keys_take_their_place_with_their_type(tmp_path):
    evaluate = {"model": "${model}", "checkpoint": "${checkpoint}", "data": "${data}/v$$1", "batch_size": "${batch}"}
    keys = {"model": "m", "checkpoint": None, "data": "d", "batch": 8, "only": ["a", "b"], "strict": False}
    path = write(tmp_path / "r.yaml", [{"evaluate": evaluate | {"classes": "${only}", "strict": "${strict}"}}], keys)
    options = read(path).steps[0].options
    assert options["data"] == "d/v$1"
    assert (options["batch_size"], options["checkpoint"], options["classes"]) == (8, None, ["a", "b"])
    given = ["checkpoint=w.pth", "batch=1", "data=2024", "only=[tench, 3]", "strict=true", "model='null'"]
    options = read(path, *given).steps[0].options
    assert (options["data"], options["batch_size"], options["checkpoint"]) == ("2024/v$1", 1, "w.pth")
    assert (options["classes"], options["strict"], options["model"]) == (["tench", "3"], True, "null")
    assert read(path, "only=null").steps[0].options["classes"] is None


def test_every_mistake_is_named_at_once(tmp_path):
    keys = {"images": 3, "share": 0.5, "model": "m", "flag": False, "many": [1], "Bad": 1, "deep": {"a": 1}}
    keys |= {"other": "${model}", "unused": 1}
    steps = [
        {"discover": {"model": "${modl}", "data": 3, "topk": 2, "images_per_class": "${images}", "output": "o"}},
        {"prun": {}},
        {"prune": {"source": "x${none}", "ratio": "much", "criterion": "obss", "strict": "yes", "step": True}},
        {"discover": 3},
        {"bench": {"models": "x", "batch_size": [1, "two"], "threads": []}},
        {"evaluate": {"config": "x.yaml", "json": True, "model": "$model", "data": "a${flag}b${many}"}},
        {"evaluate": {"model": None, "batch_size": 2.5, "ratio": "${share}"}},
        "demo",
    ]
    path = write(tmp_path / "bad.yaml", steps, keys)
    content = yaml.safe_load(path.read_text()) | {"outputs": "x"}
    path.write_text(yaml.safe_dump(content))
    given = ["imagess=3", "images=few", "share=[1]", "flag=1", "many=2", "model={a: 1}", "nonsense", "images=4"]
    message = refusal(path, *given)
    for expected in (
        "unknown part 'outputs'; did you mean 'output'?",
        "key 'Bad': a name has small letters, digits and _ only",
        "key 'deep': expected a single value or a list of them, got {'a': 1} (a mapping)",
        "key 'other': its default '${model}' names another key",
        "key 'unused' is used by no step",
        "unknown key 'imagess'; did you mean 'images'?",
        "key 'images': expected a whole number as in its default 3, got 'few' (text)",
        "key 'share': expected a number as in its default 0.5, got [1] (a list)",
        "key 'flag': expected true or false as in its default False, got 1 (a whole number)",
        "key 'many': expected a list such as [a, b] as in its default [1], got 2 (a whole number)",
        "key 'model': expected text as in its default 'm', got {'a': 1} (a mapping)",
        "expected KEY=VALUE, got 'nonsense'",
        "key 'images' is given twice",
        "step 1: discover: model: ${modl}: no such key; did you mean 'model'?",
        "step 1: discover: unknown option 'topk'; did you mean 'top_k'?",
        "step 2: unknown command 'prun'; did you mean 'prune'?",
        "step 3: prune: source: ${none}: no such key",
        "step 3: prune: ratio: expected a number, got 'much' (text)",
        "step 3: prune: criterion: expected one of random, ",
        "got 'obss' (text); did you mean 'obs'?",
        "step 3: prune: strict: expected true or false, got 'yes' (text)",
        "step 3: prune: step: expected a number, got true (true or false)",
        "step 3: prune: 'output' is missing",
        "step 4: discover: expected its options as a mapping, got 3 (a whole number)",
        "step 5: bench: models: expected a list of values, got 'x' (text)",
        "step 5: bench: batch_size[1]: expected a whole number, got 'two' (text)",
        "step 5: bench: threads: expected a list of values, got [] (a list)",
        "step 6: evaluate: 'config' is for the command line; write the options here",
        "step 6: evaluate: 'json' is for the command line",
        "step 6: evaluate: model: '$model': write a key as ${key}, and a dollar sign as $$",
        "step 6: evaluate: data: ${flag} is false (true or false), which cannot be a part of 'a${flag}b${many}'",
        "step 7: evaluate: 'model' is missing",
        "step 7: evaluate: 'data' is missing",
        "step 7: evaluate: batch_size: expected a whole number, got 2.5 (a number)",
        "step 8: expected one command with its options",
    ):
        assert expected in message
    assert "'source' is missing" not in message
    assert "step 1: discover: data" not in message


def test_outputs_that_get_in_each_others_way_are_refused(tmp_path):
    steps = [
        {"demo": {"output": "o"}},
        {"demo": {"output": "o/x/../x"}},
        {"evaluate": {"model": "o/y", "data": "d"}},
        {"prune": {"source": "m", "data": "d", "output": "o/x", "overwrite": True}},
        {"elastic": {"source": "m", "output": "o/y"}},
    ]
    message = refusal(write(tmp_path / "r.yaml", steps, output="o"))
    assert "step 4: prune: overwrite: leave it out" in message
    del steps[3]["prune"]["overwrite"]
    message = refusal(write(tmp_path / "r.yaml", steps, output="o"))
    assert "step 1: demo: o holds the recipe's own folder o" in message
    assert "steps 2 and 4 both write o/x" in message
    assert "step 3: evaluate: reads o/y, which step 5 writes" in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: {}", "expected 'steps'"),
        ("- a", "expected 'steps'"),
        ("steps: [", "not a YAML file"),
        ("keys: {a: 1, a: 2}\nsteps: [demo: {}]", "'a' is there twice"),
        ("keys: 3\nsteps: [demo: {}]", "keys: expected names with defaults"),
        ("output: [x]\nsteps: [demo: {}]", "output: expected a folder, got ['x'] (a list)"),
        ("output: ${x}\nsteps: [demo: {}]", "output: ${x}: no such key"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(text, message, tmp_path):
    (tmp_path / "r.yaml").write_text(text)
    assert message in refusal(tmp_path / "r.yaml")


def test_yaml_means_what_editors_take_it_for(tmp_path):
    keys = "{a: 1e-3, b: no, c: 2024-01-01, d: 007, e: 1:30, f: -2, g: .5, h: 1., i: ~, j: TRUE, k: 0}"
    steps = "[evaluate: {model: m, data: d, classes: [" + ", ".join(f'"${{{name}}}"' for name in "abcdefghik") + "]}]"
    (tmp_path / "r.yaml").write_text(f"keys: {keys}\nsteps: {steps}\n")
    assert refusal(tmp_path / "r.yaml").endswith("r.yaml: key 'j' is used by no step")
    (tmp_path / "r.yaml").write_text(f"keys: {keys}\nsteps: {steps}\n".replace(" j: TRUE,", ""))
    recipe = read(tmp_path / "r.yaml")
    values = [1e-3, "no", "2024-01-01", "007", "1:30", -2, 0.5, 1.0, None, 0]
    assert list(recipe.keys.values()) == values
    assert recipe.steps[0].options["classes"] == [str(value) for value in values if value is not None]


def test_every_option_of_every_command_is_understood():
    for name, parser in PARSERS.items():
        for option in describe_options(parser).values():
            assert option.kind in KINDS, (name, option)


def test_a_step_is_shown_as_it_is_typed(tmp_path):
    options = {"model": "a b", "data": "d", "classes": ["x", "y z"], "strict": True, "seed": 0, "device": "-x"}
    step = read(write(tmp_path / "r.yaml", [{"evaluate": options}])).steps[0]
    typed = command_line(PARSERS["evaluate"], "evaluate", step.options)
    assert shlex.join(typed) == "vitprune evaluate 'a b' --data d --classes x 'y z' --strict --device=-x"
    parsed = PARSER.parse_args(typed[1:])["evaluate"].as_dict()
    assert {name: parsed[name] for name in step.options} == step.options


# What is run again, and what is not.


def test_what_is_there_is_not_made_again(place, capsys):
    assert reasons(capsys)[:2] == ["has not run yet", "reads what step 1 will write"]
    assert not (place / "out").exists()
    first = answer(capsys)
    assert first["cached"] == [False] * 4
    times = {path: path.stat().st_mtime_ns for path in (place / "out").rglob("*") if ".recipe" not in path.parts}
    again = answer(capsys)
    assert again["cached"] == [True] * 4
    assert again["answers"] == first["answers"]
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert main(["run", "r.yaml"]) == 0
    assert capsys.readouterr().err.count("unchanged, not run again: vitprune ") == 4
    assert reasons(capsys) == [""] * 4


def test_a_touched_image_changes_nothing_and_a_changed_one_what_reads_it(place, capsys):
    answer(capsys)
    for folder, rerun in (("other", [False, False, True, True]), ("data", [True] * 4)):
        file = next((place / folder / "class1").iterdir())
        os.utime(file)
        assert reasons(capsys) == [""] * 4
        before = file.stat()
        pixels = Image.open(file)
        pixels.putpixel((0, 0), tuple(255 - value for value in pixels.getpixel((0, 0))))
        pixels.save(file, format="PNG")
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert [bool(reason) for reason in reasons(capsys)] == rerun
        assert f"{folder} changed" in reasons(capsys)
        assert answer(capsys)["cached"] == [not each for each in rerun]


def test_an_output_that_was_edited_or_removed_is_made_again(place, capsys):
    first = answer(capsys)
    made = files(place / "out")
    (place / "out/pruned/config.json").write_text("{}")
    assert reasons(capsys) == ["", "out/pruned was changed since", "", "reads what step 2 will write"]
    again = answer(capsys)
    assert again["cached"] == [True, False, True, True]  # the same came out, so its reader has the same inputs
    assert files(place / "out") == made
    shutil.rmtree(place / "out/run")
    assert reasons(capsys)[0] == "out/run is gone"
    assert answer(capsys)["cached"] == [False, True, True, True]
    assert files(place / "out") == made
    assert again["answers"][3] == first["answers"][3]


def test_other_options_replace_what_depends_on_them(place, capsys):
    answer(capsys)
    made = files(place / "out")
    flags_first = run("run", "--dry-run", "r.yaml", "--json", "ratio=0.25", capsys=capsys)
    assert flags_first["keys"]["ratio"] == 0.25
    assert reasons(capsys, "ratio=0.25") == ["", "other ratio", "", "reads what step 2 will write"]
    changed = answer(capsys, "ratio=0.25")
    assert changed["cached"] == [True, False, True, False]
    assert changed["answers"][1]["num_neurons"] == 108
    assert files(place / "out") != made
    answer(capsys, "ratio=0.5")
    assert files(place / "out") == made


def test_another_version_makes_everything_again(place, capsys, monkeypatch):
    answer(capsys)
    monkeypatch.setattr(vitprune, "__version__", "99", raising=False)
    assert reasons(capsys)[0] == f"vitprune {vitprune.__getattr__('__version__')} made it, this is 99"


def test_what_a_recipe_did_not_write_it_does_not_replace(place, capsys):
    (place / "out/run").mkdir(parents=True)
    (place / "out/pruned").write_text("mine")
    line = run("run", "r.yaml", code=2, capsys=capsys)
    assert "step 1: discover: out/run exists, and this recipe did not write it" in line
    assert "step 2: prune: out/pruned exists" in line
    assert line == run("run", "r.yaml", "--dry-run", code=2, capsys=capsys)
    assert files(place / "out") == {Path("pruned"): b"mine"}
    shutil.rmtree(place / "out")
    answer(capsys)
    (place / "out/run/notes.txt").write_text("mine")
    assert main(["run", "r.yaml"]) == 2
    assert "holds notes.txt, which this command does not write" in capsys.readouterr().err
    assert (place / "out/run/notes.txt").read_text() == "mine"


def test_a_step_that_failed_owns_nothing(place, capsys):
    (place / "data/class0/bad.png").write_text("no image")
    content = yaml.safe_load((place / "r.yaml").read_text())
    content["steps"][0]["discover"] |= {"strict": True, "images_per_class": 9, "shard_size": 99}
    del content["keys"]["images"]
    write(place / "r.yaml", content["steps"], content["keys"], "${out}")
    assert main(["run", "r.yaml"]) == 2
    assert "bad.png: cannot be decoded" in capsys.readouterr().err
    (place / "out/run").mkdir()
    assert "this recipe did not write it" in run("run", "r.yaml", code=2, capsys=capsys)


def test_two_recipes_do_not_share_an_output(place, capsys):
    answer(capsys)
    shutil.copy("r.yaml", "s.yaml")
    assert "out holds the results of recipe 'r'" in run("run", "s.yaml", code=2, capsys=capsys)


def test_a_card_is_no_content(place, capsys):
    answer(capsys)
    (place / "out/pruned/card.json").write_text("{}")
    assert reasons(capsys) == [""] * 4


def test_the_name_of_a_class_is_no_folder(place, capsys):
    (place / "class0").mkdir()
    prune = {"source": "vit", "data": "data", "classes": ["class0", "class1"], "output": "out/pruned"}
    write(place / "r.yaml", [{"prune": prune | {"criterion": "magnitude", "compensate": "none"}}], output="out")
    answer(capsys)
    (place / "class0/x").write_text("1")
    assert reasons(capsys) == [""]


def test_images_of_a_run_from_elsewhere_count(place, capsys):
    assert main(["discover", "vit", "--data", "data", "-o", "run"]) == 0
    write(place / "r.yaml", [{"prune": {"source": "run", "output": "out/pruned"}}], output="out")
    answer(capsys)
    assert reasons(capsys) == [""]
    Image.new("RGB", (40, 36)).save(place / "data/class0/1.png")
    (reason,) = reasons(capsys)
    assert reason == f"{place / 'data'} of run changed"


def test_each_image_is_read_once_for_all_steps_and_not_at_all_the_next_time(place, capsys, monkeypatch):
    from vitprune.recipe import contents

    hashed, hash_bytes = [], contents._hash_bytes
    monkeypatch.setattr(contents, "_hash_bytes", lambda file: hashed.append(file) or hash_bytes(file))
    monkeypatch.setattr(contents, "_SETTLED_NS", 0)
    answer(capsys)
    images = [file for file in hashed if "other" in file]
    assert len(images) == len(set(images)) == 20
    hashed.clear()
    answer(capsys)
    assert hashed == []


def test_a_recipe_without_output_runs_every_time_and_replaces_nothing(place, capsys):
    keys = {"out": "plain", "data": "data"}
    discover = {"discover": {"model": "vit", "data": "${data}", "images_per_class": 1, "output": "${out}/run"}}
    write(place / "r.yaml", [discover, {"prune": {"source": "${out}/run", "ratio": 0.25, "output": "plain/p"}}], keys)
    first = answer(capsys)
    assert first["steps"] == ["discover", "prune"]
    assert first["answers"][1]["num_neurons"] == 108
    assert sorted(path.name for path in (place / "plain").iterdir()) == ["p", "run"]
    assert main(["run", "r.yaml"]) == 2
    assert "plain/run exists; choose another output" in capsys.readouterr().err


def test_the_weights_of_a_model_from_the_hub_count(place, saved_vit, capsys, monkeypatch):
    """Offline, with the hub's cache laid out by hand."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(place / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    cache = place / "hub/models--someone--vit"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs/main").write_text("abc")
    shutil.copytree(saved_vit, cache / "snapshots/abc")
    given = ("model=hf-hub:someone/vit",)
    assert answer(capsys, *given)["cached"] == [False] * 4
    assert reasons(capsys, *given) == [""] * 4
    model = vitprune.load(saved_vit)
    model.head.bias.data += 1
    vitprune.save(model, place / "changed")
    shutil.copy(place / "changed/model.safetensors", cache / "snapshots/abc/model.safetensors")
    assert reasons(capsys, *given)[0] == "hf-hub:someone/vit changed"
    assert answer(capsys, *given)["cached"] == [False] * 4


# What no kill can spoil.


def test_a_recipe_killed_again_and_again_ends_with_the_same_bytes(place, capsys):
    """In the path search, between steps, in the curve; each time the same command goes on."""
    expected = answer(capsys)
    (place / "out").rename(place / "whole")
    for seen in ("out/run.shards/shard-000001.safetensors", "out/run/run.json", "out/pruned/plan.safetensors",
                 "out/curve/points/*", "out/curve/curve.json"):  # fmt: skip
        process = start_command(["run", "r.yaml", "--json"])
        while not list(place.glob(seen)) and process.is_alive():
            time.sleep(0.002)
        process.kill()
        process.join()
    got = answer(capsys)
    made, whole = files(place / "out"), files(place / "whole")
    assert {name for name in made if not name.name.startswith(".")} == whole.keys()
    for name, content in whole.items():
        assert made[name] == content, name
    assert got["answers"][3] == expected["answers"][3]
    assert reasons(capsys) == [""] * 4


def test_what_an_interrupted_search_left_gives_way_to_other_options(place, capsys, monkeypatch):
    from vitprune.discovery import shards

    def interrupt(*_arguments, **_options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        stop, write_shard = iter([False, False]), shards.write_shard
        patched.setattr(
            shards, "write_shard", lambda *a, **k: (interrupt if next(stop, True) else write_shard)(*a, **k)
        )
        assert main(["run", "r.yaml"]) == 130
    assert len(list((place / "out/run.shards").glob("shard-*"))) == 2
    assert reasons(capsys)[0] == "was interrupted"
    assert answer(capsys, "images=1")["answers"][0]["num_images"] == 5
    assert not (place / "out/run.shards").exists()


def test_a_second_program_on_the_same_output_is_refused(place, capsys):
    from vitprune.files import held

    with held(place / "out/.recipe/lock", what="out"):
        assert "another process works on out" in run("run", "r.yaml", code=2, capsys=capsys)


# Content hashes.


def test_a_hash_is_of_names_and_bytes(tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/x").write_text("1")

    def hashed():
        return Contents(None, track=untracked).hash(tmp_path / "a")

    seen = {hashed()}
    for change in (
        lambda: (tmp_path / "a/b/x").write_text("2"),
        lambda: (tmp_path / "a/b/x").rename(tmp_path / "a/b/y"),
        lambda: (tmp_path / "a/b/y").rename(tmp_path / "a/y"),
        lambda: (tmp_path / "a/z").write_text(""),
        lambda: (tmp_path / "a/link").symlink_to("nowhere"),
    ):
        change()
        assert hashed() not in seen
        seen.add(hashed())
    (tmp_path / "a/.hidden").write_text("3")
    (tmp_path / "a/card.json").write_text("4")
    (tmp_path / "a/b/back").symlink_to("..")
    assert hashed() in seen
    shutil.copytree(tmp_path / "a", tmp_path / "c", symlinks=True)
    assert Contents(None, track=untracked).hash(tmp_path / "c") == hashed()


def test_a_change_within_the_resolution_of_times_is_seen(tmp_path):
    contents = Contents(None, track=untracked)
    seen = set()
    for number in range(10, 60):
        (tmp_path / "x").write_text(str(number))
        os.utime(tmp_path / "x", ns=(1, 1))
        seen.add(contents.hash(tmp_path / "x"))
    assert len(seen) == 50


def test_reading_much_shows_progress(tmp_path, monkeypatch):
    shown = []
    contents = Contents(None, track=lambda items, what: shown.append((list(items), what)) or items)
    (tmp_path / "x").write_text("12")
    first = contents.hash(tmp_path)
    assert shown == []
    monkeypatch.setattr("vitprune.recipe.contents._SHOWN_BYTES", 1)
    assert contents.hash(tmp_path) == first
    assert shown == [([str(tmp_path / "x")], "hash files")]


def test_weights_beside_a_file_count(tmp_path):
    (tmp_path / "m.onnx").write_text("graph")
    alone = Contents(None, track=untracked).hash(tmp_path / "m.onnx")
    (tmp_path / "m.onnx.data").write_text("weights")
    assert Contents(None, track=untracked).hash(tmp_path / "m.onnx") != alone


# For editors.


@pytest.fixture(scope="module")
def schema():
    return json.loads((RECIPES / "recipe.schema.json").read_text())


def valid(schema, content):
    jsonschema.Draft7Validator.check_schema(schema)
    return jsonschema.Draft7Validator(schema).is_valid(content)


def test_the_published_schema_is_the_one_of_the_commands(schema, capsys):
    """If not: vitprune run --print-schema > recipes/recipe.schema.json."""
    assert run("run", "--print-schema", "--json", capsys=capsys) == schema
    assert main(["run", "--print-schema"]) == 0
    assert capsys.readouterr().out == (RECIPES / "recipe.schema.json").read_text()


def test_every_option_of_every_command_is_in_the_schema(schema):
    for name, parser in PARSERS.items():
        if name == "run":
            assert name not in schema["definitions"]
            continue
        described = schema["definitions"][name]
        assert described["properties"].keys() == describe_options(parser).keys()
        assert all(option["description"] for option in described["properties"].values())
        assert described["description"] == COMMANDS[name].SUMMARY


@pytest.mark.parametrize("recipe", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes_follow_the_schema_and_say_so(recipe, schema):
    text = recipe.read_text()
    assert text.startswith("# yaml-language-server: $schema=recipe.schema.json\n")
    assert valid(schema, yaml.safe_load(text))


@pytest.mark.parametrize(
    ("step", "is_valid"),
    [
        ({"evaluate": {"model": "m", "data": "d"}}, True),
        ({"evaluate": {"model": "m", "data": "d", "batch_size": "${batch}"}}, True),
        ({"evaluate": {"model": "m", "data": "d", "classes": ["${out}", 3]}}, True),
        ({"evaluate": {"model": "m", "data": "d", "classes": "${only}", "strict": "${strict}"}}, True),
        ({"prune": {"source": "${out}/run", "criterion": "obs", "output": "o"}}, True),
        ({"demo": None}, True),
        ({"evaluate": {"model": "m"}}, False),
        ({"evaluate": {"model": "m", "data": "d", "batchsize": 3}}, False),
        ({"evaluate": {"model": "m", "data": "d", "batch_size": "many"}}, False),
        ({"evaluate": {"model": "m", "data": "d", "batch_size": 2.5}}, False),
        ({"evaluate": {"model": "m", "data": "d", "classes": "x"}}, False),
        ({"evaluate": {"model": "m", "data": "d", "classes": []}}, False),
        ({"prune": {"source": "x", "criterion": "obss", "output": "o"}}, False),
        ({"prun": {}}, False),
        ({"demo": {}, "evaluate": {"model": "m", "data": "d"}}, False),
        ({"evaluate": None}, False),
        ("demo", False),
    ],
)
def test_schema_and_reader_agree(step, is_valid, schema, tmp_path):
    keys = {"batch": 3, "only": ["a"], "strict": True, "out": "o"}
    keys = {name: value for name, value in keys.items() if f"${{{name}}}" in str(step)}
    path = write(tmp_path / "r.yaml", [step], keys)
    assert valid(schema, yaml.safe_load(path.read_text())) == is_valid
    if is_valid:
        assert read(path).steps
    else:
        assert "step 1: " in refusal(path)


def test_result_files_of_the_authors_go_together(tmp_path):
    hashes = set()
    for name in ("p.args.json", "p-3.rlt.jsonl", "p-4.rlt.jsonl"):
        assert is_there(tmp_path / "p") == bool(hashes)
        (tmp_path / name).write_text(name)
        hashes.add(Contents(None, track=untracked).hash(tmp_path / "p"))
        assert Contents(None, track=untracked).hash(tmp_path / "p.args.json") in hashes
    assert len(hashes) == 3
    (tmp_path / "p-5.txt").write_text("")
    assert Contents(None, track=untracked).hash(tmp_path / "p") in hashes
