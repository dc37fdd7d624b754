"""Kinds of folders that a report shows: what each is recognised by, how it is read, and what the page tells of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitprune.analysis.analysis_folder import ANALYSIS_FILE, load_analysis
from vitprune.card import read_card
from vitprune.discovery.run import RUN_FILE, load_run
from vitprune.errors import VitpruneError
from vitprune.evaluation.curve_folder import CURVE_FILE, load_curve
from vitprune.evaluation.embeddings_folder import EMBEDDINGS_FILE, load_embeddings
from vitprune.evaluation.evaluation_folder import EVALUATION_FILE, load_evaluation
from vitprune.evaluation.front import FRONT_FILE, load_front
from vitprune.models.saved_folder import PLAN_FILE
from vitprune.report.card_facts import (
    Fact,
    analysis_facts,
    bench_facts,
    curve_facts,
    embeddings_facts,
    evaluation_facts,
    front_facts,
    pruned_facts,
    run_facts,
)
from vitprune.report.page_blocks import Section
from vitprune.report.pruned_folder import load_pruned
from vitprune.report.sections.analysis_section import analysis_section
from vitprune.report.sections.bench_section import bench_section
from vitprune.report.sections.curve_section import curve_section
from vitprune.report.sections.embeddings_section import embeddings_section
from vitprune.report.sections.evaluation_section import evaluation_section
from vitprune.report.sections.front_section import front_section
from vitprune.report.sections.pruned_section import pruned_section
from vitprune.report.sections.run_section import run_section
from vitprune.report.shown_folder import Artefact
from vitprune.speed.bench_folder import BENCH_FILE, load_bench


@dataclass(frozen=True)
class Kind:
    """One kind of folder.

    Attributes:
        marker: the file that only such a folder has.
        load: folder -> content.
        section: the folder, and all of the report -> its part of the page.
        facts: content -> what its card says of model and images.
    """

    marker: str
    load: Callable[[Path], Any]
    section: Callable[[Artefact, Sequence[Artefact]], Section]
    facts: Callable[[Any], list[Fact]]


# In the order of the page: first what pruning cost and brought, then why these neurons.
KINDS: Mapping[str, Kind] = {
    "evaluation": Kind(EVALUATION_FILE, load_evaluation, evaluation_section, evaluation_facts),
    "embeddings": Kind(EMBEDDINGS_FILE, load_embeddings, embeddings_section, embeddings_facts),
    "pruned": Kind(PLAN_FILE, load_pruned, pruned_section, pruned_facts),
    "bench": Kind(BENCH_FILE, load_bench, bench_section, bench_facts),
    "front": Kind(FRONT_FILE, load_front, front_section, front_facts),
    "curve": Kind(CURVE_FILE, load_curve, curve_section, curve_facts),
    "run": Kind(RUN_FILE, load_run, run_section, run_facts),
    "analysis": Kind(ANALYSIS_FILE, load_analysis, analysis_section, analysis_facts),
}


def find_kind(folder: str | Path) -> str:
    """Tell what kind of folder it is.

    Raises:
        VitpruneError: naming the folders that a report shows, if it is none of them.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise VitpruneError(f"{folder}: no such folder")
    kinds = [name for name, kind in KINDS.items() if (folder / kind.marker).is_file()]
    if not kinds:
        accepted = ", ".join(f"{name} ({kind.marker})" for name, kind in KINDS.items())
        raise VitpruneError(f"{folder}: nothing that a report shows; it takes folders of these kinds: {accepted}")
    return kinds[0]


def read_artefacts(folders: Sequence[str | Path]) -> list[Artefact]:
    """Read folders for a report, in the order given.

    Raises:
        VitpruneError: if there is none, one is named twice, of no known kind, or damaged.
    """
    paths = [Path(folder).resolve() for folder in folders]
    if not paths:
        raise VitpruneError("a report needs at least one folder")
    twice = [path for path, count in Counter(paths).items() if count > 1]
    if twice:
        raise VitpruneError(f"{twice[0]} is named twice")
    kinds = [find_kind(path) for path in paths]
    short = Counter(path.name for path in paths)
    numbers: Counter[str] = Counter()
    artefacts = []
    for path, kind in zip(paths, kinds, strict=True):
        numbers[kind] += 1
        name = path.name if short[path.name] == 1 else f"{path.parent.name}/{path.name}"
        key = f"{kind}-{numbers[kind]}"
        artefacts.append(Artefact(kind, key, name, path, KINDS[kind].load(path), read_card(path)))
    return artefacts
