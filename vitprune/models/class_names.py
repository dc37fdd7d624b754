"""Names of a model's classes, as a file or a list gives them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from vitprune.errors import VitpruneError


def name_classes_of(model: nn.Module, class_names: str | Path | Sequence[str]) -> nn.Module:
    """Give a model the names of its classes, which its images' folders have.

    Args:
        model: timm model; gets ``label_names``.
        class_names: in the order of the outputs; or a file: a name per line, a JSON list, or JSON of names to indices
            or of indices to names.

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
        source, class_names = str(class_names), _read_names(Path(class_names))
    elif isinstance(class_names, Mapping):
        class_names = _in_order(class_names, source)
    names = tuple(map(str, class_names))
    num_classes = getattr(model, "num_classes", 0)
    if len(names) != num_classes:
        raise VitpruneError(f"{source} names {len(names)} classes, the model has {num_classes} outputs")
    if len(set(names)) < len(names):
        doubled = next(name for name in names if names.count(name) > 1)
        raise VitpruneError(f"{source} names {doubled!r} twice; give every class a name of its own")
    model.label_names = names
    return model


def _read_names(path: Path) -> Sequence[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise VitpruneError(f"{path}: `class_names` cannot be read ({reason})") from error
    if path.suffix != ".json" and not text.lstrip().startswith(("[", "{")):
        return [line.strip() for line in text.splitlines() if line.strip()]
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise VitpruneError(f"{path}: not a JSON file ({error})") from error
    return _in_order(content, path)


def _in_order(content: Any, path: Path | str) -> Sequence[str]:
    if isinstance(content, Mapping):
        if all(isinstance(index, int) for index in content.values()):
            content = {str(index): name for name, index in content.items()}
        try:
            numbered = {int(index): name for index, name in content.items()}
        except ValueError:
            numbered = {}
        if sorted(numbered) == list(range(len(content))):
            content = [numbered[index] for index in range(len(numbered))]
    if not isinstance(content, list) or not all(isinstance(name, str) for name in content):
        raise VitpruneError(f"{path}: class names are a list, or {{name: index}} with the indices 0, 1, 2, ...")
    return content
