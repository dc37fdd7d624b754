"""``vitprune predict``: what a model answers to some images."""

from __future__ import annotations

from dataclasses import asdict

from jsonargparse import ArgumentParser

from vitprune.cli.arguments import add_checkpoint, add_device, add_ratio
from vitprune.cli.inputs import check_model, pick_device, read_opening, say_transform
from vitprune.errors import VitpruneError

SUMMARY = "say what a model answers to some images"


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", type=str, help="timm name, folder of a saved model, elastic file, .onnx or .xml file")
    parser.add_argument("images", type=str, nargs="+", help="files; or folders, lists or .tar files of some")
    add_checkpoint(parser)
    add_ratio(parser)
    parser.add_argument("--top-k", type=int, default=5, help="classes named for each image")
    parser.add_argument("--batch-size", type=int, default=16, help="images at once")
    add_device(parser)


def run(model, images, checkpoint, ratio, merge, top_k, batch_size, device, **opening):
    from pathlib import Path

    from vitprune.evaluation.open_model import Source, open_model
    from vitprune.evaluation.predict import predict

    check_model(model, checkpoint, opening)
    for each in images:
        if not Path(each).exists():
            raise VitpruneError(f"{each}: no such image or folder")
    where = device if Path(model).suffix in (".onnx", ".xml") else pick_device(device)
    network = open_model(Source(model, checkpoint, ratio, merge, read_opening(opening)), device=where)
    say_transform(network)
    found = predict(network, images, top_k=top_k, batch_size=batch_size)
    answer = {"predictions": [asdict(each) for each in found]}

    def show() -> None:
        for each in found:
            print(each)

    return answer, show
