"""The site: it builds without a warning, and every block of code on its pages does what the page says."""

from __future__ import annotations

import csv
import doctest
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import make_once, make_vit, shared
from markdown_it import MarkdownIt
from safetensors import safe_open
from warm_vitprune import CLIENT, Program

import vitprune
from vitprune import options
from vitprune.cli.commands import COMMANDS, build_parser
from vitprune.discovery.methods import plan_search
from vitprune.discovery.shards import Shards, find_shards
from vitprune.files import open_resumable

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))
FIRST = "quickstart.md"
EXECUTED = {"bash", "console", "python", "yaml", "json"}
# What the site's own extension or Sphinx makes of a block; none of these shows code.
DIRECTIVES = {"{toctree}", "{image}", "{command-list}", "{command-options}", "{choices}", "{recipe}", "{keys}"}
# tench, English springer, church, parachute; and what a user's own folders may be called
CLASSES = ("n01440764", "n02102040", "n03028079", "n03888257")
OWN_CLASSES = ("fish", "dog", "cat", "bird")
SECONDS_PER_BLOCK = 600


@dataclass(frozen=True)
class Block:
    """A block of code on a page; ``line`` counts its first line of code from 0."""

    language: str
    arguments: tuple[str, ...]
    code: str
    line: int


def blocks_of(path: Path) -> list[Block]:
    found = []
    for token in MarkdownIt("commonmark").parse(path.read_text(encoding="utf-8")):
        if token.type in ("fence", "code_block"):
            language, *arguments = token.info.split() or [""]
            found.append(Block(language, tuple(arguments), token.content, token.map[0] + (token.type == "fence")))
    return found


@pytest.fixture(scope="module")
def environment(request, tmp_path_factory):
    """The environment of a user without a network, whose cache holds DeiT-Tiny and the demo's model."""
    weights = shared("weights/deit_tiny_patch16_224.safetensors")
    cache = request.getfixturevalue("demo").cache  # which takes a minute, so it comes after the reason to skip
    hub = tmp_path_factory.mktemp("hub")
    repository = hub / "hub" / "models--timm--deit_tiny_patch16_224.fb_in1k"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("local")
    (repository / "snapshots" / "local").mkdir(parents=True)
    (repository / "snapshots" / "local" / "model.safetensors").symlink_to(weights)
    offline = {"HF_HOME": str(hub), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    return {**os.environ, **offline, "XDG_CACHE_HOME": str(cache), "HOME": str(cache)}


@pytest.fixture(scope="module")
def address(environment, kept_exports):
    """The socket of a process that runs commands."""
    with tempfile.TemporaryDirectory() as folder:  # a socket's name must be short
        address = f"{folder}/socket"
        command = [sys.executable, Path(__file__).with_name("warm_vitprune.py"), address, kept_exports]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout.readline() == "ready\n"
            yield address
            server.terminate()


@pytest.fixture(scope="module")
def shell(address, environment, tmp_path_factory):
    """Run a text in bash, where ``vitprune`` and ``python`` are found."""
    programs = tmp_path_factory.mktemp("bin")
    (programs / "vitprune").write_text(CLIENT.format(python=sys.executable, address=address))
    (programs / "vitprune").chmod(0o755)
    path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]])

    def run(text: str, folder: Path) -> tuple[int, str]:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text],
            cwd=folder,
            env={**environment, "PATH": path},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SECONDS_PER_BLOCK,
        )
        return done.returncode, done.stdout

    return run


def prepare(folder: Path) -> None:
    """Write the files that pages take for granted, each a real photo or real weights, few enough to be quick."""
    for split, count in (("train", 2), ("val", 1)):
        for name, own_name in zip(CLASSES, OWN_CLASSES, strict=True):
            link_images(shared(f"data/imagenette/{split}/{name}"), folder / "imagenette" / split / name, count)
            link_images(shared(f"data/imagenette/{split}/{name}"), folder / "photos" / split / own_name, count)
    for name, source, count in (("calibration", "imagenet-train-1000", 8), ("val", "nips17-1000", 8)):
        classes = sorted(path for path in shared(f"data/{source}").iterdir() if path.is_dir())
        for path in classes[:: len(classes) // count][:count]:
            link_images(path, folder / name / path.name, 1)
    photos = sorted((folder / "val").rglob("*.jpg"))
    for name, photo in zip(("cat.jpg", "dog.png", "bird.jpg"), photos, strict=False):
        (folder / name).symlink_to(photo.resolve())
    (folder / "deit_tiny.safetensors").symlink_to(shared("weights/deit_tiny_patch16_224.safetensors"))
    shutil.copy(DOCS / "serve.py", folder)
    shutil.copytree(ROOT / "recipes", folder / "recipes")


def link_images(source: Path, folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    for image in sorted(source.iterdir())[:count]:
        (folder / image.name).symlink_to(image.resolve())


@pytest.fixture(scope="module")
def begun(address, shell, tmp_path_factory):
    """The folder after the quick start, which the other pages go on from."""

    def make(folder: Path) -> None:
        prepare(folder)
        run_page(FIRST, folder, shell, address)

    return make_once(tmp_path_factory, "begun", make)


def run_page(page: str, folder: Path, shell, address: str) -> None:
    """Execute the blocks of a page from top to bottom."""
    blocks = blocks_of(DOCS / page)
    with open(folder / "python-output.txt", "w+") as output:
        program = Program(address, folder, output) if any(block.language == "python" for block in blocks) else None
        try:
            for number, block in enumerate(blocks):
                where = f"{page}, line {block.line + 1}"
                if block.language == "bash":
                    status, printed = shell(block.code, folder)
                    assert status == 0, f"{where}\n{block.code}\n{printed}"
                elif block.language == "console":
                    check_console(block.code, folder, shell, where)
                elif block.language == "python":
                    failure = program.run(block.code, page, block.line)
                    assert not failure, f"{where}\n{failure}"
                elif block.language == "yaml":
                    run_yaml(block, blocks[number + 1 :], folder, shell, where)
                elif block.language == "json":
                    json.loads(block.code)
        finally:
            if program is not None:
                program.close()


def check_console(code: str, folder: Path, shell, where: str) -> None:
    """Run the lines after ``$`` and compare what they print with the lines below, where ``...`` stands for anything.

    A mistake's message must be a mistake: exit code 2.
    """
    for part in re.split(r"^\$ ", code, flags=re.M)[1:]:
        command, _, wanted = part.partition("\n")
        status, printed = shell(command, folder)
        last = (wanted.splitlines() or [""])[-1]
        assert status == (2 if last.startswith("vitprune: ") else 0), f"{where}\n{command}\n{printed}"
        flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        assert doctest.OutputChecker().check_output(wanted, printed, flags), f"{where}\n{command}\n{printed}"


def run_yaml(block: Block, later: list[Block], folder: Path, shell, where: str) -> None:
    """Write the file that the first line names; a command below it uses it, or it is a recipe that can be run."""
    name = re.match(r"# (\S+\.yaml)\n", block.code)
    assert name, f"{where}: the first line must name the file"
    (folder / name[1]).write_text(block.code)
    if not any(name[1] in other.code for other in later if other.language in ("bash", "console")):
        status, printed = shell(f"vitprune run {name[1]} --dry-run", folder)
        assert status == 0, f"{where}\n{printed}"


def test_the_quick_start_runs(begun):
    assert (begun / "half.onnx").is_file()


def test_what_the_quick_start_pruned_is_not_measured_on_its_calibration(begun, shell):
    """README's Python example is the quick start's; ``deit-half`` comes from it, ``runs/half`` from the commands."""
    for model in ("deit-half", "deit-half.onnx", "runs/half", "half.onnx"):
        status, printed = shell(f"vitprune evaluate {model} --data calibration", begun)
        assert status == 2, printed
        assert "8 of 8 evaluation images were calibration images" in printed
    pruned = vitprune.load(begun / "deit-half")
    images = vitprune.find_images(begun / "calibration", pruned.num_classes)
    with pytest.raises(vitprune.VitpruneError, match="8 of 8"):
        vitprune.evaluate(pruned, vitprune.ImageBatches(images, pruned))
    assert vitprune.evaluate(pruned, vitprune.ImageBatches(images, pruned), allow_overlap=True).num_overlap == 8


@pytest.mark.parametrize("page", [page for page in PAGES if page != FIRST and blocks_of(DOCS / page)])
def test_every_block_of_a_page_runs(page, begun, shell, address, tmp_path):
    folder = tmp_path / "page"
    shutil.copytree(begun, folder, symlinks=True)
    if page == "file_formats.md":
        leave_shards(folder / "runs" / "killed.shards")
    run_page(page, folder, shell, address)
    for block in blocks_of(DOCS / page):
        if block.language == "{keys}":
            check_keys(block, folder)


def leave_shards(folder: Path) -> None:
    """Leave what a killed discovery leaves behind."""
    model, request = make_vit(num_classes=4).float(), {"model": "vit"}
    root = folder.parents[1] / "imagenette" / "train"
    shards = Shards(folder, request, vitprune.find_images(root, 4), batch_size=2, batches_per_shard=1)
    open_resumable(folder, request, owned=frozenset(), overwrite=False)
    find_shards(model, plan_search(model), shards, [0])


def check_keys(block: Block, folder: Path) -> None:
    """Compare the keys that a page lists with those of the file, in both directions."""
    path, *part = block.arguments
    listed = [line.partition(": ")[0] for line in block.code.splitlines()]
    assert len(set(listed)) == len(listed), f"{path}: a key is listed twice"
    patterns = {key: as_pattern(key.removesuffix("?")) for key in listed}
    found = read_keys(folder / path, part[0] if part else None)
    for key in found:
        assert any(re.fullmatch(pattern, key) for pattern in patterns.values()), f"{path}: '{key}' is not described"
    for key, pattern in patterns.items():
        there = any(re.fullmatch(pattern, name) for name in found)
        assert there or key.endswith("?"), f"{path} has no '{key}'"
    table = (folder / path).with_suffix(".csv")
    if part and table.is_file():
        with table.open(newline="") as stream:
            assert set(next(csv.reader(stream))) == found, f"{table.name} has other columns than {path}"


def as_pattern(key: str) -> str:
    """Read the placeholders of a key: an FFN's name, a number, any key of a state dict."""
    escaped = re.escape(key)
    for name, pattern in (("FFN", r"blocks\.\d+\.mlp"), ("NUMBER", r"\d+"), ("KEY", r"[\w.]+")):
        escaped = escaped.replace(name, pattern)
    return escaped


# What the head of docs/file_formats.md says of all files.
SEALS = {"content_sha256", "tensors_sha256"}


def read_keys(path: Path, part: str | None) -> set[str]:
    """Return the keys of a file, or of a part of it, but for those that all files have."""
    return _read_keys(path, part) - SEALS


def _read_keys(path: Path, part: str | None) -> set[str]:
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as stream:
            return set(stream.keys()) if part == "tensors" else set(json.loads(stream.metadata()["vitprune"]))
    if path.suffix == ".jsonl":
        return set(json.loads(path.read_text().splitlines()[0]))
    content = json.loads(path.read_text())
    for step in part.split("/") if part else ():
        content = content[int(step) if isinstance(content, list) else step]
    return set(content)


@pytest.mark.parametrize("page", PAGES)
def test_no_block_escapes(page):
    for block in blocks_of(DOCS / page):
        assert block.language in EXECUTED | DIRECTIVES, f"{page}, line {block.line + 1}: '{block.language}'"


def test_every_command_has_a_page_with_its_options():
    for name in COMMANDS:
        blocks = blocks_of(DOCS / "commands" / f"{name}.md")
        assert [block.arguments for block in blocks if block.language == "{command-options}"] == [(name,)]


def test_every_recipe_is_on_its_page():
    shown = [block.arguments[0] for block in blocks_of(DOCS / "recipes.md") if block.language == "{recipe}"]
    assert sorted(shown) == sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))


def test_the_readme_shows_the_quick_start_and_commands_that_exist():
    readme = blocks_of(ROOT / "README.md")
    (python,) = [block.code for block in readme if block.language == "python"]
    assert python in [block.code for block in blocks_of(DOCS / FIRST)]
    lines = "\n".join(block.code for block in readme if block.language in ("", "bash")).splitlines()
    commands = [shlex.split(line.partition("vitprune ")[2], comments=True) for line in lines if "vitprune " in line]
    parser, _commands = build_parser()
    for command in filter(None, commands):
        parser.parse_args(command)  # refuses unknown commands, options and choices


def test_the_reference_names_everything_public():
    text = "\n".join(path.read_text() for path in sorted((DOCS / "api").glob("*.rst")))
    documented = re.findall(r"^\.\. auto(?:function|class|exception):: (\w+)$", text, re.M)
    assert sorted(set(documented) & set(vitprune.__all__)) == vitprune.__all__
    assert len(set(documented)) == len(documented)
    choices = {name for name, value in vars(options).items() if name.isupper() and isinstance(value, Mapping)}
    assert choices == set(re.findall(r"^\.\. choices:: (\w+)$", text, re.M))


def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", DOCS, tmp_path / "site"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command += ["-d", tmp_path / "doctrees"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site" / "concepts.html").read_text()
    assert page.count("<math") >= 30
    for path in (tmp_path / "site").rglob("*.html"):
        text = path.read_text()
        assert "://cdn" not in text, path  # formulas and styles need no network
        assert ":math:" not in text, path
