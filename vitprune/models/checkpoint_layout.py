"""Which tensors of a checkpoint are the model's: by the prefix whose names fit, whatever the layout is called."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vitprune.errors import VitpruneError, VitpruneNote

# Weights averaged while training, which is what people evaluate; words of a prefix.
_AVERAGED = frozenset({"ema", "teacher", "target", "averaged", "average", "avg", "swa", "shadow"})
# An optimizer may keep its moments by the names of the weights.
_NO_WEIGHTS = frozenset({"optimizer", "optim", "exp_avg", "exp_avg_sq", "momentum_buffer", "optimizers"})
# Of the best prefix's tensors a rival has at least so many.
_RIVAL_SHARE = 0.9
# Of the tensors below a prefix, or of the model's, at least so many have the model's names; else it is another layout.
_FITTING_SHARE = 0.5
_NAMES_OF_HEADS = ("head", "classifier")


@dataclass(frozen=True)
class Found:
    """The tensors of a model in a checkpoint.

    Attributes:
        state: name -> tensor, without what stands before the names.
        prefix: what stands before them, such as ``model.backbone.``.
        others: names of the other tensors.
    """

    state: Mapping[str, Tensor]
    prefix: str
    others: Sequence[str]


def find_state(
    tensors: Mapping[str, Tensor], names: Collection[str], source: str, key: str | None = None
) -> Found | None:
    """Find the tensors of a model by their names.

    Averaged weights are preferred to those that they are an average of, with a note.

    Args:
        tensors: of a checkpoint, by the names on the way to them, joined by dots.
        names: of the model's tensors; numbers in them do not matter.
        source: of the tensors, for the message.
        key: which of several sets of weights is meant, a part of its prefix; "" for the one at the top level.

    Returns:
        The tensors; None where the checkpoint names them in another way.

    Raises:
        VitpruneError: if several sets of weights fit equally well, or none is called ``key``.

    >>> tensors = {"net.module.head.bias": torch.zeros(2), "loss.weight": torch.zeros(1)}
    >>> found = find_state(tensors, ["head.bias"], "tuned.pth")
    >>> list(found.state), found.prefix, found.others
    (['head.bias'], 'net.module.', ['loss.weight'])
    """
    known = {_without_numbers(name) for name in names}
    below: dict[str, dict[str, str]] = {}
    for name in tensors:
        parts = name.split(".")
        for place in range(len(parts)):
            rest = ".".join(parts[place:])
            if _without_numbers(rest) in known:
                prefix = ".".join(parts[:place])
                below.setdefault(f"{prefix}." if prefix else "", {})[rest] = name
    fitting = {prefix: len(own) for prefix, own in below.items() if not _NO_WEIGHTS & set(prefix.split("."))}
    most = max(fitting.values(), default=0)
    rivals = [prefix for prefix, count in fitting.items() if count >= _RIVAL_SHARE * most]
    if key is not None:
        named = [prefix for prefix in fitting if _is_called(prefix, key)]
        most = max((fitting[prefix] for prefix in named), default=0)
        named = [prefix for prefix in named if fitting[prefix] >= _RIVAL_SHARE * most]
        if not named or (rivals and most < _FITTING_SHARE * max(fitting.values())):
            raise VitpruneError(
                f"{source} has no weights of the model below `checkpoint_key` '{key}'; it has some in {_spell(rivals)}"
            )
        rivals = named
    if not rivals:
        return None
    prefix = _prefer(rivals, below, tensors, source)
    count_below = sum(name.startswith(prefix) for name in tensors)
    if fitting[prefix] < _FITTING_SHARE * min(count_below, len(names)):
        return None
    state = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    head = _find_head(tensors, prefix) if "head.weight" in names else {}
    state |= {name: tensors[whole] for name, whole in head.items() if name not in state}
    used = set(head.values()) | {prefix + name for name in state}
    return Found(state, prefix, [name for name in tensors if name not in used])


def _without_numbers(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "#", name)


def _is_called(prefix: str, key: str) -> bool:
    return prefix == "" if not key.strip(".") else f".{key.strip('.')}." in f".{prefix}"


def _spell(prefixes: Sequence[str]) -> str:
    return ", ".join(repr(prefix.rstrip(".")) for prefix in prefixes) or "no place"


def _is_averaged(prefix: str) -> bool:
    return bool(_AVERAGED & set(re.split(r"[^a-z]+", prefix.lower())))


def _prefer(
    rivals: Sequence[str], below: Mapping[str, Mapping[str, str]], tensors: Mapping[str, Tensor], source: str
) -> str:
    """Choose among sets of weights that fit equally well: an average, else the only one there is."""
    if len(rivals) == 1:
        return rivals[0]
    averaged = [prefix for prefix in rivals if _is_averaged(prefix)]
    chosen = (averaged or list(rivals))[0]
    if len(averaged) != 1 and not all(_are_same(below[chosen], below[prefix], tensors) for prefix in rivals):
        raise VitpruneError(
            f"{source} has several sets of weights, in {_spell(rivals)}; say which with `checkpoint_key`"
        )
    if averaged:
        others = [prefix for prefix in rivals if prefix != chosen]
        warnings.warn(
            f"{source}: the averaged weights in {_spell([chosen])} are taken, not those in {_spell(others)}; "
            "`checkpoint_key` chooses",
            VitpruneNote,
            stacklevel=2,
        )
    return chosen


def _are_same(one: Mapping[str, str], other: Mapping[str, str], tensors: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensors[one[name]], tensors[other[name]]) for name in one)


def _find_head(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, str]:
    """Find a classifier beside its encoder: in ``model.head`` where the encoder is in ``model.backbone``."""
    if f"{prefix}head.weight" in tensors:
        return {}
    parts = prefix.rstrip(".").split(".") if prefix else []
    for place in reversed(range(len(parts))):
        above = "".join(f"{part}." for part in parts[:place])
        for name in _NAMES_OF_HEADS:
            weight = tensors.get(f"{above}{name}.weight")
            if weight is not None and weight.dim() == 2:
                found = {f"head.{kind}": f"{above}{name}.{kind}" for kind in ("weight", "bias")}
                return {own: whole for own, whole in found.items() if whole in tensors}
    return {}


def count_kinds(names: Sequence[str]) -> str:
    """Say how many tensors these are and where they come from.

    >>> count_kinds(["loss.weight", "optimizer.state.0", "optimizer.state.1"])
    '3 (optimizer: 2, loss: 1)'
    """
    kinds = Counter(name.partition(".")[0] for name in names).most_common()
    shown = ", ".join(f"{kind}: {count}" for kind, count in kinds[:3])
    return f"{len(names)} ({shown}{', ...' if len(kinds) > 3 else ''})"
