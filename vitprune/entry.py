"""What every verb does before it begins, and puts back after it: one decorator for all of them.

Models in wrappers that change nothing are taken out, weights that are no numbers are refused by name, every module is
in eval mode while the verb runs, batches are checked as they are read, and warnings of other libraries stay inside.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import nn

from vitprune.batches import DOOR, GivenBatches, given, inside_door
from vitprune.errors import VitpruneError, VitpruneNote
from vitprune.progress import Reported, forget_work, report, untracked
from vitprune.wrappers import TRANSFORMERS, check_unwrapped, evaluating, library_of, unwrap

Verb = TypeVar("Verb", bound=Callable[..., Any])

# Parameters by the words of the command line, and as they were called before.
RENAMED: Mapping[str, str] = {"ratio": "pruning_ratio", "compensate": "compensation"}
_BATCHES = ("batches", "calibration", "evaluation")


def entry(verb: Verb | None = None, *, any_module: bool = False, loads: bool = False) -> Verb:
    """Make a function one that users call.

    Args:
        verb: a function whose models and ``batches`` come from a user.
        any_module: whether a module that holds a timm model and does more than that is used as it is.
        loads: whether the function returns a model with weights that nobody has looked at yet.

    Raises:
        VitpruneError: when the function is called, if weights hold NaN or infinity, or a wrapper does more than the
            model inside.

    >>> @entry
    ... def is_training(model):
    ...     return model.training
    >>> model = nn.Dropout()
    >>> is_training(model), model.training
    (False, True)
    """
    if verb is None:
        return lambda function: entry(function, any_module=any_module, loads=loads)
    signature = inspect.signature(verb)
    takes_progress = "track" in signature.parameters or "batches" in signature.parameters

    @wraps(verb)
    def called(*args: Any, **kwargs: Any) -> Any:
        kwargs = _rename(verb.__name__, signature, kwargs)
        progress = kwargs.pop("progress", False) if takes_progress else False
        bound = signature.bind(*args, **kwargs)
        if progress and "track" in signature.parameters and bound.arguments.get("track", untracked) is untracked:
            bound.arguments["track"] = report
        models: list[nn.Module] = []
        for name, value in bound.arguments.items():
            bound.arguments[name] = _prepare(name, value, models, any_module=any_module, loads=loads)
            if progress and isinstance(bound.arguments[name], GivenBatches):
                bound.arguments[name] = Reported(bound.arguments[name], verb.__name__)
        with ExitStack() as stack:
            stack.enter_context(evaluating(*models))
            outermost = not inside_door()
            if outermost:
                for model in models:
                    check_finite_weights(model)
                DOOR.inside = True
                stack.callback(setattr, DOOR, "inside", False)
                stack.callback(forget_work)
                stack.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")
                warnings.simplefilter("always", VitpruneNote)
            result = verb(*bound.args, **bound.kwargs)
            if loads:
                named = bound.arguments.get("checkpoint") or next(iter(bound.arguments.values()))
                check_finite_weights(result, str(named))
            return result

    called.__signature__ = _shown(signature, progress=takes_progress)
    called.is_entry = True
    return called


def check_finite_weights(model: nn.Module, source: str = "") -> None:
    """Refuse a model whose weights hold NaN or infinity.

    Args:
        model: any module.
        source: where they were read, for the message.

    Raises:
        VitpruneError: naming the first such tensor.

    >>> model = nn.Linear(2, 1)
    >>> model.bias.data[0] = float("nan")
    >>> check_finite_weights(model)
    Traceback (most recent call last):
    vitprune.errors.VitpruneError: weights: bias holds NaN or infinity in 1 of 1 numbers; take another checkpoint
    """
    buffers = {name for name, _buffer in model.named_buffers(remove_duplicate=False)}
    for key, value in model.state_dict().items():
        if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.is_meta:
            continue
        # Buffers may hold the infinite bounds of a mask or of a clip.
        may_be_infinite = key in buffers and not key.endswith(("running_mean", "running_var"))
        wrong = torch.isnan(value) if may_be_infinite else ~torch.isfinite(value)
        if bool(wrong.any()):
            raise VitpruneError(
                f"{source or 'weights'}: {key} holds NaN or infinity in {int(wrong.sum())} of {value.numel()} numbers; "
                "take another checkpoint"
            )


def _prepare(name: str, value: Any, models: list[nn.Module], *, any_module: bool, loads: bool) -> Any:
    if isinstance(value, nn.Module):
        value = unwrap(value)
        # What models of transformers answer is no tensor.
        if not loads and (not any_module or library_of(value) == TRANSFORMERS):
            check_unwrapped(value)
        models.append(value)
        return value
    if name == "models" and isinstance(value, Mapping):
        return {key: _prepare(key, each, models, any_module=any_module, loads=loads) for key, each in value.items()}
    if name in _BATCHES:
        return given(value)
    return value


def _rename(verb: str, signature: inspect.Signature, given_names: dict[str, Any]) -> dict[str, Any]:
    """Return arguments by the names of the function, whichever of two words they were given by."""
    result = dict(given_names)
    for new, old in RENAMED.items():
        for asked, known in ((new, old), (old, new)):
            if asked in result and asked not in signature.parameters and known in signature.parameters:
                if known in result:
                    raise VitpruneError(f"{verb}: {new} and {old} are one parameter; give it once")
                result[known] = result.pop(asked)
    return result


def _shown(signature: inspect.Signature, *, progress: bool) -> inspect.Signature:
    """Return a signature with what the door adds to it."""
    parameters = list(signature.parameters.values())
    if not progress:
        return signature
    place = next((i for i, each in enumerate(parameters) if each.kind is each.VAR_KEYWORD), len(parameters))
    parameters.insert(place, inspect.Parameter("progress", inspect.Parameter.KEYWORD_ONLY, default=False))
    return signature.replace(parameters=parameters)
