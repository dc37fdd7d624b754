"""Models from their description: what it takes to build one, and how it gets widths and tensors that were stored."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from vitprune.errors import VitpruneError
from vitprune.models.attention import SplitAttention, describe_attention, restore_attention
from vitprune.models.left_out import describe_left_out, restore_left_out
from vitprune.models.merging import describe_merging, set_merging
from vitprune.models.units import find_left
from vitprune.seal import parsing
from vitprune.twins.twin import add_projection, set_norm_eps

CONFIG_FILE = "config.json"
# What a description says beside timm's own keys, where there is such a thing.
ATTENTION_KEY, LEFT_OUT_KEY, MERGE_KEY = "attention", "left_out", "merge"
NORM_EPS_KEY, PROJECTION_KEY, TWIN_KEY = "norm_eps", "projection", "twin"

# Arguments of timm's factory that say where weights and descriptions come from.
_NOT_OF_A_MODEL = frozenset(
    {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "model_name"}
)


def describe(model: nn.Module) -> dict[str, Any]:
    """Return what it takes to build a model again, as timm writes it to ``config.json``.

    Args:
        model: a timm model. If it was created with arguments that timm does not record, they are read from its
            attribute ``model_args`` (a dict); names of its classes from ``label_names`` (a sequence).
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / CONFIG_FILE
        save_config_for_hf(model, str(path), **unrecorded(model))
        return json.loads(path.read_text())


def unrecorded(model: nn.Module) -> dict[str, Any]:
    """Return what timm does not know of a model and is told when it describes it."""
    names = getattr(model, "label_names", None)
    known = {
        "label_names": list(names) if names else None,
        ATTENTION_KEY: describe_attention(model),
        LEFT_OUT_KEY: describe_left_out(model),
        MERGE_KEY: describe_merging(model),
        NORM_EPS_KEY: getattr(model, "norm_eps", None),
        PROJECTION_KEY: _describe_projection(model),
        TWIN_KEY: getattr(model, "twin", None),
    }
    return {
        "model_config": {key: value for key, value in known.items() if value} or None,
        "model_args": getattr(model, "model_args", None) or None,
    }


def build(config: Mapping[str, Any], source: str = CONFIG_FILE) -> nn.Module:
    """Build the dense model that a description is of, with random weights.

    Args:
        config: as ``describe`` gives it.
        source: where it was read, for the message.

    Raises:
        VitpruneError: if this timm cannot build it.
    """
    with parsing(source):
        _check_names_no_code(config, source)
    try:
        model_args = {"num_classes": config["num_classes"], **config.get("model_args", {})}
        model = timm.create_model(config["architecture"], pretrained_cfg=dict(config["pretrained_cfg"]), **model_args)
    except (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise VitpruneError(f"timm {timm.__version__} cannot build the model of {source} ({error!r})") from error
    model.model_args = model_args
    if isinstance(config.get("label_names"), list):
        model.label_names = tuple(config["label_names"])
    return model


def _check_names_no_code(config: Mapping[str, Any], source: str) -> None:
    """Refuse a description that would fetch a model, or read another file, instead of naming an architecture."""
    name, model_args = config["architecture"], config.get("model_args", {})
    if not isinstance(name, str) or not timm.is_model(name):
        raise VitpruneError(f"{source}: timm {timm.__version__} has no architecture {str(name)[:100]!r}")
    foreign = sorted(_NOT_OF_A_MODEL & dict(model_args).keys())
    if foreign:
        raise VitpruneError(
            f"{source}: {foreign[0]} says where to load from, which a description must not; take it out"
        )


def restore(model: nn.Module, config: Mapping[str, Any], source: str = CONFIG_FILE) -> nn.Module:
    """Return a freshly built dense model as a description tells of its attention, missing layers and merging tokens.

    Raises:
        VitpruneError: if it cannot have them.
    """
    try:
        set_norm_eps(model, config.get(NORM_EPS_KEY))
        if config.get(PROJECTION_KEY):
            add_projection(model, config[PROJECTION_KEY])
        if config.get(TWIN_KEY):
            model.twin = config[TWIN_KEY]
        model = restore_attention(model, config.get(ATTENTION_KEY) or {})
        model = restore_left_out(model, config.get(LEFT_OUT_KEY) or {})
        return set_merging(model, config[MERGE_KEY]) if config.get(MERGE_KEY) else model
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError, VitpruneError) as error:
        raise VitpruneError(f"{source}: the model cannot be as described ({error})") from error


def _describe_projection(model: nn.Module) -> int | None:
    """Return the width of what an encoder's embedding is mapped to, as ``add_projection`` adds it."""
    head = getattr(model, "head", None)
    return head.out_features if getattr(model, "num_classes", 1) == 0 and type(head) is nn.Linear else None


def fill(model: nn.Module, state: Mapping[str, Tensor], complaint: str) -> nn.Module:
    """Give a freshly built dense model the widths, dtype and tensors of a state dict."""
    fit_widths(model, {key: tuple(value.shape) for key, value in state.items()})
    problem = find_mismatch(model, state)
    if problem:
        raise VitpruneError(f"{complaint}: {problem}")
    dtypes = {value.dtype for value in state.values() if value.is_floating_point()}
    if len(dtypes) == 1:
        model.to(*dtypes)
    model.load_state_dict(state)
    return model


def fit_widths(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Replace the layers that own units of a freshly built dense model by ones of the stored shapes."""
    names = [part.linear for group in find_left(model) for part in group.owned]
    for attention, module in model.named_modules():
        if type(module) is SplitAttention:
            names += [f"{attention}.{linear}" for linear in ("q", "k", "v", "proj")]
    for name in names:
        stored = shapes.get(f"{name}.weight")
        linear = model.get_submodule(name)
        has_bias = f"{name}.bias" in shapes
        if stored and (stored != tuple(linear.weight.shape) or has_bias != (linear.bias is not None)):
            model.set_submodule(name, nn.Linear(stored[1], stored[0], bias=has_bias))


def find_mismatch(model: nn.Module, state: Mapping[str, Tensor]) -> str | None:
    """Say how a state dict differs from a model's in names or shapes; None where it does not."""
    own = model.state_dict()
    for key in own:
        if key in state and own[key].shape != state[key].shape:
            return f"{key} is {list(state[key].shape)} in the file, {list(own[key].shape)} in the model"
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unexpected:
        return f"the file lacks {name_few(missing)}; the model lacks {name_few(unexpected)}"
    return None


def name_few(names: list[str]) -> str:
    """List the first three names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") if names else "nothing"
