"""Multiply-accumulates of a model, and the speed-up that they allow at most."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vitprune.entry import entry
from vitprune.errors import VitpruneError
from vitprune.models.trunk import plain_attention
from vitprune.models.units import find_feed_forwards
from vitprune.views import data_config


@entry
@torch.no_grad()
def count_macs(model: nn.Module) -> int:
    """Count the multiply-accumulates of one image: linear layers, convolutions and attention's matrix products.

    >>> import timm
    >>> count_macs(timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32).eval())
    3003264
    """
    model = copy.deepcopy(model).cpu().float().requires_grad_(False)
    image = torch.zeros(1, *data_config(model)["input_size"])
    # Without fused attention, so that it is counted as the matrix products it is.
    with plain_attention(model), FlopCounterMode(display=False) as counter:
        try:
            model(image)
        except (AssertionError, IndexError, RuntimeError) as error:
            raise VitpruneError(
                f"{type(model).__name__} does not read images {list(image.shape[1:])}, which its pretrained_cfg says "
                f"({str(error).splitlines()[0]}); set pretrained_cfg['input_size'] to what it was built for"
            ) from error
    return counter.get_total_flops() // 2


@dataclass(frozen=True)
class Sizes:
    """How large a model is.

    Attributes:
        num_parameters: of all layers.
        macs: multiply-accumulates of one image.
        size_bytes: of its weights, as stored.
    """

    num_parameters: int
    macs: int
    size_bytes: int


def measure_sizes(model: nn.Module) -> Sizes:
    """Return how large a model is."""
    size_bytes = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    return Sizes(count_parameters(model), count_macs(model), size_bytes)


def count_parameters(model: nn.Module) -> int:
    """Count all parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


@entry
@torch.no_grad()
def ffn_share(model: nn.Module) -> float:
    """Return the share of the model's multiply-accumulates spent in its FFNs, in (0, 1).

    >>> import timm
    >>> round(ffn_share(timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32).eval()), 2)
    0.49
    """
    model = copy.deepcopy(model).cpu().float()
    total = count_macs(model)
    for ffn in find_feed_forwards(model):
        down = model.get_submodule(ffn.down_proj)
        model.set_submodule(ffn.name, _Zero(down.out_features))
    return 1 - count_macs(model) / total


class _Zero(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(*x.shape[:-1], self.width)


def amdahl_ceiling(macs_dense: int, macs_pruned: int) -> float:
    """Return the speed-up that fewer multiply-accumulates allow at most; what is not removed still has to run.

    >>> amdahl_ceiling(1250, 900)
    1.3888888888888888
    """
    return macs_dense / macs_pruned
