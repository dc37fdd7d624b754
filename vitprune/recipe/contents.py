"""Content hashes of files and folders, read again only where a file looks changed."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from vitprune.files import CARD_FILE, FORMAT_VERSION, atomic_file, hash_file, read_json
from vitprune.progress import Track

# The result files of the paper's authors: PREFIX.args.json, PREFIX-LABEL.rlt.jsonl.
_ARGS_SUFFIX, _RESULT_SUFFIX = ".args.json", ".rlt.jsonl"
# Within the resolution of a file's times it may change without showing it.
_SETTLED_NS = 2 * 10**9
_SHOWN_BYTES = 200 * 2**20


class Contents:
    """Content hashes; a file that looks as it did at an earlier time (size, times, inode) is not read again.

    Args:
        memory: file with earlier looks, if it is there; None for none.
        track: wraps (files, description) where many bytes have to be read.
    """

    def __init__(self, memory: Path | None, *, track: Track) -> None:
        self._track = track
        self._known: dict[str, list[int | str]] = {}
        self._is_new = False
        self._once: dict[str, str] = {}
        if memory is not None and memory.is_file():
            self._known = read_json(memory, kind="hashes")["files"]

    def hash(self, path: str | Path, *, leave_out: Collection[Path] = ()) -> str:
        """Return the SHA-256 of a file's bytes, or of the names and bytes of a folder's files, links followed.

        Hidden files and ``card.json`` do not count. With a file count those that belong to it: ``PATH.data``, where the
        weights of a large ONNX file are, and the result files beside ``PREFIX.args.json``, which PREFIX names too.

        Args:
            path: must exist, as ``is_there`` has it.
            leave_out: absolute paths that do not count.
        """
        path = os.path.abspath(path)
        found = _walk(path, frozenset(map(str, leave_out))) if os.path.isdir(path) else _together(path)
        names = dict(sorted(found))
        hashes = self._hash_files(list(names.values()))
        return hashlib.sha256(json.dumps(list(zip(names, hashes, strict=True))).encode()).hexdigest()

    def hash_once(self, path: str | Path, *, leave_out: Collection[Path] = ()) -> str:
        """Return the same as at the first call: for what does not change while the commands of a recipe run."""
        path = os.path.abspath(path)
        if path not in self._once:
            self._once[path] = self.hash(path, leave_out=leave_out)
        return self._once[path]

    def save(self, memory: Path) -> None:
        """Write the looks for the next time, where there are new ones."""
        if self._is_new:
            with atomic_file(memory) as temporary:
                content = {"kind": "hashes", "version": FORMAT_VERSION, "files": self._known}
                temporary.write_text(json.dumps(content, sort_keys=True))
            self._is_new = False

    def _hash_files(self, files: Sequence[str]) -> list[str]:
        looks = {file: _look(file) for file in files}
        unknown = [file for file in files if looks[file] is None or self._known.get(file, [])[:-1] != looks[file]]
        many = sum(looks[file][0] for file in unknown if looks[file]) > _SHOWN_BYTES
        hashes = {file: _hash_bytes(file) for file in (self._track(unknown, "hash files") if many else unknown)}
        for file, digest in hashes.items():
            look = looks[file]
            if look is not None and max(look[1:3]) < time.time_ns() - _SETTLED_NS:
                self._known[file] = [*look, digest]
                self._is_new = True
        return [hashes[file] if file in hashes else str(self._known[file][-1]) for file in files]


def is_there(path: str | Path) -> bool:
    """Tell whether a command's output is there: a file, a folder, or PREFIX of the authors' result files."""
    return os.path.lexists(path) or os.path.isfile(f"{path}{_ARGS_SUFFIX}")


def _together(path: str) -> Iterator[tuple[str, str]]:
    """Yield (rest of the name, absolute path) of a file and of those that belong to it."""
    prefix = path.removesuffix(_ARGS_SUFFIX)
    if prefix == path and os.path.isfile(path):
        yield "", path
        if os.path.isfile(f"{path}.data"):
            yield ".data", f"{path}.data"
    elif os.path.isfile(f"{prefix}{_ARGS_SUFFIX}"):
        yield _ARGS_SUFFIX, f"{prefix}{_ARGS_SUFFIX}"
        for entry in os.scandir(os.path.dirname(path)):
            if entry.path.startswith(f"{prefix}-") and entry.name.endswith(_RESULT_SUFFIX):
                yield entry.path.removeprefix(prefix), entry.path


def _walk(folder: str, leave_out: frozenset[str]) -> Iterator[tuple[str, str]]:
    """Yield (path relative to ``folder``, absolute path) of every file that counts."""

    def visit(place: str, name: str, above: frozenset[tuple[int, int]]) -> Iterator[tuple[str, str]]:
        status = os.stat(place)
        here = (status.st_dev, status.st_ino)
        if here in above:  # a link back to a folder that holds it
            return
        for entry in os.scandir(place):
            if entry.name.startswith(".") or entry.name == CARD_FILE or entry.path in leave_out:
                continue
            if entry.is_dir():
                yield from visit(entry.path, f"{name}{entry.name}/", above | {here})
            else:
                yield f"{name}{entry.name}", entry.path

    return visit(folder, "", frozenset())


def _look(file: str) -> list[int] | None:
    """Return size, times and inode; None where there is nothing to read, such as behind a broken link."""
    try:
        status = os.stat(file)
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _hash_bytes(file: str) -> str:
    """Return the SHA-256 of a file; nothing where it cannot be read, which the command that needs it will say."""
    try:
        return hash_file(file, digits=64)
    except OSError:
        return ""
