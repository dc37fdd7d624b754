"""Small text files of users: read in whatever encoding a spreadsheet leaves behind, and split into rows."""

from __future__ import annotations

import codecs
import csv
import io
import unicodedata
from pathlib import Path

from vitprune.errors import VitpruneError

_SEPARATORS = {".csv": ",;\t", ".tsv": "\t"}


def as_name(text: str) -> str:
    r"""Return a name in the form in which names are compared: Unicode NFC, without space around it.

    >>> as_name("cafe\u0301 ") == "caf\u00e9"
    True
    """
    return unicodedata.normalize("NFC", text).strip()


def read_text(path: str | Path, what: str) -> str:
    """Read a text file: UTF-8, with or without a byte order mark, or UTF-16 with one.

    Args:
        path: of the file.
        what: what it is, for the message.

    Raises:
        VitpruneError: if there is no such file, or it is no text.
    """
    path = Path(path)
    if not path.is_file():
        raise VitpruneError(f"{what} {path}: no such file")
    content = path.read_bytes()
    utf_16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if utf_16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise VitpruneError(f"{what} {path}: not a text file in UTF-8") from error
    if "\0" in text:
        raise VitpruneError(f"{what} {path}: not a text file")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def split_rows(text: str, suffix: str = "") -> list[tuple[int, tuple[str, ...]]]:
    r"""Return the lines that hold something: their number, from 1, and their fields.

    A file without a suffix of tables is one only where every line has two fields (tab, comma or semicolon).

    Args:
        text: as ``read_text`` gives it.
        suffix: of the file; ``.csv`` and ``.tsv`` are tables.

    >>> split_rows("cat\ndog, hot\n"), split_rows("cat\t0\ndog\t1\n")
    ([(1, ('cat',)), (2, ('dog, hot',))], [(1, ('cat', '0')), (2, ('dog', '1'))])
    """
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if suffix in _SEPARATORS:
        first = lines[0][1] if lines else ""
        separator = max(_SEPARATORS[suffix], key=first.count)
        reader = csv.reader(io.StringIO(text), delimiter=separator, skipinitialspace=True)
        rows = [(reader.line_num, tuple(field.strip() for field in row)) for row in reader]
        return [(number, row) for number, row in rows if any(row)]
    for separator in "\t,;":
        if lines and all(line.count(separator) == 1 for _number, line in lines):
            return [(number, tuple(field.strip() for field in line.split(separator))) for number, line in lines]
    return [(number, (line.strip(),)) for number, line in lines]


def find_column(header: tuple[str, ...], names: frozenset[str]) -> int | None:
    """Return the place of the only column called by one of some names, in any case; None where there is not one."""
    places = [place for place, name in enumerate(header) if name.lower().replace(" ", "_") in names]
    return places[0] if len(places) == 1 else None
