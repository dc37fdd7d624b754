"""How parts of a report name each other."""

from __future__ import annotations

from collections.abc import Sequence

from vitprune.report.artefacts import Artefact


def of_kind(artefacts: Sequence[Artefact], kind: str) -> list[Artefact]:
    """Return the folders of one kind, in order."""
    return [artefact for artefact in artefacts if artefact.kind == kind]


def part_name(artefact: Artefact, artefacts: Sequence[Artefact], name: str) -> str:
    """Return what the list of parts calls a folder's part: with the folder's name where there are several of a kind."""
    return name if len(of_kind(artefacts, artefact.kind)) == 1 else f"{name}: {artefact.name}"


def class_id(artefact: Artefact, index: int) -> str:
    """Return the id of a class's row."""
    return f"{artefact.key}-class-{index}"


def card_id(artefact: Artefact) -> str:
    """Return the id of a folder's card."""
    return f"{artefact.key}-card"
