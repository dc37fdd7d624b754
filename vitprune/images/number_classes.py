"""Which output of a model each class is, by its name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.utils.misc import natural_key

from vitprune.errors import VitpruneError
from vitprune.images.class_map import names_in_order, read_class_map
from vitprune.images.class_names import english_names, label_names_of
from vitprune.images.image_set import ImageSet
from vitprune.images.text_rows import as_name

_WNID = re.compile(r"n\d{8}", re.ASCII)
_INTEGER = re.compile(r"\d+", re.ASCII)
_REMEDY = "say which is which with `class_map`"


@dataclass(frozen=True)
class Numbering:
    """Which output each class is.

    Attributes:
        index_of: name as given -> class index.
        described: by what rule, for people.
        left_out: names that are none of the model's classes.
        label_names: what every output is called, in order; empty where that is not sure.
    """

    index_of: Mapping[str, int]
    described: str
    left_out: tuple[str, ...] = ()
    label_names: tuple[str, ...] = ()


def number_classes(
    root: Path,
    names: Sequence[str],
    num_classes: int,
    *,
    class_map: str | Path | None = None,
    label_names: Sequence[str] | None = None,
    what: str = "class folders",
) -> Numbering:
    """Say which output of a model each class is; the first of these that applies decides.

    A class map; the names that the model has for its classes; WordNet ids of ImageNet's classes; names that are whole
    numbers, which are indices; sorted order, where there are as many names as outputs and timm and torchvision would
    sort them alike.

    Args:
        root: where the names are from, for messages.
        names: of the classes present, each once.
        num_classes: outputs of the model.
        class_map: as ``read_class_map`` reads it.
        label_names: what the model calls its classes, in order.
        what: the names are of, for messages.

    Raises:
        VitpruneError: if nothing tells, or what tells contradicts.

    >>> number_classes(Path("photos"), ["10", "9"], 12).index_of
    {'10': 10, '9': 9}
    """
    if label_names is not None and len(label_names) != num_classes:
        raise VitpruneError(f"there are names for {len(label_names)} classes, but the model has {num_classes} outputs")
    count = _count(names)
    if class_map is not None:
        return _by_class_map(root, names, num_classes, Path(class_map), label_names or (), count)
    if label_names:
        return _by_label_names(root, names, label_names, what)
    subset = infer_imagenet_subset({"num_classes": num_classes})
    if subset and all(map(_WNID.fullmatch, names)):
        numbered = {name: index for index, name in enumerate(ImageNetInfo(subset).label_names())}
        _check_known(root, names, numbered, f"{subset}'s {num_classes} classes")
        return Numbering({name: numbered[name] for name in names}, f"{count}: by WordNet id")
    if all(map(_INTEGER.fullmatch, names)):
        return Numbering(_as_indices(root, names, num_classes, what), f"{count}: {_called(what)} are indices")
    return _in_order(root, names, num_classes, count, what)


def check_numbering(model: Any, images: ImageSet) -> None:
    """Refuse images whose classes are numbered in another way than a model's, or not at all.

    Args:
        model: a timm model, or an opened ONNX file.
        images: whose labels are about to be read.

    Raises:
        VitpruneError: if there are no labels, or a class is another output of the model by the names it knows.
    """
    if not images.has_labels:
        raise VitpruneError(f"{images.root}: these images have no labels, which are needed here ({images.numbering})")
    place_of = {as_name(name): index for index, name in enumerate(label_names_of(model))}
    for index, name in images.class_names.items():
        known = place_of.get(as_name(name), index)
        if known != index:
            raise VitpruneError(
                f"{images.root}: '{name}' is numbered {index}, but the model's class '{name}' is {known}; find the "
                "images with the model's `label_names`"
            )


def _by_class_map(
    root: Path, names: Sequence[str], num_classes: int, path: Path, label_names: Sequence[str], count: str
) -> Numbering:
    numbered = read_class_map(path)
    index_of = {name: numbered[as_name(name)] for name in names if as_name(name) in numbered}
    _check_known(root, names, index_of, f"{path}, which names {_few(list(numbered))}")
    beyond = [name for name, index in numbered.items() if index >= num_classes]
    if beyond:
        raise VitpruneError(f"{path}: class {numbered[beyond[0]]} of '{beyond[0]}' is beyond the {num_classes} outputs")
    place_of = {as_name(name): index for index, name in enumerate(label_names)}
    for name, index in numbered.items():
        if place_of.get(name, index) != index:
            raise VitpruneError(
                f"{path}: '{name}' has index {index}, but the model's class '{name}' is {place_of[name]} of "
                f"{_few(label_names)}; leave `class_map` out, or prune again with it"
            )
    known = tuple(label_names) or names_in_order(numbered, num_classes)
    return Numbering(index_of, f"{count}: by {path}", label_names=known)


def _check_known(root: Path, names: Sequence[str], numbered: Mapping[str, int], source: str) -> None:
    unknown = [name for name in names if name not in numbered]
    if unknown:
        raise VitpruneError(f"{root}: '{unknown[0]}' ({len(unknown)} of {len(names)} folders) is not in {source}")


def _by_label_names(root: Path, names: Sequence[str], label_names: Sequence[str], what: str) -> Numbering:
    index_of: dict[str, int] = {}
    # The same spelling first; then one that differs in case alone; then an English name of a WordNet id.
    spellings = (
        (as_name, lambda name: [as_name(name)]),
        (lambda label: as_name(label).casefold(), lambda name: [as_name(name).casefold()]),
        (lambda label: as_name(label).casefold(), _english),
    )
    for of_label, of_name in spellings:
        places: dict[str, list[int]] = {}
        for index, label in enumerate(label_names):
            places.setdefault(of_label(label), []).append(index)
        taken = frozenset(index_of.values())
        for name in names:
            found = {place for spelling in of_name(name) for place in places.get(spelling, ())} - taken
            if name in index_of or not found:
                continue
            if len(found) > 1:
                raise VitpruneError(
                    f"{root}: '{name}' is the name of the classes {' and '.join(map(str, sorted(found)))} of the "
                    f"model; {_REMEDY}"
                )
            (index_of[name],) = found
    if not index_of:
        if all(map(_INTEGER.fullmatch, names)) and not any(map(_INTEGER.fullmatch, label_names)):
            indices = _as_indices(root, names, len(label_names), what)
            described = f"{_count(names)}: {_called(what)} are indices"
            return Numbering(indices, described, label_names=tuple(label_names))
        raise VitpruneError(
            f"{root} has none of the model's {len(label_names)} classes ({_few(label_names)}); its {what} are "
            f"{_few(names)}"
        )
    return Numbering(
        {name: index_of[name] for name in names if name in index_of},
        f"{_count(index_of)} by the model's names",
        tuple(name for name in names if name not in index_of),
        tuple(label_names),
    )


def _check_not_imagenets(root: Path, names: Sequence[str], num_classes: int) -> None:
    """Refuse English names of most of ImageNet's classes, whose sorted order is not ImageNet's."""
    subset = infer_imagenet_subset({"num_classes": num_classes})
    if subset is None:
        return
    descriptions = ImageNetInfo(subset).label_descriptions()
    known = {_spoken(spelling) for text in descriptions for spelling in (text, *text.split(", "))}
    found = [name for name in names if _spoken(name) in known]
    if 2 * len(found) > len(names):
        raise VitpruneError(
            f"{root}: {len(found)} of {len(names)} names ({_few(found)}) are of {subset}'s classes, which are not in "
            f"sorted order; {_REMEDY}"
        )


def _spoken(name: str) -> str:
    return as_name(name).casefold().replace("_", " ")


def _english(name: str) -> list[str]:
    names = english_names(name)
    return [each.casefold() for each in [*names, ", ".join(names)]] if names else []


def _as_indices(root: Path, names: Sequence[str], num_classes: int, what: str) -> dict[str, int]:
    index_of = {name: int(name) for name in names}
    by_index: dict[int, str] = {}
    for name, index in index_of.items():
        if index in by_index:
            raise VitpruneError(f"{root}: '{by_index[index]}' and '{name}' are both class {index}; {_REMEDY}")
        by_index[index] = name
    if max(by_index) >= num_classes:
        first, last = by_index[min(by_index)], by_index[max(by_index)]
        raise VitpruneError(
            f"{root}: the {what} {first} .. {last} are whole numbers but no indices of the model's outputs (0 .. "
            f"{num_classes - 1}); {_REMEDY}"
        )
    if num_classes > 2 and sorted(by_index) == list(range(1, num_classes)):
        raise VitpruneError(
            f"{root}: the {what} 1 .. {num_classes - 1} may be the model's outputs without 0, or be counted from 1; "
            f"{_REMEDY}"
        )
    return index_of


def _in_order(root: Path, names: Sequence[str], num_classes: int, count: str, what: str) -> Numbering:
    # Names that Unicode spells in several ways sort differently by machine.
    plain = sorted(names, key=as_name)
    if len(names) != num_classes:
        raise VitpruneError(
            f"{root} has {len(names)} {what} ({plain[0]}, ...) but the model has {num_classes} outputs; {_REMEDY}"
        )
    _check_not_imagenets(root, names, num_classes)
    natural = sorted(names, key=lambda name: natural_key(as_name(name)))
    if natural != plain:
        index = next(index for index in range(num_classes) if natural[index] != plain[index])
        raise VitpruneError(
            f"{root}: the order of its {what} is not sure: class {index} is '{natural[index]}' as timm sorts them, "
            f"'{plain[index]}' as torchvision does; {_REMEDY}"
        )
    known = tuple(map(as_name, plain))
    if len(set(known)) < len(known):
        raise VitpruneError(f"{root}: two {what} have one name, spelt differently in Unicode; {_REMEDY}")
    described = f"{count} in sorted order: {_few(known)}"
    return Numbering({name: index for index, name in enumerate(plain)}, described, label_names=known)


def _count(names: Sequence[str] | Mapping[str, int]) -> str:
    return f"{len(names)} class{'' if len(names) == 1 else 'es'}"


def _called(what: str) -> str:
    return {"class folders": "folder names"}.get(what, what)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
