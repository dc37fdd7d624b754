"""Damaged files of every kind that vitprune reads: each is read rightly, or refused in one line that names it.

``python tests/bad_input.py --inputs 20000 --seed 3`` tries so many and prints the table of docs/trust.md. Each input is
a good file with a few changes: bytes flipped, cut, doubled or taken out, and in JSON and YAML values of another type,
missing, far too large or nested deeply.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import resource
import shutil
import signal
import string
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from conftest import TINY, make_vit, photos
from PIL import Image

import vitprune
from vitprune.cli import main
from vitprune.errors import VitpruneError
from vitprune.seal import SEAL, seal

CLASSES = ["ant", "bee", "cat", "dog", "elk"]
SECONDS = 20
# More than the good files take.
MEMORY_BYTES = 2**29
STRANGE = (
    None, True, -1, 0, 1, 2**31, 2**63, -(2**70), 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "x",
    "é\u0000", "../../etc/passwd", "/etc/passwd", "a" * 5000, [], {}, [[]], [None], {"": None}, ["x"] * 3, [1e999],
)  # fmt: skip

INSERTED = (b"\r\n", b"\xff\xfe", b"\0", b"{", b"[" * 2000, b'"', b"-", b"NaN", b"1e999")


@dataclass
class Kind:
    """A kind of file.

    Attributes:
        make: writes good files below a folder; returns what is read, and the file in it that is damaged.
        read: reads it.
        text: whether values in it are changed as well as bytes: ``json``, ``yaml`` or ``header``.
    """

    make: Callable[[Path], tuple[Path, Path]]
    read: Callable[[Path], Any]
    text: str | None = None


KINDS: dict[str, Kind] = {}


def damage_bytes(content: bytes, rng: random.Random) -> bytes:
    """Return bytes with one to three changes."""
    result = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        place, size = rng.randrange(len(result) + 1), rng.choice((1, 1, 2, 4, 8, 64, 1024))
        change = rng.choice(("flip", "cut", "take out", "double", "random", "zero", "ones", "insert"))
        if change == "flip" and result:
            result[min(place, len(result) - 1)] ^= 1 << rng.randrange(8)
        elif change == "cut":
            del result[place:]
        elif change == "take out":
            del result[place : place + size]
        elif change == "double":
            result[place:place] = result[place : place + size]
        elif change == "random":
            result[place : place + size] = rng.randbytes(min(size, max(len(result) - place, 0)))
        elif change in ("zero", "ones"):
            byte = b"\0" if change == "zero" else b"\xff"
            result[place : place + size] = byte * min(size, max(len(result) - place, 0))
        elif change == "insert":
            result[place:place] = rng.choice(
                (b"\r\n", b"\xff\xfe", b"\0", b"{", b"[" * 2000, b'"', b"-", b"NaN", b"1e999")
            )
    return bytes(result)


def damage_value(value: Any, rng: random.Random) -> Any:
    """Return a value of JSON with one change somewhere in it."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        name = rng.choice(list(value))
        if rng.random() < 0.2:
            return {key: each for key, each in value.items() if key != name}
        if rng.random() < 0.1:
            return {**value, rng.choice(("", "x", name.upper() if isinstance(name, str) else "y")): rng.choice(STRANGE)}
        return {**value, name: damage_value(value[name], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        place = rng.randrange(len(value))
        if rng.random() < 0.2:
            return value[:place] + value[place + 1 :]
        if rng.random() < 0.1:
            return [*value[:place], value[place], *value[place:]]
        return [*value[:place], damage_value(value[place], rng), *value[place + 1 :]]
    if isinstance(value, str) and rng.random() < 0.3:
        return value[: rng.randrange(len(value) + 1)] + rng.choice(string.printable) * rng.randint(0, 3)
    if isinstance(value, int | float) and not isinstance(value, bool) and rng.random() < 0.4:
        return rng.choice((-value, value + 1, value * 1e6, value / 3, str(value)))
    return rng.choice(STRANGE)


def sealed(changed: Any, rng: random.Random) -> Any:
    """Return damaged content that fits its seal, as who means harm would write it, half of the time."""
    if isinstance(changed, dict) and SEAL in changed and rng.random() < 0.5:
        with contextlib.suppress(RecursionError):
            return seal(changed)
    return changed


def damage(content: bytes, text: str | None, rng: random.Random) -> bytes:
    """Return a damaged file."""
    if text is None or rng.random() < 0.3:
        return damage_bytes(content, rng)
    if text == "header":  # of safetensors: its length, JSON, numbers
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        if rng.random() < 0.7 and "vitprune" in header.get("__metadata__", {}):
            facts = damage_value(json.loads(header["__metadata__"]["vitprune"]), rng)
            header["__metadata__"]["vitprune"] = json.dumps(sealed(facts, rng))
        else:
            header = damage_value(header, rng)
        told = json.dumps(header).encode()
        return len(told).to_bytes(8, "little") + told + content[8 + length :]
    if text == "lines":
        lines = content.decode().splitlines()
        place = rng.randrange(len(lines))
        lines[place] = json.dumps(damage_value(json.loads(lines[place]), rng))
        return "\n".join(lines).encode()
    value = (json.loads if text == "json" else yaml.safe_load)(content)
    changed = sealed(damage_value(value, rng), rng)
    return (json.dumps(changed) if text == "json" else yaml.safe_dump(changed, allow_unicode=True)).encode()


@dataclass
class Outcome:
    """What came of the inputs of one kind."""

    read: int = 0
    refused: int = 0
    failures: list[str] = field(default_factory=list)
    slowest: float = 0.0


class TooLongError(Exception):
    pass


@contextlib.contextmanager
def limited(seconds: int):
    def stop(_signal, _frame):
        raise TooLongError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def attempt(kind: Kind, read: Path, damaged: Path) -> str | None:
    """Read a damaged file; return what is wrong with how that went, None where it was read or refused as it should."""
    try:
        with (
            limited(SECONDS), warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()),
            contextlib.redirect_stdout(io.StringIO()),
        ):  # fmt: skip
            warnings.simplefilter("ignore")
            kind.read(read)
    except VitpruneError as error:
        told = str(error)
        if read.name not in told and damaged.name not in told:
            return f"refused without the file's name: {told[:200]}"
        return "refused"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        frames = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)]
        return f"{type(error).__name__}: {str(error)[:150]} ({' '.join(frames[-4:])})"
    return None


def try_kind(name: str, count: int, seed: int, keep: Path | None = None) -> Outcome:
    """Damage the good file of a kind so often; the same seed gives the same inputs."""
    outcome = Outcome()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        read, target = KINDS[name].make(root)
        good = target.read_bytes()
        KINDS[name].read(read)
        for number in range(count):
            rng = random.Random(f"{seed} {name} {number}")
            content = damage(good, KINDS[name].text, rng)
            target.write_bytes(content)
            started = time.perf_counter()
            wrong = attempt(KINDS[name], read, target)
            outcome.slowest = max(outcome.slowest, time.perf_counter() - started)
            if wrong is None:
                outcome.read += 1
            elif wrong == "refused":
                outcome.refused += 1
            else:
                outcome.failures.append(f"{number}: {wrong}")
                if keep is not None:
                    (keep / f"{name.replace(' ', '_').replace('/', '_')}-{number}{target.suffix}").write_bytes(content)
    return outcome


def kind(name: str, read: Callable[[Path], Any], text: str | None = None):
    def add(make: Callable[[Path], tuple[Path, Path]]):
        KINDS[name] = Kind(make, read, text)
        return make

    return add


_MADE: dict[str, Path] = {}


def made(name: str, make: Callable[[Path], None]) -> Path:
    """Return a folder that is made once."""
    if name not in _MADE:
        _MADE[name] = Path(tempfile.mkdtemp(prefix="bad-input-")) / name
        _MADE[name].parent.mkdir(exist_ok=True)
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            make(_MADE[name])
    return _MADE[name]


def dense() -> Path:
    def make(folder: Path) -> None:
        model = make_vit(depth=1).float()
        model.model_args = {**TINY, "depth": 1}
        vitprune.save(model, folder)

    return made("dense", make)


def images() -> Path:
    return made("photos", lambda folder: photos(folder, CLASSES, count=2))


def others() -> Path:
    return made("others", lambda folder: photos(folder, CLASSES, count=2, seed=5))


def ran(name: str, *arguments: Any) -> Path:
    """Return the folder that a command wrote, made once."""

    def make(folder: Path) -> None:
        assert main([*map(str, arguments), "-o", str(folder)]) == 0, arguments

    return made(name, make)


def run_folder() -> Path:
    return ran("run", "discover", dense(), "--data", images(), "--quadrature", "riemann:1")


def pruned() -> Path:
    return ran("pruned", "prune", dense(), "--data", images(), "--step", "1")


def elastic() -> Path:
    return ran("elastic.safetensors", "elastic", dense(), "--data", images(), "--ratios", "0.5")


def exported() -> Path:
    def make(path: Path) -> None:
        assert main(["export", str(pruned()), str(path), "--data", str(images())]) == 0

    return made("model.onnx", make)


def onnx_file() -> Path:
    return exported()


FOLDERS = {
    "evaluation": lambda: ran("evaluation", "evaluate", dense(), "--against", dense(), "--data", images()),
    "curve": lambda: ran(
        "curve", "curve", dense(), "--data", images(), "--eval-data", others(), "--ratios", "0.5", "--step", "1"
    ),
    "analysis": lambda: ran("analysis", "analyze", run_folder(), "--experiments", "scores", "similarity"),
    "bench": lambda: ran("bench", "bench", dense(), "--backend", "torch-eager", "--seconds", "0.01"),
    "run": run_folder,
    "pruned": pruned,
}


def copied(make: Callable[[], Path], file: str | None = None):
    def copy(root: Path) -> tuple[Path, Path]:
        source = make()
        target = root / source.name
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
        return target, target / file if file else target

    return copy


def report(folder: Path) -> None:
    from vitprune.report.page import write_report

    write_report([folder], folder.parent / "report.html")


def add_folders() -> None:
    for name, make in FOLDERS.items():
        for file, text in (
            ("evaluation.json", "json"), ("images.jsonl", "lines"), ("curve.json", "json"), ("analysis.json", "json"),
            ("bench.json", "json"), ("run.json", "json"), ("paths.safetensors", "header"),
            ("class_scores.safetensors", "header"), ("plan.safetensors", "header"), ("card.json", "json"),
            ("request.json", "json"),
        ):  # fmt: skip
            if (make() / file).is_file():
                KINDS[f"{name}: {file}"] = Kind(copied(make, file), report, text)
    KINDS["run: paths, to prune"] = Kind(copied(run_folder, "paths.safetensors"), vitprune.load_run, "header")
    KINDS["pruned: config.json"] = Kind(copied(pruned, "config.json"), lambda at: vitprune.load(str(at)), "json")
    KINDS["pruned: model.safetensors"] = Kind(
        copied(pruned, "model.safetensors"), lambda at: vitprune.load(str(at)), "header"
    )
    KINDS["plan"] = Kind(copied(pruned, "plan.safetensors"), vitprune.read_plan, "header")
    KINDS["elastic file"] = Kind(copied(elastic), lambda at: vitprune.load(str(at), ratio=0.3), "header")
    KINDS["ONNX file"] = Kind(copied(onnx_file), lambda at: vitprune.open_onnx(at)(torch.zeros(1, 3, 32, 32)))


@kind("checkpoint (.pth)", lambda at: vitprune.load(str(dense()), checkpoint=str(at)))
def _(root: Path):
    from safetensors.torch import load_file

    torch.save({"state_dict": load_file(dense() / "model.safetensors"), "epoch": 3}, root / "checkpoint.pth")
    return root / "checkpoint.pth", root / "checkpoint.pth"


@kind("class map (.txt)", lambda at: read_images(at))
def _(root: Path):
    (root / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    return root / "classes.txt", root / "classes.txt"


@kind("class map (.json)", lambda at: read_images(at), "json")
def _(root: Path):
    (root / "classes.json").write_text(json.dumps({name: index for index, name in enumerate(CLASSES)}))
    return root / "classes.json", root / "classes.json"


def read_images(class_map: Path) -> None:
    from vitprune.images.class_map import read_class_map

    read_class_map(class_map)


@kind("list of images (.csv)", lambda at: list_all(at))
def _(root: Path):
    files = sorted(images().rglob("*.png"))
    (root / "list.csv").write_text("file,label\n" + "".join(f"{file},{file.parent.name}\n" for file in files))
    return root / "list.csv", root / "list.csv"


@kind("images in a .tar", lambda at: list_all(at))
def _(root: Path):
    import tarfile

    with tarfile.open(root / "images.tar", "w") as archive:
        for file in sorted(images().rglob("*.png"))[:4]:
            archive.add(file, f"{file.parent.name}/{file.name}")
    return root / "images.tar", root / "images.tar"


def list_all(at: Path) -> None:
    from vitprune.data import ImageChoice

    model = vitprune.load(str(dense()))
    for _batch in vitprune.ImageBatches(ImageChoice(at).find(model, labels_matter=False), model):
        pass


def add_pictures() -> None:
    for suffix, mode in (
        ("png", "RGB"), ("jpg", "RGB"), ("jpg", "CMYK"), ("png", "I;16"), ("png", "P"), ("png", "LA"), ("gif", "P"),
        ("webp", "RGBA"), ("bmp", "RGB"), ("tiff", "F"), ("tiff", "RGB"),
    ):  # fmt: skip

        def make(root: Path, suffix: str = suffix, mode: str = mode) -> tuple[Path, Path]:
            (root / "photos" / "ant").mkdir(parents=True)
            file = root / "photos" / "ant" / f"1.{suffix}"
            Image.effect_noise((40, 36), 80).convert("RGB" if mode == "RGBA" else "L").convert(mode).save(file)
            return root / "photos", file

        KINDS[f"image (.{suffix}, {mode})"] = Kind(make, list_all)


@kind("recipe", lambda at: run_recipe(at), "yaml")
def _(root: Path):
    (root / "recipe.yaml").write_text(
        f"keys:\n  model: {dense()}\n  data: {images()}\n  ratio: 0.5\n"
        f"output: {root / 'out'}\n"
        "steps:\n"
        "- prune:\n    source: ${model}\n    data: ${data}\n    ratio: ${ratio}\n    output: half\n"
        "- export:\n    model: half\n    data: ${data}\n    output: half.onnx\n"
    )
    return root / "recipe.yaml", root / "recipe.yaml"


def run_recipe(at: Path) -> None:
    told = io.StringIO()
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(io.StringIO()):
        code = main(["run", str(at), "--dry-run"])
    if code:
        raise VitpruneError(told.getvalue().strip())


def authors_of(suffix: str) -> Callable[[Path], tuple[Path, Path]]:
    from vitprune.interop.authors import find_args_file, write_authors

    def make(root: Path) -> tuple[Path, Path]:
        files = write_authors([vitprune.load_run(run_folder())], root / "authors")
        return find_args_file(root / "authors"), next(file for file in files if file.name.endswith(suffix))

    return make


KINDS["the authors' results (.jsonl)"] = Kind(authors_of(".jsonl"), lambda at: vitprune.read_authors(at), "lines")
KINDS["the authors' arguments (.json)"] = Kind(authors_of(".args.json"), lambda at: vitprune.read_authors(at), "json")


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def prepare() -> None:
    if "plan" not in KINDS:
        add_folders()
        add_pictures()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--inputs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--keep", type=Path)
    asked = parser.parse_args()
    prepare()
    names = [name for name in KINDS if not asked.only or any(word in name for word in asked.only)]
    each = -(-asked.inputs // len(names))
    peak, total = peak_bytes(), Counter()
    print("| kind | inputs | read | refused | failed | slowest |\n|---|---|---|---|---|---|")
    for name in names:
        outcome = try_kind(name, each, asked.seed, asked.keep)
        total += Counter(read=outcome.read, refused=outcome.refused, failed=len(outcome.failures))
        cells = (name, each, outcome.read, outcome.refused, len(outcome.failures), f"{outcome.slowest:.2f} s")
        print(f"| {' | '.join(map(str, cells))} |", flush=True)
        for failure in outcome.failures[:3]:
            print(f"    {failure}", file=sys.stderr, flush=True)
    grown = (peak_bytes() - peak) / 2**20
    cells = ("all", total.total(), total["read"], total["refused"], total["failed"], f"{grown:.0f} MiB more memory")
    print(f"| {' | '.join(map(str, cells))} |")
    sys.exit(total["failed"] > 0 or grown > MEMORY_BYTES / 2**20)
