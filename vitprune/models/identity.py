"""Which model it is: its architecture's name and a hash of its weights."""

from __future__ import annotations

import hashlib

import torch
from torch import nn


def hash_weights(model: nn.Module) -> str:
    """Return the SHA-256 (hexadecimal) of all parameters and buffers with their names, dtypes and shapes."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(f"{key} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def architecture(model: nn.Module) -> str:
    """Return the timm name of a model, or its class name where timm recorded none."""
    return (getattr(model, "pretrained_cfg", None) or {}).get("architecture") or type(model).__name__
