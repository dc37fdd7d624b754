"""Names of models: what timm and the hub call them, how else people spell that, and where the weights are."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from timm.models import get_arch_pretrained_cfgs, is_model
from torch import nn

from vitprune.errors import VitpruneError
from vitprune.models.load_twin import PATTERNS, is_of_transformers
from vitprune.models.saved_folder import load_folder

HUB, FOLDER = "hf-hub:", "local-dir:"
PLAN_FILE = "plan.safetensors"
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")  # in timm's order
_PAGE = re.compile(
    r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/+(?P<repository>[^/?#]+/[^/?#]+)(?:/.*|[?#].*)?$"
)
# What others call timm's models, piece by piece.
_WORDS = (
    (r"dinov2-with-registers-(\w+)", r"vit_\1_patch14_reg4_dinov2"),
    (r"dinov2-(\w+)", r"vit_\1_patch14_dinov2"),
    (r"vit-mae-(\w+)", r"vit_\1_patch16_224.mae"),
    (r"dino-vit([sb])(\d+)", r"vit_\1_patch\2_224.dino"),
    (r"clip-vit-(\w+)-patch(\d+)(?:-(\d+))?", r"vit_\1_patch\2_clip_\g<3>"),
)


def spell(name: str) -> str:
    """Return a model as ``load`` knows it, of any spelling whose meaning is plain.

    Args:
        name: of a model: timm's, the hub's, the address of its page, or a folder.

    >>> spell("timm/vit_tiny_patch16_224.augreg_in21k")
    'hf-hub:timm/vit_tiny_patch16_224.augreg_in21k'
    >>> spell("https://huggingface.co/timm/deit_tiny_patch16_224.fb_in1k/tree/main")
    'hf-hub:timm/deit_tiny_patch16_224.fb_in1k'
    >>> spell("local-dir:runs/mine")
    'runs/mine'
    """
    if os.path.exists(name):
        return name
    scheme, colon, rest = name.partition(":")
    scheme = scheme.lower().replace("_", "-")
    if colon and f"{scheme}:" in (HUB, "hf:", "huggingface:", "timm:") and not rest.startswith("//"):
        rest = f"timm/{rest}" if scheme == "timm" and "/" not in rest else rest
        page = _PAGE.match(rest)
        return HUB + (page["repository"] if page else rest)
    if colon and f"{scheme}:" == FOLDER:
        return rest
    if scheme == "hf" and rest.startswith("//"):
        return HUB + rest.strip("/")
    page = _PAGE.match(name)
    repository = page["repository"] if page else name
    if re.fullmatch(r"timm/[\w.@-]+", repository):
        return HUB + repository
    return name


def check_name(name: str) -> None:
    """Refuse what is no name of a timm model.

    Raises:
        VitpruneError: naming what is near.
    """
    if Path(name).is_file() and not is_model(name.partition(".")[0]):
        raise VitpruneError(f"{name} is a file; pass a timm name as the model, and weights as `checkpoint`")
    page = _PAGE.match(name)
    if page or re.fullmatch(r"[\w.-]+/[\w.@-]+", name):
        _refuse_repository(name, page["repository"] if page else name)
    if "://" in name:
        raise VitpruneError(f"{name} is an address; download the file, and pass it as `checkpoint` beside a timm name")
    if any(separator in name for separator in "/\\") or name in (".", "..", ""):
        raise VitpruneError(f"{name or 'the model'}: no such folder, and no timm model has this name")
    if not is_model(name.partition(".")[0]):
        near = _find_near(name)
        hint = f"; did you mean {', '.join(near)}?" if near else "; timm.list_models() names them all"
        raise VitpruneError(f"unknown model '{name}'{hint}")
    architecture_name, _, tag = name.partition(".")
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{architecture_name}.*")]
    if tag and tag not in tags:
        raise VitpruneError(f"{architecture_name} has no weights '{tag}'; timm knows {', '.join(tags) or 'none'}")


def _find_near(name: str) -> list[str]:
    plain = name.lower().replace("-", "_")
    if is_model(plain.partition(".")[0]):
        return [plain]
    return difflib.get_close_matches(plain, timm.list_models(), n=3, cutoff=0.5)


def _refuse_repository(name: str, repository: str) -> None:
    """Say what to type for a repository that may hold no timm model."""
    owner, _, model = repository.partition("/")
    translated = next(
        (re.sub(pattern, timms, model.lower()) for pattern, timms in _WORDS if re.fullmatch(pattern, model.lower())),
        model,
    )
    translated = translated.lower().replace("-", "_")
    near = [translated] if is_model(translated.partition(".")[0]) else _find_near(model)[:1]
    known = f"the timm name {near[0]} for timm's version of it, or " if near and owner != "timm" else ""
    raise VitpruneError(
        f"{name}: no such folder; type {known}{HUB}{repository} if that repository holds a model of "
        "timm or transformers"
    )


def fetch(name: str, model_args: Mapping[str, Any] | None = None) -> nn.Module:
    """Build a timm model with its weights from the hub.

    Args:
        name: timm name, or ``hf-hub:OWNER/NAME``.
        model_args: what timm is to create it with.

    Raises:
        VitpruneError: if they cannot be fetched.
    """
    # The hub client logs every retry; the one line below says it all.
    from huggingface_hub.utils import logging as hub_logging

    verbosity = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()
    try:
        model = timm.create_model(name, pretrained=True, **(model_args or {}))
    except Exception as error:
        reason = _reason(error)
        if isinstance(error, KeyError | RuntimeError) and name.startswith(HUB):
            raise VitpruneError(
                f"{name}: that repository does not hold a timm model ({reason}); name the timm model, and pass its "
                "file of weights as `checkpoint`"
            ) from error
        raise VitpruneError(
            f"{name}: its weights could not be fetched from the hub ({reason}); "
            "get the file another way and pass it as `checkpoint`"
        ) from error
    finally:
        hub_logging.set_verbosity(verbosity)
    if model_args:
        model.model_args = dict(model_args)
    return model


def fetch_folder(name: str) -> Path | None:
    """Fetch a repository whose model timm cannot load by itself: one that was pruned, or of transformers.

    Args:
        name: ``hf-hub:OWNER/NAME``, with ``@REVISION`` perhaps.

    Returns:
        Its folder in the hub's cache, called by the commit that it is of; None where timm loads the model.

    Raises:
        VitpruneError: if it cannot be fetched.
    """
    repository, _, revision = name.removeprefix(HUB).partition("@")
    fetched = {"repo_id": repository, "revision": revision or None}
    try:
        folder = Path(snapshot_download(allow_patterns=["config.json", PLAN_FILE], **fetched))
        config = json.loads((folder / "config.json").read_text())
        if not is_of_transformers(config) and not (folder / PLAN_FILE).is_file():
            return None
        return Path(snapshot_download(allow_patterns=[*PATTERNS, PLAN_FILE], **fetched))
    except Exception as error:  # of the client, of its transport, of the network
        raise VitpruneError(
            f"{name}: it could not be fetched from the hub ({_reason(error)}); get its files another way"
        ) from error


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()).split(". ")[0] or type(error).__name__


def build_untrained(name: str) -> nn.Module:
    """Build a timm model with random weights, to look at what it consists of.

    Of a repository on the hub nothing but the description is fetched, where timm can build its model.

    Args:
        name: timm name, or ``hf-hub:OWNER/NAME``, whose description comes from the hub.

    Raises:
        VitpruneError: if there is no such model.

    >>> build_untrained("vit_tiny_patch16_224").num_classes
    1000
    """
    name = spell(name)
    if not name.startswith(HUB):
        check_name(name)
    else:
        folder = fetch_folder(name)
        if folder is not None:
            return load_folder(folder).eval()
    try:
        return timm.create_model(name, pretrained=False).eval()
    except Exception as error:
        raise VitpruneError(f"{name}: it cannot be built ({_reason(error)})") from error


def find_hub_weights(name: str) -> Path | None:
    """Return the file in the hub's cache that ``load`` would read for a timm name or ``hf-hub:OWNER/NAME``.

    None where there is no such name, its weights were not fetched yet, or they do not come from the hub.
    """
    name = spell(name)
    files: tuple[str, ...] = _HUB_FILES
    if name.startswith(HUB):
        location = name.removeprefix(HUB)
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
