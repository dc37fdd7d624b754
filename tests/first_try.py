"""Models and images as strangers bring them, of every kind that once went wrong: what vitprune does with each now.

``python tests/first_try.py`` prints the table of docs/first_try.md. Each kind is an example of its own; the tests of
each go further.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import torch
from conftest import TINY, make_vit, photos
from families import build
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import vitprune
from vitprune.cli import main
from vitprune.data import data_config

NAMES = ["bird", "cat", "dog", "fish"]
KINDS: dict[str, Callable[[], str]] = {}


def kind(met: str) -> Callable[[Callable[[], str]], Callable[[], str]]:
    """Name a kind by what was met."""

    def add(show: Callable[[], str]) -> Callable[[], str]:
        KINDS[met] = show
        return show

    return add


def row(met: str) -> str:
    """Return the row of the table of a kind, tried in a folder of its own."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            return f"| {list(KINDS).index(met) + 1} | {met} | {KINDS[met]()} |"
        finally:
            os.chdir(before)


def said(*arguments: str, about: str = "") -> str:
    """Run a command; return the last line that it says on stderr, or the last one about something."""
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        code = main(list(arguments))
    lines = [line for line in err.getvalue().strip().splitlines() if about in line]
    return f"`{lines[-1].replace(str(Path.cwd()) + '/', '').removeprefix('vitprune: ')}`, exit code {code}"


def refused(call: Callable[[], object]) -> str:
    try:
        call()
    except vitprune.VitpruneError as error:
        return f"`{error}`".replace(str(Path.cwd()) + "/", "")
    raise AssertionError("not refused")


def model_of(num_classes: int, *, names: list[str] | None = None, **model_args) -> str:
    model = make_vit(num_classes=num_classes, **model_args).float()
    model.model_args = {**TINY, "num_classes": num_classes, **model_args}
    if names is not None:
        model.label_names = tuple(names)
    vitprune.save(model, "model")
    return "model"


def weights_of(**model_args) -> dict[str, torch.Tensor]:
    return make_vit(**{"num_classes": 4, **model_args}).float().state_dict()


TINY_ARGS = [
    "--model-args",
    *(f"{name}={value}" for name, value in TINY.items() if name not in ("img_size", "num_classes")),
]


@kind("folders `0` .. `11`, whose sorted order is not that of the numbers")
def numbers() -> str:
    photos(Path("val"), [str(number) for number in range(12)])
    return said("evaluate", model_of(12), "--data", "val", about="images of")


@kind("folders of other classes than the model's, in an order of their own")
def shifted() -> str:
    photos(Path("val"), ["bird", "dog", "fish", "zebra"])
    return said("evaluate", model_of(4, names=NAMES), "--data", "val", about="images of")


@kind("names of classes, from the first command to the file")
def names() -> str:
    photos(Path("train"), NAMES, count=2)
    said("prune", model_of(4, names=NAMES), "--data", "train", "--ratio", "0.5", "--step", "1", "-o", "half")
    said("export", "half", "half.onnx", "--data", "train")
    file = {entry.key: entry.value for entry in onnx.load("half.onnx").metadata_props}
    of_file = json.loads(file["vitprune"])["label_names"]
    return f"the pruned folder says {', '.join(vitprune.load('half').label_names)}; its ONNX file {', '.join(of_file)}"


@kind("a checkpoint of another image size than the name's")
def facts() -> str:
    save_file(weights_of(img_size=48), "at48.safetensors")
    photos(Path("val"), NAMES)
    asked = ["evaluate", "vit_tiny_patch16_224", "--checkpoint", "at48.safetensors", *TINY_ARGS, "--data", "val"]
    return said(*asked, about="images: ")


@kind("NaN in weights")
def nan() -> str:
    weights = weights_of(img_size=32)
    weights["blocks.1.mlp.fc1.bias"][0] = float("nan")
    save_file(weights, "w.safetensors")
    photos(Path("val"), NAMES)
    return said("evaluate", "vit_tiny_patch16_224", "--checkpoint", "w.safetensors", *TINY_ARGS, "--data", "val")


@kind("a model in train mode, as `timm.create_model` returns it")
def train_mode() -> str:
    model = make_vit(drop_rate=0.5).train()
    images = [(torch.randn(8, 3, 32, 32).double(), torch.arange(8) % 5)]
    first, second = (vitprune.discover(model, images, method="activation") for _ in range(2))
    same = "the same" if torch.equal(first.joint_scores, second.joint_scores) else "other"
    return f"two searches give {same} scores, and the model is in {'train' if model.training else 'eval'} mode again"


@kind("16-bit images")
def deep() -> str:
    Path("val/a").mkdir(parents=True)
    Image.fromarray(np.full((32, 32), 32896, np.uint16)).save("val/a/grey.png")
    model = make_vit(num_classes=1)
    (images, _labels) = next(iter(vitprune.ImageBatches(vitprune.find_images("val", None), model)))
    config = data_config(model)
    grey = images[0, 0].mean().item() * config["std"][0] + config["mean"][0]
    return f"half of white is read as {grey:.2f} of white"


@kind("one output, of a sigmoid")
def one_output() -> str:
    model = make_vit(num_classes=1)
    images = torch.randn(8, 3, 32, 32).double()
    with torch.no_grad():
        right = (model(images)[:, 0] > 0).long()
    half = torch.cat([right[:4], 1 - right[4:]])
    top1 = vitprune.evaluate(model, [(images, half)]).top1
    return f"its accuracy is that of its two classes: {top1:g} where half of the labels are turned"


@kind("answers for every token")
def tokens() -> str:
    model = make_vit(global_pool="")
    images = [(torch.randn(2, 3, 32, 32).double(), torch.zeros(2, dtype=torch.int64))]
    return refused(lambda: vitprune.evaluate(model, images))


@kind("hidden folders, `__MACOSX`, a folder called `x.jpg`, images without suffix")
def files() -> str:
    photos(Path("val"), ["a", ".hidden", "__MACOSX", "a/x.jpg"])
    Path("val/a/0.png").rename("val/a/photo")
    return f"of these, {', '.join(vitprune.find_images('val', None).files)} are images"


@kind("calibration images in no class folders")
def flat() -> str:
    photos(Path("all"), ["photos"], count=4)
    return said(
        "prune", model_of(4), "--data", "all/photos", "--ratio", "0.5", "--step", "1", "-o", "half", about="images of"
    )


@kind("a checkpoint inside `state_dict`, each tensor behind `module.model.`")
def layout() -> str:
    torch.save(
        {"state_dict": {f"module.model.{key}": value for key, value in weights_of(img_size=32).items()}}, "w.pth"
    )
    photos(Path("val"), NAMES)
    asked = ["evaluate", "vit_tiny_patch16_224", "--checkpoint", "w.pth", *TINY_ARGS, "--data", "val"]
    return said(*asked, about="images of")


@kind("positions of a model with registers, for another image size")
def positions() -> str:
    model = {"reg_tokens": 4, "no_embed_class": True, "depth": 1}
    weights = make_vit("vit_small_patch14_reg4_dinov2", **model, img_size=32).float().state_dict()
    save_file(weights, "w.safetensors")
    options = {"depth": 1, **{name: TINY[name] for name in ("patch_size", "embed_dim", "num_heads", "mlp_ratio")}}
    loaded = vitprune.load(
        "vit_small_patch14_reg4_dinov2", checkpoint="w.safetensors", image_size=48, model_args=options
    )
    return f"{weights['pos_embed'].shape[1]} positions become {loaded.pos_embed.shape[1]}"


@kind("a pointer of Git LFS instead of weights")
def pointer() -> str:
    Path("w.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 22883976\n")
    return refused(lambda: vitprune.load("vit_tiny_patch16_224", checkpoint="w.safetensors"))


@kind("a web page instead of weights")
def web_page() -> str:
    Path("w.pth").write_text("<!doctype html><html><title>Sign in</title></html>")
    return refused(lambda: vitprune.load("vit_tiny_patch16_224", checkpoint="w.pth"))


@kind("an ONNX file that is fed bytes, height and width before channels")
def foreign_input() -> str:
    Path("val/a").mkdir(parents=True)
    image = onnx.helper.make_tensor_value_info("image", onnx.TensorProto.UINT8, [1, 32, 32, 3])
    answer = onnx.helper.make_tensor_value_info("answer", onnx.TensorProto.UINT8, [1, 32, 32, 3])
    node = onnx.helper.make_node("Identity", ["image"], ["answer"])
    graph = onnx.helper.make_graph([node], "g", [image], [answer])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, "bytes.onnx")
    photos(Path("photos"), NAMES)
    return said("evaluate", "bytes.onnx", "--data", "photos")


@kind("an ONNX file that ends in a softmax")
def softmax() -> str:
    photos(Path("val"), NAMES)
    model = vitprune.load(model_of(4))
    vitprune.export_onnx(model, "m.onnx", [(torch.randn(4, 3, 32, 32), torch.zeros(4))])
    file = onnx.load("m.onnx")
    output = file.graph.output[0]
    file.graph.node.append(onnx.helper.make_node("Softmax", [output.name], ["shares"], axis=-1))
    output.name = "shares"
    onnx.save(file, "shares.onnx")
    return said("evaluate", "shares.onnx", "--data", "val", about="probabilities")


@kind("a class map with a byte-order mark")
def bom() -> str:
    photos(Path("val"), NAMES)
    Path("map.json").write_text(json.dumps({name: number for number, name in enumerate(NAMES)}), encoding="utf-8-sig")
    return said("evaluate", model_of(4), "--data", "val", "--class-map", "map.json", about="images of")


@kind("a name as the hub spells it")
def spelling() -> str:
    return said("info", "google/vit-base-patch16-224")


@kind("a model inside `DataParallel`, batches as dictionaries, an iterator that is read once")
def wrapped() -> str:
    model = nn.DataParallel(make_vit())
    batches = ({"pixel_values": torch.randn(4, 3, 32, 32).double(), "labels": [0, 1, 2, 3]} for _ in range(2))
    _pruned, plan = vitprune.prune(model, batches, ratio=0.5, criterion="variance", step=1)
    return f"{plan.num_neurons} of {plan.num_neurons_dense} neurons are left"


@kind("hierarchical families whose blocks have FFNs (Twins, VOLO, CrossViT, NesT, DaViT, MaxViT)")
def families() -> str:
    pruned = []
    for name in ("twins_svt_small", "crossvit_tiny_240", "davit_tiny"):
        _model, plan = vitprune.prune(build(name), ratio=0.5, criterion="magnitude", compensate="none", step=1)
        pruned.append(f"{name} loses {1 - plan.num_neurons / plan.num_neurons_dense:.0%} of its neurons")
    return f"{', '.join(pruned)}; [the others](families.md)"


@kind("a folder of float16 weights")
def halves() -> str:
    model = make_vit(num_classes=4).half()
    model.model_args = {**TINY, "num_classes": 4}
    vitprune.save(model, "half16")
    photos(Path("val"), NAMES)
    return said("discover", "half16", "--data", "val", "--method", "activation", "-o", "run", about="float")


@kind("an output that cannot be, noticed after all the work")
def output() -> str:
    return said("export", model_of(4), "model.pt")


def page() -> list[str]:
    """Return all rows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [row(met) for met in KINDS]


if __name__ == "__main__":
    print("\n".join(page()))
