"""Cards: which model, which images, by which command, on what; one for each folder of a report."""

from __future__ import annotations

import json
from dataclasses import dataclass

from vitprune.card import Card
from vitprune.report.artefacts import KINDS
from vitprune.report.card_facts import UNKNOWN, Fact
from vitprune.report.shown_folder import Artefact, card_id
from vitprune.report.text import duration, plural, scaled


@dataclass(frozen=True)
class CardView:
    """A card as shown.

    Attributes:
        id: unique on the page.
        section: id of the part that it belongs to.
        title: name of the folder.
        summary: in one line.
        command: that wrote it; empty where it is not known.
        facts: everything else.
        arguments: all of the command's, as JSON; empty where they are not known.
    """

    id: str
    section: str
    title: str
    summary: str
    command: str
    facts: tuple[Fact, ...]
    arguments: str


def make_card_view(artefact: Artefact) -> CardView:
    """Put together what is known of where a folder comes from."""
    card = artefact.card
    facts = [Fact("folder", str(artefact.folder), code=True), *KINDS[artefact.kind].facts(artefact.content)]
    facts += _describe_machine(card)
    summary = [artefact.kind]
    if card is not None:
        # The verb of the command that wrote it.
        summary = [*card.command.split()[1:2], duration(card.seconds), card.hardware["processor"]]
    return CardView(
        id=card_id(artefact),
        section=artefact.key,
        title=artefact.name,
        summary=" · ".join(summary),
        command="" if card is None else card.command,
        facts=tuple(facts),
        arguments="" if card is None else json.dumps(card.arguments, indent=2, sort_keys=True),
    )


def _describe_machine(card: Card | None) -> list[Fact]:
    if card is None:
        return [Fact("command", f"{UNKNOWN}: a program wrote this folder, or an earlier vitprune")]
    hardware = card.hardware
    cores = f"{plural(hardware['usable_cores'], 'core')} of {hardware['cores']}"
    threads = "" if hardware["threads"] is None else f", {plural(hardware['threads'], 'thread')}"
    memory = "" if hardware["memory_bytes"] is None else f", {scaled(hardware['memory_bytes'], 'B')} memory"
    gpus = ", ".join(hardware["gpus"]) or "none used"
    return [
        Fact("duration", f"{duration(card.seconds)}, at most {scaled(card.peak_memory_bytes, 'B')} of memory"),
        Fact("finished", card.finished.replace("T", " ").replace("+00:00", " UTC")),
        Fact("hardware", f"{hardware['processor']}, {cores}{threads}{memory}; GPU: {gpus}; {hardware['system']}"),
        Fact("versions", ", ".join(f"{name} {version}" for name, version in card.versions.items())),
    ]
