"""Files of weights: read as plain tensors, without running what is in them."""

from __future__ import annotations

import argparse
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vitprune.errors import VitpruneError
from vitprune.models.foreign_file import explain_file, is_safetensors

# What training scripts leave in the middle of names.
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
# Where they keep what they were called with.
_ARGUMENTS = ("args", "hyper_parameters", "hparams", "config", "cfg", "opt")


@dataclass(frozen=True)
class Checkpoint:
    """What a file of weights holds.

    Attributes:
        tensors: every tensor of it, by the names on the way to it, joined by dots.
        arguments: what the training script was called with, as far as the file says.
        architecture: timm name that the file gives itself.
    """

    tensors: Mapping[str, Tensor]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    architecture: str | None = None


def read_checkpoint(path: Path, *, what: str = "checkpoint ") -> Checkpoint:
    """Read a file of weights, whatever its name: safetensors, or what ``torch.save`` wrote of tensors and plain data.

    Args:
        path: the file.
        what: it is called before its path, in messages.

    Raises:
        VitpruneError: if there is no such file, or it is something else; it says what.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     torch.save({"model": {"head.weight": torch.zeros(2, 3)}, "epoch": 3}, Path(folder) / "tuned.pth")
    ...     list(read_checkpoint(Path(folder) / "tuned.pth").tensors)
    ['model.head.weight']
    """
    source = f"{what}{path}"
    _check_file(path, source)
    content = _read_safetensors(path, source) if is_safetensors(path) else _read_torch(path, source)
    if not isinstance(content, Mapping):
        raise VitpruneError(f"{source} is not a plain state dict: it holds a {type(content).__name__}")
    tensors = dict(_flatten(content))
    if not tensors:
        raise VitpruneError(f"{source} is not a plain state dict: no tensor is in it")
    arguments = _find_arguments(content)
    named = content.get("arch") or arguments.get("model") or arguments.get("arch")
    return Checkpoint(tensors, arguments, named if isinstance(named, str) else None)


def _check_file(path: Path, source: str) -> None:
    if path.is_dir():
        raise VitpruneError(f"{source} is a folder; name its file of weights, or pass the folder as the model")
    if not path.is_file():
        raise VitpruneError(f"{source}: no such file")
    try:
        problem = explain_file(path)
    except OSError as error:
        raise VitpruneError(f"{source}: cannot be read ({error.strerror})") from error
    if problem:
        raise VitpruneError(f"{source} {problem}")


def _read_safetensors(path: Path, source: str) -> Mapping[str, Any]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise VitpruneError(
            f"{source}: not a safetensors file, or a damaged one ({first_line(error)}); download or copy it again"
        ) from error


def _read_torch(path: Path, source: str) -> Any:
    try:
        # Training scripts store their argparse.Namespace beside the weights: plain data, so it may be read.
        with torch.serialization.safe_globals([argparse.Namespace]), path.open("rb") as stream:
            return torch.load(stream, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile pickle fails in any way
        raise VitpruneError(f"{source} {_explain_failure(path, error)}") from error


def _explain_failure(path: Path, error: Exception) -> str:
    text = str(error)
    named = re.search(r"GLOBAL ([\w.]+)|global ([\w.]+) was not an allowed|call to ([\w.]+)", text)
    culprit = next((name for name in named.groups() if name), "") if named else ""
    if re.search(r"(^|\.)(timm|torch\.nn|torchvision|transformers|models?)\.", f".{culprit}") or _is_model(culprit):
        return (
            f"is a whole pickled model ({culprit}), not a plain state dict: reading it would run its code; where it "
            "was made, save model.state_dict() instead"
        )
    if isinstance(error, EOFError | zipfile.BadZipFile) or "PytorchStreamReader" in text or "unexpected EOF" in text:
        return f"is damaged or cut off ({first_line(error)}); download or copy it again"
    if isinstance(error, pickle.UnpicklingError) and not culprit and not _is_pickle(path):
        return "is no file of weights that torch knows; pass .safetensors, .pth or .npz"
    reason = culprit or first_line(error).split(". ")[0]
    return (
        f"is not a plain state dict that can be read without running its code ({reason}); "
        "where it was made, save model.state_dict() alone, or .safetensors"
    )


def _is_model(culprit: str) -> bool:
    return culprit.startswith("__main__.") or "Transformer" in culprit.rpartition(".")[2]


def _is_pickle(path: Path) -> bool:
    with path.open("rb") as stream:
        start = stream.read(2)
    return start[:1] == b"\x80" or start == b"PK"


def first_line(error: Exception) -> str:
    """Return the first line of what an error says, or its kind where it says nothing."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _flatten(content: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for key, value in content.items():
        if not isinstance(key, str | int):
            continue
        name = prefix + ".".join(part for part in str(key).split(".") if part not in _WRAPPERS)
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, Mapping):
            yield from _flatten(value, f"{name}." if name else "")


def _find_arguments(content: Mapping[Any, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key in _ARGUMENTS:
        value = content.get(key)
        value = vars(value) if isinstance(value, argparse.Namespace) else value
        if isinstance(value, Mapping) and not any(isinstance(each, Tensor) for each in value.values()):
            found = {**{name: each for name, each in value.items() if isinstance(name, str)}, **found}
    return found
