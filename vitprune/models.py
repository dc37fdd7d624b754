"""Models: a timm name, a timm name with a checkpoint, or a folder or an elastic file that vitprune wrote."""

from __future__ import annotations

import argparse
import copy
import difflib
import hashlib
import json
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import get_arch_pretrained_cfgs, is_model, load_state_dict, model_entrypoint
from timm.models._hub import save_config_for_hf, save_for_hf
from torch import Tensor, nn

from vitprune.elastic import ELASTIC, Elastic, read_state, write_elastic
from vitprune.errors import VitpruneError
from vitprune.feed_forward import find_feed_forwards
from vitprune.files import atomic_folder, read_kind

WEIGHTS_FILE, CONFIG_FILE, PLAN_FILE = "model.safetensors", "config.json", "plan.safetensors"
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")  # in timm's order
FOLDER_FILES = frozenset({WEIGHTS_FILE, CONFIG_FILE, PLAN_FILE})


def load(
    model: str | Path, *, checkpoint: str | Path | None = None, device: str = "cpu", ratio: float | None = None
) -> nn.Module:
    """Load a model in eval mode.

    Args:
        model: a timm name (weights from the hub unless ``checkpoint`` is given), ``hf-hub:OWNER/NAME``, a folder with
            ``config.json`` and ``model.safetensors``, pruned or not, or an elastic file (``.safetensors``).
        checkpoint: weights for a timm name: .safetensors; .pth, .pt, .bin or .tar (a plain state dict, read without
            running pickled code; timm's, DeiT's and MAE's layouts); or the .npz of google-research ViT. The number
            of classes and the pooling (MAE's ``fc_norm``) follow the checkpoint.
        device: where to put it.
        ratio: of an elastic file, the share of all FFN neurons to be gone, at least; in [0, 1). None: the dense model.

    Returns:
        An ordinary ``nn.Module``.

    Raises:
        VitpruneError: if there is no such model, its weights cannot be fetched, the checkpoint does not fit, or
            ``ratio`` is out of range, beyond the largest of the file, or given with anything else.
    """
    name = str(model)
    check_device(device)
    if Path(name).suffix == ".safetensors":
        if checkpoint is not None:
            raise VitpruneError(f"{name} is a file with its own weights; leave --checkpoint out")
        return _load_elastic(Path(name), 0.0 if ratio is None else ratio).eval().to(device)
    if ratio is not None:
        raise VitpruneError(f"{name} has one width only: ratio is for an elastic file (.safetensors); prune it instead")
    if Path(name).is_dir():
        if checkpoint is not None:
            raise VitpruneError(f"{name} is a folder with its own weights; leave --checkpoint out")
        return _load_folder(Path(name)).eval().to(device)
    if name.startswith("hf-hub:"):
        if checkpoint is not None:
            raise VitpruneError(f"{name} brings its own weights; leave --checkpoint out, or pass a timm name")
    else:
        _check_name(name)
    if checkpoint is None:
        return _fetch(name).eval().to(device)
    return _load_checkpoint(name, Path(checkpoint)).eval().to(device)


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


def _check_name(name: str) -> None:
    if Path(name).is_file() and not is_model(name.partition(".")[0]):
        raise VitpruneError(f"{name} is a file; pass a timm name as the model, and weights as --checkpoint FILE")
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


def _fetch(name: str) -> nn.Module:
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
            "get the file another way and pass --checkpoint FILE"
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


def _load_checkpoint(name: str, path: Path) -> nn.Module:
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
    if _mismatch(model, state):
        filter_state = getattr(
            sys.modules[model_entrypoint(name.partition(".")[0]).__module__], "checkpoint_filter_fn", None
        )
        state = filter_state(state, model) if filter_state else state
    problem = _mismatch(model, state)
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
        raise VitpruneError(f"checkpoint {path} does not fit {name}: nothing in the file for {_few(missing)}")
    model.model_args = model_args
    return model


def _mismatch(model: nn.Module, state: Mapping[str, Tensor]) -> str | None:
    own = model.state_dict()
    for key in own:
        if key in state and own[key].shape != state[key].shape:
            return f"{key} is {list(state[key].shape)} in the file, {list(own[key].shape)} in the model"
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unexpected:
        return f"the file lacks {_few(missing)}; the model lacks {_few(unexpected)}"
    return None


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") if names else "nothing"


def build_dense(folder: str | Path) -> nn.Module:
    """Build the dense model that a pruned folder came from, with random weights: for timing, not for answers.

    Raises:
        VitpruneError: if the folder is no saved model.
    """
    return _build(_read_config(Path(folder))).eval()


def _read_config(folder: Path) -> dict[str, Any]:
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise VitpruneError(f"{folder} is no saved model: it has no {name}")
    try:
        return json.loads((folder / CONFIG_FILE).read_text())
    except json.JSONDecodeError as error:
        raise VitpruneError(f"{folder / CONFIG_FILE}: not a JSON file ({error})") from error


def _load_folder(folder: Path) -> nn.Module:
    weights_path = folder / WEIGHTS_FILE
    model = _build(_read_config(folder))
    try:
        state = load_file(weights_path)
    except SafetensorError as error:
        raise VitpruneError(f"{weights_path}: not a safetensors file ({error})") from error
    return _fill(model, state, f"{weights_path} does not fit its {CONFIG_FILE}")


def _load_elastic(path: Path, ratio: float) -> nn.Module:
    kind = read_kind(path)
    if kind is None:
        raise VitpruneError(f"{path} holds weights without their model; pass a timm name, and this as --checkpoint")
    if kind != ELASTIC:
        raise VitpruneError(f"{path} is no model but a vitprune file of kind '{kind}'")
    config, state = read_state(path, ratio)
    return _fill(_build(config, str(path)), state, f"{path} does not fit its own description")


def _fill(model: nn.Module, state: Mapping[str, Tensor], complaint: str) -> nn.Module:
    """Give a freshly built dense model the widths, dtype and tensors of a state dict."""
    _fit_widths(model, {key: tuple(value.shape) for key, value in state.items()})
    problem = _mismatch(model, state)
    if problem:
        raise VitpruneError(f"{complaint}: {problem}")
    dtypes = {value.dtype for value in state.values() if value.is_floating_point()}
    if len(dtypes) == 1:
        model.to(*dtypes)
    model.load_state_dict(state)
    return model


def describe(model: nn.Module) -> dict[str, Any]:
    """Return what it takes to build a model again, as timm writes it to ``config.json``.

    Args:
        model: a timm model. If it was created with arguments that timm does not record, they are read from its
            attribute ``model_args`` (a dict); names of its classes from ``label_names`` (a sequence).
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / CONFIG_FILE
        save_config_for_hf(model, str(path), **_unrecorded(model))
        return json.loads(path.read_text())


def _unrecorded(model: nn.Module) -> dict[str, Any]:
    """Return what timm does not know of a model and is told when it describes it."""
    names = getattr(model, "label_names", None)
    return {
        "model_config": {"label_names": list(names)} if names else None,
        "model_args": getattr(model, "model_args", None) or None,
    }


def save_elastic(model: nn.Module, elastic: Elastic, path: str | Path) -> None:
    """Write an elastic file: the dense model once, and what every stop changes; whole or not at all.

    Args:
        model: the dense model that ``elastic`` is of; described as in ``save``.
        elastic: from ``vitprune.make_elastic``.
        path: the file, ``.safetensors``; replaced if it exists.

    Raises:
        VitpruneError: if the model is another one, the file would not load again, or it cannot be written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise VitpruneError(f"{path}: an elastic file is called .safetensors")
    if hash_weights(model) != elastic.facts["weights_sha256"]:
        raise VitpruneError(f"{path}: the elastic model was made of other weights than this model has")
    config, state = describe(model), model.state_dict()
    _fill(_build(config, str(path)), state, f"{path} would not load again: the model does not fit its description")
    write_elastic(path, elastic, state=state, ffns=find_feed_forwards(model), config=config)


def _build(config: Mapping[str, Any], source: str = CONFIG_FILE) -> nn.Module:
    try:
        model_args = {"num_classes": config["num_classes"], **config.get("model_args", {})}
        model = timm.create_model(config["architecture"], pretrained_cfg=dict(config["pretrained_cfg"]), **model_args)
    except (KeyError, RuntimeError, TypeError) as error:
        raise VitpruneError(f"timm {timm.__version__} cannot build the model of {source} ({error!r})") from error
    model.model_args = model_args
    if isinstance(config.get("label_names"), list):
        model.label_names = tuple(config["label_names"])
    return model


def _fit_widths(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Replace the FFN projections of a freshly built dense model by ones of the stored shapes."""
    for ffn in find_feed_forwards(model):
        for name in (*ffn.up_projs, ffn.down_proj):
            stored = shapes.get(f"{name}.weight")
            linear = model.get_submodule(name)
            has_bias = f"{name}.bias" in shapes
            if stored and (stored != tuple(linear.weight.shape) or has_bias != (linear.bias is not None)):
                model.set_submodule(name, nn.Linear(stored[1], stored[0], bias=has_bias))


def save(model: nn.Module, folder: str | Path, *, plan: Any = None) -> None:
    """Write ``config.json`` and ``model.safetensors`` in timm's layout, and the plan beside them; all or nothing.

    The written folder is loaded again before it takes its name, so what exists can be read.

    Args:
        model: a timm model, dense or pruned. If it was created with arguments that timm does not record, they are read
            from its attribute ``model_args`` (a dict); names of its classes from ``label_names`` (a sequence).
        folder: replaced if it exists.
        plan: a ``vitprune.Plan``, written to ``plan.safetensors``.

    Raises:
        VitpruneError: if the folder would not load again, or cannot be written.
    """
    with atomic_folder(folder) as temporary:
        save_for_hf(model, temporary, **_unrecorded(model), safe_serialization=True)
        if plan is not None:
            plan.write(temporary / PLAN_FILE)
        _load_folder(temporary)


def keep_classes(model: nn.Module, classes: Sequence[int], *, label_names: Sequence[str] | None = None) -> nn.Module:
    """Return a copy whose classifier answers only some of the classes.

    Args:
        model: timm model with a classifier; stays as it is.
        classes: class indices to keep, each once; output i of the result is class ``classes[i]``.
        label_names: what the kept classes are called (folder names of their images), recorded as ``label_names``.

    Raises:
        VitpruneError: if the classifier is not linear, or a class is unknown, doubled or the only one.

    >>> model = timm.create_model("vit_tiny_patch16_224", depth=1)
    >>> keep_classes(model, [7, 3], label_names=["cock", "shark"]).head.out_features
    2
    """
    num_classes = getattr(model, "num_classes", 0)
    unknown = [index for index in classes if not 0 <= index < num_classes]
    if unknown:
        raise VitpruneError(f"class {unknown[0]} cannot be kept: the model has {num_classes}")
    if len(set(classes)) < max(2, len(classes)):
        raise VitpruneError(f"keep at least two different classes, each once; got {list(classes)}")
    result = copy.deepcopy(model)
    heads = result.get_classifier()
    heads = heads if isinstance(heads, tuple | list) else (heads,)
    for name, module in list(result.named_modules()):
        if any(module is head for head in heads):
            if not isinstance(module, nn.Linear):
                raise VitpruneError(
                    f"{name}: only linear classifiers can be reduced, this is a {type(module).__name__}"
                )
            result.set_submodule(name, _keep_rows(module, list(classes)))
        if getattr(module, "num_classes", None) == num_classes:
            module.num_classes = len(classes)
    result.model_args = {**(getattr(model, "model_args", None) or {}), "num_classes": len(classes)}
    if label_names is not None:
        result.label_names = tuple(label_names)
    return result


def _keep_rows(linear: nn.Linear, rows: list[int]) -> nn.Linear:
    weight, bias = linear.weight, linear.bias
    kept = nn.Linear(linear.in_features, len(rows), bias=bias is not None, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        kept.weight.copy_(weight[rows])
        if bias is not None:
            kept.bias.copy_(bias[rows])
    return kept.train(linear.training).requires_grad_(weight.requires_grad)


def has_classifier(model: nn.Module) -> bool:
    """Tell whether a model has classes to answer; timm's ``num_classes=0`` has none."""
    return getattr(model, "num_classes", 1) > 0


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
