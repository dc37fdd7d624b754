"""The JSON schema of recipes, made from the commands' parsers: editors complete and check with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jsonargparse import ArgumentParser

from vitprune.recipe.command_options import Option, describe_options
from vitprune.recipe.read import KEY_NAME

_KEY = {"$ref": "#/definitions/key"}
_SINGLE = {"type": ["string", "number", "boolean", "null"]}
_TYPES: Mapping[str, Any] = {
    "text": {"type": ["string", "number"]},
    "whole": {"type": "integer"},
    "number": {"type": "number"},
    "flag": {"type": "boolean"},
}


def recipe_schema(commands: Mapping[str, ArgumentParser], summaries: Mapping[str, str]) -> dict[str, Any]:
    """Return the schema (draft 7, which editors know best) of a recipe.

    Args:
        commands: the commands' parsers.
        summaries: one line for each.
    """
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "vitprune recipe",
        "description": "An experiment for 'vitprune run': commands with their options, in order.",
        "type": "object",
        "required": ["steps"],
        "additionalProperties": False,
        "properties": {
            "keys": {
                "description": "Defaults of what 'vitprune run RECIPE KEY=VALUE' changes; options name it ${key}.",
                "type": ["object", "null"],
                "propertyNames": {"pattern": f"^{KEY_NAME}$"},
                "additionalProperties": {"anyOf": [_SINGLE, {"type": "array", "items": _SINGLE}]},
            },
            "output": {
                "description": "Folder of the results; finished steps are remembered there, and not run again.",
                "type": "string",
            },
            "steps": {
                "description": "Commands, in order.",
                "type": "array",
                "minItems": 1,
                "items": {
                    "type": "object",
                    "minProperties": 1,
                    "maxProperties": 1,
                    "additionalProperties": False,
                    "properties": {name: {"$ref": f"#/definitions/{name}"} for name in commands},
                },
            },
        },
        "definitions": {
            "key": {
                "description": "The value of a key; where that is null, the option is left out.",
                "type": "string",
                "pattern": rf"^\$\{{{KEY_NAME}\}}$",
            },
            **{name: _describe_command(parser, summaries[name]) for name, parser in commands.items()},
        },
    }


def _describe_command(parser: ArgumentParser, summary: str) -> dict[str, Any]:
    options = describe_options(parser)
    required = [name for name, option in options.items() if option.required]
    return {
        "description": summary,
        "type": "object" if required else ["object", "null"],
        "additionalProperties": False,
        **({"required": required} if required else {}),
        "properties": {name: _describe_option(option) for name, option in options.items()},
    }


def _describe_option(option: Option) -> dict[str, Any]:
    single = {"enum": list(option.choices)} if option.choices else dict(_TYPES[option.kind])
    # Any text may be a key already.
    if option.choices or option.kind != "text":
        single = {"anyOf": [single, _KEY]}
    schema = {"anyOf": [{"type": "array", "minItems": 1, "items": single}, _KEY]} if option.many else single
    described = {"description": option.help, **schema}
    return described if option.default is None else {**described, "default": option.default}
