"""What keeps the package in shape: imports point downward, and nothing global changes on import."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import vitprune
from vitprune.cli.commands import COMMANDS
from vitprune.cli.wording import in_flags

PACKAGE = Path(__file__).resolve().parents[1] / "vitprune"

# Lower rows import nothing from higher ones.
LAYERS = (
    ("errors", "progress", "table"),
    ("options", "processes", "intervals", "wrappers", "batches", "seal"),
    ("files", "timing", "views", "entry", "sharing"),
    ("answers", "twins"),
    ("answer_loss", "card", "images"),
    ("data",),
    ("seen_images",),
    ("models",),
    ("discovery",),
    ("figures", "calibration"),
    ("pruning", "interop"),
    ("export", "training"),
    ("speed",),
    ("evaluation",),
    ("analysis", "hub"),
    ("report",),
    ("demo", "recipe"),
    ("cli",),
    ("__main__",),
)
HEIGHT = {name: height for height, row in enumerate(LAYERS) for name in row}
ONLY_IN = {
    "onnx": {"export", "speed"},
    "onnx_ir": {"export", "speed"},
    "onnxruntime": {"export", "speed"},
    "openvino": {"export"},
    "nncf": {"export"},
    "torch_pruning": {"pruning"},
    "timm": {"models", "images", "views", "twins", "interop", "demo", "training"},
    "matplotlib": {"figures", "report", "analysis"},
    "jinja2": {"report"},
    "rich": {"cli"},
    "jsonargparse": {"cli", "recipe"},
}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def test_no_two_files_have_one_name():
    """A name leads to one file; the file of a command may be called as the verb that it serves."""
    names = [path.stem for path in MODULES if part_of(path) != "cli" and path.stem != "__init__"]
    assert not {name for name in names if names.count(name) > 1}


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def part_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downward(path):
    part = part_of(path)
    for module in imports_of(path):
        names = module.split(".")
        if names[0] == "vitprune" and len(names) > 1 and names[1] != part:
            assert HEIGHT[names[1]] < HEIGHT[part], module
        if names[0] in ONLY_IN:
            assert part in ONLY_IN[names[0]], module


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_the_command_line_prints(path):
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    printing = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
    assert not printing or part_of(path) == "cli"


FLAG_OR_COMMAND = re.compile(
    r"(?<![\w-])--[a-z][a-z-]+|['`]?vitprune (" + "|".join(COMMANDS) + r")\b|'(" + "|".join(COMMANDS) + r")'"
)


@pytest.mark.parametrize(
    "path",
    # Recipes are commands, and speak of them.
    [path for path in MODULES if part_of(path) not in ("cli", "recipe")],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_no_string_outside_the_command_line_names_a_flag_or_a_command(path):
    strings = [node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
    named = [text for text in strings if isinstance(text, str) and FLAG_OR_COMMAND.search(text)]
    assert not named


def test_the_command_line_words_every_parameter_as_a_flag():
    """What the library puts in backquotes a user of the command line sees as a flag."""
    parameters = {
        name
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Raise)
        for text in ast.walk(node)
        if isinstance(text, ast.Constant) and isinstance(text.value, str)
        for name in re.findall(r"`([a-z_]+)`", text.value)
    }
    assert parameters
    for name in parameters:
        assert in_flags(f"`{name}`").startswith("--")


@pytest.mark.parametrize("name", vitprune.__all__)
def test_every_public_function_has_an_example(name):
    value = getattr(vitprune, name)
    if inspect.isfunction(value):
        assert ">>> " in (inspect.getdoc(value) or ""), name


def test_importing_everything_changes_nothing_global():
    code = (
        "import torch, warnings, logging\n"
        "before = (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(),\n"
        "          torch.random.get_rng_state().tolist(), list(logging.getLogger().handlers))\n"
        "import vitprune\n"
        "for name in vitprune.__all__: getattr(vitprune, name)\n"
        "after = (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(),\n"
        "         torch.random.get_rng_state().tolist(), list(logging.getLogger().handlers))\n"
        "assert before == after\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
