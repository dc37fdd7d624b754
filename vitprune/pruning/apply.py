"""Take the units of a plan out of a model: masked (reversible) or removed (smaller weights).

Both give the same logits: that is the law of the package.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from vitprune.pruning.plan import Plan, fit_plan
from vitprune.seen_images import seen_by


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
            weight = model.get_submodule(group.read_by).weight
            columns = group.columns(plan.removed(group.name)).to(weight.device)
            taken.append((weight, columns, weight[:, columns].clone()))
            weight[:, columns] = 0
    try:
        yield model
    finally:
        with torch.no_grad():
            for weight, columns, values in taken:
                weight[:, columns] = values


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
    with torch.no_grad():
        for group in groups:
            weight = result.get_submodule(group.read_by).weight
            weight[:, group.columns(plan.removed(group.name)).to(weight.device)] = 0
    return remember(result, plan.calibration)


def remove_neurons(model: nn.Module, plan: Plan) -> nn.Module:
    """Return a copy with smaller linear layers, without the units that the plan removes.

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
    for group in groups:
        removed = plan.removed(group.name)
        if len(removed) == 0:
            continue
        for part in group.owned:
            indices = part.indices(removed, group.num_units, group.unit_size)
            prune[part.axis](result.get_submodule(part.linear), indices.tolist())
    return remember(result, plan.calibration)


def remember(model: nn.Module, seen: frozenset[str]) -> nn.Module:
    """Record in a model, in place, which images had a say in it beside those that it knows; see ``SeenImages``."""
    if seen:
        model.calibration = seen_by(model) | seen
    return model
