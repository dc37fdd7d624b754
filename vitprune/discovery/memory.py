"""How much of a search fits into a memory budget.

Letters: B images, L blocks; a row is one image at one quadrature node.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitprune.errors import VitpruneError
from vitprune.models.trunk import plain_attention

GIB = 2**30
CPU_BUDGET_GIB = 2.0
# Measured on ViT-B/16: gradients on their way make half as much again; a block with its tangents holds four times what
# autograd keeps of it.
_GRAPH_OVERHEAD, _TANGENT_OVERHEAD = 1.5, 4


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


def count_rows(model: nn.Module, images: Tensor, memory_gib: float | None) -> tuple[int, int]:
    """Return how many rows fit into one autograd graph of all blocks, and into one block with tangents.

    Args:
        model: timm Vision Transformer with frozen parameters.
        images: [B, 3, height, width]; one is looked at.
        memory_gib: to use beside the weights; None takes 2 on a CPU and four fifths of what is free on a GPU.

    Returns:
        Both at least 1.

    Raises:
        VitpruneError: if the budget is not positive.
    """
    budget = budget_bytes(memory_gib, images.device)
    graph = measure_row_bytes(model, images)
    with plain_attention(model):
        block = measure_row_bytes(model, images) / len(model.blocks)
    return max(1, int(budget / (_GRAPH_OVERHEAD * graph))), max(1, int(budget / (_TANGENT_OVERHEAD * block)))


def budget_bytes(memory_gib: float | None, device: torch.device) -> float:
    """Return the bytes that a search may use.

    Raises:
        VitpruneError: if the budget is not positive.

    >>> budget_bytes(0.5, torch.device("cpu")) / 2**30
    0.5
    """
    if memory_gib is not None:
        if not memory_gib > 0:
            raise VitpruneError(f"memory must be positive, got {memory_gib}")
        return memory_gib * GIB
    if device.type != "cuda":
        return CPU_BUDGET_GIB * GIB
    free = torch.cuda.mem_get_info(device)[0]
    return 0.8 * (free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
