"""Which files are images: those that Pillow can decode, by suffix or, without a known one, by content."""

from __future__ import annotations

import mimetypes
import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from PIL import Image

from vitprune.errors import VitpruneError

# What Pillow opens without being able to decode it by itself.
_STUBS = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"})
# Formats that say by their first bytes what they are, and in which photos come.
_BY_CONTENT = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "AVIF", "JPEG2000", "QOI")
# Pictures that Pillow alone does not decode, whether or not this machine has a media type for their suffix.
_FOREIGN = frozenset(
    [
        ".heic",
        ".heif",
        ".hif",
        ".jxl",
        ".svg",
        ".svgz",
        ".eps",
        ".wmf",
        ".emf",
        ".exr",
        ".hdr",
        ".psb",
        ".xcf",
        ".raw",
        ".dng",
        ".cr2",
        ".cr3",
        ".nef",
        ".arw",
        ".orf",
        ".rw2",
        ".raf",
        ".avif",
        ".jp2",
        ".jxr",
        ".wdp",
        ".kra",
        ".ai",
    ]
)
_JUNK = frozenset({"__macosx", "@eadir", "$recycle.bin", "system volume information", "thumbs.db", "desktop.ini"})


def is_junk(name: str) -> bool:
    """Tell whether a file or folder is hidden, or one that an operating system leaves among others.

    >>> is_junk("._1.jpg"), is_junk("Thumbs.db"), is_junk("__MACOSX"), is_junk("1.jpg")
    (True, True, True, False)
    """
    return name.startswith(".") or name.lower() in _JUNK


@cache
def image_suffixes() -> frozenset[str]:
    """Return the suffixes of files that Pillow decodes on this machine, in lower case."""
    known = Image.registered_extensions()
    return frozenset(suffix for suffix, kind in known.items() if kind in Image.OPEN and kind not in _STUBS)


def find_kind(name: str, open_stream: Callable[[], BinaryIO]) -> str:
    """Say of a file whether it is an ``image``, ``foreign`` (a picture that cannot be decoded) or ``other``.

    Args:
        name: of the file.
        open_stream: opens it; called only where the suffix leaves open what it is.

    >>> find_kind("a.JPG", open), find_kind("a.heic", open), find_kind("a.txt", open)
    ('image', 'foreign', 'other')
    """
    suffix = PurePosixPath(name).suffix.lower()
    if suffix in image_suffixes():
        return "image"
    if suffix in _FOREIGN:
        return "foreign"
    media_type = mimetypes.guess_type(name)[0] if suffix else None
    if media_type is not None:
        return "foreign" if media_type.startswith("image/") else "other"
    return "image" if _is_image(open_stream) else "other"


def _is_image(open_stream: Callable[[], BinaryIO]) -> bool:
    Image.init()
    try:
        with open_stream() as stream, Image.open(stream, formats=[kind for kind in _BY_CONTENT if kind in Image.OPEN]):
            return True
    except Exception:  # decoders raise whatever a file that is no image makes them stumble over
        return False


def _refuse(error: OSError) -> None:
    raise VitpruneError(f"{error.filename}: this folder cannot be read ({error.strerror})") from error


def walk_files(root: Path) -> Iterator[str]:
    """Yield the files below a folder relative to it, those behind links too, hidden things and junk left out.

    Raises:
        VitpruneError: if a folder cannot be read.
    """
    entered: set[tuple[int, int]] = set()
    for folder, folders, files in os.walk(root, followlinks=True, onerror=_refuse):
        here = os.stat(folder)
        if (here.st_dev, here.st_ino) in entered:  # a link that leads back
            folders.clear()
            continue
        entered.add((here.st_dev, here.st_ino))
        folders[:] = sorted(name for name in folders if not is_junk(name))
        relative = Path(folder).relative_to(root)
        yield from ((relative / name).as_posix() for name in sorted(files) if not is_junk(name))
