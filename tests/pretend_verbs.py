"""Run every verb on the CPU and on the pretended device, and compare: ``python tests/pretend_verbs.py FOLDER``.

Prints a JSON line for each: its name, how far its numbers are from the CPU's, how many operations ran on the device,
and why it failed where it did. ``--list`` prints their names.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from conftest import TINY, make_vit, photos
from torch import Tensor, nn

import vitprune
from vitprune.analysis.faithfulness import rank_by_class, rank_by_image
from vitprune.cli import main
from vitprune.options import ABLATIONS, COMPENSATIONS, CRITERIA, METHODS, TOKENS

BOTH = ("ffn", "attention")
CLASSES = ["ant", "bee", "cat", "dog", "elk"]
Numbers = Mapping[str, Tensor]
VERBS: dict[str, Callable[[nn.Module, Path], Numbers]] = {}


def verb(name: str) -> Callable[[Callable], Callable]:
    def add(call: Callable) -> Callable:
        VERBS[name] = call
        return call

    return add


def make_batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(5, 3, 32, 32, generator=generator), torch.arange(5)) for _ in range(4)]


def pruned(result: tuple[nn.Module, Any]) -> Numbers:
    model, plan = result
    kept = {f"keep {name}": keep.double() for name, keep in plan.keep.items()}
    return {**kept, **{name: value.detach() for name, value in model.named_parameters()}}


def found(result: Any) -> Numbers:
    numbers = {f"scores {name}": scores for name, scores in (result.class_scores or {}).items()}
    return {"neurons": result.neurons.double(), **numbers}


for _name in CRITERIA:
    if _name != "jas":
        VERBS[f"prune --criterion {_name}"] = lambda model, at, name=_name: pruned(
            vitprune.prune(model, make_batches(), criterion=name, compensate="ridge")
        )
for _name in COMPENSATIONS:
    VERBS[f"prune --compensate {_name}"] = lambda model, at, name=_name: pruned(
        vitprune.prune(model, make_batches(), criterion="variance", compensate=name, step=0.5)
    )
for _name in METHODS:
    VERBS[f"discover --method {_name}"] = lambda model, at, name=_name: found(
        vitprune.discover(model, make_batches(), method=name)
    )
for _name in TOKENS:
    VERBS[f"discover --tokens {_name}"] = lambda model, at, name=_name: found(
        vitprune.discover(model, make_batches(), tokens=name)
    )


@verb("discover --quadrature riemann:4 --top-k 2")
def _(model, at):
    return found(vitprune.discover(model, make_batches(), quadrature="riemann:4", top_k=2))


@verb("discover --nodes ffn attention")
def _(model, at):
    return found(vitprune.discover(model, make_batches(), nodes=BOTH))


@verb("prune --criterion jas")
def _(model, at):
    discovery = vitprune.discover(model, make_batches())
    return pruned(vitprune.prune(model, make_batches(), criterion="jas", found=discovery))


@verb("prune --mode mask")
def _(model, at):
    return pruned(vitprune.prune(model, make_batches(), mode="mask"))


@verb("prune --parts ffn qk vo heads layers")
def _(model, at):
    return pruned(vitprune.prune(model, make_batches(), ratio=0.4, parts=["ffn", "qk", "vo", "heads", "layers"]))


@verb("prune an encoder")
def _(model, at):
    encoder = vitprune.load(str(at.parent / "encoder"), device=str(next(model.parameters()).device))
    return pruned(vitprune.prune(encoder, make_batches()))


@verb("predict")
def _(model, at):
    answers = vitprune.predict(model, sorted((at.parent / "photos").rglob("*.png")))
    return {"shares": torch.tensor([each.probabilities for each in answers])}


@verb("embed")
def _(model, at):
    return {"embeddings": vitprune.embed(model, make_batches())}


@verb("bench")
def _(model, at):
    device = str(next(model.parameters()).device)
    rows = vitprune.bench({"a": model}, backends=["torch-eager"], batch_sizes=[1], seconds=0.01, device=device)
    return {"rows": torch.tensor(float(len(rows)))}


@verb("top images")
def _(model, at):
    result = vitprune.find_top_images(model, make_batches(), {"blocks.0.mlp": [1, 2]})
    return {f"{key}": each.activations for key, each in result.items()}


@verb("cards")
def _(model, at):
    result = vitprune.make_cards(model, make_batches(), vitprune.discover(model, make_batches(), nodes=BOTH))
    steered = [answer.value for card in result.cards for each in card.steering for answer in each.answers]
    pointed = [answer.value for card in result.cards for answer in card.towards]
    return {"maps": result.maps, "steering": torch.tensor(steered), "towards": torch.tensor(pointed)}


@verb("faithfulness")
def _(model, at):
    found = vitprune.discover(model, make_batches(), nodes=BOTH)
    rows = vitprune.measure_faithfulness(
        model,
        make_batches(),
        {("jas", "class"): rank_by_class(found), ("jas", "image"): rank_by_image(model, found)},
        nodes=BOTH,
        tokens=["cls", "all"],
        ablations=list(ABLATIONS),
        shares=[0.1, 0.5],
        classes=found.classes,
        reference=make_batches(),
        donors=make_batches()[::-1],
    )
    return {f"{row.ranked} {row.tokens} {row.ablation}": torch.tensor(row.kept + row.removed) for row in rows}


@verb("edges")
def _(model, at):
    edges = vitprune.measure_edges(model, make_batches(), vitprune.discover(model, make_batches(), nodes=BOTH))
    return {f"{index}": scores for index, scores in edges.scores.items()}


@verb("activations")
def _(model, at):
    return vitprune.record_activations(model, make_batches(), vitprune.discover(model, make_batches(), nodes=BOTH))


def command(name: str, *arguments: str, read: Callable[[Path], Numbers]) -> None:
    """Add a command; ``MODEL``, ``PHOTOS``, ``RUN``, ``HALF`` and ``OUT`` stand for what there is."""

    def call(model: nn.Module, at: Path) -> Numbers:
        device = next(model.parameters()).device.type
        places = {"MODEL": at.parent / "dense", "PHOTOS": at.parent / "photos", "OUT": at, "HALF": at.parent / "half"}
        places.update(RUN=at.parent / "run", OTHERS=at.parent / "others", ENCODER=at.parent / "encoder")
        given = [str(places.get(argument, argument)).replace("OUT", str(at)) for argument in arguments]
        with contextlib.redirect_stdout(io.StringIO()):
            code = main([*given, "--device", device])
        if code:
            raise SystemExit(f"exit code {code}")
        return read(at)

    VERBS[f"vitprune {name}"] = call


def tensors_of(pattern: str) -> Callable[[Path], Numbers]:
    from safetensors.torch import load_file

    def read(at: Path) -> Numbers:
        files = sorted(at.glob(pattern))
        assert files, f"{at} holds no {pattern}"
        return {f"{file.name} {name}": value for file in files for name, value in load_file(file).items()}

    return read


def numbers_of(name: str) -> Callable[[Path], Numbers]:
    """Read all numbers of a JSON file but how long something took."""

    def walk(value: Any, key: str) -> Iterator[tuple[str, Tensor]]:
        if isinstance(value, dict):
            for inner, below in value.items():
                if "seconds" not in inner:
                    yield from walk(below, f"{key}.{inner}")
        elif isinstance(value, list):
            for number, below in enumerate(value):
                yield from walk(below, f"{key}.{number}")
        elif isinstance(value, int | float):
            yield key, torch.tensor(float(value))

    def read(at: Path) -> Numbers:
        numbers = dict(walk(json.loads((at / name).read_text()), name))
        assert numbers, f"{at / name} holds no numbers"
        return numbers

    return read


command("discover", "discover", "MODEL", "--data", "PHOTOS", "-o", "OUT", read=tensors_of("paths.safetensors"))
command("prune", "prune", "MODEL", "--data", "PHOTOS", "-o", "OUT", read=tensors_of("model.safetensors"))
command(
    "prune --target-macs 0.5",
    *("prune", "MODEL", "--data", "PHOTOS", "--target-macs", "0.5"),
    *("--parts", "ffn", "qk", "vo", "tokens", "pixels", "-o", "OUT"),
    read=tensors_of("model.safetensors"),
)
command(
    "prune --merge 1:3",
    *("prune", "MODEL", "--data", "PHOTOS", "--merge", "1:3", "-o", "OUT"),
    read=tensors_of("model.safetensors"),
)
command(
    "elastic",
    *("elastic", "MODEL", "--data", "PHOTOS", "--ratios", "0.25", "0.5", "-o", "OUT/elastic.safetensors"),
    read=tensors_of("elastic.safetensors"),
)
command("evaluate", "evaluate", "HALF", "--data", "OTHERS", "-o", "OUT", read=numbers_of("evaluation.json"))
command(
    "evaluate --against",
    *("evaluate", "HALF", "--against", "MODEL", "--data", "OTHERS", "-o", "OUT"),
    read=numbers_of("evaluation.json"),
)
command(
    "evaluate --knn",
    *("evaluate", "ENCODER", "--data", "OTHERS", "--knn", "PHOTOS", "-o", "OUT"),
    read=numbers_of("evaluation.json"),
)
command(
    "curve",
    *("curve", "MODEL", "--data", "PHOTOS", "--eval-data", "OTHERS", "--ratios", "0.25", "0.5", "-o", "OUT"),
    read=numbers_of("curve.json"),
)
command(
    "analyze",
    *("analyze", "RUN", "--data", "OTHERS", "-o", "OUT"),
    read=numbers_of("analysis.json"),
)
command(
    "recover",
    *("recover", "HALF", "--data", "PHOTOS", "--epochs", "2", "--batch-size", "5", "-o", "OUT"),
    read=tensors_of("model.safetensors"),
)
command(
    "finetune",
    *("finetune", "MODEL", "--data", "PHOTOS", "--epochs", "1", "-o", "OUT"),
    read=tensors_of("model.safetensors"),
)


def make_inputs(root: Path) -> None:
    """Write the models, photos, the run and the pruned folder that the verbs read; all made on the CPU."""
    model = make_vit().float()
    model.model_args = TINY
    vitprune.save(model, root / "dense")
    encoder = make_vit(num_classes=0).float()
    encoder.model_args = {**TINY, "num_classes": 0}
    vitprune.save(encoder, root / "encoder")
    photos(root / "photos", CLASSES, count=4, seed=1)
    photos(root / "others", CLASSES, count=4, seed=2)
    dense = str(root / "dense")
    for arguments in (
        ["discover", dense, "--data", str(root / "photos"), "-o", str(root / "run"), "--device", "cpu"],
        ["prune", dense, "--data", str(root / "photos"), "-o", str(root / "half"), "--device", "cpu"],
    ):
        with contextlib.redirect_stdout(io.StringIO()):
            assert main(arguments) == 0, arguments


def compare(name: str, root: Path, device: str) -> dict[str, Any]:
    """Run a verb on both devices; return how far apart their numbers are, relative to the largest of each tensor."""
    from pretend_device import ran

    folder = root / name.replace(" ", "_").replace(",", "").replace(":", "")
    folder.mkdir()
    answers = []
    for number, where in enumerate(("cpu", device)):
        for made in ("dense", "encoder", "photos", "others", "run", "half"):
            (folder / made).exists() or (folder / made).symlink_to(root / made)
        before = ran.total()
        try:
            model = vitprune.load(str(root / "dense"), device=where)
            answers.append(VERBS[name](model, folder / f"out{number}"))
        except (Exception, SystemExit) as error:  # one verb that fails must not hide the others
            here = [
                f"{Path(frame.filename).name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)
            ]
            return {"verb": name, "failed": f"on {where}: {type(error).__name__}: {error} ({' '.join(here[-4:])})"}
    of_cpu, of_device = answers
    if of_cpu.keys() != of_device.keys():
        return {"verb": name, "failed": f"other numbers: {sorted(of_cpu.keys() ^ of_device.keys())[:3]}"}
    difference = max(
        float((value.double() - of_device[key].double().cpu()).abs().max() / value.double().abs().max().clamp_min(1e-6))
        for key, value in of_cpu.items()
        if value.numel()
    )
    return {"verb": name, "difference": difference, "operations": ran.total() - before}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--only", nargs="+")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(VERBS))
        sys.exit()
    import pretend_device

    warnings.simplefilter("ignore")
    pretend_device.add_device()
    make_inputs(arguments.folder)
    for _name in arguments.only or VERBS:
        print(json.dumps(compare(_name, arguments.folder, pretend_device.NAME)), flush=True)
