"""A plan: which neurons every FFN keeps, and where the decision came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitprune.errors import VitpruneError
from vitprune.files import read_tensors, write_tensors
from vitprune.models.identity import architecture
from vitprune.models.saved_folder import PLAN_FILE
from vitprune.models.units import FeedForward, find_feed_forwards


@dataclass(frozen=True)
class Plan:
    """Keep-masks by FFN name.

    Attributes:
        keep: FFN name -> bool [H]; True where the neuron stays.
        facts: where it came from (criterion, allocation, ratio, calibration images, hash of the weights); JSON values.
    """

    keep: Mapping[str, Tensor]
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def widths(self) -> dict[str, int]:
        """Neurons kept, by FFN name."""
        return {name: int(keep.sum()) for name, keep in self.keep.items()}

    @property
    def num_neurons(self) -> int:
        """Neurons kept in all FFNs."""
        return sum(self.widths.values())

    @property
    def num_neurons_dense(self) -> int:
        """Neurons before pruning in all FFNs."""
        return sum(len(keep) for keep in self.keep.values())

    @property
    def pruning_ratio(self) -> float:
        """Share of neurons removed, in [0, 1)."""
        return 1 - self.num_neurons / self.num_neurons_dense

    @property
    def calibration(self) -> frozenset[str]:
        """Content hashes of every image that had a say in the plan or its compensation."""
        return frozenset(self.facts.get("calibration", {}).get("sha256", ()))

    def kept(self, name: str) -> Tensor:
        """Return the indices of the neurons that an FFN keeps, ascending (int64)."""
        return self.keep[name].nonzero().squeeze(1)

    def removed(self, name: str) -> Tensor:
        """Return the indices of the neurons that an FFN loses, ascending (int64)."""
        return (~self.keep[name]).nonzero().squeeze(1)

    def write(self, path: str | Path) -> None:
        """Write the plan to a safetensors file."""
        write_tensors(path, dict(self.keep), kind="plan", facts={"ffns": list(self.keep), **self.facts})


def read_plan(path: str | Path) -> Plan:
    """Read a plan from its file, or from the folder of a pruned model.

    Raises:
        VitpruneError: if there is none.
    """
    path = Path(path)
    tensors, facts = read_tensors(path / PLAN_FILE if path.is_dir() else path, kind="plan")
    names = facts.pop("ffns")
    return Plan({name: tensors[name].bool() for name in names}, facts)


def fit_plan(model: nn.Module, plan: Plan) -> list[FeedForward]:
    """Return the model's FFNs after checking that the plan covers exactly them and leaves none empty.

    Raises:
        VitpruneError: naming both sides of the first mismatch.
    """
    ffns = find_feed_forwards(model)
    made_for = plan.facts.get("architecture", architecture(model))
    if made_for != architecture(model):
        raise VitpruneError(f"plan does not fit this model: it is for {made_for}, the model is {architecture(model)}")
    names = [ffn.name for ffn in ffns]
    if names != list(plan.keep):
        raise VitpruneError(
            f"plan does not fit this model: it covers {_span(list(plan.keep))}, the model has {_span(names)}"
        )
    for ffn in ffns:
        if len(plan.keep[ffn.name]) != ffn.num_neurons:
            raise VitpruneError(
                f"plan does not fit this model: {ffn.name} has {ffn.num_neurons} neurons, "
                f"the plan covers {len(plan.keep[ffn.name])}"
            )
        if not plan.keep[ffn.name].any():
            raise VitpruneError(f"plan leaves {ffn.name} without neurons")
    return ffns


def _span(names: Sequence[str]) -> str:
    return f"{len(names)} FFNs ({names[0]} .. {names[-1]})" if names else "no FFNs"


def plan_from_widths(scores: Mapping[str, Tensor], widths: Mapping[str, int], facts: Mapping[str, Any]) -> Plan:
    """Keep the highest-scoring neurons of each FFN.

    Args:
        scores: FFN name -> scores [H].
        widths: FFN name -> neurons to keep; ties go to the lower index.
        facts: recorded in the plan.
    """
    keep = {}
    for name, score_H in scores.items():
        order = score_H.double().sort(descending=True, stable=True).indices
        mask = torch.zeros(len(score_H), dtype=torch.bool)
        mask[order[: widths[name]]] = True
        keep[name] = mask
    return Plan(keep, dict(facts))
