"""The verb: load a model, whatever it comes from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitprune.entry import entry
from vitprune.errors import VitpruneError
from vitprune.models.elastic_file import load_elastic
from vitprune.models.fit_checkpoint import load_checkpoint, refill
from vitprune.models.image_size import set_image_size
from vitprune.models.merge_schedule import parse_schedule
from vitprune.models.merging import check_merging, set_merging
from vitprune.models.output_names import name_classes_of
from vitprune.models.saved_folder import load_folder
from vitprune.models.sources import HUB, check_name, fetch, fetch_folder, spell
from vitprune.models.transform import set_transform
from vitprune.twins.find_twin import adopt
from vitprune.views import data_config


@entry(loads=True)
def load(
    model: str | Path | nn.Module,
    *,
    checkpoint: str | Path | None = None,
    device: str = "cpu",
    ratio: float | None = None,
    merge: str | None = None,
    checkpoint_key: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    image_size: int | Sequence[int] | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    crop_pct: float | None = None,
    interpolation: str | None = None,
    class_names: str | Path | Sequence[str] | None = None,
) -> nn.Module:
    """Load a model in eval mode.

    What a checkpoint tells overrides what the name says: by its shapes image and patch size, channels, depth, widths,
    biases, tokens, classes and pooling; by the arguments of the training script how images are prepared.

    Args:
        model: a timm name (weights from the hub unless ``checkpoint`` is given), ``hf-hub:OWNER/NAME``, a folder with
            ``config.json`` and ``model.safetensors`` or ``pytorch_model.bin``, pruned or not, or an elastic file
            (``.safetensors``). Folders, repositories and models in memory of other libraries become the timm
            model that computes the same.
        checkpoint: weights for a timm name: .safetensors; .pth, .pt, .bin, .ckpt or .tar (tensors and plain data, read
            without running pickled code); or the .npz of google-research ViT. Names may have any prefix. For a folder:
            weights of its model that were trained elsewhere.
        device: where to put it.
        ratio: of an elastic file, the share of the units of every part to be gone, at least; in [0, 1). None: the
            dense model.
        merge: which tokens merge, as ``parse_schedule`` reads it, instead of those that merge already.
        checkpoint_key: which weights of a checkpoint that has several, such as ``model`` beside ``model_ema``; "" for
            those at its top level. None: averaged ones, where there are some.
        model_args: what timm is to create the model with; overrides what a ``checkpoint`` tells.
        image_size: height and width of the images, or both in one: positions are resampled to it.
        mean: of each channel, for pixels in [0, 1].
        std: of each channel.
        crop_pct: share of the shorter side that is used, in (0, 1].
        interpolation: how images are resized, such as ``bicubic``.
        class_names: of the outputs, in their order, or a file of them.

    Returns:
        An ordinary ``nn.Module``. ``opened`` says how it was loaded.

    Raises:
        VitpruneError: if there is no such model, its weights cannot be fetched, the checkpoint does not fit,
            ``ratio`` is out of range, beyond the largest of the file, or given with anything else, or its tokens
            cannot merge so.

    >>> import tempfile, timm
    >>> from vitprune import save
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(timm.create_model("vit_tiny_patch16_224", num_classes=5), folder)
    ...     load(folder).num_classes
    5
    """
    check_device(device)
    size = _check_size(image_size)
    if model_args is not None:
        model_args = _check_model_args(model_args)
    if isinstance(model, nn.Module):
        given = {"checkpoint": checkpoint, "ratio": ratio, "checkpoint_key": checkpoint_key, "model_args": model_args}
        named = next((key for key, value in given.items() if value is not None), None)
        if named is not None:
            raise VitpruneError(f"a model in memory has weights of its own; leave `{named}` out")
        name, loaded = type(model).__name__, adopt(model)
    else:
        name = spell(str(model))
        loaded = _load(name, checkpoint, ratio, checkpoint_key, model_args, size)
    if size is not None and tuple(data_config(loaded)["input_size"][1:]) != size:
        loaded = set_image_size(loaded, size)
    set_transform(loaded, mean=mean, std=std, crop_pct=crop_pct, interpolation=interpolation)
    if class_names is not None:
        name_classes_of(loaded, class_names)
    if merge is not None:
        check_merging(loaded)
        loaded = set_merging(loaded, parse_schedule(merge, loaded))
    said = {
        "checkpoint_key": checkpoint_key,
        "model_args": None if model_args is None else dict(model_args),
        "image_size": None if size is None else list(size),
        "mean": _as_list(mean),
        "std": _as_list(std),
        "crop_pct": crop_pct,
        "interpolation": interpolation,
        "class_names": None if class_names is None else list(loaded.label_names),
    }
    loaded.opened = {
        "model": str(Path(name).resolve()) if Path(name).exists() else getattr(loaded, "fetched", name),
        **({} if checkpoint is None else {"checkpoint": str(Path(checkpoint).resolve())}),
        **{key: value for key, value in said.items() if value is not None and _is_json(value)},
    }
    return loaded.eval().to(device)


def _load(
    name: str,
    checkpoint: str | Path | None,
    ratio: float | None,
    checkpoint_key: str | None,
    model_args: Mapping[str, Any] | None,
    size: tuple[int, int] | None,
) -> nn.Module:
    is_elastic, is_folder = Path(name).suffix == ".safetensors", Path(name).is_dir()
    if checkpoint is None or is_elastic or is_folder:
        of_checkpoint = {"checkpoint": checkpoint, "checkpoint_key": checkpoint_key, "model_args": model_args}
        given = [key for key, value in of_checkpoint.items() if value is not None]
        if given and is_elastic:
            raise VitpruneError(f"{name} is a file with its own weights; leave `{given[0]}` out")
        if model_args is not None and is_folder:
            raise VitpruneError(f"{name} is a folder with a model of its own; leave `model_args` out")
        if checkpoint_key is not None and checkpoint is None:
            raise VitpruneError("`checkpoint_key` is for a `checkpoint`, which is missing")
    if is_elastic:
        return load_elastic(Path(name), 0.0 if ratio is None else ratio)
    if ratio is not None:
        raise VitpruneError(f"{name} has one width only: ratio is for an elastic file (.safetensors); prune it instead")
    if is_folder:
        loaded = load_folder(Path(name))
        return loaded if checkpoint is None else refill(loaded, Path(checkpoint), key=checkpoint_key)
    if name.startswith(HUB):
        if checkpoint is not None:
            raise VitpruneError(f"{name} brings its own weights; leave `checkpoint` out, or pass a timm name")
    else:
        check_name(name)
    if checkpoint is None:
        folder = fetch_folder(name) if name.startswith(HUB) and not model_args else None
        if folder is None:
            return fetch(name, model_args)
        loaded = load_folder(folder)
        # The commit that it was read at, so that it is the same another time.
        loaded.fetched = f"{name.partition('@')[0]}@{folder.name}"
        return loaded
    return load_checkpoint(name, Path(checkpoint), key=checkpoint_key, model_args=model_args, image_size=size)


def check_device(device: str) -> None:
    """Refuse a device that torch does not have here.

    Raises:
        VitpruneError: if ``device`` is unknown or absent.
    """
    try:
        torch.empty(1, device=device)
        if torch.device(device).type == "meta":
            raise RuntimeError("it holds no numbers")
    except (RuntimeError, AssertionError) as error:
        raise VitpruneError(f"device '{device}' cannot be used here ({str(error).splitlines()[0]})") from error


def _check_size(image_size: int | Sequence[int] | None) -> tuple[int, int] | None:
    if image_size is None:
        return None
    sizes = [image_size] if isinstance(image_size, int) else list(image_size)
    if len(sizes) not in (1, 2) or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise VitpruneError(f"`image_size` takes one number of pixels, or height and width; got {image_size}")
    return (sizes[0], sizes[-1])


def _check_model_args(model_args: Any) -> dict[str, Any]:
    if not isinstance(model_args, Mapping) or not all(isinstance(key, str) for key in model_args):
        raise VitpruneError(f"`model_args` are arguments by name, such as {{'num_heads': 4}}; got {model_args!r}")
    if "img_size" in model_args:
        _check_size(model_args["img_size"])
    return dict(model_args)


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except TypeError:  # a class of layers, say, which a Python user may pass
        return False
    return True


def _as_list(value: float | Sequence[float] | None) -> Any:
    return None if value is None else [float(each) for each in value] if isinstance(value, Sequence) else float(value)
