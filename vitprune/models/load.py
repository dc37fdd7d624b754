"""The verb: load a model, whatever it comes from."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from vitprune.entry import entry
from vitprune.errors import VitpruneError
from vitprune.models.elastic_file import load_elastic
from vitprune.models.merge_schedule import parse_schedule
from vitprune.models.merging import check_merging, set_merging
from vitprune.models.saved_folder import load_folder
from vitprune.models.sources import check_name, fetch, load_checkpoint


@entry(loads=True)
def load(
    model: str | Path,
    *,
    checkpoint: str | Path | None = None,
    device: str = "cpu",
    ratio: float | None = None,
    merge: str | None = None,
) -> nn.Module:
    """Load a model in eval mode.

    Args:
        model: a timm name (weights from the hub unless ``checkpoint`` is given), ``hf-hub:OWNER/NAME``, a folder with
            ``config.json`` and ``model.safetensors``, pruned or not, or an elastic file (``.safetensors``).
        checkpoint: weights for a timm name: .safetensors; .pth, .pt, .bin or .tar (a plain state dict, read without
            running pickled code; timm's, DeiT's and MAE's layouts); or the .npz of google-research ViT. The number
            of classes and the pooling (MAE's ``fc_norm``) follow the checkpoint.
        device: where to put it.
        ratio: of an elastic file, the share of the units of every part to be gone, at least; in [0, 1). None: the
            dense model.
        merge: which tokens merge, as ``parse_schedule`` reads it, instead of those that merge already.

    Returns:
        An ordinary ``nn.Module``.

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
    loaded = _load(str(model), checkpoint, ratio)
    if merge is not None:
        check_merging(loaded)
        loaded = set_merging(loaded, parse_schedule(merge, loaded))
    return loaded.eval().to(device)


def _load(name: str, checkpoint: str | Path | None, ratio: float | None) -> nn.Module:
    if Path(name).suffix == ".safetensors":
        if checkpoint is not None:
            raise VitpruneError(f"{name} is a file with its own weights; leave `checkpoint` out")
        return load_elastic(Path(name), 0.0 if ratio is None else ratio)
    if ratio is not None:
        raise VitpruneError(f"{name} has one width only: ratio is for an elastic file (.safetensors); prune it instead")
    if Path(name).is_dir():
        if checkpoint is not None:
            raise VitpruneError(f"{name} is a folder with its own weights; leave `checkpoint` out")
        return load_folder(Path(name))
    if name.startswith("hf-hub:"):
        if checkpoint is not None:
            raise VitpruneError(f"{name} brings its own weights; leave `checkpoint` out, or pass a timm name")
    else:
        check_name(name)
    if checkpoint is None:
        return fetch(name)
    return load_checkpoint(name, Path(checkpoint))


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
