"""The commands that benchmarks name at their head are understood; what they measure takes too long for a test."""

from __future__ import annotations

import ast
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
PROGRAMS = sorted(path for path in BENCHMARKS.glob("*.py") if path.name != "common.py")


def commands_of(program: Path) -> list[list[str]]:
    text = ast.get_docstring(ast.parse(program.read_text()))
    found = re.findall(r"^ {4}python (benchmarks/.+(?:\n {8}.+)*)", text, flags=re.MULTILINE)
    return [shlex.split(command.replace("\\\n", " ")) for command in found]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_the_commands_at_its_head_are_understood(program, monkeypatch, capsys):
    commands = commands_of(program)
    assert commands
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name, *arguments in commands:
        assert name == f"benchmarks/{program.name}"
        monkeypatch.setattr(sys, "argv", [name, *arguments, "--print_config"])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(program), run_name="__main__")
        assert ended.value.code in (0, None), capsys.readouterr().err
