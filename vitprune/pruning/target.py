"""What a plan may cost: neurons, parameters, multiply-accumulates or milliseconds, by width of every group.

Letters: H units of a group (hidden neurons of an FFN).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn

from vitprune.entry import entry
from vitprune.errors import VitpruneError
from vitprune.models.macs import count_macs
from vitprune.models.units import FFN, HEADS, QK, VO, Group, find_groups, hook_hidden, kind_of
from vitprune.options import TARGETS
from vitprune.views import block_of, data_config

# Of a cost that is a sum of floats.
ROUNDING = 1e-9


@dataclass(frozen=True)
class Target:
    """A limit and what every width costs towards it.

    Attributes:
        kind: key of ``TARGETS``.
        limit: what the model may cost at most, in the unit of the kind.
        fixed: what the model costs beside its units.
        costs: group name -> cost at 0, 1 .. H units [H + 1]; float64, non-decreasing.
        maps: name of an attention or FFN -> cost of a linear map of each token in its place, where that is told.
    """

    kind: str
    limit: float
    fixed: float
    costs: Mapping[str, Tensor]
    maps: Mapping[str, float] = field(default_factory=dict)

    def predict(self, widths: Mapping[str, int]) -> float:
        """Return what a model of these widths costs."""
        return self.fixed + sum(float(self.costs[name][width]) for name, width in widths.items())

    @property
    def dense(self) -> float:
        """What the model costs before pruning."""
        return self.fixed + sum(float(cost_H[-1]) for cost_H in self.costs.values())

    @property
    def share(self) -> float:
        """Share of what the units cost that has to go, in [0, 1]."""
        return min(max((self.dense - self.limit) / (self.dense - self.fixed), 0.0), 1.0)

    def partly(self, share: float) -> Target:
        """Return a milder target, where only this share of what the units cost has to go."""
        limit = self.dense - share * (self.dense - self.fixed)
        return replace(self, limit=max(limit, self.limit))


@entry
def target_neurons(model: nn.Module, ratio: float) -> Target:
    """Ask for a share of all FFN neurons to be removed.

    Args:
        model: timm Vision Transformer.
        ratio: in [0, 1).

    Raises:
        VitpruneError: if the ratio is out of range.

    >>> import timm
    >>> target_neurons(timm.create_model("vit_tiny_patch16_224", depth=2), 0.5).limit
    768.0
    """
    if not 0 <= ratio < 1:
        raise VitpruneError(f"pruning_ratio must be in [0, 1), got {ratio}")
    groups = find_groups(model)
    limit = sum(group.num_units for group in groups) * (1 - ratio)
    return Target("neurons", limit, 0.0, _linear(dict.fromkeys(groups, 1)))


@entry
def target_parameters(model: nn.Module, limit: float, *, kinds: Sequence[str] = (FFN,)) -> Target:
    """Ask for a number of parameters of the whole model.

    A layer without bias that reads units counts as if it had one, because compensation may give it one.

    Args:
        model: timm Vision Transformer.
        limit: of the whole model; up to 1, a share of what it has.
        kinds: of units that may go; keys of ``KINDS`` but ``layers``.

    Raises:
        VitpruneError: if the model cannot be that small or is smaller already.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=1)
    >>> target = target_parameters(model, 600_000)
    >>> round(target.predict({"blocks.0.mlp": 768})) == sum(p.numel() for p in model.parameters())
    True
    """
    groups = find_groups(model, kinds)
    total = sum(parameter.numel() for parameter in model.parameters())
    for reader in map(model.get_submodule, {group.read_by: None for group in groups if group.kind != QK}):
        total += reader.out_features if reader.bias is None else 0
    return _checked("parameters", limit, total, {group: parameters_per_unit(model, group) for group in groups})


@entry
def target_macs(model: nn.Module, limit: float, *, total: int | None = None, kinds: Sequence[str] = (FFN,)) -> Target:
    """Ask for a number of multiply-accumulates of one image.

    Args:
        model: timm Vision Transformer in eval mode.
        limit: of the whole model; up to 1, a share of what it has.
        total: of the whole dense model, where ``count_macs`` has counted them already.
        kinds: of units that may go; keys of ``KINDS`` but ``layers``.

    Raises:
        VitpruneError: if the model cannot be that small or is smaller already.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=1).eval()
    >>> target_macs(model, 1e8).dense == count_macs(model)
    True
    """
    groups = find_groups(model, kinds)
    tokens = count_tokens(model, groups)
    per_unit = {
        group: tokens[group.name] * macs_per_unit(model, group, num_tokens=tokens[group.name])
        + _compared(model, group, tokens[group.name])
        for group in groups
    }
    return _checked("macs", limit, count_macs(model) if total is None else total, per_unit)


def parameters_per_unit(model: nn.Module, group: Group) -> int:
    """Return how many parameters go with a unit of a group."""
    biases = sum(
        part.copies * (part.unit_size or group.unit_size)
        for part in group.owned
        if part.axis == 0 and model.get_submodule(part.linear).bias is not None
    )
    return macs_per_unit(model, group, num_tokens=0) + biases


def macs_per_unit(model: nn.Module, group: Group, *, num_tokens: int) -> int:
    """Return how many multiply-accumulates of one token go with a unit of a group: the weights that it owns.

    In attention, the products of its dimensions with those of all ``num_tokens`` tokens come to that.
    """
    lengths = [
        model.get_submodule(part.linear).weight.shape[1 - part.axis] * part.copies * (part.unit_size or group.unit_size)
        for part in group.owned
    ]
    return sum(lengths) + _features_attended(group) * num_tokens


def _features_attended(group: Group) -> int:
    """Return how many features of all heads a unit takes out of the two products that see every pair of tokens."""
    if group.kind in (QK, VO):
        return group.owned[0].copies
    return group.unit_size + group.owned[0].unit_size if group.kind == HEADS else 0


def _compared(model: nn.Module, group: Group, num_tokens: int) -> int:
    """Return what a dimension of the keys costs where tokens merge, because these are matched by them."""
    merge = getattr(model.get_submodule(block_of(group.module)), "merge", None)
    if group.kind != QK or merge is None:
        return 0
    second = (num_tokens - merge.num_prefix) // 2
    return group.owned[0].copies * (num_tokens - merge.num_prefix - second) * second


@torch.no_grad()
def count_tokens(model: nn.Module, groups: Sequence[Group]) -> dict[str, int]:
    """Return for how many tokens of one image the units of each group are computed, by name."""
    tokens: dict[str, int] = {}
    parameter = next(model.parameters())
    image = torch.zeros(1, *data_config(model)["input_size"], device=parameter.device, dtype=parameter.dtype)
    with hook_hidden(model, groups, lambda name, h: tokens.update({name: h[..., 0].numel()})):
        model(image)
    return tokens


@entry
def target_latency(
    model: nn.Module, limit: float, *, total: float, tables: Mapping[str, Sequence[tuple[int, float]]]
) -> Target:
    """Ask for a latency, from measured times of every FFN over widths.

    Args:
        model: timm Vision Transformer.
        limit: ms of one run of the whole model.
        total: measured ms of the whole dense model.
        tables: group name -> pairs (width, measured ms), the dense width among them; times between are interpolated,
            and a time above that of a larger width is lowered to it.

    Raises:
        VitpruneError: if the model cannot be that fast or is faster already.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=1)
    >>> target = target_latency(model, 3.0, total=4.0, tables={"blocks.0.mlp": [(384, 1.0), (768, 2.0)]})
    >>> target.fixed, target.predict({"blocks.0.mlp": 576})
    (2.0, 3.5)
    """
    costs = {}
    for group in find_groups(model):
        widths, times = zip(*sorted(tables[group.name]), strict=True)
        grid = np.interp(np.arange(group.num_units + 1), widths, np.minimum.accumulate(times[::-1])[::-1])
        costs[group.name] = torch.from_numpy(grid).double()
    fixed = total - sum(float(cost_H[-1]) for cost_H in costs.values())
    return check_target(Target("latency", limit, fixed, costs))


def _linear(per_unit: Mapping[Group, float]) -> dict[str, Tensor]:
    return {
        group.name: cost * torch.arange(group.num_units + 1, dtype=torch.float64) for group, cost in per_unit.items()
    }


def _checked(kind: str, limit: float, total: float, per_unit: Mapping[Group, float]) -> Target:
    costs = _linear(per_unit)
    limit = limit * total if 0 < limit <= 1 else limit
    return check_target(Target(kind, limit, total - sum(float(cost_H[-1]) for cost_H in costs.values()), costs))


def check_target(target: Target) -> Target:
    """Return a target that can be met.

    Raises:
        VitpruneError: if the model cannot be that small, or is smaller already.
    """
    smallest = target.predict(dict.fromkeys(target.costs, 1))
    what = TARGETS[target.kind]
    if target.limit > target.dense * (1 + ROUNDING):
        raise VitpruneError(f"target of {target.limit:g} {what}: the model has {target.dense:.6g} already")
    if target.limit < smallest:
        least = "neuron in each FFN" if all(kind_of(name) == FFN for name in target.costs) else "unit in each group"
        raise VitpruneError(
            f"target of {target.limit:g} {what}: with one {least} the model still has {smallest:.6g}; ask for more"
        )
    return target
