"""How a model's images are prepared: as it was trained, by the user's word or the training script's."""

from __future__ import annotations

import numbers
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from vitprune.entry import entry
from vitprune.errors import VitpruneError, VitpruneNote
from vitprune.views import data_config

# What timm resizes images with.
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
_POOLS = ("avg", "avgmax", "max", "token", "map", "prr", "")


@dataclass(frozen=True)
class Told:
    """What the arguments of a training script tell.

    Attributes:
        model_args: that the model was created with.
        transform: keys of ``set_transform`` -> values.
    """

    model_args: Mapping[str, Any]
    transform: Mapping[str, Any]


@entry
def set_transform(
    model: nn.Module,
    *,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    crop_pct: float | None = None,
    interpolation: str | None = None,
) -> nn.Module:
    """Say how a model's images are prepared; what is None stays as it is.

    Its ``data_config`` and what ``save`` and ``export_onnx`` write of it follow.

    Args:
        model: timm model; changed in place.
        mean: of each channel, subtracted from pixels in [0, 1]; one number for all.
        std: of each channel, by which they are divided then; one number for all.
        crop_pct: share of the shorter side that is used, in (0, 1].
        interpolation: how images are resized: nearest, bilinear, bicubic, box, hamming or lanczos.

    Returns:
        The model.

    Raises:
        VitpruneError: if a value is out of range.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=1)
    >>> config = data_config(set_transform(model, mean=0.4, crop_pct=1))
    >>> config["mean"], config["crop_pct"], config["interpolation"]
    ([0.4, 0.4, 0.4], 1.0, 'bicubic')
    """
    told: dict[str, Any] = {}
    channels = data_config(model)["input_size"][0]
    for name, value in (("mean", mean), ("std", std)):
        if value is not None:
            told[name] = _check_channels(name, value, channels)
    if crop_pct is not None:
        if not isinstance(crop_pct, numbers.Real) or not 0 < crop_pct <= 1:
            raise VitpruneError(f"`crop_pct` must be in (0, 1], got {crop_pct}")
        told["crop_pct"] = float(crop_pct)
    if interpolation is not None:
        if interpolation not in INTERPOLATIONS:
            raise VitpruneError(f"`interpolation` must be one of {', '.join(INTERPOLATIONS)}; got {interpolation!r}")
        told["interpolation"] = interpolation
    if told:
        model.pretrained_cfg = {**(getattr(model, "pretrained_cfg", None) or {}), **told}
    return model


def _check_channels(name: str, value: Any, channels: int) -> tuple[float, ...]:
    values = (value,) if isinstance(value, numbers.Real) else tuple(value)
    values = values * channels if len(values) == 1 else values
    if len(values) != channels or not all(isinstance(each, numbers.Real) for each in values):
        raise VitpruneError(f"`{name}` takes one number, or one for each of {channels} channels; got {value}")
    if name == "std" and min(values) <= 0:
        raise VitpruneError(f"`std` must be above 0, got {value}")
    if max(map(abs, values)) > 1:
        raise VitpruneError(f"`{name}` is of pixels in [0, 1], got {value}; divide by 255")
    return tuple(map(float, values))


def tell_transform(model: nn.Module, told: Mapping[str, Any]) -> nn.Module:
    """Apply what a training script's arguments tell of the transform; what they cannot mean is left out with a note."""
    for name, value in told.items():
        try:
            set_transform(model, **{name: value})
        except (VitpruneError, TypeError):
            warnings.warn(
                f"the checkpoint says {name} {value!r}, which is left out; say it with `{name}`",
                VitpruneNote,
                stacklevel=3,
            )
    return model


def read_told(arguments: Mapping[str, Any], source: str) -> Told:
    """Read the arguments of a training script: timm's, DeiT's and MAE's names.

    Args:
        arguments: name -> value, whatever else is among them.
        source: of them, for the message.

    >>> told = read_told({"img_size": 160, "mean": [0.5], "lr": 0.1, "gp": "avg"}, "tuned.pth")
    >>> told.model_args, told.transform
    ({'img_size': (160, 160), 'global_pool': 'avg'}, {'mean': [0.5]})
    """
    model_args: dict[str, Any] = {}
    for nested in (arguments, arguments.get("model_kwargs"), arguments.get("model_args")):
        if isinstance(nested, Mapping):
            model_args |= {
                key: nested[key] for key in ("num_heads", "act_layer", "norm_layer") if _is_plain(nested.get(key))
            }
    for nested in (arguments.get("model_kwargs"), arguments.get("model_args")):
        if isinstance(nested, Mapping):
            model_args |= {key: value for key, value in nested.items() if isinstance(key, str) and _is_plain(value)}
    size = _read_size(arguments, model_args.pop("img_size", None))
    if size is not None:
        model_args["img_size"] = size
    pool = arguments.get("gp") or arguments.get("global_pool")
    pool = {True: "avg", "fast": None}.get(pool, pool) if isinstance(pool, bool | str) else None
    if pool in _POOLS and pool:
        model_args.setdefault("global_pool", pool)
    crop = arguments.get("crop_pct") or arguments.get("eval_crop_ratio")
    transform = {"mean": arguments.get("mean"), "std": arguments.get("std"), "crop_pct": crop}
    interpolation = arguments.get("interpolation")
    if interpolation != "random":  # of training alone
        transform["interpolation"] = interpolation
    return Told(model_args, {name: value for name, value in transform.items() if value not in (None, "", [], ())})


def _is_plain(value: Any) -> bool:
    return isinstance(value, bool | int | float | str) or (
        isinstance(value, list | tuple) and all(isinstance(each, int | float) for each in value)
    )


def _read_size(arguments: Mapping[str, Any], img_size: Any) -> tuple[int, int] | None:
    """Return height and width: what the model was created with, else what its images had."""
    for value in (img_size, arguments.get("input_size"), arguments.get("img_size"), arguments.get("image_size")):
        values = (value,) if isinstance(value, int) and not isinstance(value, bool) else value
        if not isinstance(values, list | tuple) or not all(isinstance(each, int) and each > 0 for each in values):
            continue
        if len(values) in (1, 2, 3):
            return (values[0], values[0]) if len(values) == 1 else (values[-2], values[-1])
    return None
