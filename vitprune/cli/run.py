"""``vitprune run``: execute the commands of a recipe."""

from __future__ import annotations

from jsonargparse import ArgumentParser

SUMMARY = "execute the commands of a recipe"


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("recipe", type=str, help="YAML file: a list of commands with their options")
    parser.add_argument("--dry-run", action="store_true", help="check the recipe and print its commands")
