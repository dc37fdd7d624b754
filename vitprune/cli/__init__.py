"""The command line: one file per command; ``main`` runs it."""

from vitprune.cli.commands import main

__all__ = ["main"]
