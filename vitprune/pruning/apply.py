"""Take the units of a plan out of a model: masked (reversible) or removed (smaller weights).

Both give the same logits: that is the law of the package.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vitprune.entry import entry
from vitprune.models.left_out import Bias
from vitprune.models.units import HEADS, Group
from vitprune.pruning.plan import Plan, fit_plan
from vitprune.seen_images import seen_by


@entry
@contextmanager
def masked(model: nn.Module, plan: Plan) -> Iterator[nn.Module]:
    """Mask units for a while: zero their columns of the layers that read them in place, then put them back.

    Args:
        model: timm Vision Transformer; changed inside the block, bit for bit itself again after it.
        plan: which units to keep.

    Raises:
        VitpruneError: if the plan is not for this model.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=1)
    >>> with masked(model, Plan({"blocks.0.mlp": torch.arange(768) < 700})):
    ...     int((model.blocks[0].mlp.fc2.weight[:, 700:] != 0).sum())
    0
    """
    groups = fit_plan(model, plan)
    taken = []
    with torch.no_grad():
        for group in groups:
            for tensor, axis, index in _silenced(model, group, plan):
                taken.append((tensor, axis, index, tensor.index_select(axis, index)))
                tensor.index_fill_(axis, index, 0)
    try:
        yield model
    finally:
        with torch.no_grad():
            for tensor, axis, index, values in reversed(taken):
                tensor.index_copy_(axis, index, values)


def _silenced(model: nn.Module, group: Group, plan: Plan) -> Iterator[tuple[Tensor, int, Tensor]]:
    """Yield what is zeroed to mask a group's removed units: a tensor, an axis, and places on it."""
    part = group.silenced
    linear = model.get_submodule(part.linear)
    index = group.indices(part, plan.removed(group.name)).to(linear.weight.device)
    yield linear.weight, part.axis, index
    if part.axis == 0 and linear.bias is not None:
        yield linear.bias, 0, index


@entry
def mask_neurons(model: nn.Module, plan: Plan) -> nn.Module:
    """Return a copy of the same shape in which the removed units have no effect (zero columns in their reader).

    Raises:
        VitpruneError: if the plan is not for this model.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=1)
    >>> mask_neurons(model, Plan({"blocks.0.mlp": torch.arange(768) < 700})).blocks[0].mlp.fc2.in_features
    768
    """
    groups = fit_plan(model, plan)
    result = copy.deepcopy(model)
    silence(result, groups, plan)
    return remember(result, plan.calibration)


@torch.no_grad()
def silence(model: nn.Module, groups: Sequence[Group], plan: Plan) -> None:
    """Zero in place what makes removed units matter: their columns of the layers that read them, or rows of queries.

    Args:
        model: that the groups are of.
        groups: from ``fit_plan``.
        plan: which units stay.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=1)
    >>> plan = Plan({"blocks.0.mlp": torch.arange(768) < 700})
    >>> silence(model, fit_plan(model, plan), plan)
    >>> bool((model.blocks[0].mlp.fc2.weight[:, 700:] == 0).all())
    True
    """
    for group in groups:
        for tensor, axis, index in _silenced(model, group, plan):
            tensor.index_fill_(axis, index, 0)


@entry
def remove_neurons(model: nn.Module, plan: Plan) -> nn.Module:
    """Return a copy with smaller linear layers, without the units that the plan removes.

    Of an attention or FFN that goes as a whole the bias of its output projection is left.

    Raises:
        VitpruneError: if the plan is not for this model.

    Source:
        The slicing is torch-pruning's (arXiv:2301.12900), by its primitives: its dependency graph is not right on
        packed gated FFNs.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=1)
    >>> remove_neurons(model, Plan({"blocks.0.mlp": torch.arange(768) < 700})).blocks[0].mlp.fc2.in_features
    700
    """
    import torch_pruning

    groups = fit_plan(model, plan)
    result = copy.deepcopy(model)
    prune = (torch_pruning.prune_linear_out_channels, torch_pruning.prune_linear_in_channels)
    for name in plan.left_out:
        result.set_submodule(name, _bias_of(result, name))
    gone: dict[tuple[str, int], set[int]] = {}
    for group in groups:
        removed = plan.removed(group.name)
        if group.module in plan.left_out or len(removed) == 0:
            continue
        for part in group.owned:
            gone.setdefault((part.linear, part.axis), set()).update(group.indices(part, removed).tolist())
        if group.kind == HEADS:
            result.get_submodule(group.module).num_heads -= len(removed)
    for (linear, axis), indices in gone.items():
        prune[axis](result.get_submodule(linear), sorted(indices))
    return remember(result, plan.calibration)


def _bias_of(model: nn.Module, name: str) -> Bias:
    layer = model.get_submodule(name)
    reader = layer.proj if hasattr(layer, "proj") else layer.fc2
    bias_D = reader.weight.new_zeros(reader.out_features) if reader.bias is None else reader.bias
    return Bias(bias_D).requires_grad_(reader.weight.requires_grad)


def remember(model: nn.Module, seen: frozenset[str]) -> nn.Module:
    """Record in a model, in place, which images had a say in it beside those that it knows; see ``SeenImages``."""
    if seen:
        model.calibration = seen_by(model) | seen
    return model
