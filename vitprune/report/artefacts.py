"""Folders that a report shows: what each kind is recognised by, and what is read of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vitprune.card import Card, read_card
from vitprune.discovery.run import RUN_FILE, load_run
from vitprune.errors import VitpruneError
from vitprune.evaluation.curve_folder import CURVE_FILE, load_curve
from vitprune.evaluation.evaluation_folder import EVALUATION_FILE, load_evaluation
from vitprune.evaluation.model_facts import ModelFacts, describe_network
from vitprune.files import read_json
from vitprune.models.load import load
from vitprune.models.saved_folder import PLAN_FILE, build_dense
from vitprune.models.units import find_feed_forwards
from vitprune.pruning.plan import Plan, read_plan
from vitprune.speed.bench_folder import BENCH_FILE, load_bench

ANALYSIS_FILE = "analysis.json"


@dataclass(frozen=True)
class PrunedModel:
    """A pruned folder.

    Attributes:
        plan: which neurons stay, and where the decision came from.
        model: the pruned model.
        dense: the same architecture and classes with all neurons; its ``weights_sha256`` is that of the weights which
            the plan was applied to.
        dense_widths: FFN name -> its neurons in ``dense``.
        label_names: folder names of its classes, where it was reduced to some; else empty.
    """

    plan: Plan
    model: ModelFacts
    dense: ModelFacts
    dense_widths: Mapping[str, int]
    label_names: tuple[str, ...]


@dataclass(frozen=True)
class Artefact:
    """One folder of a report.

    Attributes:
        kind: key of ``KINDS``.
        key: short name, unique in the report; what its links begin with.
        name: of the folder, for people; unique in the report.
        folder: absolute.
        content: ``Run``, ``PrunedModel``, ``Evaluation``, ``CurveRecord``, ``BenchRecord``, or the JSON object of an
            analysis.
        card: of the command that wrote it; None where another program did.
    """

    kind: str
    key: str
    name: str
    folder: Path
    content: Any
    card: Card | None


@dataclass(frozen=True)
class Kind:
    """How one kind of folder is recognised and read.

    Attributes:
        marker: the file that only such a folder has.
        made_by: the command that writes it.
        read: folder -> content.
    """

    marker: str
    made_by: str
    read: Callable[[Path], Any]


def _read_pruned(folder: Path) -> PrunedModel:
    plan = read_plan(folder)
    network, dense = load(folder), build_dense(folder)
    return PrunedModel(
        plan=plan,
        model=describe_network(network, str(folder)),
        dense=replace(describe_network(dense, str(folder)), weights_sha256=plan.facts.get("weights_sha256", "")),
        dense_widths={ffn.name: ffn.num_neurons for ffn in find_feed_forwards(dense)},
        label_names=tuple(getattr(network, "label_names", None) or ()),
    )


def _read_analysis(folder: Path) -> Mapping[str, Any]:
    return read_json(folder / ANALYSIS_FILE, kind="analysis")


KINDS: Mapping[str, Kind] = {
    "run": Kind(RUN_FILE, "discover", load_run),
    "pruned": Kind(PLAN_FILE, "prune", _read_pruned),
    "evaluation": Kind(EVALUATION_FILE, "evaluate -o", load_evaluation),
    "curve": Kind(CURVE_FILE, "curve", load_curve),
    "bench": Kind(BENCH_FILE, "bench -o", load_bench),
    "analysis": Kind(ANALYSIS_FILE, "analyze", _read_analysis),
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
        accepted = ", ".join(f"{kind.made_by} ({kind.marker})" for kind in KINDS.values())
        raise VitpruneError(f"{folder}: nothing that a report shows; it takes the folders that these write: {accepted}")
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
        artefacts.append(Artefact(kind, key, name, path, KINDS[kind].read(path), read_card(path)))
    return artefacts
