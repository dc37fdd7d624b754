"""Recipes: whole experiments as data, a YAML list of commands with their options."""

from __future__ import annotations

import difflib
import re
from argparse import ArgumentError
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace

from vitprune.errors import VitpruneError


def read_recipe(path: str | Path, commands: Mapping[str, ArgumentParser]) -> list[tuple[str, Namespace]]:
    """Read and check a recipe before any of it runs.

    Args:
        path: YAML file with one key, ``steps``: a list of {command: {option: value}}.
        commands: the commands' parsers.

    Returns:
        (command, its options with defaults) in order.

    Raises:
        VitpruneError: naming every mistake of every step.
    """
    path = Path(path)
    if not path.is_file():
        raise VitpruneError(f"recipe {path}: no such file")
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise VitpruneError(f"recipe {path}: not a YAML file ({error})") from error
    steps = content.get("steps") if isinstance(content, dict) else None
    if not isinstance(steps, list) or not steps or set(content) != {"steps"}:
        raise VitpruneError(f"recipe {path}: expected one key 'steps' with a list of commands")
    parsed, problems = [], []
    for position, step in enumerate(steps, 1):
        try:
            parsed.append(_parse_step(step, commands))
        except VitpruneError as error:
            problems.append(f"step {position}: {error}")
    if problems:
        raise VitpruneError(f"recipe {path}: " + "; ".join(problems))
    return parsed


def _parse_step(step: Any, commands: Mapping[str, ArgumentParser]) -> tuple[str, Namespace]:
    if not isinstance(step, dict) or len(step) != 1:
        raise VitpruneError("expected one command with its options")
    ((command, given),) = step.items()
    if command not in commands:
        raise VitpruneError(f"unknown command '{command}' (known: {', '.join(commands)})")
    given = {} if given is None else given
    if not isinstance(given, dict):
        raise VitpruneError(f"{command}: expected its options as a mapping, got {given!r}")
    if "config" in given:
        raise VitpruneError(f"{command}: 'config' is for the command line; write the options here")
    for action in commands[command]._actions:
        if action.nargs == "+" and not isinstance(given.get(action.dest, []), list):
            raise VitpruneError(f"{command}: {action.dest}: expected a list, got {given[action.dest]!r}")
    try:
        return command, commands[command].parse_object(given)
    except ArgumentError as error:
        raise VitpruneError(f"{command}: {explain_mistake(error, option_names(commands[command]))}") from error


def option_names(parser: ArgumentParser) -> list[str]:
    """Return every way to name an option of a command: ``--top-k`` and ``top_k``."""
    return [name for action in parser._actions for name in (*action.option_strings, action.dest)]


def explain_mistake(error: ArgumentError, known: Iterable[str]) -> str:
    """Turn a parser's complaint into one line that proposes the nearest of the known names."""
    message = re.sub(r'Parser key "(\w+)":', r"\1:", " ".join(str(error).split()))
    message = re.sub(r"<class '(\w+)'>", r"\1", re.sub(r"(?<=[ ,])[a-z]+\.(?=[a-z_]+(,|$))", "", message))
    patterns = r"argument subcommand: invalid choice: '([^']*)'|unrecognized arguments: (\S+)|[Oo]ption '([^']*)'"
    unknown = re.search(patterns, message)
    if unknown:
        near = difflib.get_close_matches(next(filter(None, unknown.groups())), known, n=1, cutoff=0.6)
        message += f"; did you mean '{near[0]}'?" if near else ""
    return message
