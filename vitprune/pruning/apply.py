"""Take the neurons of a plan out of a model: masked (reversible) or removed (smaller weights).

Both give the same logits: that is the law of the package.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from vitprune.pruning.plan import Plan, fit_plan


@contextmanager
def masked(model: nn.Module, plan: Plan) -> Iterator[nn.Module]:
    """Mask neurons for a while: zero their columns of the output projections in place, then put them back.

    Args:
        model: timm Vision Transformer; changed inside the block, bit for bit itself again after it.
        plan: which neurons to keep.

    Raises:
        VitpruneError: if the plan is not for this model.
    """
    ffns = fit_plan(model, plan)
    columns = {}
    with torch.no_grad():
        for ffn in ffns:
            weight = model.get_submodule(ffn.down_proj).weight
            removed = plan.removed(ffn.name).to(weight.device)
            columns[ffn.name] = (weight, removed, weight[:, removed].clone())
            weight[:, removed] = 0
    try:
        yield model
    finally:
        with torch.no_grad():
            for weight, removed, values in columns.values():
                weight[:, removed] = values


def mask_neurons(model: nn.Module, plan: Plan) -> nn.Module:
    """Return a copy of the same shape in which the removed neurons have no effect (zero columns in ``fc2``).

    Raises:
        VitpruneError: if the plan is not for this model.
    """
    ffns = fit_plan(model, plan)
    result = copy.deepcopy(model)
    with torch.no_grad():
        for ffn in ffns:
            weight = result.get_submodule(ffn.down_proj).weight
            weight[:, plan.removed(ffn.name).to(weight.device)] = 0
    return result


def remove_neurons(model: nn.Module, plan: Plan) -> nn.Module:
    """Return a copy with smaller linear layers, without the neurons that the plan removes.

    Raises:
        VitpruneError: if the plan is not for this model.

    Source:
        The slicing is torch-pruning's (arXiv:2301.12900), by its primitives: its dependency graph is not right on
        packed gated FFNs.
    """
    import torch_pruning

    ffns = fit_plan(model, plan)
    result = copy.deepcopy(model)
    for ffn in ffns:
        removed = plan.removed(ffn.name)
        if len(removed) == 0:
            continue
        for name in ffn.up_projs:
            torch_pruning.prune_linear_out_channels(result.get_submodule(name), ffn.up_rows(removed).tolist())
        torch_pruning.prune_linear_in_channels(result.get_submodule(ffn.down_proj), removed.tolist())
    return result
