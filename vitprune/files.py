"""Files that are either whole or absent: atomic writes, and tensors with one JSON string in the header."""

from __future__ import annotations

import csv
import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from vitprune.errors import VitpruneError
from vitprune.seal import check_tensor, hash_tensor, seal, unseal

FORMAT_VERSION = 1
REQUEST_FILE = "request.json"
# Every output folder may have one.
CARD_FILE = "card.json"
# Bytes of a file's name, on all usual file systems.
LONGEST_NAME = 255
_BLOCK_BYTES = 2**20
# As ``atomic_file`` names them.
_TEMPORARY = re.compile(r"\..+\.[a-z0-9_]{8}(\.\w+)?")
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def refuse_existing(path: str | Path, *, overwrite: bool, owned: frozenset[str] | None = None) -> None:
    """Refuse an output path that is taken or cannot be written, before any work is done for it.

    Args:
        path: where the output will go.
        overwrite: whether an earlier output may be replaced.
        owned: for a folder, the names that such an output consists of, beside its card; None for a file.

    Raises:
        VitpruneError: if ``path`` exists and ``overwrite`` is off, if it holds anything else than ``owned``, if it is a
            file where a folder is wanted or the other way round, or if it lies in no writable folder.
    """
    path = Path(path).absolute()
    check_place(path, is_folder=owned is not None)
    if not path.exists():
        return
    if owned is not None and not any(path.iterdir()):
        return
    if not overwrite:
        raise VitpruneError(f"{path} exists; choose another output or add `overwrite`")
    foreign = sorted({entry.name for entry in path.iterdir()} - owned - {CARD_FILE}) if owned is not None else []
    if foreign:
        raise VitpruneError(f"{path} holds {foreign[0]}, which this command does not write; it will not be replaced")


def check_place(path: str | Path, *, is_folder: bool) -> None:
    """Refuse a place where no output can be written, before any work is done for it.

    Args:
        path: where the output will go; may exist.
        is_folder: whether it will be a folder.

    Raises:
        VitpruneError: if ``path`` is a file where a folder is wanted or the other way round, or lies in no writable
            folder.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile() as file:
    ...     check_place(f"{file.name}/below", is_folder=True)
    Traceback (most recent call last):
    vitprune.errors.VitpruneError: ... cannot be written: ... is not a folder
    """
    path = Path(path).absolute()
    try:
        parent = next(folder for folder in (path, *path.parents) if folder.exists())
        parent = parent.parent if parent == path and path != path.parent else parent
    except OSError as error:  # a name that is too long, say
        raise VitpruneError(f"{str(path)[:200]} cannot be written ({error.strerror})") from error
    if not parent.is_dir():
        raise VitpruneError(f"{path} cannot be written: {parent} is not a folder")
    if not os.access(parent, os.W_OK):
        raise VitpruneError(f"{path} cannot be written: no permission in {parent}")
    try:
        # Permissions are not all: file systems are read-only, or no place for files.
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise VitpruneError(f"{path} cannot be written: no file can be made in {parent} ({error.strerror})") from error
    if path.exists() and path.is_dir() != is_folder:
        raise VitpruneError(f"{path} is {'a folder' if path.is_dir() else 'a file'}; choose another output")


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary name next to ``path``; on success it becomes ``path``, on any exception it is removed.

    Raises:
        VitpruneError: if the parent cannot be made or written to, or the disk is full.
    """
    path = Path(path)
    with _explain_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            _finish(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_siblings(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder next to ``path``; on success its files move to where ``path`` lies, that one last.

    On any exception nothing is kept. A ``path`` that they replace goes first where there are several files, so that a
    kill leaves no mixture of old and new.

    Raises:
        VitpruneError: if one of the others exists and does not belong to an older ``path``, or they cannot be written.
    """
    path = Path(path).absolute()
    with _explain_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        try:
            yield temporary
            files = sorted(temporary.iterdir(), key=lambda file: file.name == path.name)
            foreign = [file.name for file in files if not path.exists() and path.with_name(file.name).exists()]
            if foreign:
                raise VitpruneError(f"{path.with_name(foreign[0])} exists; choose another output")
            if len(files) > 1:
                path.unlink(missing_ok=True)
            for file in files:
                _finish(file)
                file.replace(path.with_name(file.name))
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder next to ``path``; on success it replaces ``path``, on any exception it is removed."""
    path = Path(path).absolute()
    with _explain_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        try:
            temporary.chmod(0o777 & ~_umask())
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    _finish(file)
            if path.exists():
                old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
                try:
                    path.replace(old)
                    temporary.replace(path)
                finally:
                    if not path.exists():
                        old.replace(path)
                    shutil.rmtree(old, ignore_errors=True)
            else:
                temporary.replace(path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _explain_os_errors(path: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise VitpruneError(f"{path}: no space left to write it; nothing was kept") from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EPERM, errno.EEXIST, errno.EISDIR):
            raise VitpruneError(f"{path}: cannot be written ({error.strerror})") from error
        raise
    except SafetensorError as error:  # its writer reports operating system errors as text
        if any(f"os error {number}" in str(error) or f"code: {number}," in str(error) for number in _NO_SPACE):
            raise VitpruneError(f"{path}: no space left to write it; nothing was kept") from error
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _finish(path: Path) -> None:
    """Give a file the permissions of any new file (temporary ones are private) and bring it to the disk."""
    path.chmod(0o666 & ~_umask())
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON atomically, sealed where it says its ``kind``; the same content gives the same bytes."""
    content = seal(content) if isinstance(content, Mapping) and "kind" in content else content
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def read_json(path: str | Path, *, kind: str) -> dict[str, Any]:
    """Read a JSON object that says it is of ``kind``.

    Raises:
        VitpruneError: if the file is no JSON, damaged, or of another kind or a newer version.
    """
    try:
        content = json.loads(Path(path).read_text())
    except (ValueError, RecursionError) as error:
        raise VitpruneError(f"{path}: not a JSON file ({error})") from error
    _check_kind(path, content, kind)
    return unseal(path, content)


def read_json_lines(path: str | Path) -> list[dict[str, Any]]:
    """Read a file with a JSON object on each line.

    Raises:
        VitpruneError: if it is none.
    """
    try:
        rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    except (ValueError, RecursionError) as error:
        raise VitpruneError(f"{path}: not a file of JSON lines ({error})") from error
    wrong = next((number for number, row in enumerate(rows, 1) if not isinstance(row, dict)), None)
    if wrong is not None:
        raise VitpruneError(f"{path}: line {wrong} is no JSON object")
    return rows


def check_lines(path: str | Path, content: Mapping[str, Any]) -> None:
    """Refuse a file of JSON lines that is not the one which ``content``, of the file beside it, was written with.

    Raises:
        VitpruneError: if its hash is another than ``lines_sha256``, where that is known.
    """
    known = content.get("lines_sha256")
    if known is not None and known != hash_file(path):
        raise VitpruneError(f"{path}: damaged, or changed since it was written (its hash does not fit)")


def write_table(path: str | Path, rows: Iterable[Any], row_type: type) -> None:
    """Write dataclass values to a CSV file, one row each in the order given; a column per field."""
    with atomic_file(path) as temporary, temporary.open("w", newline="") as stream:
        table = csv.DictWriter(stream, [field.name for field in fields(row_type)], lineterminator="\n")
        table.writeheader()
        table.writerows(map(asdict, rows))


def write_tensors(path: str | Path, tensors: Mapping[str, Any], *, kind: str, facts: Mapping[str, Any]) -> None:
    """Write torch tensors to a safetensors file with ``facts`` as one JSON string in its header."""
    from safetensors.torch import save_file

    contiguous = {name: tensor.contiguous() for name, tensor in sorted(tensors.items())}
    hashes = {name: hash_tensor(tensor) for name, tensor in contiguous.items()}
    header = seal({"kind": kind, "version": FORMAT_VERSION, **facts, "tensors_sha256": hashes})
    with atomic_file(path) as temporary:
        save_file(contiguous, temporary, metadata={"vitprune": json.dumps(header, sort_keys=True)})


def read_tensors(path: str | Path, *, kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the tensors and the facts of a file that ``write_tensors`` wrote.

    Raises:
        VitpruneError: if the file is missing, no safetensors file, damaged, or of another kind or a newer version.
    """
    with open_tensors(path, kind=kind) as (stream, facts):
        return {name: stream.get_tensor(name) for name in stream.keys()}, facts  # noqa: SIM118 (no mapping)


@contextmanager
def open_tensors(path: str | Path, *, kind: str) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Open a file that ``write_tensors`` wrote, to read some of its tensors.

    Yields:
        What has the tensors (``keys``, and ``get_tensor``, which checks what it reads), and the facts.

    Raises:
        VitpruneError: if the file is missing, no safetensors file, damaged, or of another kind or a newer version.
    """
    with _open_safetensors(path) as (stream, facts):
        _check_kind(path, facts, kind)
        facts = unseal(path, facts)
        yield SealedTensors(path, stream, facts.pop("tensors_sha256", {})), facts


class SealedTensors:
    """Tensors of an open safetensors file, checked against their hashes as they are read."""

    def __init__(self, path: str | Path, stream: Any, hashes: Mapping[str, str]) -> None:
        self._path, self._stream, self._hashes = path, stream, hashes
        if not isinstance(hashes, dict):
            raise VitpruneError(f"{path}: damaged: it has no hashes of its tensors")
        if hashes and set(hashes) != set(self.keys()):
            raise VitpruneError(f"{path}: damaged, or changed since it was written (it has other tensors)")

    def keys(self) -> list[str]:
        """Return the names of the tensors."""
        return list(self._stream.keys())

    def get_tensor(self, name: str) -> Any:
        """Return a tensor.

        Raises:
            VitpruneError: if there is none of this name, or it is damaged.
        """
        if name not in self.keys():
            raise VitpruneError(f"{self._path}: damaged, or of another version: it lacks the tensor {name}")
        return check_tensor(self._path, name, self._stream.get_tensor(name), self._hashes)


def read_kind(path: str | Path) -> str | None:
    """Return what kind of vitprune file a safetensors file is; None where another program wrote it.

    Raises:
        VitpruneError: if the file is missing or no safetensors file.
    """
    with _open_safetensors(path) as (_stream, facts):
        return facts.get("kind")


@contextmanager
def _open_safetensors(path: str | Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as stream:
            try:
                facts = json.loads((stream.metadata() or {}).get("vitprune", "{}"))
            except (ValueError, RecursionError) as error:
                raise VitpruneError(f"{path}: damaged: its facts are no JSON ({error})") from error
            if not isinstance(facts, dict):
                raise VitpruneError(f"{path}: damaged: its facts are no JSON object")
            yield stream, facts
    except FileNotFoundError as error:
        raise VitpruneError(f"{path}: no such file") from error
    except (SafetensorError, IsADirectoryError) as error:
        raise VitpruneError(f"{path}: not a safetensors file ({error})") from error


def _check_kind(path: str | Path, content: Any, kind: str) -> None:
    found = content.get("kind") if isinstance(content, dict) else None
    if found != kind:
        raise VitpruneError(f"{path}: expected a vitprune file of kind '{kind}', found {found!r}")
    if not isinstance(content.get("version", 0), int):
        raise VitpruneError(f"{path}: damaged: its version is {content['version']!r}")
    if content.get("version", 0) > FORMAT_VERSION:
        raise VitpruneError(f"{path}: format version {content['version']} is newer than this vitprune; upgrade it")


@contextmanager
def held(path: str | Path, *, what: str) -> Iterator[None]:
    """Hold a lock file, so that no other program on this machine works on the same thing; a kill releases it.

    Raises:
        VitpruneError: if another one holds it.
    """
    from filelock import FileLock, Timeout

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise VitpruneError(f"another process works on {what}; wait for it, or choose another output") from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()


def refuse_foreign(folder: str | Path) -> None:
    """Refuse a folder that is there, is not empty, and was not begun by ``open_resumable``.

    >>> refuse_foreign("nowhere")
    """
    folder = Path(folder)
    if folder.exists() and not (folder / REQUEST_FILE).is_file() and not _is_just_begun(folder):
        refuse_existing(folder, overwrite=False, owned=frozenset())


def open_resumable(folder: str | Path, request: Mapping[str, Any], *, owned: frozenset[str], overwrite: bool) -> Path:
    """Open a folder that a killed run may have left, if it was made by the same request.

    Args:
        folder: made if it does not exist.
        request: everything that its content depends on; JSON values.
        owned: the names that such a folder consists of, beside its card.
        overwrite: start anew where it was made by another request.

    Raises:
        VitpruneError: if it was made by another request and ``overwrite`` is off, or is no such folder.
    """
    folder = Path(folder)
    path = folder / REQUEST_FILE
    wanted = json.loads(json.dumps(request))
    if path.is_file():
        before = read_json(path, kind="request")["request"]
        if before == wanted:
            _remove_temporary(folder, frozenset({*owned, REQUEST_FILE, CARD_FILE}))
            return folder
        changed = sorted(key for key in {**before, **wanted} if before.get(key) != wanted.get(key))
        if not overwrite:
            raise VitpruneError(
                f"{folder} was made with another {', '.join(changed)}; choose another output or add `overwrite`"
            )
        refuse_existing(folder, overwrite=True, owned=owned | {REQUEST_FILE})
        shutil.rmtree(folder)
    if _is_just_begun(folder):
        _remove_temporary(folder, frozenset({REQUEST_FILE}))
    refuse_existing(folder, overwrite=False, owned=frozenset())
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, {"kind": "request", "version": FORMAT_VERSION, "request": wanted})
    return folder


def _is_just_begun(folder: Path) -> bool:
    """Tell whether a run was killed before it had written its request: nothing else is there."""
    if not folder.is_dir():
        return False
    return all(entry.name.startswith(f".{REQUEST_FILE}.") for entry in folder.iterdir())


def _remove_temporary(folder: Path, owned: frozenset[str]) -> None:
    """Remove the temporary files that a killed run left behind, in the folder and in those that it owns."""
    for name in owned:
        for entry in folder.glob(f".{name}.*"):
            entry.unlink()
        if (folder / name).is_dir():
            for entry in (folder / name).rglob(".*"):
                if entry.is_file() and _TEMPORARY.fullmatch(entry.name):
                    entry.unlink()


def hash_file(*paths: str | Path, digits: int = 16) -> str:
    """Return the first hexadecimal digits of the SHA-256 of a file, or of several one behind the other."""
    digest = hashlib.sha256()
    for path in paths:
        with Path(path).open("rb") as stream:
            while block := stream.read(_BLOCK_BYTES):
                digest.update(block)
    return digest.hexdigest()[:digits]
