"""One folder of a report, and how parts of the page find and name it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitprune.card import Card


@dataclass(frozen=True)
class Artefact:
    """One folder of a report.

    Attributes:
        kind: key of ``KINDS``.
        key: short name, unique in the report; what its links begin with.
        name: of the folder, for people; unique in the report.
        folder: absolute.
        content: what its kind loads: ``Run``, ``PrunedModel``, ``Evaluation``, ``CurveRecord``, ``BenchRecord`` or
            ``Analysis``.
        card: of the command that wrote it; None where another program did.
    """

    kind: str
    key: str
    name: str
    folder: Path
    content: Any
    card: Card | None


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
