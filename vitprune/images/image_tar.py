"""Files inside a ``.tar``, read where they lie: nothing is extracted."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from vitprune.errors import VitpruneError


def is_tar(path: str | Path) -> bool:
    """Tell whether a file is a tar archive, compressed or not."""
    return Path(path).is_file() and tarfile.is_tarfile(path)


def list_tar(path: str | Path) -> Mapping[str, tuple[int, int]]:
    """Return where the files of an archive lie in it: name -> (offset, size) in bytes.

    Args:
        path: an uncompressed .tar.

    Raises:
        VitpruneError: if it is compressed or damaged, or a name in it leads out of it.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "1.txt").write_text("one")
    ...     with tarfile.open(Path(folder, "all.tar"), "w") as archive:
    ...         archive.add(Path(folder, "1.txt"), "./digits/1.txt")
    ...     print(list(list_tar(Path(folder, "all.tar"))), open_file(Path(folder, "all.tar", "digits", "1.txt")).read())
    ['digits/1.txt'] b'one'
    """
    found = Path(path).stat()
    return _index(str(path), found.st_mtime_ns, found.st_size)


@lru_cache(maxsize=8)
def _index(path: str, _mtime_ns: int, _size: int) -> Mapping[str, tuple[int, int]]:
    places: dict[str, tuple[int, int]] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if member.isreg() and not member.issparse():
                    name = PurePosixPath(member.name)
                    if name.is_absolute() or ".." in name.parts:
                        raise VitpruneError(f"{path}: '{member.name}' leads out of the archive; pack it anew")
                    places[str(name)] = (member.offset_data, member.size)
    except tarfile.TarError as error:
        raise VitpruneError(f"{path}: not an uncompressed .tar that can be read ({error}); unpack it") from error
    return places


def open_file(path: str | Path) -> BinaryIO:
    """Open a file for reading; one inside an archive is named by the archive's path and its own behind that.

    Raises:
        OSError: if there is no such file.
    """
    path = Path(path)
    archive = find_archive(path)
    if archive is None:
        return path.open("rb")
    name = path.relative_to(archive).as_posix()
    places = list_tar(archive)
    if name not in places:
        raise FileNotFoundError(f"no '{name}' in {archive}")
    offset, size = places[name]
    with archive.open("rb") as stream:
        stream.seek(offset)
        return io.BytesIO(stream.read(size))


def find_archive(path: str | Path) -> Path | None:
    """Return the archive that a path leads into; None where it leads into none."""
    path = Path(path)
    if path.exists():
        return None
    return next((parent for parent in path.parents if parent.is_file()), None)
