"""What classes are called: by a model, by people, and in WordNet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn

from vitprune.errors import VitpruneError
from vitprune.images.text_rows import as_name


def find_class(root: str | Path, class_names: Mapping[int, str], name: str) -> int:
    """Return the class index that a user means by a folder name, a class index or an English name.

    Args:
        root: the data folder, for the message.
        class_names: class index -> folder name, of the classes to choose from.
        name: as the user wrote it; English names (of WordNet ids) in any case.

    Raises:
        VitpruneError: if no class has this name, or several have.

    >>> find_class("photos", {0: "n01440764", 217: "n02102040"}, "English springer")
    217
    """
    wanted = as_name(str(name))
    for index, folder in class_names.items():
        if wanted == as_name(folder):
            return index
    if wanted in map(str, class_names):
        return int(wanted)
    named = [index for index, folder in class_names.items() if wanted.lower() in map(str.lower, english_names(folder))]
    if not named:
        raise VitpruneError(
            f"class '{name}' is neither a folder of {root} nor the index or English name of one: "
            f"there are no images of class '{name}'"
        )
    if len(named) > 1:
        raise VitpruneError(f"class '{name}' may be {' or '.join(class_names[index] for index in named)}; name one")
    return named[0]


def describe_class(name: str) -> str:
    """Return a class name that people can read: the first lemma of a WordNet id, any other name as it is.

    >>> describe_class("n01443537"), describe_class("cat")
    ('goldfish', 'cat')
    """
    return next(iter(english_names(name)), name)


def class_names(model: Any) -> tuple[str, ...]:
    """Return what a model's classes are called: its own names, or ImageNet's, where it has as many as a subset of that.

    Empty where nobody knows.
    """
    own = label_names_of(model)
    if own:
        return tuple(describe_class(name) for name in own)
    subset = infer_imagenet_subset(model) if getattr(model, "num_classes", 0) else None
    return tuple(ImageNetInfo(subset).label_descriptions()) if subset else ()


def label_names_of(model: Any) -> tuple[str, ...]:
    """Return the names that a model has for its classes, in order: its own, or those it was published with.

    Empty where it has none. Names that it was published with count only where they are as many as its classes.

    Args:
        model: a timm model, or an opened ONNX file.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=2)
    >>> model.label_names = ("cat", "dog")
    >>> label_names_of(model)
    ('cat', 'dog')
    """
    config = getattr(model, "pretrained_cfg", None) or {}
    published = config.get("label_names") if isinstance(config, Mapping) else getattr(config, "label_names", None)
    if getattr(model, "label_names", None):
        return tuple(map(str, model.label_names))
    return tuple(map(str, published)) if published and len(published) == getattr(model, "num_classes", 0) else ()


def remember_names(model: nn.Module, names: Sequence[str]) -> None:
    """Tell a model what its classes are called, where it does not know and there is a name for each.

    Args:
        model: changed in place.
        names: in the order of its outputs; none: nothing happens.
    """
    if names and not label_names_of(model) and len(names) == getattr(model, "num_classes", 0):
        model.label_names = tuple(names)


def english_names(folder: str) -> list[str]:
    """Return the English names of a WordNet id; none for any other name."""
    info, known = _wordnet()
    return info.label_name_to_description(folder).split(", ") if folder in known else []


@cache
def _wordnet() -> tuple[ImageNetInfo, frozenset[str]]:
    info = ImageNetInfo("imagenet-22k")
    return info, frozenset(info.label_names())
