"""Read a recipe: its keys, what was given for them, and its steps, all checked before any of it runs."""

from __future__ import annotations

import os
import re
import string
from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import yaml
from jsonargparse import ArgumentParser

from vitprune.errors import VitpruneError
from vitprune.files import LONGEST_NAME
from vitprune.recipe.command_options import (
    KINDS,
    check_value,
    describe_options,
    describe_value,
    explain_mistake,
    option_names,
    suggest,
)

KEY_NAME = r"[a-z_][a-z0-9_]*"
_PARTS = ("keys", "output", "steps")
# What classes and devices are called, files and folders may be called too.
_NEVER_PATHS = frozenset({"backend", "classes", "device", "keep_classes", "target"})
_GIVEN = re.compile(r"([^=]+)=(.*)", re.DOTALL)


@dataclass(frozen=True)
class Step:
    """One command of a recipe.

    Attributes:
        command: its name.
        options: option name -> value, with defaults; without those that only the command line has.
        output: the file or folder that it writes; None where it only answers.
    """

    command: str
    options: Mapping[str, Any]
    output: str | None


@dataclass(frozen=True)
class Recipe:
    """A recipe as it will run.

    Attributes:
        path: its file.
        keys: key -> value, defaults replaced by what was given.
        output: folder of its results, where what is finished is remembered; None: nothing is remembered.
        steps: in order.
    """

    path: Path
    keys: Mapping[str, Any]
    output: str | None
    steps: tuple[Step, ...]


class _Loader(yaml.SafeLoader):
    """YAML as its version 1.2 has it, and as editors read it: 1e-3 is a number, ``no`` and dates are text.

    A name that a mapping has twice is a mistake.
    """

    yaml_implicit_resolvers: ClassVar[dict[str, list]] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _value in node.value]
        for place, name in enumerate(names):
            if name in names[:place]:
                raise yaml.constructor.ConstructorError(None, None, f"'{name}' is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?", list("-+.0123456789")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), _first)


class _Text(string.Template):
    """Text with ``${key}`` in it; a dollar sign is written ``$$``."""

    idpattern = "(?!)"  # no $key without braces
    braceidpattern = "[^}]*"


def read_recipe(path: str | Path, commands: Mapping[str, ArgumentParser], given: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe before any of it runs.

    Args:
        path: YAML file: ``steps``, a list of {command: {option: value}}; if wished ``keys``, {name: default}, which the
            values of options name as ``${name}``; and ``output``, a folder. A value that is ``${name}`` and nothing
            else takes the key's value with its type, and is left out where that is null; inside longer text the value
            is written out.
        commands: the commands' parsers.
        given: ``key=value`` each; the value is YAML, of the type of the key's default (of any, where that is null), or
            null.

    Returns:
        The recipe with all keys filled in.

    Raises:
        VitpruneError: naming every mistake of the file and of what was given.
    """
    path = Path(path)
    if not path.is_file():
        raise VitpruneError(f"recipe {path}: no such file")
    try:
        content = yaml.load(path.read_text(), _Loader)  # noqa: S506 (a SafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise VitpruneError(f"recipe {path}: not a YAML file ({error})") from error
    if not isinstance(content, dict) or not isinstance(content.get("steps"), list) or not content["steps"]:
        raise VitpruneError(f"recipe {path}: expected 'steps' with a list of commands")
    problems = [f"unknown part '{name}'{suggest(str(name), _PARTS)}" for name in content if name not in _PARTS]
    keys, mistakes = _read_keys(content.get("keys"), given)
    output, more = _read_output(content.get("output"), keys)
    problems += mistakes + more
    steps = []
    for position, step in enumerate(content["steps"], 1):
        read, mistakes = _read_step(step, commands, keys, remembers=output is not None)
        steps.append(read)
        problems += [f"step {position}: {mistake}" for mistake in mistakes]
    if output is not None:
        problems += _check_outputs(output, steps)
    named = str([content.get("output"), content["steps"]])
    problems += [f"key '{name}' is used by no step" for name in keys if f"${{{name}}}" not in named]
    if problems:
        raise VitpruneError(f"recipe {path}: " + "; ".join(problems))
    return Recipe(path, keys, output, tuple(steps))


def _read_keys(declared: Any, given: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Return the keys' values, and every mistake in their declaration and in what was given."""
    declared = {} if declared is None else declared
    if not isinstance(declared, dict):
        return {}, [f"keys: expected names with defaults, got {describe_value(declared)}"]
    defaults, problems = {}, []
    for name, default in declared.items():
        wrong = None
        if not re.fullmatch(KEY_NAME, str(name)):
            wrong = "a name has small letters, digits and _ only"
        elif isinstance(default, dict) or _is_nested_list(default):
            wrong = f"expected a single value or a list of them, got {describe_value(default)}"
        elif "$" in str(default):
            wrong = f"its default {default!r} names another key; only options can"
        problems += [f"key '{name}': {wrong}"] if wrong else []
        defaults[str(name)] = None if wrong else default
    keys = dict(defaults)
    seen: set[str] = set()
    for word in given:
        match = _GIVEN.fullmatch(word)
        if match is None:
            problems.append(f"expected KEY=VALUE, got '{word}'")
            continue
        name, text = match.groups()
        if name not in keys:
            problems.append(f"unknown key '{name}'{suggest(name, keys)} (keys: {', '.join(keys) or 'none'})")
        elif name in seen:
            problems.append(f"key '{name}' is given twice")
        else:
            seen.add(name)
            keys[name], mistakes = _read_given(name, text, defaults[name])
            problems += mistakes
    return keys, problems


def _is_nested_list(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(each, list | dict) for each in value)


def _read_given(name: str, text: str, default: Any) -> tuple[Any, list[str]]:
    """Return the value that was given for a key, and what is wrong with it."""
    try:
        value = yaml.load(text, _Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        if isinstance(default, str):
            return text, []
        return default, [f"key '{name}': {text!r} is no YAML value ({' '.join(str(error).split())})"]
    if value is None:
        return value, []
    if isinstance(default, str) and not isinstance(value, list | dict):
        return value if text[0] in "'\"" else text, []  # a folder may be called 2024, or 'a #1'
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    wanted, fits = {
        type(None): ("a single value or a list of them", not isinstance(value, dict)),
        str: (KINDS["text"], False),
        bool: (KINDS["flag"], isinstance(value, bool)),
        int: (KINDS["whole"], is_number and isinstance(value, int)),
        float: (KINDS["number"], is_number),
        list: ("a list such as [a, b]", isinstance(value, list)),
    }[type(default)]
    if fits and not _is_nested_list(value):
        return value, []
    return default, [f"key '{name}': expected {wanted} as in its default {default!r}, got {describe_value(value)}"]


def _fill(value: Any, keys: Mapping[str, Any]) -> tuple[Any, list[str]]:
    """Return a value with the keys that it names filled in, and what is wrong with it."""
    if isinstance(value, list) and value:
        filled = [_fill(each, keys) for each in value]
        kept = [each for (each, _mistakes), raw in zip(filled, value, strict=True) if each is not None or not raw]
        return kept or None, [mistake for _each, mistakes in filled for mistake in mistakes]
    if not isinstance(value, str) or "$" not in value:
        return value, []
    names = [match["braced"] for match in _Text.pattern.finditer(value) if match["braced"] is not None]
    unknown = [f"${{{name}}}: no such key{suggest(name, keys)}" for name in names if name not in keys]
    if unknown:
        return None, unknown
    if names and value == f"${{{names[0]}}}":
        return keys[names[0]], []
    texts = {name: keys[name] for name in names}
    mistakes = [
        f"${{{name}}} is {describe_value(text)}, which cannot be a part of {value!r}"
        for name, text in texts.items()
        if text is None or isinstance(text, bool | list)
    ]
    try:
        return _Text(value).substitute(texts), mistakes
    except ValueError:
        return None, [*mistakes, f"{value!r}: write a key as ${{key}}, and a dollar sign as $$"]


def _read_output(value: Any, keys: Mapping[str, Any]) -> tuple[str | None, list[str]]:
    output, problems = _fill(value, keys)
    if problems:
        return None, [f"output: {problem}" for problem in problems]
    if output is not None and (not isinstance(output, str) or not output):
        return None, [f"output: expected a folder, got {describe_value(output)}"]
    if output is not None and (max(map(len, Path(output).parts)) > LONGEST_NAME or "\0" in output):
        return None, [f"output: no folder can be called {describe_value(output[:40])}"]
    return output, []


def _read_step(
    step: Any, commands: Mapping[str, ArgumentParser], keys: Mapping[str, Any], *, remembers: bool
) -> tuple[Step | None, list[str]]:
    """Return a step, and every mistake in it."""
    if not isinstance(step, dict) or len(step) != 1:
        return None, ["expected one command with its options"]
    ((command, raw),) = step.items()
    if command not in commands:
        return None, [f"unknown command '{command}'{suggest(str(command), commands)} (known: {', '.join(commands)})"]
    raw = {} if raw is None else raw
    if not isinstance(raw, dict):
        return None, [f"{command}: expected its options as a mapping, got {describe_value(raw)}"]
    parser = commands[command]
    described = describe_options(parser)
    problems: list[str] = []
    options: dict[str, Any] = {}
    wrong = set()
    for name, value in raw.items():
        mistakes = []
        if name in ("config", "json"):
            mistakes = [f"'{name}' is for the command line" + ("; write the options here" * (name == "config"))]
        elif name not in described:
            mistakes = [f"unknown option '{name}'{suggest(str(name), described)}"]
        elif remembers and name == "overwrite":
            mistakes = ["overwrite: leave it out; a recipe with 'output' replaces its own outputs, and no others"]
        else:
            value, mistakes = _fill(value, keys)
            mistakes = [f"{name}: {mistake}" for mistake in mistakes]
            if value is not None and not mistakes:
                options[name], mistakes = check_value(described[name], value)
        problems += mistakes
        wrong |= {name} if mistakes else set()
    required = [name for name, option in described.items() if option.required]
    problems += [f"'{name}' is missing" for name in required if name not in options and name not in wrong]
    if problems:
        return None, [f"{command}: {problem}" for problem in problems]
    try:
        parsed = parser.parse_object(options).as_dict()
    except ArgumentError as error:
        return None, [f"{command}: {explain_mistake(error, option_names(parser))}"]
    resolved = {name: parsed[name] for name in described}
    return Step(command, resolved, resolved.get("output")), []


def _check_outputs(output: str, steps: Sequence[Step | None]) -> list[str]:
    """Return what is wrong with where steps write and what they read of it."""
    problems = []
    own = Path(os.path.abspath(output))
    written: dict[Path, int] = {}
    for position, step in enumerate(steps, 1):
        if step is None or step.output is None:
            continue
        path = Path(os.path.abspath(step.output))
        if path == own or path in own.parents:
            problems.append(f"step {position}: {step.command}: {step.output} holds the recipe's own folder {output}")
        if path in written:
            problems.append(f"steps {written[path]} and {position} both write {step.output}")
        written.setdefault(path, position)
    for position, step in enumerate(steps, 1):
        for text in [] if step is None else texts_of(step):
            path = Path(os.path.abspath(text))
            later = [other for place, other in written.items() if place in (path, *path.parents) and other >= position]
            if later:
                problems.append(f"step {position}: {step.command}: reads {text}, which step {later[0]} writes")
    return problems


def texts_of(step: Step) -> list[str]:
    """Return the values of a step's options that may name a file or folder to read."""
    values = [value for name, value in step.options.items() if name != "output" and name not in _NEVER_PATHS]
    flat = [each for value in values for each in (value if isinstance(value, list) else [value])]
    return [each for each in flat if isinstance(each, str) and each and "\0" not in each]


def overlap(one: Path, other: Path) -> bool:
    """Tell whether two absolute paths are the same, or one lies in the other."""
    return one == other or one in other.parents or other in one.parents
