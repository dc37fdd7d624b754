"""Names of a model's classes, as a file or a list gives them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from vitprune.errors import VitpruneError
from vitprune.images.class_map import read_class_map


def name_classes_of(model: nn.Module, class_names: str | Path | Sequence[str]) -> nn.Module:
    """Give a model the names of its classes, which its images' folders have.

    Args:
        model: timm model; gets ``label_names``.
        class_names: in the order of the outputs; or {name: index}; or a file, as ``read_class_map`` reads it.

    Returns:
        The model.

    Raises:
        VitpruneError: if there is no such file, or there are not as many different names as outputs.

    >>> import timm
    >>> name_classes_of(timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=2), ["cat", "dog"]).label_names
    ('cat', 'dog')
    """
    source = "`class_names`"
    if isinstance(class_names, str | Path):
        source, class_names = str(class_names), read_class_map(class_names)
    names = tuple(map(str, class_names))
    if isinstance(class_names, Mapping):
        if sorted(class_names.values()) != list(range(len(class_names))):
            raise VitpruneError(f"{source}: class names are a list, or {{name: index}} with the indices 0, 1, 2, ...")
        names = tuple(sorted(class_names, key=lambda name: class_names[name]))
    num_classes = getattr(model, "num_classes", 0)
    if len(names) != num_classes:
        raise VitpruneError(f"{source} names {len(names)} classes, the model has {num_classes} outputs")
    if len(set(names)) < len(names):
        doubled = next(name for name in names if names.count(name) > 1)
        raise VitpruneError(f"{source} names {doubled!r} twice; give every class a name of its own")
    model.label_names = names
    return model
