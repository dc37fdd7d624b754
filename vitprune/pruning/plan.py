"""A plan: which units every group keeps, and where the decision came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitprune.errors import VitpruneError
from vitprune.files import read_tensors, write_tensors
from vitprune.models.elastic_file import read_ranking
from vitprune.models.facts import Facts
from vitprune.models.identity import architecture
from vitprune.models.saved_folder import PLAN_FILE
from vitprune.models.units import FFN, KINDS, LAYERS, Group, find_groups, kind_of
from vitprune.seal import parsing
from vitprune.table import align


@dataclass(frozen=True)
class Plan:
    """Keep-masks by group name.

    Attributes:
        keep: group name -> bool [H]; True where the unit stays.
        facts: where it came from.
        kinds: group name -> key of ``KINDS``, where it is another one than ``ffn``.

    >>> plan = Plan({"blocks.0.mlp": torch.tensor([True, False, True, False])})
    >>> plan.widths, plan.pruning_ratio
    ({'blocks.0.mlp': 2}, 0.5)
    """

    keep: Mapping[str, Tensor]
    facts: Facts = field(default_factory=Facts)
    kinds: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        rows = [
            (name, KINDS[self.kind(name)], str(len(keep)), str(int(keep.sum()))) for name, keep in self.keep.items()
        ]
        return align(("group", "units", "before", "kept"), rows)

    def __repr__(self) -> str:
        return str(self)

    def kind(self, name: str) -> str:
        """Return which kind of units a group has."""
        return self.kinds.get(name, FFN)

    @property
    def parts(self) -> tuple[str, ...]:
        """Kinds of units that the plan speaks of, in the order of ``KINDS``."""
        present = {self.kind(name) for name in self.keep}
        return tuple(kind for kind in KINDS if kind in present)

    @property
    def left_out(self) -> frozenset[str]:
        """Names of the attentions and FFNs that go as a whole."""
        return frozenset(
            name.removesuffix(f".{LAYERS}")
            for name, keep in self.keep.items()
            if self.kind(name) == LAYERS and not keep.any()
        )

    def only(self, *parts: str) -> Plan:
        """Return the plan of some kinds of units alone."""
        keep = {name: mask for name, mask in self.keep.items() if self.kind(name) in parts}
        return replace(self, keep=keep, kinds={name: kind for name, kind in self.kinds.items() if name in keep})

    @property
    def widths(self) -> dict[str, int]:
        """Units kept, by group name."""
        return {name: int(keep.sum()) for name, keep in self.keep.items()}

    @property
    def num_neurons(self) -> int:
        """Neurons kept in all FFNs."""
        return sum(width for name, width in self.widths.items() if self.kind(name) == FFN)

    @property
    def num_neurons_dense(self) -> int:
        """Neurons before pruning in all FFNs."""
        return sum(len(keep) for name, keep in self.keep.items() if self.kind(name) == FFN)

    @property
    def pruning_ratio(self) -> float:
        """Share of FFN neurons removed, in [0, 1)."""
        return 1 - self.num_neurons / self.num_neurons_dense if self.num_neurons_dense else 0.0

    @property
    def calibration(self) -> frozenset[str]:
        """Hashes of every image that had a say in the plan or its compensation, as ``SeenImages`` has them."""
        return self.facts.calibration.sha256

    def kept(self, name: str) -> Tensor:
        """Return the indices of the units that a group keeps, ascending (int64)."""
        return self.keep[name].nonzero().squeeze(1)

    def removed(self, name: str) -> Tensor:
        """Return the indices of the units that a group loses, ascending (int64)."""
        return (~self.keep[name]).nonzero().squeeze(1)

    def with_facts(self, **facts: Any) -> Plan:
        """Return the same plan with some facts replaced."""
        return replace(self, facts=replace(self.facts, **facts))

    def write(self, path: str | Path) -> None:
        """Write the plan to a safetensors file."""
        units = [{"name": name, "kind": self.kind(name)} for name in self.keep]
        write_tensors(path, dict(self.keep), kind="plan", facts={"units": units, **self.facts.as_json()})


def read_plan(path: str | Path) -> Plan:
    """Read a plan from its file, or from the folder of a pruned model.

    Raises:
        VitpruneError: if there is none, or it has units of a kind that this version does not know.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     Plan({"blocks.0.mlp": torch.arange(4) < 3}).write(Path(folder) / "plan.safetensors")
    ...     read_plan(folder).widths
    {'blocks.0.mlp': 3}
    """
    path = Path(path)
    path = path / PLAN_FILE if path.is_dir() else path
    tensors, content = read_tensors(path, kind="plan")
    with parsing(path):
        # Version 0.1.0 wrote the names of FFNs alone.
        units = content.get("units") or [{"name": name, "kind": FFN} for name in content["ffns"]]
        unknown = [each for each in units if each["kind"] not in KINDS]
        if unknown:
            raise VitpruneError(
                f"{path}: {unknown[0]['name']} has units of kind '{unknown[0]['kind']}', which this version does not "
                f"know ({', '.join(KINDS)})"
            )
        kinds = {each["name"]: each["kind"] for each in units if each["kind"] != FFN}
        return Plan({each["name"]: tensors[each["name"]].bool() for each in units}, Facts.from_json(content), kinds)


def read_elastic_plan(path: str | Path, ratio: float | None = None) -> Plan:
    """Read from an elastic file which units of the dense model stay at a ratio; None is 0.

    Raises:
        VitpruneError: if the file is missing or no elastic file, or ``ratio`` is out of range or beyond the largest.

    >>> import tempfile, timm
    >>> from vitprune import make_elastic, save_elastic
    >>> model = timm.create_model("vit_tiny_patch16_224", num_classes=5)
    >>> elastic = make_elastic(model, ratios=[0.5], criterion="magnitude", compensation="none")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_elastic(model, elastic, Path(folder) / "tiny.safetensors")
    ...     read_elastic_plan(Path(folder) / "tiny.safetensors", 0.25).pruning_ratio
    0.25
    """
    ranking, facts = read_ranking(path)
    keep, left_out = ranking.keep(ratio or 0.0), ranking.left_out(ratio or 0.0)
    kinds = {name: kind_of(name) for name in keep if kind_of(name) != FFN}
    return Plan(keep, replace(facts, pruning_ratio_asked=ratio or 0.0, stand_ins=left_out or None), kinds)


def find_plan(source: str | Path, ratio: float | None = None) -> Plan | None:
    """Read the plan of what ``vitprune.load`` takes: a pruned folder, or an elastic file at a ratio; else None."""
    source = Path(source)
    if source.suffix == ".safetensors" and source.is_file():
        return read_elastic_plan(source, ratio)
    return read_plan(source) if (source / PLAN_FILE).is_file() else None


def fit_plan(model: nn.Module, plan: Plan) -> list[Group]:
    """Return the model's groups after checking that the plan covers exactly those of its kinds and leaves none empty.

    A group may be empty where its layer goes as a whole.

    Raises:
        VitpruneError: naming both sides of the first mismatch.
    """
    made_for = plan.facts.architecture or architecture(model)
    if made_for != architecture(model):
        raise VitpruneError(f"plan does not fit this model: it is for {made_for}, the model is {architecture(model)}")
    groups = find_groups(model, plan.parts or (FFN,))
    names = [group.name for group in groups]
    if names != list(plan.keep):
        raise VitpruneError(
            f"plan does not fit this model: it covers {_span(list(plan.keep))}, the model has {_span(names)}"
        )
    left_out = plan.left_out
    for group in groups:
        unit = KINDS[group.kind]
        if len(plan.keep[group.name]) != group.num_units:
            raise VitpruneError(
                f"plan does not fit this model: {group.name} has {group.num_units} {unit}s, "
                f"the plan covers {len(plan.keep[group.name])}"
            )
        if group.module not in left_out and not plan.keep[group.name].any():
            raise VitpruneError(f"plan leaves {group.name} without {unit}s")
    return groups


def _span(names: Sequence[str]) -> str:
    what = "FFNs" if all(kind_of(name) == FFN for name in names) else "groups"
    return f"{len(names)} {what} ({names[0]} .. {names[-1]})" if names else "no FFNs"


def plan_from_widths(scores: Mapping[str, Tensor], widths: Mapping[str, int]) -> Plan:
    """Keep the highest-scoring units of each group.

    Args:
        scores: group name -> scores [H].
        widths: group name -> units to keep; ties go to the lower index.
    """
    keep = {}
    for name, score_H in scores.items():
        order = score_H.double().sort(descending=True, stable=True).indices
        mask = torch.zeros(len(score_H), dtype=torch.bool)
        mask[order[: widths[name]]] = True
        keep[name] = mask
    return Plan(keep)
