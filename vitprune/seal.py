"""Seals: the hash of its content that a file carries, so that no damaged byte is taken for a number."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vitprune.errors import VitpruneError

# Where a file has its seal; files of version 0.1.0 have none.
SEAL = "content_sha256"
DIGITS = 32


def hash_content(content: Any) -> str:
    """Return a hash of JSON values, whatever the order of their keys.

    >>> hash_content({"a": 1, "b": [2.5]}) == hash_content({"b": (2.5,), "a": 1})
    True
    """
    plain, digest = _with_text_keys(content), hashlib.sha256()
    # Key by key: a run of a million images has a list of as many names.
    for key, value in sorted(plain.items()) if isinstance(plain, dict) else [("", plain)]:
        digest.update(json.dumps([key, value], sort_keys=True).encode())
    return digest.hexdigest()[:DIGITS]


def _with_text_keys(value: Any) -> Any:
    """Return JSON values whose keys are text, as they are read back, so that they stand in one order."""
    if isinstance(value, dict):
        return {_as_text(key): _with_text_keys(each) for key, each in value.items()}
    return [_with_text_keys(each) for each in value] if isinstance(value, list | tuple) else value


def _as_text(key: Any) -> str:
    return key if isinstance(key, str) else next(iter(json.loads(json.dumps({key: None}))))


def hash_tensor(tensor: Any) -> str:
    """Return a hash of a torch tensor: its dtype, its shape and its numbers.

    >>> import torch
    >>> hash_tensor(torch.zeros(2)) == hash_tensor(torch.zeros(2, 1))
    False
    """
    import torch

    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    plain = tensor.detach().cpu().contiguous().reshape(-1)
    if plain.numel():
        digest.update(plain.view(torch.uint8).numpy())
    return digest.hexdigest()[:DIGITS]


def hash_tensors(tensors: Mapping[str, Any]) -> str:
    """Return one hash of named tensors."""
    return hash_content({name: hash_tensor(tensor) for name, tensor in tensors.items()})


def seal(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return JSON values with their seal among them.

    >>> sorted(seal({"a": 1}))
    ['a', 'content_sha256']
    """
    rest = {key: value for key, value in content.items() if key != SEAL}
    return {**rest, SEAL: hash_content(rest)}


def unseal(path: str | Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a file without its seal, which must fit where there is one.

    Raises:
        VitpruneError: if it does not.

    >>> unseal("a.json", {**seal({"a": 1}), "a": 2})
    Traceback (most recent call last):
    vitprune.errors.VitpruneError: a.json: damaged, or changed since it was written (its hash under "content_sha256" ...
    """
    rest = {key: value for key, value in content.items() if key != SEAL}
    if SEAL in content and content[SEAL] != hash_content(rest):
        raise VitpruneError(
            f'{path}: damaged, or changed since it was written (its hash under "{SEAL}" does not fit; of a file that '
            "you changed yourself, take that line out)"
        )
    return rest


def check_tensor(path: str | Path, name: str, tensor: Any, hashes: Mapping[str, str]) -> Any:
    """Return a tensor of a file, after checking it against the hash that the file has for it, where it has one.

    Raises:
        VitpruneError: if it does not fit.
    """
    if name in hashes and hashes[name] != hash_tensor(tensor):
        raise VitpruneError(f"{path}: damaged, or changed since it was written (the hash of {name} does not fit)")
    return tensor


@contextmanager
def parsing(path: str | Path) -> Iterator[None]:
    """While a file's content is taken apart: what does not fit is the file's fault, and named with it.

    Raises:
        VitpruneError: if a value is missing, or of another type or range than it should be.

    >>> with parsing("a.json"):
    ...     {}["rows"]
    Traceback (most recent call last):
    vitprune.errors.VitpruneError: a.json: damaged, or of another version: it lacks 'rows'
    """
    try:
        yield
    except KeyError as error:
        raise VitpruneError(f"{path}: damaged, or of another version: it lacks {error}") from error
    except (ArithmeticError, AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise VitpruneError(f"{path}: damaged, or of another version: {error}") from error
