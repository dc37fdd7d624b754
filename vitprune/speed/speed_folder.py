"""The folder of a model that was pruned to be so fast: a pruned model's, with the candidates that were looked at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vitprune.figures.candidates_figure import draw_candidates
from vitprune.figures.style import save_figure
from vitprune.files import FORMAT_VERSION, atomic_folder, read_json, write_json, write_table
from vitprune.models.saved_folder import FOLDER_FILES, save
from vitprune.seal import parsing
from vitprune.speed.prune_for_speed import PrunedForSpeed
from vitprune.speed.speed_candidates import Candidate, candidate_from_json

SPEED_FILE, TABLE_FILE, PICTURE_FILE = "speed.json", "candidates.csv", "candidates.png"
SPEED_FILES = FOLDER_FILES | {SPEED_FILE, TABLE_FILE, PICTURE_FILE}


@dataclass(frozen=True)
class SpeedRecord:
    """How fast a folder's model was to be, and is.

    Attributes:
        facts: what ``describe_speed`` gives beside the candidates.
        candidates: all that was looked at, the least loss first.
    """

    facts: dict[str, Any]
    candidates: tuple[Candidate, ...]


def describe_speed(result: PrunedForSpeed) -> dict[str, Any]:
    """Return how fast a model was to be and is, and what was looked at; JSON values."""
    return {
        "backend": result.backend,
        "precision": result.precision,
        "asked_speedup": result.asked_speedup,
        "predicted_speedup": result.predicted_speedup,
        "speedup": result.speedup,
        "speedups": dict(zip(map(str, result.batch_sizes), result.speedups, strict=True)),
        "dense_ms": result.dense_ms,
        "fit_error": result.fit_error,
        "refused": dict(result.refused),
        "candidates": [asdict(each) for each in result.candidates],
    }


def save_for_speed(result: PrunedForSpeed, output: str | Path, *, facts: Mapping[str, Any] | None = None) -> None:
    """Write the folder, whole or not at all: the model, its plan, and the candidates as JSON, CSV and a picture.

    Args:
        result: from ``prune_for_speed``.
        output: the folder; replaced if it exists.
        facts: what else to keep in ``speed.json``; JSON values.
    """
    with atomic_folder(output) as temporary:
        save(result.model, temporary, plan=result.plan)
        content = {**describe_speed(result), **(facts or {})}
        write_json(temporary / SPEED_FILE, {"kind": "speed", "version": FORMAT_VERSION, **content})
        write_table(temporary / TABLE_FILE, result.candidates, Candidate)
        save_figure(draw_candidates(result.candidates, asked=result.asked_speedup), temporary / PICTURE_FILE)


def load_speed(folder: str | Path) -> SpeedRecord | None:
    """Read how fast a folder's model was to be; None where nobody asked.

    >>> load_speed("nowhere") is None
    True
    """
    path = Path(folder) / SPEED_FILE
    if not path.is_file():
        return None
    content = read_json(path, kind="speed")
    with parsing(path):
        candidates = tuple(map(candidate_from_json, content.pop("candidates")))
    return SpeedRecord(content, candidates)
