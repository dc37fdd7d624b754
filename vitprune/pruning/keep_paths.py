"""Keep the neurons of the class paths and nothing else: the rule of the paper that the path search is from."""

from __future__ import annotations

import torch
from torch import nn

from vitprune.discovery.discover import Discovery, class_paths, only_ffns
from vitprune.entry import entry
from vitprune.errors import VitpruneError
from vitprune.models.facts import Facts
from vitprune.models.identity import architecture
from vitprune.pruning.plan import Plan, fit_plan


@entry
def plan_paths(model: nn.Module, found: Discovery, num_neurons: int) -> Plan:
    """Plan to keep, in every FFN, the neurons of the path of each class.

    A class's path has the neurons that are most often on the paths of its images (``class_paths``); classes share
    neurons, so an FFN keeps fewer than classes times ``num_neurons``.

    Args:
        model: that the discovery is of.
        found: by any method; of the classes that are to be kept (``specialise``).
        num_neurons: K of each class in each FFN, at least 1.

    Raises:
        VitpruneError: if ``num_neurons`` is out of range, the discovery is of another model, or its paths go through
            attention alone.

    Source:
        arXiv:2503.09046, which masks what is on no path; ``prune_as_planned`` takes it out and makes good for it.

    >>> import timm
    >>> from vitprune import discover
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32, num_classes=5).eval()
    >>> batches = [(torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 1, 4]))]
    >>> plan = plan_paths(model, discover(model, batches), 10)
    >>> all(10 <= width <= 30 for width in plan.widths.values())
    True
    """
    found = only_ffns(found)
    sizes = {name: scores.shape[1] for name, scores in found.class_scores.items()}
    narrowest = min(sizes, key=sizes.__getitem__)
    if not 1 <= num_neurons <= sizes[narrowest]:
        raise VitpruneError(
            f"`num_neurons` must be in [1, {sizes[narrowest]}] ({narrowest} has that many), got {num_neurons}"
        )
    paths = class_paths(found, num_neurons)
    keep = {}
    for position, name in enumerate(found.layers):
        on_path = torch.zeros(sizes[name], dtype=torch.bool)
        for neurons_LK in paths.values():
            on_path[neurons_LK[position]] = True
        keep[name] = on_path
    facts = Facts(architecture=architecture(model), keep_paths=num_neurons, calibration=found.seen)
    plan = Plan(keep, facts)
    fit_plan(model, plan)
    return plan
