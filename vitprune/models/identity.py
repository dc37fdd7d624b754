"""Which model it is: its architecture's name and a hash of its weights."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import nn


def hash_weights(model: nn.Module) -> str:
    """Return the SHA-256 (hexadecimal) of all parameters and buffers with their names, dtypes and shapes."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(f"{key} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def how_opened(model: nn.Module) -> dict[str, Any] | None:
    """Return what ``load`` was told of a model; None where that was a name alone, or it was not loaded."""
    opened = getattr(model, "opened", None) or {}
    name = opened.get("model", "")
    says_more = opened.keys() - {"model"} or Path(name).is_absolute() or "@" in name
    return dict(opened) if says_more else None


def said_beside(model: nn.Module) -> dict[str, Any]:
    """Return what ``load`` was told of a model beside its name and checkpoint."""
    return {key: value for key, value in (how_opened(model) or {}).items() if key not in ("model", "checkpoint")}


def architecture(model: nn.Module) -> str:
    """Return the timm name of a model, or its class name where timm recorded none."""
    return (getattr(model, "pretrained_cfg", None) or {}).get("architecture") or type(model).__name__
