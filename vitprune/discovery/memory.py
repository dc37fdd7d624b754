"""How many rows (images x quadrature nodes) fit into a memory budget.

Letters: B images.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitprune.errors import VitpruneError

GIB = 2**30
# On a CPU more rows than these only leave its caches.
CPU_BUDGET_GIB, CPU_ROWS = 2.0, 32
# Beside what autograd keeps of a row: gradients on their way, the states of the prefix and their tangents.
_OVERHEAD = 1.5


def measure_row_bytes(model: nn.Module, images: Tensor) -> int:
    """Measure how many bytes autograd keeps of one image [1, 3, height, width] from the stem to the logits.

    The model's own parameters do not count.
    """
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = tensor
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(images[:1].detach().clone().requires_grad_())
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def check_budget(budget_gib: float) -> None:
    """Refuse a budget that is none.

    Raises:
        VitpruneError: if the budget is not positive.
    """
    if not budget_gib > 0:
        raise VitpruneError(f"memory must be positive, got {budget_gib}")


def rows_within(budget_gib: float | None, row_bytes: int, device: torch.device) -> int:
    """Return how many rows may be in an autograd graph at once, at least 1.

    Args:
        budget_gib: memory beside the model's weights; None takes 2 GiB on a CPU and four fifths of what is free on a
            GPU.
        row_bytes: as ``measure_row_bytes`` found.
        device: where the model is.

    Raises:
        VitpruneError: if the budget is not positive.

    >>> rows_within(1.0, 50 * 2**20, torch.device("cpu"))
    13
    """
    if budget_gib is not None:
        check_budget(budget_gib)
    else:
        budget_gib = CPU_BUDGET_GIB
        if device.type == "cuda":
            budget_gib = 0.8 * torch.cuda.mem_get_info(device)[0] / GIB
    rows = max(1, int(budget_gib * GIB / (_OVERHEAD * row_bytes)))
    return min(rows, CPU_ROWS) if device.type == "cpu" else rows
