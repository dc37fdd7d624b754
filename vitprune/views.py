"""What the rest of the package asks of a timm model: its transform, its tokens, its blocks, its classifier."""

from __future__ import annotations

from typing import Any

import timm.data
from torch import nn

from vitprune.wrappers import check_unwrapped, find_patch_embed, unwrap


def data_config(model: Any) -> dict[str, Any]:
    """Return the transform that a model's images need, as timm describes it; JSON values.

    Args:
        model: a timm model, or an opened ONNX file.
    """
    if not isinstance(model, nn.Module):
        return dict(model.data_config)
    model = unwrap(model)
    check_unwrapped(model)
    config = timm.data.resolve_model_data_config(model)
    # A model built for another image size than its pretrained configuration says so only in its patch embedding.
    built_for = getattr(find_patch_embed(model), "img_size", None)
    if built_for is not None:
        config["input_size"] = (config["input_size"][0], *built_for)
    # Nor does the configuration know of other channels; one channel is the mean of three.
    channels = _num_channels(model)
    if channels is not None and channels != config["input_size"][0]:
        config["input_size"] = (channels, *config["input_size"][1:])
        for key in ("mean", "std"):
            if len(config[key]) != channels:
                config[key] = (sum(config[key]) / len(config[key]),) * channels
    return {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}


def _num_channels(model: nn.Module) -> int | None:
    name = (getattr(model, "pretrained_cfg", None) or {}).get("first_conv")
    known = isinstance(name, str) and any(name == each for each, _module in model.named_modules())
    first = model.get_submodule(name) if known else getattr(find_patch_embed(model), "proj", None)
    return first.in_channels if isinstance(first, nn.Conv2d) else None


def has_classifier(model: nn.Module) -> bool:
    """Tell whether a model has classes to answer; timm's ``num_classes=0`` has none."""
    return getattr(model, "num_classes", 1) > 0


def has_class_token(model: nn.Module) -> bool:
    """Tell whether a model puts a class token before the patches."""
    return getattr(model, "cls_token", None) is not None


def num_prefix_tokens(model: nn.Module) -> int:
    """Count the tokens before the patches: class, distillation, registers."""
    return getattr(model, "num_prefix_tokens", 0)


def num_patches(model: nn.Module) -> int | None:
    """Count the patches of an image of the model's own size; None where it does not say."""
    return getattr(getattr(model, "patch_embed", None), "num_patches", None)


def num_tokens_read(model: nn.Module) -> int | None:
    """Count the leading tokens that the head reads; None where it reads them all."""
    if getattr(model, "attn_pool", None) is not None or getattr(model, "global_pool", "") != "token":
        return None
    return 2 if hasattr(model, "head_dist") else 1


def block_of(group: str) -> str:
    """Return the name of the block that a group of units is in.

    >>> block_of("blocks.3.mlp")
    'blocks.3'
    """
    return group.rpartition(".")[0]
