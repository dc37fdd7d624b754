"""Answers of finished passes over images, kept for an analysis that is killed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from vitprune.files import read_tensors, write_tensors


def read_pass(folder: str | Path | None, name: str) -> dict[str, Tensor] | None:
    """Return what a pass of this name left in a folder; None where it left nothing, or nothing is kept.

    >>> read_pass(None, "undisturbed") is None
    True
    """
    path = None if folder is None else Path(folder) / f"{name}.safetensors"
    return None if path is None or not path.is_file() else read_tensors(path, kind="answers")[0]


def write_pass(folder: str | Path | None, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Keep what a pass found, where a folder is given."""
    if folder is not None:
        write_tensors(Path(folder) / f"{name}.safetensors", tensors, kind="answers", facts={"pass": name})
