"""Which files and folders a recipe reads that are not there and that no earlier step makes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from vitprune.errors import VitpruneError
from vitprune.recipe.contents import is_there
from vitprune.recipe.read import Recipe, Step

# Options that name files or folders to read, and nothing else.
_PATHS = (
    *("data", "eval_data", "class_map", "class_names", "plan", "folders", "runs", "images", "sources"),
    *("checkpoint", "against_checkpoint", "teacher_checkpoint"),
)
# Options that name models: in timm, on the hub, or on this disk.
_MODELS = ("model", "models", "source", "against", "teacher")
_SUFFIXES = frozenset({".onnx", ".xml", ".safetensors", ".pt", ".pth", ".bin", ".ckpt"})


def check_inputs(recipe: Recipe) -> None:
    """Refuse a recipe that reads what is not there, before any of it runs.

    Raises:
        VitpruneError: naming everything that is missing, and the steps that read it.
    """
    outputs: list[Path] = []
    missing = []
    for position, step in enumerate(recipe.steps, 1):
        for name, text in _read_by(step, outputs):
            path = Path(os.path.abspath(text))
            if not is_there(path) and not any(output in (path, *path.parents) for output in outputs):
                missing.append(f"step {position}: {step.command}: {name} {text} is not there")
        if step.output is not None:
            outputs.append(Path(os.path.abspath(step.output)))
    if missing:
        raise VitpruneError(f"recipe {recipe.path}: {'; '.join(missing)}, and no earlier step makes it")


def _read_by(step: Step, outputs: list[Path]) -> Iterator[tuple[str, str]]:
    """Yield (option, value) of what a step reads from this disk."""
    for name, value in step.options.items():
        for text in value if isinstance(value, list) else [value]:
            if not isinstance(text, str) or not text:
                continue
            if name in _PATHS or (name in _MODELS and _is_on_disk(text, outputs)):
                yield name, text


def _is_on_disk(text: str, outputs: list[Path]) -> bool:
    """Tell whether what names a model can only be a file or folder: by suffix, or by the folder that it begins with."""
    path = Path(text)
    if path.is_absolute() or text.startswith(".") or path.suffix in _SUFFIXES:
        return True
    if ":" in text or len(path.parts) < 2:
        return False
    first = Path(os.path.abspath(path.parts[0]))
    return first.is_dir() or any(first in (output, *output.parents) for output in outputs)
