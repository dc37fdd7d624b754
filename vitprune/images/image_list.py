"""Where images are: in a folder, in a ``.tar``, or where a list says; and what class each is said to be of."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

from timm.utils.misc import natural_key

from vitprune.errors import VitpruneError
from vitprune.images.image_files import find_kind, image_suffixes, is_junk, walk_files
from vitprune.images.image_tar import is_tar, list_tar, open_file
from vitprune.images.text_rows import as_name, find_column, read_text, split_rows

_FILES = frozenset(
    [
        "file",
        "files",
        "filename",
        "file_name",
        "filepath",
        "file_path",
        "path",
        "image",
        "images",
        "image_path",
        "image_file",
        "img",
        "img_path",
    ]
)
_LABELS = frozenset(
    ["label", "labels", "class", "class_name", "classname", "category", "target", "label_name", "name", "wnid", "y"]
)


@dataclass(frozen=True)
class Listing:
    """Images before their classes are numbered.

    Attributes:
        root: what ``files`` are relative to.
        files: sorted within a folder; as listed in a list.
        names: per file, what its class is called; None where nothing tells.
        classes: names of all classes, those without images too, in natural order.
        what: the names are, for messages: ``class folders`` or ``labels``.
        passed_over: files that look as if they were meant as images.
        strays: images that are in no class folder, where there are class folders.
    """

    root: Path
    files: tuple[str, ...]
    names: tuple[str | None, ...]
    classes: tuple[str, ...]
    what: str = "class folders"
    passed_over: tuple[str, ...] = ()
    strays: tuple[str, ...] = ()


def list_images(root: str | Path) -> Listing:
    r"""List the images of a folder at any depth, of a ``.tar``, or of a text or CSV file that lists them.

    Raises:
        VitpruneError: if there is no such thing, or it cannot be read.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for name in ("a.jpg", "b.jpg"):
    ...         Path(folder, name).touch()
    ...     _ = Path(folder, "list.csv").write_text("file,label\nb.jpg,cat\n")
    ...     print(list_images(folder).files, list_images(Path(folder, "list.csv")).names)
    ('a.jpg', 'b.jpg') ('cat',)
    """
    root = Path(root)
    if root.is_dir():
        return _list_folder(root)
    if is_tar(root):
        return _list_archive(root)
    if not root.is_file():
        raise VitpruneError(f"{root}: no such data folder, list of images or .tar")
    if root.suffix.lower() in image_suffixes():
        raise VitpruneError(f"{root} is one image; name its folder, a list of images or a .tar")
    return _read_list(root)


def _list_folder(root: Path) -> Listing:
    folders = [entry.name for entry in root.iterdir() if entry.is_dir() and not is_junk(entry.name)]
    files, passed_over = [], []
    for name in walk_files(root):
        kind = find_kind(name, partial(open_file, root / name))
        if kind == "image":
            files.append(name)
        elif kind != "other":
            passed_over.append(name)
    return _by_folder(root, files, folders, passed_over)


def _by_folder(root: Path, files: Sequence[str], folders: Sequence[str], passed_over: Sequence[str]) -> Listing:
    names = {name: PurePosixPath(name).parts[0] if "/" in name else None for name in sorted(files, key=_by_parts)}
    return Listing(
        root.absolute(),
        tuple(names),
        tuple(names.values()),
        tuple(sorted(folders, key=natural_key)),
        passed_over=tuple(passed_over),
        strays=tuple(name for name, folder in names.items() if folder is None) if folders else (),
    )


def _by_parts(name: str) -> tuple[str, ...]:
    # A folder's files stay together, as they are in the order of folders.
    folder, slash, rest = name.partition("/")
    return (folder, rest) if slash else ("", folder)


def _list_archive(root: Path) -> Listing:
    members = [name for name in list_tar(root) if not any(map(is_junk, PurePosixPath(name).parts))]
    files, passed_over, told = [], [], {}
    for name in members:
        path = PurePosixPath(name)
        key, _dot, field = path.name.partition(".")
        if field in ("cls", "json"):
            label = _read_label(root, name, field)
            if label is not None:
                told[(path.parent, key)] = label
            continue
        kind = find_kind(name, partial(open_file, root / name))
        if kind == "image":
            files.append(name)
        elif kind == "foreign":
            passed_over.append(name)
    if told and files:
        return _with_told(root, files, told, passed_over)
    # An archive of one folder that holds the class folders.
    depth = 0
    parts = [PurePosixPath(name).parts for name in files]
    while parts and all(len(each) > depth + 2 for each in parts) and len({each[depth] for each in parts}) == 1:
        depth += 1
    ordered = sorted(zip(parts, files, strict=True), key=lambda pair: (pair[0][depth], pair[1]))
    names = tuple(each[depth] if len(each) > depth + 1 else None for each, _file in ordered)
    folders = {name for name in names if name is not None}
    return Listing(
        root.absolute(),
        tuple(file for _parts, file in ordered),
        names,
        tuple(sorted(folders, key=natural_key)),
        passed_over=tuple(passed_over),
        strays=tuple(file for (_parts, file), name in zip(ordered, names, strict=True) if name is None)
        if folders
        else (),
    )


def _read_label(root: Path, name: str, field: str) -> str | None:
    with open_file(root / name) as stream:
        content = stream.read()
    try:
        text = content.decode()
        if field == "cls":
            return as_name(text)
        known = json.loads(text)
    except ValueError as error:
        raise VitpruneError(f"{root}: '{name}' cannot be read ({error})") from error
    told = [known[key] for key in ("cls", "label", "class") if key in known] if isinstance(known, Mapping) else []
    return as_name(str(told[0])) if told and isinstance(told[0], int | str) else None


def _with_told(root: Path, files: Sequence[str], told: Mapping, passed_over: Sequence[str]) -> Listing:
    names = []
    for name in sorted(files):
        path = PurePosixPath(name)
        label = told.get((path.parent, path.name.partition(".")[0]))
        if label is None:
            raise VitpruneError(f"{root}: '{name}' has no label beside it (.cls), but other images have")
        names.append(label)
    classes = tuple(sorted(set(names), key=natural_key))
    return Listing(root.absolute(), tuple(sorted(files)), tuple(names), classes, "labels", tuple(passed_over))


def _read_list(path: Path) -> Listing:
    folder, what = path.parent, f"list of images {path}:"
    text = read_text(path, "list of images")
    rows = split_rows(text, path.suffix.lower())
    if not rows:
        raise VitpruneError(f"{what} holds no files")
    if path.suffix.lower() not in (".csv", ".tsv"):
        # A file's name may hold what separates it from a label elsewhere.
        whole = [(number, (line.strip(),)) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        if _is_file(folder, whole[0][1][0]):
            rows = whole
        elif len(rows[0][1]) == 1:
            parted = [(number, tuple(row[0].rsplit(None, 1))) for number, row in rows]
            rows = parted if all(len(row) == 2 for _number, row in parted) else rows
    header = rows[0][1]
    at_file = at_label = None
    if not any(_is_file(folder, field) for field in header):
        at_file, at_label = find_column(header, _FILES), find_column(header, _LABELS)
        rows = rows[1:] if at_file is not None else rows
    if at_file is None:
        if len(header) > 2:
            raise VitpruneError(f"{what} line {rows[0][0]}: head its {len(header)} columns 'file' and 'label'")
        at_file = 1 if len(header) == 2 and _is_file(folder, header[1]) and not _is_file(folder, header[0]) else 0
        at_label = 1 - at_file if len(header) == 2 else None
    line_of: dict[str, int] = {}
    names: list[str | None] = []
    for number, row in rows:
        if len(row) != len(header):
            raise VitpruneError(f"{what} line {number}: {len(row)} columns, the first line has {len(header)}")
        file = row[at_file]
        if not _is_file(folder, file):
            raise VitpruneError(f"{what} line {number}: no such file '{file[:200]}' in {folder}")
        file = file if (folder / file).exists() else file.replace("\\", "/")
        file = PurePosixPath(file).as_posix()
        if file in line_of:
            raise VitpruneError(f"{what} line {number}: '{file}' is there already (line {line_of[file]})")
        line_of[file] = number
        names.append(None if at_label is None else as_name(row[at_label]) or None)
    if not line_of:
        raise VitpruneError(f"{what} holds no files")
    if any(name is not None for name in names) and None in names:
        number = list(line_of.values())[names.index(None)]
        raise VitpruneError(f"{what} line {number}: no label, but other lines have one")
    classes = tuple(sorted({name for name in names if name is not None}, key=natural_key))
    if classes:
        return Listing(folder.absolute(), tuple(line_of), tuple(names), classes, "labels")
    by_folder = [PurePosixPath(file).parts[0] if "/" in file.strip("/") else None for file in line_of]
    if None in by_folder or any(PurePosixPath(file).is_absolute() or file.startswith("..") for file in line_of):
        return Listing(folder.absolute(), tuple(line_of), (None,) * len(line_of), (), "labels")
    classes = tuple(sorted(set(by_folder), key=natural_key))
    return Listing(folder.absolute(), tuple(line_of), tuple(by_folder), classes)


def _is_file(folder: Path, name: str) -> bool:
    try:
        return bool(name) and ((folder / name).is_file() or (folder / name.replace("\\", "/")).is_file())
    except OSError:  # too long to be one
        return False
