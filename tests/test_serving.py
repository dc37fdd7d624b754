"""docs/serve.py: timm's transform and vitprune's answers, from the file alone, without torch, timm or vitprune."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
import torch
from conftest import make_vit, shared
from PIL import Image

import vitprune
from vitprune.export.runtime import open_onnx
from vitprune.views import data_config

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE = (DOCS / "serving.md").read_text(encoding="utf-8")
# Runs a script as if nothing but numpy, pillow and onnxruntime were installed beside it.
WITHOUT_TORCH = """
import runpy, sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "torchvision", "timm", "vitprune", "onnx", "scipy", "safetensors"}:
            raise ImportError(f"{name} is not installed")
sys.meta_path.insert(0, Missing())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
NAMES = ("ant", "bee", "cat", "dog", "eel")
PHOTO = {"interpolation": "bicubic", "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "crop_mode": "center"}


@pytest.fixture(scope="module")
def serve():
    spec = importlib.util.spec_from_file_location("serve", DOCS / "serve.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def odd_images(tmp_path_factory):
    """A class folder of images of odd sizes in the modes that files come in."""
    root = tmp_path_factory.mktemp("odd")
    (root / "any").mkdir()
    generator = np.random.default_rng(0)

    def save(name, size, mode, **options):
        pixels = generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(root / "any" / name, **options)

    save("wide.jpg", (301, 97), "RGB")
    save("tall.jpg", (33, 122), "RGB")
    save("grey.jpg", (47, 61), "L")
    save("ink.jpg", (50, 41), "CMYK")
    save("palette.png", (57, 43), "P", transparency=3)
    save("alpha.png", (39, 64), "RGBA")
    save("grey_alpha.png", (45, 38), "LA")
    save("bits.png", (70, 31), "1")
    save("square.png", (32, 32), "RGB")
    save("small.png", (9, 14), "RGB")
    save("pixel.png", (1, 1), "RGB")
    return root


@pytest.fixture(scope="module")
def exported(tmp_path_factory, image_folder):
    """The ONNX file of a small model that knows what its classes are called."""
    model = make_vit().float()
    model.label_names = NAMES
    path = tmp_path_factory.mktemp("serving") / "named.onnx"
    vitprune.export_onnx(model, path, vitprune.ImageBatches(vitprune.find_images(image_folder, 5), model))
    return path


def run(*arguments, **options):
    command = [sys.executable, "-c", WITHOUT_TORCH, DOCS / "serve.py", *arguments]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=120, **options)


def model_with(config):
    """Stand in for a model: all that ImageBatches asks of an opened file is its transform."""
    return type("Model", (), {"data_config": config})()


def files_of(images):
    return [str(images.root / name) for name in images.files]


@pytest.mark.parametrize("crop_pct", [0.875, 0.9, 1.0, 1.2])  # 1.2: the resized image is smaller than the crop
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"interpolation": "bilinear"},
        {"interpolation": "lanczos"},
        {"crop_mode": "squash"},
        {"input_size": [3, 24, 40]},
        {"input_size": [3, 45, 31], "crop_mode": "squash", "interpolation": "bilinear"},
        {"input_size": [1, 31, 31], "mean": [0.5], "std": [0.25]},
    ],
    ids=lambda changes: "-".join(str(value) for value in changes.values()) or "bicubic",
)
def test_the_transform_is_timms(serve, odd_images, changes, crop_pct):
    config = {**PHOTO, "input_size": [3, 32, 32], "crop_pct": crop_pct, **changes}
    images = vitprune.find_images(odd_images, 1)
    batches = vitprune.ImageBatches(images, model_with(config), strict=True)
    (expected,) = [images for images, _labels in batches]
    got = np.stack([serve.preprocess(Image.open(path), config) for path in files_of(images)])
    assert got.dtype == np.float32
    assert torch.equal(torch.from_numpy(got), expected)  # the same operations in the same order: equal to the bit


def test_the_transform_is_deits_on_photos(serve):
    config = data_config(timm.create_model("deit_tiny_patch16_224"))
    images = vitprune.find_images(shared("data/nips17-1000"), 1000).head(10)
    transform = timm.data.create_transform(**config, is_training=False)
    for path in files_of(images):
        image = Image.open(path).convert("RGB")
        assert torch.equal(torch.from_numpy(serve.preprocess(image, config)), transform(image))


def test_probabilities_are_those_of_vitprune(serve, exported, odd_images):
    opened = open_onnx(exported)
    images = vitprune.find_images(odd_images, 1)
    (logits,) = [opened(images) for images, _labels in vitprune.ImageBatches(images, opened, strict=True)]
    got = serve.classify(*serve.open_model(str(exported)), files_of(images))
    np.testing.assert_allclose(got, logits.double().softmax(1).numpy(), rtol=0, atol=1e-6)
    np.testing.assert_allclose(got.sum(1), 1, rtol=1e-12)


def test_the_script_needs_no_torch_and_prints_what_classify_returns(serve, exported, odd_images):
    files = files_of(vitprune.find_images(odd_images, 1)) * 4  # more than one batch
    expected = serve.classify(*serve.open_model(str(exported)), files)
    done = run(exported, *files, "--json", "--threads", 1)
    assert (done.returncode, done.stderr) == (0, "")
    answers = json.loads(done.stdout)
    assert [answer["file"] for answer in answers] == files
    for answer, probabilities in zip(answers, expected, strict=True):
        assert [row["class"] for row in answer["top"]] == np.argsort(-probabilities).tolist()
        assert [row["name"] for row in answer["top"]] == [NAMES[row["class"]] for row in answer["top"]]
        # Other threads and another batch size may sum in another order.
        assert [row["probability"] for row in answer["top"]] == pytest.approx(sorted(probabilities)[::-1], abs=1e-6)


def test_names_come_from_the_file_or_from_labels_and_indices_stand_in(exported, odd_images, tmp_path):
    nameless = with_facts(exported, tmp_path / "nameless.onnx", class_names=[])
    (tmp_path / "labels.txt").write_text("0\n1 é\n2\n3\n4\n", encoding="utf-8")
    image, options = odd_images / "any" / "wide.jpg", ("--threads", 1)
    named = run(exported, image, *options).stdout.splitlines()
    numbered = run(nameless, image, *options).stdout.splitlines()
    labelled = json.loads(run(exported, image, *options, "--json", "--labels", tmp_path / "labels.txt").stdout)
    assert named[0] == numbered[0] == str(image)
    assert [re.fullmatch(r"  [01]\.\d{4}  (\w+)", line)[1] for line in named[1:]] == [
        NAMES[int(line.split()[1])] for line in numbered[1:]
    ]
    assert {row["class"]: row["name"] for row in labelled[0]["top"]}[1] == "1 é"


def with_facts(path, to, **changes):
    """Copy an exported file and change what it says about itself."""
    graph = onnx.load(path)
    facts = json.loads(graph.metadata_props[0].value)
    onnx.helper.set_model_props(graph, {"vitprune": json.dumps({**facts, **changes})})
    onnx.save(graph, to)
    return to


def bad_inputs(exported, image, folder):
    """Yield the arguments of a mistake and the line that it is answered with."""
    damaged, foreign, text = folder / "damaged.jpg", folder / "foreign.onnx", folder / "text.onnx"
    damaged.write_bytes(image.read_bytes()[:300])
    text.write_text("no graph")
    graph = onnx.load(exported)
    del graph.metadata_props[:]
    onnx.save(graph, foreign)
    (folder / "labels.txt").write_text("one\ntwo\n")
    border = {**json.loads(onnx.load(exported).metadata_props[0].value)["data_config"], "crop_mode": "border"}
    yield (folder / "no.onnx", image), f"{folder / 'no.onnx'}: no such file"
    yield (exported, image, folder / "no.jpg"), f"{folder / 'no.jpg'}: no such file"
    yield (exported, image, "--labels", folder / "no.txt"), f"{folder / 'no.txt'}: no such file"
    yield (exported, image, damaged), f"{damaged}: cannot be decoded ("
    yield (exported, text), f"{text}: cannot be decoded (cannot identify image file"
    yield (text, image), f"{text}: ONNX Runtime cannot open it ("
    yield (foreign, image), f"{foreign}: does not say which transform its images need; export it with"
    yield (exported, image, "--labels", folder / "labels.txt"), "labels.txt: has 2 names, the model has 5 classes"
    bordered = with_facts(exported, folder / "border.onnx", data_config=border)
    yield (bordered, image), f"{bordered}: crop_mode must be 'center' or 'squash', got 'border'"
    headless = with_facts(exported, folder / "headless.onnx", num_classes=0)
    yield (headless, image), f"{headless}: the model has no classifier (num_classes=0)"


def test_a_mistake_is_one_line_and_exit_code_2(exported, odd_images, tmp_path):
    for arguments, message in bad_inputs(exported, odd_images / "any" / "wide.jpg", tmp_path):
        done = run(*arguments)
        assert (done.returncode, done.stdout) == (2, ""), done
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert done.stderr.startswith("error: ")
        assert message in done.stderr


def test_the_page_lists_every_key_of_the_metadata(exported):
    facts = json.loads(onnx.load(exported).metadata_props[0].value)
    rows = {key for line in PAGE.splitlines() if line.startswith("| `") for key in re.findall(r"`(\w+)`", line)}
    assert {*facts, *facts["data_config"]} <= rows
