"""Folders and hub repositories of transformers: read as files, loaded as the timm twin of their model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vitprune.errors import VitpruneError
from vitprune.models.checkpoint_file import read_checkpoint
from vitprune.twins.find_twin import adopt_transformers

PROCESSOR_FILE = "preprocessor_config.json"
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
# What of a repository is read.
PATTERNS = ("config.json", PROCESSOR_FILE, *_WEIGHTS, *_INDICES, "model-*.safetensors", "pytorch_model-*.bin")


def is_of_transformers(config: Any) -> bool:
    """Tell whether a ``config.json`` describes a model of transformers.

    >>> is_of_transformers({"model_type": "vit"}), is_of_transformers({"architecture": "vit_tiny_patch16_224"})
    (True, False)
    """
    return isinstance(config, Mapping) and "architecture" not in config and isinstance(config.get("model_type"), str)


def load_transformers(folder: Path, config: Mapping[str, Any]) -> nn.Module:
    """Load the twin of a folder that transformers wrote, which need not be installed.

    Args:
        folder: with ``config.json``, weights in one file or in shards, and ``preprocessor_config.json`` perhaps.
        config: content of the first.

    Raises:
        VitpruneError: if files are missing or damaged, or its model has no twin.
    """
    processor = folder / PROCESSOR_FILE
    return adopt_transformers(
        config,
        _read_weights(folder),
        processor=_read_json(processor) if processor.is_file() else None,
        source=str(folder),
    )


def _read_weights(folder: Path) -> dict[str, Tensor]:
    for name in _WEIGHTS:
        if (folder / name).is_file():
            return dict(read_checkpoint(folder / name, what="").tensors)
    index = next((folder / name for name in _INDICES if (folder / name).is_file()), None)
    if index is None:
        raise VitpruneError(f"{folder} has no weights: neither {_WEIGHTS[0]} nor {_WEIGHTS[1]}")
    named = _read_json(index).get("weight_map")
    if not isinstance(named, Mapping) or not named:
        raise VitpruneError(f"{index}: it names no shards")
    state: dict[str, Tensor] = {}
    for shard in sorted(set(map(str, named.values()))):
        if Path(shard).name != shard:
            raise VitpruneError(f"{index}: the shard {shard} lies outside of the folder")
        state |= read_checkpoint(folder / shard, what="").tensors
    missing = sorted(set(named) - set(state))
    if missing:
        raise VitpruneError(f"{index}: no shard has {missing[0]} ({len(missing)} are missing)")
    return state


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise VitpruneError(f"{path}: not a JSON file ({error})") from error
    if not isinstance(content, Mapping):
        raise VitpruneError(f"{path}: a JSON object is expected")
    return content
