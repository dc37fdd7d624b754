"""``vitprune info``: what a model consists of, and what of it can go."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import ArgumentParser

from vitprune.cli.inputs import refuse_run
from vitprune.cli.terminal import print_table
from vitprune.errors import VitpruneError

SUMMARY = "say what a model consists of, what of it can go, and how fast that could make it"


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "model", type=str, help="timm name (no weights are fetched), folder of a saved model, or elastic file"
    )


def run(model):
    from dataclasses import asdict

    from vitprune.pruning.info import info

    found = info(_open(model))
    answer = asdict(found)

    def show() -> None:
        _show(model, found)

    return answer, show


def _open(model: str):
    from vitprune.models.load import load
    from vitprune.models.sources import build_untrained

    if Path(model).suffix in (".onnx", ".xml"):
        raise VitpruneError(f"{model} is an exported file; 'vitprune doctor' says why an ONNX file is not faster")
    refuse_run(model)
    return load(model) if Path(model).exists() else build_untrained(model)


def _show(model: str, found) -> None:
    from vitprune.options import PARTS

    config = found.data_config
    _channels, height, width = config["input_size"]
    mean, std = (" ".join(f"{value:.3g}" for value in config[key]) for key in ("mean", "std"))
    print(f"{model}: {found.architecture}, {found.num_classes or 'no'} classes")
    print(f"images {height} x {width}, crop {config['crop_pct']:g}, {config['interpolation']}, mean {mean}, std {std}")
    sizes = [f"{found.num_parameters:,} parameters", f"{found.macs / 1e6:,.1f} M multiply-accumulates"]
    if found.num_blocks is not None:
        sizes.append(f"{found.num_blocks} blocks")
    if found.num_tokens is not None:
        sizes.append(f"{found.num_tokens} tokens")
    print(", ".join(sizes))
    if found.merge:
        print("tokens that merge: " + ", ".join(f"{r} in block {at}" for at, r in enumerate(found.merge) if r))
    if found.left_out:
        print("gone: " + ", ".join(f"{name} ({kind})" for name, kind in found.left_out.items()))
    rows = [
        (
            each.part,
            PARTS[each.part],
            "" if each.num_units is None else f"{each.num_units:,}",
            "" if each.macs_share is None else f"{each.macs_share:.1%}",
            "" if each.ceiling is None else f"{each.ceiling:.2f} x",
        )
        for each in found.parts
        if each.reason is None
    ]
    if rows:
        columns = ("part", "what can go", "units", "of the products", "at most")
        print_table("parts", columns, rows, texts=("what can go",))
        print(
            f"of the products: multiply-accumulates that go with all of it ({found.rest_share:.1%} belong to no part); "
            "at most: how many times as fast the model is without it (Amdahl)"
        )
    for each in found.parts:
        if each.reason is not None:
            print(f"{each.part} cannot go: {each.reason}")
    print("paths: discover can follow it" if found.no_paths is None else f"paths: {found.no_paths}")
