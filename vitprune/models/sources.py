"""Where dense models come from: a timm name with weights from the hub, or with a checkpoint of one's own."""

from __future__ import annotations

import argparse
import difflib
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from timm.models import get_arch_pretrained_cfgs, is_model, load_state_dict, model_entrypoint
from torch import Tensor, nn

from vitprune.errors import VitpruneError
from vitprune.models.build import find_mismatch, name_few

_HUB_FILES = ("model.safetensors", "pytorch_model.bin")  # in timm's order


def check_name(name: str) -> None:
    """Refuse what is no name of a timm model.

    Raises:
        VitpruneError: naming what is near.
    """
    if Path(name).is_file() and not is_model(name.partition(".")[0]):
        raise VitpruneError(f"{name} is a file; pass a timm name as the model, and weights as `checkpoint`")
    if any(separator in name for separator in "/\\") or name in (".", ".."):
        raise VitpruneError(f"{name}: no such folder, and no timm model has this name")
    if not is_model(name.partition(".")[0]):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        hint = f"; did you mean {', '.join(near)}?" if near else "; timm.list_models() names them all"
        raise VitpruneError(f"unknown model '{name}'{hint}")
    architecture_name, _, tag = name.partition(".")
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{architecture_name}.*")]
    if tag and tag not in tags:
        raise VitpruneError(f"{architecture_name} has no weights '{tag}'; timm knows {', '.join(tags) or 'none'}")


def fetch(name: str) -> nn.Module:
    """Build a timm model with its weights from the hub.

    Raises:
        VitpruneError: if they cannot be fetched.
    """
    # The hub client logs every retry; the one line below says it all.
    from huggingface_hub.utils import logging as hub_logging

    verbosity = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()
    try:
        return timm.create_model(name, pretrained=True)
    except Exception as error:
        reason = " ".join(str(error).split()).split(". ")[0] or type(error).__name__
        raise VitpruneError(
            f"{name}: its weights could not be fetched from the hub ({reason}); "
            "get the file another way and pass it as `checkpoint`"
        ) from error
    finally:
        hub_logging.set_verbosity(verbosity)


def find_hub_weights(name: str) -> Path | None:
    """Return the file in the hub's cache that ``load`` would read for a timm name or ``hf-hub:OWNER/NAME``.

    None where there is no such name, its weights were not fetched yet, or they do not come from the hub.
    """
    files: tuple[str, ...] = _HUB_FILES
    if name.startswith("hf-hub:"):
        location = name.removeprefix("hf-hub:")
    else:
        known = is_model(name.partition(".")[0]) and ("." not in name or name in get_arch_pretrained_cfgs(name))
        cfg = timm.get_pretrained_cfg(name) if known else None
        location = cfg.hf_hub_id if cfg is not None else None
        files = (cfg.hf_hub_filename,) if location and cfg.hf_hub_filename else files
    if not location:
        return None
    repository, _, revision = location.partition("@")
    try:
        found = [try_to_load_from_cache(repository, file, revision=revision or None) for file in files]
    except HFValidationError:  # 'load' tells what is wrong with the name
        return None
    return next((Path(path) for path in found if isinstance(path, str)), None)


def load_checkpoint(name: str, path: Path) -> nn.Module:
    """Build a timm model with the weights of a file; classes and pooling follow the file.

    Raises:
        VitpruneError: if there is no such file, it is no plain state dict, or does not fit.
    """
    if not path.is_file():
        raise VitpruneError(f"checkpoint {path}: no such file")
    if path.suffix == ".npz":
        return _load_npz(name, path)
    state = _read_state_dict(path)
    cfg = timm.get_pretrained_cfg(name)
    model_args: dict[str, Any] = {}
    classifier = cfg.classifier[0] if isinstance(cfg.classifier, tuple | list) else cfg.classifier
    head = state.get(f"{classifier}.weight")
    if head is not None and len(head) != cfg.num_classes:
        model_args["num_classes"] = len(head)
    model = timm.create_model(name, **model_args)
    if "fc_norm.weight" in state and isinstance(getattr(model, "fc_norm", None), nn.Identity):
        model_args["global_pool"] = "avg"  # MAE and others: norm after pooling the patches
        model = timm.create_model(name, **model_args)
    if find_mismatch(model, state):
        filter_state = getattr(
            sys.modules[model_entrypoint(name.partition(".")[0]).__module__], "checkpoint_filter_fn", None
        )
        state = filter_state(state, model) if filter_state else state
    problem = find_mismatch(model, state)
    if problem:
        raise VitpruneError(f"checkpoint {path} does not fit {name}: {problem}")
    model.load_state_dict(state)
    model.model_args = model_args
    return model


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    try:
        # Training scripts store their argparse.Namespace beside the weights: plain data, so it may be read.
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = load_state_dict(str(path), weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0].split(". ")[0] if str(error) else type(error).__name__
        raise VitpruneError(
            f"checkpoint {path} is not a plain state dict that can be read without running its code ({reason}); "
            "save it as .safetensors"
        ) from error
    if not isinstance(state, Mapping) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise VitpruneError(f"checkpoint {path} is not a plain state dict: name -> tensor")
    return dict(state)


def _load_npz(name: str, path: Path) -> nn.Module:
    import numpy as np

    try:
        with zipfile.ZipFile(path), np.load(path, allow_pickle=False) as arrays:
            head = next((arrays[key] for key in arrays.files if key.endswith("head/bias")), None)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise VitpruneError(f"checkpoint {path} is not a plain .npz of arrays ({error})") from error
    if head is None:
        raise VitpruneError(f"checkpoint {path} has no 'head/bias': not a google-research ViT with a classifier")
    model_args = {"num_classes": len(head)}
    model = timm.create_model(name, **model_args)
    if not hasattr(model, "load_pretrained"):
        raise VitpruneError(f"{name} cannot read .npz checkpoints: it is no google-research ViT")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)  # whatever the file leaves untouched stays visible
    try:
        model.load_pretrained(str(path))
    except (KeyError, RuntimeError, ValueError, AssertionError) as error:
        raise VitpruneError(f"checkpoint {path} does not fit {name}: {str(error).splitlines()[0]}") from error
    missing = [key for key, parameter in model.named_parameters() if parameter.isnan().any()]
    if missing:
        raise VitpruneError(f"checkpoint {path} does not fit {name}: nothing in the file for {name_few(missing)}")
    model.model_args = model_args
    return model
