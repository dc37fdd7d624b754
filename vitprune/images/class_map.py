"""Class maps: files that say which output of a model each class is."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vitprune.errors import VitpruneError
from vitprune.images.text_rows import as_name, find_column, read_text, split_rows

_NAMES = frozenset(
    [
        "name",
        "names",
        "class",
        "class_name",
        "classname",
        "label_name",
        "folder",
        "folder_name",
        "category",
        "wnid",
        "synset",
        "synset_id",
    ]
)
_INDICES = frozenset(
    [
        "index",
        "idx",
        "id",
        "class_index",
        "class_idx",
        "class_id",
        "label_index",
        "label_id",
        "target",
        "label",
        "number",
    ]
)


def read_class_map(path: str | Path) -> dict[str, int]:
    r"""Read which class index each name has.

    Args:
        path: text with one name per line, in the order of the outputs (timm's class map), or WordNet id and words
            (ImageNet's synset words); text or CSV with rows of name and index, in this order or the other, with a
            header or without; JSON: a list of names, {name: index}, {"index": name}, or a transformers configuration
            with ``id2label`` or ``label2id``. Text is UTF-8 or UTF-16.

    Returns:
        Name, in Unicode NFC -> class index.

    Raises:
        VitpruneError: if it is none of these, or has a name twice or an empty line between two names.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "map.csv").write_text("index,name\n1,cat\n0,dog\n")
    ...     read_class_map(Path(folder, "map.csv"))
    {'cat': 1, 'dog': 0}
    """
    path = Path(path)
    text = read_text(path, "class map")
    suffix = path.suffix.lower()
    pairs = _read_json(path, text) if suffix == ".json" else _read_rows(path, text, suffix)
    numbered: dict[str, int] = {}
    place_of: dict[str, str] = {}
    for place, name, index in pairs:
        name = as_name(name)
        if not name:
            raise VitpruneError(f"class map {path}: {place}: a class without a name")
        if index < 0:
            raise VitpruneError(f"class map {path}: {place}: class index {index} of '{name}' is negative")
        if name in numbered:
            raise VitpruneError(
                f"class map {path}: {place}: '{name}' is there already ({place_of[name]}); name every class once"
            )
        numbered[name], place_of[name] = index, place
    if not numbered:
        raise VitpruneError(f"class map {path}: holds no names")
    return numbered


def names_in_order(numbered: Mapping[str, int], num_classes: int) -> tuple[str, ...]:
    """Return what a class map calls every output of a model; empty where it has not just one name for each.

    >>> names_in_order({"cat": 1, "dog": 0}, 2), names_in_order({"cat": 1, "dog": 0}, 3)
    (('dog', 'cat'), ())
    """
    by_index = {index: name for name, index in numbered.items()}
    complete = len(numbered) == num_classes and sorted(by_index) == list(range(num_classes))
    return tuple(by_index[index] for index in range(num_classes)) if complete else ()


def _read_rows(path: Path, text: str, suffix: str) -> list[tuple[str, str, int]]:
    rows = split_rows(text, suffix)
    if not rows:
        return []
    if suffix not in (".csv", ".tsv") and "\t" not in text:
        spaced = _read_spaced(path, text)
        if spaced is not None:
            return spaced
    widths = {len(row) for _number, row in rows}
    if len(widths) > 1:
        number = next(number for number, row in rows if len(row) != len(rows[0][1]))
        raise VitpruneError(f"class map {path}: line {number}: other columns than line {rows[0][0]}")
    ((width),) = widths
    if width == 1:
        return _read_names(path, rows, table=suffix in (".csv", ".tsv"))
    header = rows[0][1]
    places = find_column(header, _NAMES), find_column(header, _INDICES)
    body = rows[1:]
    if None in places or places[0] == places[1]:
        body = rows
        integers = [place for place in range(width) if all(_is_integer(row[place]) for _number, row in rows)]
        if not integers:  # an unknown header perhaps
            body = rows[1:]
            integers = [place for place in range(width) if body and all(_is_integer(row[place]) for _n, row in body)]
        if width == 2 and not integers and suffix not in (".csv", ".tsv"):
            # Names with a comma in each.
            return _read_names(path, [(number, (line.strip(),)) for number, line in _lines(text)], table=False)
        if width != 2 or len(integers) != 1:
            raise VitpruneError(
                f"class map {path}: cannot tell names from class indices in its {width} columns; head them 'name' and "
                "'index'"
            )
        places = (1 - integers[0], integers[0])
    pairs = []
    for number, row in body:
        if not _is_integer(row[places[1]]):
            raise VitpruneError(f"class map {path}: line {number}: class index '{row[places[1]]}' is no whole number")
        pairs.append((f"line {number}", row[places[0]], int(row[places[1]])))
    return pairs


def _read_spaced(path: Path, text: str) -> list[tuple[str, str, int]] | None:
    """Read lines of WordNet id and words, in the order of the outputs, or of index and name."""
    lines = [(number, line.strip()) for number, line in _lines(text)]
    of_wordnet = [(number, re.match(r"(n\d{8})\s+\S", line)) for number, line in lines]
    if all(found for _number, found in of_wordnet):
        return _read_names(path, [(number, (found[1],)) for number, found in of_wordnet], table=False)
    indexed = [(number, re.fullmatch(r"(\d+)\s+(?:(n\d{8})\s.*|([^\d\s,;][^,;]*))", line)) for number, line in lines]
    if all(found for _number, found in indexed) and len({found[1] for _number, found in indexed}) == len(lines):
        return [(f"line {number}", found[2] or found[3], int(found[1])) for number, found in indexed]
    return None


def _lines(text: str) -> list[tuple[int, str]]:
    return [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _read_names(path: Path, rows, *, table: bool) -> list[tuple[str, str, int]]:
    if table and rows[0][1][0].lower() in _NAMES - {"class", "category"}:
        rows = rows[1:]
    for (before, _row), (number, _next) in itertools.pairwise(rows):
        if number != before + 1:
            raise VitpruneError(f"class map {path}: line {before + 1} is empty, so what follows has no sure index")
    if rows and not table and rows[0][0] != 1:
        raise VitpruneError(f"class map {path}: line 1 is empty, so what follows has no sure index")
    return [(f"line {number}", row[0], index) for index, (number, row) in enumerate(rows)]


def _is_integer(text: str) -> bool:
    return text.removeprefix("-").isascii() and text.removeprefix("-").isdigit()


def _read_json(path: Path, text: str) -> list[tuple[str, str, int]]:
    def keep_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [as_name(name) for name, _value in pairs]
        twice = [name for name in names if names.count(name) > 1] if len(set(names)) < len(names) else []
        if twice:
            lines = [number for number, line in _lines(text) if json.dumps(twice[0], ensure_ascii=False) in line]
            where = f"line {lines[-1]}: " if lines else ""
            raise VitpruneError(f"class map {path}: {where}'{twice[0]}' is there twice; name every class once")
        return dict(pairs)

    try:
        content = json.loads(text, object_pairs_hook=keep_pairs)
    except json.JSONDecodeError as error:
        raise VitpruneError(f"class map {path}: not a JSON file ({error})") from error
    if isinstance(content, dict):
        for key in ("id2label", "label2id"):
            if isinstance(content.get(key), dict):
                content = content[key]
                break
    if isinstance(content, list) and all(isinstance(name, str) for name in content):
        return [(f"entry {index}", name, index) for index, name in enumerate(content)]
    if isinstance(content, dict) and all(type(index) is int for index in content.values()):
        return [(f"'{name}'", name, index) for name, index in content.items()]
    if isinstance(content, dict) and all(
        _is_integer(index) and isinstance(name, str) for index, name in content.items()
    ):
        return [(f"'{index}'", name, int(index)) for index, name in content.items()]
    raise VitpruneError(
        f"class map {path}: expected an object {{folder name: class index}} or {{class index: folder name}}, or a list "
        "of names"
    )
