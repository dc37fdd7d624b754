"""A comparison of embeddings: two encoders asked about the images of a folder, and the folder that keeps it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vitprune.errors import VitpruneError
from vitprune.evaluation.embeddings import Fidelity, describe_fidelity, read_fidelity
from vitprune.evaluation.model_facts import ModelFacts
from vitprune.files import (
    FORMAT_VERSION,
    atomic_file,
    atomic_folder,
    check_lines,
    hash_file,
    read_json,
    read_json_lines,
    write_json,
)
from vitprune.seal import parsing

EMBEDDINGS_FILE, COSINES_FILE = "embeddings.json", "images.jsonl"
EMBEDDINGS_FILES = frozenset({EMBEDDINGS_FILE, COSINES_FILE})


@dataclass(frozen=True)
class EmbeddingComparison:
    """What the folder of such a comparison holds.

    Attributes:
        root: the data folder, absolute.
        files: images that could be decoded, relative to ``root``.
        images_sha256: ``digest_images`` of them.
        skipped: images that could not be decoded.
        model: which model was compared.
        against: with which.
        fidelity: how near they are.
    """

    root: Path
    files: tuple[str, ...]
    images_sha256: str
    skipped: tuple[str, ...]
    model: ModelFacts
    against: ModelFacts
    fidelity: Fidelity

    def __str__(self) -> str:
        return f"{self.model.name} against {self.against.name}\n{self.fidelity}"

    def __repr__(self) -> str:
        return str(self)


def save_embeddings(comparison: EmbeddingComparison, folder: str | Path) -> None:
    """Write the folder of a comparison, all or nothing: ``embeddings.json`` and ``images.jsonl`` (file, cosine)."""
    content = {
        "kind": "embeddings",
        "version": FORMAT_VERSION,
        "data": str(comparison.root),
        "images_sha256": comparison.images_sha256,
        "models": {"model": asdict(comparison.model), "against": asdict(comparison.against)},
        "skipped": list(comparison.skipped),
        **describe_fidelity(comparison.fidelity),
    }
    rows = zip(comparison.files, comparison.fidelity.cosines, strict=True)
    with atomic_folder(folder) as temporary:
        with atomic_file(temporary / COSINES_FILE) as path, path.open("w") as stream:
            stream.writelines(json.dumps({"file": file, "cosine": cosine}) + "\n" for file, cosine in rows)
        content["lines_sha256"] = hash_file(temporary / COSINES_FILE)
        write_json(temporary / EMBEDDINGS_FILE, content)


def load_embeddings(folder: str | Path) -> EmbeddingComparison:
    """Read the folder of a comparison.

    Raises:
        VitpruneError: if the folder is none, or its files disagree.
    """
    folder = Path(folder)
    for name in sorted(EMBEDDINGS_FILES):
        if not (folder / name).is_file():
            raise VitpruneError(f"{folder} is no comparison of embeddings: it has no {name}")
    content = read_json(folder / EMBEDDINGS_FILE, kind="embeddings")
    with parsing(folder):
        return _read_comparison(folder, content)


def _read_comparison(folder: Path, content: Mapping[str, Any]) -> EmbeddingComparison:
    rows = read_json_lines(folder / COSINES_FILE)
    if len(rows) != content["num_images"]:
        raise VitpruneError(
            f"{folder}: {EMBEDDINGS_FILE} is of {content['num_images']} images, {COSINES_FILE} of {len(rows)}"
        )
    check_lines(folder / COSINES_FILE, content)
    return EmbeddingComparison(
        root=Path(content["data"]),
        files=tuple(row["file"] for row in rows),
        images_sha256=content["images_sha256"],
        skipped=tuple(content["skipped"]),
        model=ModelFacts(**content["models"]["model"]),
        against=ModelFacts(**content["models"]["against"]),
        fidelity=read_fidelity(content, rows),
    )
