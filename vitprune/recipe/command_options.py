"""What a command's parser knows of its options: to check a recipe, to describe it for editors, to write it as typed."""

from __future__ import annotations

import difflib
import re
from argparse import Action, ArgumentError
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jsonargparse import ArgumentParser

# Of the command line itself.
NOT_IN_RECIPES = frozenset({"help", "config", "print_config", "json"})
KINDS: Mapping[str, str] = {
    "text": "text",
    "whole": "a whole number",
    "number": "a number",
    "flag": "true or false",
}
_KIND_OF = {str: "text", int: "whole", float: "number"}


@dataclass(frozen=True)
class Option:
    """One option of a command.

    Attributes:
        name: as recipes write it: ``images_per_class``.
        flag: as the command line writes it: ``--images-per-class``; None for a positional argument.
        kind: key of ``KINDS``, of each value.
        many: whether it takes a list of values.
        choices: the only values allowed; empty where any is.
        required: whether the command does not run without it.
        default: its value where it is not given.
        help: one line for people.
    """

    name: str
    flag: str | None
    kind: str
    many: bool
    choices: tuple[str, ...]
    required: bool
    default: Any
    help: str


def describe_options(parser: ArgumentParser) -> dict[str, Option]:
    """Return the options of a command that a recipe may give, by name."""
    return {action.dest: _describe(action) for action in parser._actions if action.dest not in NOT_IN_RECIPES}


def _describe(action: Action) -> Option:
    is_flag = action.nargs == 0
    # jsonargparse keeps the type there; argparse's own actions, those with choices, are of text.
    kind = "flag" if is_flag else _KIND_OF[getattr(action, "_typehint", str)]
    return Option(
        name=action.dest,
        flag=next((name for name in action.option_strings if name.startswith("--")), None),
        kind=kind,
        many=action.nargs in ("+", "*"),
        choices=tuple(action.choices or ()),
        required=action.required,
        default=action.default,
        help=action.help or "",
    )


def option_names(parser: ArgumentParser) -> list[str]:
    """Return every way to name an option of a command: ``--top-k`` and ``top_k``."""
    return [name for action in parser._actions for name in (*action.option_strings, action.dest)]


def explain_mistake(error: ArgumentError, known: Iterable[str]) -> str:
    """Turn a parser's complaint into one line that proposes the nearest of the known names."""
    message = re.sub(r'Parser key "(\w+)":', r"\1:", " ".join(str(error).split()))
    message = re.sub(r"<class '(\w+)'>", r"\1", re.sub(r"(?<=[ ,])[a-z]+\.(?=[a-z_]+(,|$))", "", message))
    patterns = r"argument subcommand: invalid choice: '([^']*)'|unrecognized arguments: (\S+)|[Oo]ption '([^']*)'"
    unknown = re.search(patterns, message)
    return message + (suggest(next(filter(None, unknown.groups())), known) if unknown else "")


def suggest(name: str, known: Iterable[str]) -> str:
    """Return ``; did you mean 'x'?`` for the nearest known name, or nothing where none is near.

    >>> suggest("prun", ["discover", "prune"])
    "; did you mean 'prune'?"
    """
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{near[0]}'?" if near else ""


def describe_value(value: Any) -> str:
    """Return a value and what kind of value it is, for a message.

    >>> describe_value("many"), describe_value([1]), describe_value(True)
    ("'many' (text)", '[1] (a list)', 'true (true or false)')
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"{str(value).lower()} ({KINDS['flag']})"
    kinds = {str: KINDS["text"], int: KINDS["whole"], float: KINDS["number"], list: "a list", dict: "a mapping"}
    return f"{value!r} ({kinds.get(type(value), type(value).__name__)})"


def check_value(option: Option, value: Any) -> tuple[Any, list[str]]:
    """Check one option's value, as YAML gives it.

    Returns:
        The value as the command takes it (a number where text is wanted becomes text: a ratio, a class index), and
        what is wrong with it, both sides named; empty where nothing is.
    """
    if not option.many:
        checked, problem = _check_single(option, value)
        return checked, [f"{option.name}: {problem}"] if problem else []
    if not isinstance(value, list) or not value:
        return value, [f"{option.name}: expected a list of values, got {describe_value(value)}"]
    checked = [_check_single(option, each) for each in value]
    problems = [f"{option.name}[{place}]: {problem}" for place, (_each, problem) in enumerate(checked) if problem]
    return [each for each, _problem in checked], problems


def _check_single(option: Option, value: Any) -> tuple[Any, str]:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if option.kind == "text" and is_number and not option.choices:
        return str(value), ""
    fits = {
        "text": isinstance(value, str),
        "whole": is_number and isinstance(value, int),
        "number": is_number,
        "flag": isinstance(value, bool),
    }[option.kind]
    if option.choices and value not in option.choices:
        near = suggest(str(value), option.choices)
        return value, f"expected one of {', '.join(option.choices)}, got {describe_value(value)}{near}"
    if not fits:
        return value, f"expected {KINDS[option.kind]}, got {describe_value(value)}"
    if option.kind != "number":
        return value, ""
    try:
        return float(value), ""
    except OverflowError:
        return value, f"{describe_value(value)[:40]} is too large a number"


def command_line(parser: ArgumentParser, command: str, given: Mapping[str, Any]) -> list[str]:
    """Return a command as a user would type it; what is at its default is left out.

    Args:
        parser: of the command.
        command: its name.
        given: option name -> value; None for one that is not given.
    """
    described = sorted(describe_options(parser).values(), key=lambda option: option.flag is not None)
    words = ["vitprune", command]
    for option in described:
        value = given.get(option.name)
        if value is None or value == option.default:
            continue
        values = [str(each) for each in value] if option.many else [str(value)]
        if option.flag is None:
            words += values
        elif option.kind == "flag":
            words.append(option.flag)
        elif not option.many and values[0].startswith("-"):
            words.append(f"{option.flag}={values[0]}")
        else:
            words += [option.flag, *values]
    return words
