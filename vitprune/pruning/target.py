"""What a plan may cost: neurons, parameters, multiply-accumulates or milliseconds, by width of every FFN.

Letters: H hidden neurons.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from vitprune.data import data_config
from vitprune.errors import VitpruneError
from vitprune.models.units import FeedForward, find_feed_forwards, hook_hidden
from vitprune.options import TARGETS


@dataclass(frozen=True)
class Target:
    """A limit and what every width costs towards it.

    Attributes:
        kind: key of ``TARGETS``.
        limit: what the model may cost at most, in the unit of the kind.
        fixed: what the model costs beside its FFN neurons.
        costs: FFN name -> cost at 0, 1 .. H neurons [H + 1]; float64, non-decreasing.
    """

    kind: str
    limit: float
    fixed: float
    costs: Mapping[str, Tensor]

    def predict(self, widths: Mapping[str, int]) -> float:
        """Return what a model of these widths costs."""
        return self.fixed + sum(float(self.costs[name][width]) for name, width in widths.items())

    @property
    def dense(self) -> float:
        """What the model costs before pruning."""
        return self.fixed + sum(float(cost_H[-1]) for cost_H in self.costs.values())

    @property
    def share(self) -> float:
        """Share of what the FFN neurons cost that has to go, in [0, 1]."""
        return min(max((self.dense - self.limit) / (self.dense - self.fixed), 0.0), 1.0)

    def partly(self, share: float) -> Target:
        """Return a milder target, where only this share of what the FFN neurons cost has to go."""
        limit = self.dense - share * (self.dense - self.fixed)
        return Target(self.kind, max(limit, self.limit), self.fixed, self.costs)


def target_neurons(model: nn.Module, pruning_ratio: float) -> Target:
    """Ask for a share of all FFN neurons to be removed.

    Args:
        model: timm Vision Transformer.
        pruning_ratio: in [0, 1).

    Raises:
        VitpruneError: if the ratio is out of range.
    """
    if not 0 <= pruning_ratio < 1:
        raise VitpruneError(f"pruning_ratio must be in [0, 1), got {pruning_ratio}")
    ffns = find_feed_forwards(model)
    limit = sum(ffn.num_neurons for ffn in ffns) * (1 - pruning_ratio)
    return Target("neurons", limit, 0.0, _linear(dict.fromkeys(ffns, 1)))


def target_parameters(model: nn.Module, limit: float) -> Target:
    """Ask for a number of parameters of the whole model.

    An output projection without bias counts as if it had one, because compensation may give it one.

    Raises:
        VitpruneError: if the model cannot be that small or is smaller already.
    """
    per_neuron = {}
    for ffn in find_feed_forwards(model):
        ups = [model.get_submodule(name) for name in ffn.up_projs]
        rows = 2 if ffn.packed else 1
        per_neuron[ffn] = model.get_submodule(ffn.down_proj).out_features + sum(
            rows * (up.in_features + (up.bias is not None)) for up in ups
        )
    total = sum(parameter.numel() for parameter in model.parameters())
    for ffn in find_feed_forwards(model):
        down = model.get_submodule(ffn.down_proj)
        total += down.out_features if down.bias is None else 0
    return _checked("parameters", limit, total, per_neuron)


def target_macs(model: nn.Module, limit: float, *, total: int) -> Target:
    """Ask for a number of multiply-accumulates of one image.

    Args:
        model: timm Vision Transformer in eval mode.
        limit: of the whole model.
        total: of the whole dense model, as ``count_macs`` counts them.

    Raises:
        VitpruneError: if the model cannot be that small or is smaller already.
    """
    ffns = find_feed_forwards(model)
    tokens = count_tokens(model, ffns)
    per_neuron = {}
    for ffn in ffns:
        ups = [model.get_submodule(name) for name in ffn.up_projs]
        weights = sum((2 if ffn.packed else 1) * up.in_features for up in ups)
        per_neuron[ffn] = tokens[ffn.name] * (weights + model.get_submodule(ffn.down_proj).out_features)
    return _checked("macs", limit, total, per_neuron)


@torch.no_grad()
def count_tokens(model: nn.Module, ffns: Sequence[FeedForward]) -> dict[str, int]:
    """Return how many tokens of one image each FFN computes, by name."""
    tokens: dict[str, int] = {}
    parameter = next(model.parameters())
    image = torch.zeros(1, *data_config(model)["input_size"], device=parameter.device, dtype=parameter.dtype)
    with hook_hidden(model, ffns, lambda name, h: tokens.update({name: h[..., 0].numel()})):
        model(image)
    return tokens


def target_latency(
    model: nn.Module, limit: float, *, total: float, tables: Mapping[str, Sequence[tuple[int, float]]]
) -> Target:
    """Ask for a latency, from measured times of every FFN over widths.

    Args:
        model: timm Vision Transformer.
        limit: ms of one run of the whole model.
        total: measured ms of the whole dense model.
        tables: FFN name -> pairs (width, measured ms), the dense width among them; times between are interpolated, and
            a time above that of a larger width is lowered to it.

    Raises:
        VitpruneError: if the model cannot be that fast or is faster already.
    """
    costs = {}
    for ffn in find_feed_forwards(model):
        widths, times = zip(*sorted(tables[ffn.name]), strict=True)
        grid = np.interp(np.arange(ffn.num_neurons + 1), widths, np.minimum.accumulate(times[::-1])[::-1])
        costs[ffn.name] = torch.from_numpy(grid).double()
    fixed = total - sum(float(cost_H[-1]) for cost_H in costs.values())
    return _check(Target("latency", limit, fixed, costs))


def _linear(per_neuron: Mapping[FeedForward, float]) -> dict[str, Tensor]:
    return {ffn.name: cost * torch.arange(ffn.num_neurons + 1, dtype=torch.float64) for ffn, cost in per_neuron.items()}


def _checked(kind: str, limit: float, total: float, per_neuron: Mapping[FeedForward, float]) -> Target:
    costs = _linear(per_neuron)
    return _check(Target(kind, limit, total - sum(float(cost_H[-1]) for cost_H in costs.values()), costs))


def _check(target: Target) -> Target:
    smallest = target.predict(dict.fromkeys(target.costs, 1))
    what = TARGETS[target.kind]
    if target.limit > target.dense:
        raise VitpruneError(f"target of {target.limit:g} {what}: the model has {target.dense:.6g} already")
    if target.limit < smallest:
        raise VitpruneError(
            f"target of {target.limit:g} {what}: with one neuron in each FFN the model still has {smallest:.6g}; "
            "ask for more"
        )
    return target
