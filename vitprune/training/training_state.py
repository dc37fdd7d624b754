"""The state of a training on disk: tensors and numbers, nothing that runs when it is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from vitprune.errors import VitpruneError
from vitprune.files import read_tensors, write_tensors

KIND = "training"


@dataclass(frozen=True)
class TrainingState:
    """Where a training stands.

    Attributes:
        epoch: that is being trained, from 0.
        step: steps of it that are done.
        seconds: that were spent training.
        model: state dict of the student.
        optimizer: its ``state_dict``.
        ema: state dict of the running mean; empty where there is none.
        best: state dict of the best epoch; empty before the first.
        scaler: state of the gradients' scale in half precision; empty where there is none.
        log: a row for each epoch that is done.
        totals: sums of the losses over the steps of this epoch.
    """

    epoch: int
    step: int
    seconds: float
    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Any]
    ema: Mapping[str, Tensor] = field(default_factory=dict)
    best: Mapping[str, Tensor] = field(default_factory=dict)
    scaler: Mapping[str, Any] = field(default_factory=dict)
    log: tuple[Mapping[str, Any], ...] = ()
    totals: Mapping[str, float] = field(default_factory=dict)


def write_state(state: TrainingState, path: str | Path) -> None:
    """Write a state; whole or not at all.

    Raises:
        VitpruneError: if the optimiser keeps what is neither tensor nor number.

    >>> import tempfile, torch
    >>> state = TrainingState(1, 2, 3.0, {"w": torch.ones(2)}, {"state": {0: {"step": torch.tensor(4.0)}}})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_state(state, Path(folder) / "state.safetensors")
    ...     read_state_file(Path(folder) / "state.safetensors").optimizer
    {'state': {0: {'step': tensor(4.)}}}
    """
    tensors: dict[str, Tensor] = {}
    facts = {
        "epoch": state.epoch,
        "step": state.step,
        "seconds": state.seconds,
        "log": list(state.log),
        "totals": dict(state.totals),
        **{name: _pack(getattr(state, name), name, tensors) for name in ("optimizer", "scaler")},
    }
    for name in ("model", "ema", "best"):
        tensors.update({f"{name}/{key}": value for key, value in getattr(state, name).items()})
    contiguous = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    write_tensors(path, contiguous, kind=KIND, facts=facts)


def read_state_file(path: str | Path) -> TrainingState:
    """Read what ``write_state`` wrote.

    Raises:
        VitpruneError: if there is no such file, or it is another one.
    """
    tensors, facts = read_tensors(path, kind=KIND)
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "ema": {}, "best": {}}
    for key, value in tensors.items():
        part, _, name = key.partition("/")
        if part in parts:
            parts[part][name] = value
    packed = {name: _unpack(facts[name], tensors) for name in ("optimizer", "scaler")}
    return TrainingState(
        facts["epoch"],
        facts["step"],
        facts["seconds"],
        **parts,
        **packed,
        log=tuple(facts["log"]),
        totals=facts["totals"],
    )


def _pack(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Return JSON values for nested mappings and lists; tensors go to ``tensors`` by where they are."""
    if isinstance(value, Tensor):
        tensors[path] = value
        return {"tensor": path}
    if isinstance(value, Mapping):
        return {"items": [[key, _pack(each, f"{path}/{key}", tensors)] for key, each in value.items()]}
    if isinstance(value, list | tuple):
        return {"list": [_pack(each, f"{path}/{index}", tensors) for index, each in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    raise VitpruneError(
        f"this optimiser keeps a {type(value).__name__} ({path}), which no checkpoint holds; choose another `opt`"
    )


def _unpack(packed: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    ((kind, content),) = packed.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "items":
        return {key: _unpack(each, tensors) for key, each in content}
    return [_unpack(each, tensors) for each in content] if kind == "list" else content
