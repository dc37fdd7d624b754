"""Which output of a model each class is: by what rule, what is refused, and how names travel from file to file."""

from __future__ import annotations

import codecs
import csv
import json
import random
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import torch
from conftest import TINY, make_vit, photos
from timm.data import ImageNetInfo
from timm.data.readers.reader_image_folder import find_images_and_targets

import vitprune
from vitprune import ImageBatches, VitpruneError, find_images
from vitprune.cli.commands import main
from vitprune.images.class_map import read_class_map

NAMES = ("bird", "cat", "dog", "fish")
MAGPIE, CAFE = "Elster größer", "café"


def by_folder(images):
    return {Path(file).parts[0]: label for file, label in zip(images.files, images.labels, strict=True)}


@pytest.mark.parametrize("form", ["{}", "{:03}", "{:05}"])
@pytest.mark.parametrize("count", [12, 101])
def test_names_that_are_whole_numbers_are_indices(form, count, tmp_path):
    root = photos(tmp_path, [form.format(index) for index in range(count)])
    images = find_images(root, count)
    assert by_folder(images) == {form.format(index): index for index in range(count)}
    assert images.numbering == f"{count} classes: folder names are indices"
    assert images.label_names == ()  # an index is no name


def test_some_indices_are_enough(tmp_path):
    assert by_folder(find_images(photos(tmp_path, ["7", "999", "10"]), 1000)) == {"7": 7, "10": 10, "999": 999}


@pytest.mark.parametrize(
    ("names", "num_classes", "message"),
    [
        ([str(index) for index in range(1, 13)], 12, r"class folders 1 \.\. 12 .* no indices .* \(0 \.\. 11\); say"),
        ([str(index) for index in range(1, 12)], 12, r"1 \.\. 11 may be .* without 0, or be counted from 1; say"),
        (["2017", "2018"], 2, r"2017 \.\. 2018 .* no indices"),
        (["1", "001", "2"], 12, "are both class 1"),
        ([str(index) for index in range(11)] + ["other"], 12, "order of its class folders is not sure"),
        (["Beagle", "apple", "Zebra", "cat"], 4, "class 0 is 'apple' as timm sorts them, 'Beagle' as torchvision"),
        ([f"class{index}" for index in range(11)], 11, "class 2 is 'class2' .* 'class10'"),
        (["a10", "a9"], 2, "not sure"),
        (["ant", "bee"], 3, "2 class folders .* 3 outputs"),
    ],
)
def test_numbering_that_is_not_sure_is_refused(names, num_classes, message, tmp_path):
    with pytest.raises(VitpruneError, match=message):
        find_images(photos(tmp_path, names), num_classes)


@pytest.mark.parametrize("seed", range(20))
def test_sorted_order_is_both_timms_and_torchvisions_or_refused(seed, tmp_path):
    draw = random.Random(seed)
    words = ["ant", "Bee", "cat", "Dog", "a2", "a10", "z 1", "Z", "_x", "é", "10x", "9x", "B"]
    root = photos(tmp_path, draw.sample(words, 4))
    torchvision = {name: index for index, name in enumerate(sorted(path.name for path in root.iterdir()))}
    _files, theirs = find_images_and_targets(str(root))
    if theirs != torchvision:
        with pytest.raises(VitpruneError, match="not sure"):
            find_images(root, 4)
    else:
        images = find_images(root, 4)
        assert by_folder(images) == theirs
        assert list(images.label_names) == sorted(theirs, key=theirs.get)


@pytest.mark.parametrize(
    ("names", "expected", "left_out"),
    [
        (("bird", "dog", "fish", "zebra"), {"bird": 0, "dog": 2, "fish": 3}, ("zebra",)),
        (("dog", "fish"), {"dog": 2, "fish": 3}, ()),
        (("Dog", "FISH"), {"Dog": 2, "FISH": 3}, ()),
        (("3", "0"), {"0": 0, "3": 3}, ()),
    ],
)
def test_names_that_the_model_knows_are_matched(names, expected, left_out, tmp_path):
    images = find_images(photos(tmp_path, names), 4, label_names=NAMES)
    assert (by_folder(images), images.left_out, images.label_names) == (expected, left_out, NAMES)


def test_names_that_the_model_does_not_know_are_refused(tmp_path):
    root = photos(tmp_path, ["oak", "fir", "ash", "elm"])
    with pytest.raises(
        VitpruneError, match=r"none of the model's 4 classes \(bird, cat, dog, \.\.\.\); .* ash, elm, fir"
    ):
        find_images(root, 4, label_names=NAMES)
    with pytest.raises(VitpruneError, match="names for 3 classes, but the model has 4"):
        find_images(root, 4, label_names=NAMES[:3])


def test_a_name_in_another_form_of_unicode_is_the_same(tmp_path):
    root = photos(tmp_path / "data", [unicodedata.normalize("NFD", CAFE), "bar"])
    assert sorted(find_images(root, 2, label_names=(CAFE, "bar")).labels) == [0, 1]
    (tmp_path / "map.txt").write_text(f"{unicodedata.normalize('NFC', CAFE)}\nbar\n", encoding="utf-8")
    images = find_images(root, 2, class_map=tmp_path / "map.txt", classes=[unicodedata.normalize("NFC", CAFE)])
    assert set(images.labels) == {0}


def test_a_published_model_says_its_names(tmp_path):
    model = make_vit(num_classes=4)
    model.pretrained_cfg = {**model.pretrained_cfg, "label_names": list(reversed(NAMES))}
    assert by_folder(vitprune.ImageChoice(photos(tmp_path, NAMES[:2])).find(model)) == {"bird": 3, "cat": 2}


MAPS = {
    "lines.txt": "b\na\nc\n",
    "windows.txt": "b\r\na\r\nc\r\n",
    "spaces.txt": " b \na\t\nc\n\n\n",
    "name_index.csv": "b,0\na,1\nc,2\n",
    "index_name.csv": "0,b\n2,c\n1,a\n",
    "header.csv": "class,index\na,1\nb,0\nc,2\n",
    "header_reversed.csv": "idx,class_name\n1,a\n0,b\n2,c\n",
    "odd_header.csv": "Klasse,Nummer\na,1\nb,0\nc,2\n",
    "semicolon.csv": "name;index\na;1\nb;0\nc;2\n",
    "quoted.csv": '"name","index"\n"a","1"\n"b","0"\n"c","2"\n',
    "columns.csv": "index,name,count\n1,a,7\n0,b,8\n2,c,9\n",
    "one_column.csv": "name\nb\na\nc\n",
    "tabs.tsv": "a\t1\nb\t0\nc\t2\n",
    "tabs.txt": "1\ta\n0\tb\n2\tc\n",
    "object.json": '{"a": 1, "b": 0, "c": 2}',
    "indices.json": '{"0": "b", "1": "a", "2": "c"}',
    "list.json": '["b", "a", "c"]',
    "config.json": '{"architectures": ["ViT"], "id2label": {"0": "b", "1": "a", "2": "c"}}',
    "label2id.json": '{"label2id": {"a": 1, "b": 0, "c": 2}}',
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name", MAPS)
def test_class_maps_of_many_kinds_say_the_same(name, encoding, tmp_path):
    (tmp_path / name).write_bytes(MAPS[name].encode(encoding))
    assert read_class_map(tmp_path / name) == {"a": 1, "b": 0, "c": 2}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "cat\ndog\ncat\n", r"line 3: 'cat' is there already \(line 1\)"),
        ("a.txt", f"{CAFE}\n{unicodedata.normalize('NFD', CAFE)}\n", "line 2: .* there already"),
        ("a.txt", "cat\n\ndog\n", "line 2 is empty"),
        ("a.txt", "\ncat\n", "line 1 is empty"),
        ("a.txt", "", "holds no names"),
        ("a.csv", "name,index\ncat,0\ncat,1\n", r"line 3: 'cat' is there already \(line 2\)"),
        ("a.csv", "name,index\ncat,one\n", "line 2: class index 'one' is no whole number"),
        ("a.csv", "cat,-1\n", "negative"),
        ("a.csv", "7,1\n8,0\n", "cannot tell names from class indices"),
        ("a.csv", "cat,dog\nfish,ant\n", "cannot tell names"),
        ("a.csv", "cat,0\ndog\n", "line 2: other columns than line 1"),
        ("a.json", '{"cat": 0,\n "cat": 1}', "line 2: 'cat' is there twice"),
        ("a.json", '{"cat": "0"}', "expected an object"),
        ("a.json", '["cat", "cat"]', "'cat' is there already"),
        ("a.json", "{", "not a JSON file"),
    ],
)
def test_class_maps_that_are_refused(name, text, message, tmp_path):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(VitpruneError, match=message):
        read_class_map(tmp_path / name)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "map.txt").write_bytes(b"cat\xff\xfe\xfa")
    with pytest.raises(VitpruneError, match="not a text file in UTF-8"):
        read_class_map(tmp_path / "map.txt")


def test_a_spreadsheets_class_map_is_read_as_csv_writes_it(tmp_path):
    names = ["tench, Tinca tinca", 'a "quoted" name', MAGPIE, "plain"]
    with (tmp_path / "map.csv").open("w", newline="", encoding="utf-8") as stream:
        stream.write(codecs.BOM_UTF8.decode())
        csv.writer(stream).writerows([("index", "name"), *enumerate(names)])
    assert read_class_map(tmp_path / "map.csv") == {name: index for index, name in enumerate(names)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("oak\nfir\nash\nelm\n", "'bird' .4 of 4 folders. is not in .*map.txt, which names oak, fir, ash, ..."),
        ("dog\ncat\nbird\nfish\n", "'dog' has index 0, but the model's class 'dog' is 2 of bird, cat, dog"),
        ("bird\ncat\ndog\nfish\nant\n", "class 4 of 'ant' is beyond the 4 outputs"),
    ],
)
def test_a_wrong_class_map_names_both_sides(text, message, tmp_path):
    (tmp_path / "map.txt").write_text(text)
    with pytest.raises(VitpruneError, match=message):
        find_images(photos(tmp_path / "data", NAMES), 4, class_map=tmp_path / "map.txt", label_names=NAMES)


def test_python_is_warned_and_refused_as_well(tmp_path):
    root, model = photos(tmp_path, NAMES), make_vit(num_classes=4)
    model.label_names = tuple(reversed(NAMES))
    images = find_images(root, 4)  # in sorted order, which is not the model's
    with pytest.raises(VitpruneError, match="'bird' is numbered 0, but the model's class 'bird' is 3"):
        vitprune.evaluate(model, ImageBatches(images, model))
    with pytest.raises(VitpruneError, match="'bird' is numbered 0"):
        vitprune.discover(model, ImageBatches(images, model))
    with pytest.raises(VitpruneError, match="'bird' is numbered 0"):
        vitprune.score_neurons(model, "taylor", batches=ImageBatches(images, model))
    one = find_images(root, 4, label_names=model.label_names, classes=["cat"])
    with pytest.warns(UserWarning, match="1 of the 4 classes .* nothing is learned of the others"):
        vitprune.prune(model.float(), ImageBatches(one, model), criterion="variance", compensation="ridge", step=1)


def run(*arguments, capsys):
    status = main([*map(str, arguments)])
    return status, capsys.readouterr().err


def names_of(folder):
    return json.loads((folder / "config.json").read_text()).get("label_names")


@pytest.mark.parametrize("order", [NAMES, ("fish", "dog", "cat", "bird")])
def test_names_travel_from_discover_to_the_server(order, dense, tmp_path, capsys):
    train, val = photos(tmp_path / "train", NAMES), photos(tmp_path / "val", NAMES[1:], seed=1)
    numbered = []
    if order != NAMES:
        (tmp_path / "map.txt").write_text("\n".join(order))
        numbered = ["--class-map", tmp_path / "map.txt"]
    asked = ["--method", "activation", "-o", tmp_path / "run"]
    status, told = run("discover", dense, "--data", train, *asked, *numbered, capsys=capsys)
    how = f"by {tmp_path / 'map.txt'}" if numbered else "in sorted order: bird, cat, dog, ..."
    assert (status, told.count("4 classes")) == (0, 1)
    assert how in told
    asked = ["--ratio", "0.3", "--step", "1", "--compensate", "ridge", "-o", tmp_path / "pruned"]
    assert run("prune", tmp_path / "run", *asked, capsys=capsys)[0] == 0
    assert names_of(tmp_path / "pruned") == list(order)
    assert vitprune.read_plan(tmp_path / "pruned").facts.label_names == order
    graph = tmp_path / "pruned.onnx"
    assert run("export", tmp_path / "pruned", graph, capsys=capsys)[0] == 0
    assert vitprune.open_onnx(graph).label_names == order
    serve = Path(__file__).resolve().parents[1] / "docs" / "serve.py"
    command = [sys.executable, serve, graph, val / "cat" / "0.png", "--json"]
    (answer,) = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert all(row["name"] == order[row["class"]] for row in answer["top"])
    # Three of the four classes are numbered by name from now on, and the dense model beside it as well.
    for model in (tmp_path / "pruned", graph):
        output = ["--against", dense, "-o", tmp_path / f"{model.name}-val", "--overwrite"]
        status, told = run("evaluate", model, "--data", val, *output, capsys=capsys)
        assert (status, "3 classes by the model's names" in told) == (0, True)
        rows = [json.loads(line) for line in (tmp_path / f"{model.name}-val" / "images.jsonl").read_text().splitlines()]
        assert all(row["label"] == row["against_label"] == order.index(row["file"].split("/")[0]) for row in rows)


def test_a_class_map_names_an_exported_model(dense, tmp_path, capsys):
    (tmp_path / "map.csv").write_text("index,name\n1,cat\n0,dog\n3,bird\n2,fish\n")
    data = photos(tmp_path / "data", NAMES)
    assert (
        run("export", dense, tmp_path / "a.onnx", "--data", data, "--class-map", tmp_path / "map.csv", capsys=capsys)[0]
        == 0
    )
    assert vitprune.open_onnx(tmp_path / "a.onnx").label_names == ("dog", "cat", "fish", "bird")
    (tmp_path / "short.txt").write_text("cat\ndog\n")
    status, told = run(
        "export", dense, tmp_path / "b.onnx", "--data", data, "--class-map", tmp_path / "short.txt", capsys=capsys
    )
    assert (status, told.count("\n")) == (2, 1)
    assert "has 2 names, not one for each of the 4 classes" in told


def test_python_learns_names_where_the_command_line_does(tmp_path):
    model = make_vit(num_classes=4).float()
    batches = ImageBatches(find_images(photos(tmp_path, NAMES), 4), model)
    pruned, plan = vitprune.prune(model, batches, criterion="variance", compensation="none", step=1)
    assert pruned.label_names == plan.facts.label_names == NAMES
    assert getattr(model, "label_names", None) is None  # the caller's model stays as it was
    kept = vitprune.keep_classes(pruned, [2, 0])
    assert kept.label_names == ("dog", "bird")


def test_what_is_not_sure_is_not_remembered(dense, tmp_path, capsys):
    data = photos(tmp_path / "data", ["a", "b", "c"])
    asked = ["--criterion", "variance", "--step", "1", "--compensate", "ridge", "-o", tmp_path / "pruned"]
    status, told = run("prune", dense, "--data", data, *asked, capsys=capsys)
    assert (status, "without labels" in told) == (0, True)
    assert names_of(tmp_path / "pruned") is None


def test_evaluation_images_of_few_classes_are_not_learned_from(dense, tmp_path, capsys):
    (tmp_path / "map.txt").write_text("\n".join(NAMES))
    train, val = photos(tmp_path / "train", NAMES), photos(tmp_path / "val", ["cat"], seed=1)
    asked = ["--ratios", "0.3", "--criteria", "variance", "--compensations", "ridge", "--step", "1"]
    status, told = run(
        "curve", dense, "--data", train, "--eval-data", val, "--class-map", tmp_path / "map.txt", *asked, "-o",
        tmp_path / "curve", capsys=capsys,
    )  # fmt: skip
    assert status == 0
    assert "the evaluation images show 1 of the 4 classes" in told
    assert "nothing is measured of the others" in told
    assert "learned" not in told


def test_english_names_of_imagenet_are_not_sorted(tmp_path):
    """A thousand of them would fit in sorted order, which is not ImageNet's."""
    descriptions = ImageNetInfo("imagenet-1k").label_descriptions()
    names = {text.replace(" ", "_") if index % 2 else text for index, text in enumerate(descriptions)}
    root = photos(tmp_path, [*names, *(f"filler {index}" for index in range(1000 - len(names)))])
    with pytest.raises(VitpruneError, match=r"of 1000 names .* are of imagenet-1k's classes, which are not in sorted"):
        find_images(root, 1000)


def test_a_model_whose_names_are_not_one_for_each_class_is_refused(tmp_path):
    model = make_vit(num_classes=4)
    model.label_names = NAMES[:3]
    with pytest.raises(VitpruneError, match="names for 3 classes, but the model has 4 outputs"):
        vitprune.ImageChoice(photos(tmp_path, NAMES)).find(model)


def test_two_folders_are_the_classes_of_one_output(image_folder, tmp_path, capsys):
    binary = make_vit(num_classes=1).float()
    binary.model_args = {**TINY, "num_classes": 1}
    vitprune.save(binary, tmp_path / "binary")
    for name in ("class1", "class4"):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / name).symlink_to(image_folder / name)
    assert main(["evaluate", str(tmp_path / "binary"), "--data", str(tmp_path / "data"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    images = vitprune.find_images(tmp_path / "data", 1)
    assert images.labels == (0,) * 4 + (1,) * 4
    batches = list(vitprune.ImageBatches(images, binary))
    with torch.no_grad():
        right = sum(int(((binary(pixels)[:, 0] > 0) == (labels == 1)).sum()) for pixels, labels in batches)
    assert found["top1"] == right / 8


@pytest.mark.parametrize(
    ("text", "numbered"),
    [
        ("n01440764 tench, Tinca tinca\nn01443537 goldfish\n", {"n01440764": 0, "n01443537": 1}),
        ("n01443537  goldfish, Carassius auratus\r\nn01440764 tench\r\n", {"n01443537": 0, "n01440764": 1}),
        ("1 great white shark\n0 dog\n", {"great white shark": 1, "dog": 0}),
        ("0 n01440764 tench, Tinca tinca\n1 n01443537 goldfish\n", {"n01440764": 0, "n01443537": 1}),
        ("dog\n3 wheeler\n", {"dog": 0, "3 wheeler": 1}),  # names, in their order
        ("2 wheeler\n2 seater\n", {"2 wheeler": 0, "2 seater": 1}),
    ],
    ids=[
        "synset words",
        "any order",
        "index and name",
        "index and synset words",
        "names",
        "names that begin with numbers",
    ],
)
def test_class_maps_separated_by_spaces(text, numbered, tmp_path):
    from vitprune.images.class_map import read_class_map

    (tmp_path / "map.txt").write_bytes(text.encode())
    assert read_class_map(tmp_path / "map.txt") == numbered
