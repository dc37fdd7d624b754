"""A teacher too large for one GPU: each process holds a part of its blocks, which meet where they are needed."""

from __future__ import annotations

import torch
from torch import nn

from vitprune.errors import VitpruneError
from vitprune.models.units import find_groups
from vitprune.processes import Processes
from vitprune.views import block_of


def spread_teacher(teacher: nn.Module, processes: Processes, device: torch.device) -> nn.Module:
    """Leave in this process its share of the weights of a teacher's blocks; the others hold the rest.

    Each block is gathered while images pass through it, and given up again. It answers as before.

    Args:
        teacher: changed in place; best still in the host's memory, so that no GPU has to hold all of it.
        processes: that train together, at least two.
        device: of this process; where weights are that belong to no block.

    Raises:
        VitpruneError: for one process alone, or a model that has no blocks with units.

    Source:
        ``torch.distributed.fsdp.fully_shard``; Zhao et al., arXiv:2304.11277.

    >>> spread_teacher(nn.Identity(), Processes(), torch.device("cpu"))
    Traceback (most recent call last):
        ...
    vitprune.errors.VitpruneError: `shard_teacher` shares a teacher out among processes, and there is one; use torchrun
    """
    from torch.distributed.fsdp import fully_shard

    check_several(processes)
    for name in dict.fromkeys(block_of(group.name) for group in find_groups(teacher)):
        fully_shard(teacher.get_submodule(name), reshard_after_forward=True)
    return teacher.to(device)


def check_several(processes: Processes) -> None:
    """Refuse to share out what a process has for itself.

    Raises:
        VitpruneError: for one process alone.
    """
    if processes.count < 2:
        raise VitpruneError("`shard_teacher` shares a teacher out among processes, and there is one; use torchrun")
