"""What stands where an attention or an FFN was: a bias, or a map of each token by itself.

Letters: B images, N tokens, D embedding width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

BIAS, MAP = "bias", "map"


class Bias(nn.Module):
    """Answer every token with the same vector: what is left of a layer of width 0.

    >>> Bias(torch.ones(4))(torch.randn(2, 3, 4)).shape
    torch.Size([2, 3, 4])
    """

    def __init__(self, bias_D: Tensor) -> None:
        super().__init__()
        self.bias = nn.Parameter(bias_D.detach().clone())

    def forward(self, x_BND: Tensor, **_attention: object) -> Tensor:
        """Return the bias for every token [B, N, D]; what attention is told beside them plays no part."""
        return self.bias.expand_as(x_BND)


class TokenMap(nn.Module):
    """Answer every token by a linear map of it, called ``proj`` as in attention.

    >>> TokenMap(torch.eye(4), torch.zeros(4))(torch.randn(2, 3, 4)).shape
    torch.Size([2, 3, 4])
    """

    def __init__(self, weight_DD: Tensor, bias_D: Tensor) -> None:
        super().__init__()
        self.proj = nn.Linear(weight_DD.shape[1], weight_DD.shape[0]).to(weight_DD)
        with torch.no_grad():
            self.proj.weight.copy_(weight_DD)
            self.proj.bias.copy_(bias_D)

    def forward(self, x_BND: Tensor, **_attention: object) -> Tensor:
        """Return the mapped tokens [B, N, D]; what attention is told beside them plays no part."""
        return self.proj(x_BND)


def is_left_out(module: nn.Module) -> bool:
    """Tell whether a module stands where a layer was."""
    return type(module) in (Bias, TokenMap)


def describe_left_out(model: nn.Module) -> dict[str, str]:
    """Return what stands where a layer was, by its name: ``bias`` or ``map``.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=1)
    >>> model.blocks[0].attn = Bias(torch.zeros(192))
    >>> describe_left_out(model)
    {'blocks.0.attn': 'bias'}
    """
    return {
        name: BIAS if type(module) is Bias else MAP for name, module in model.named_modules() if is_left_out(module)
    }


def restore_left_out(model: nn.Module, described: Mapping[str, str]) -> nn.Module:
    """Put into a freshly built dense model, in place, what ``describe_left_out`` described; weights are zeros.

    >>> import timm
    >>> model = restore_left_out(timm.create_model("vit_tiny_patch16_224", depth=1), {"blocks.0.mlp": "map"})
    >>> model.blocks[0].mlp.proj.weight.shape
    torch.Size([192, 192])
    """
    for name, kind in described.items():
        layer = model.get_submodule(name)
        dim = (layer.fc2 if hasattr(layer, "fc2") else layer.proj).out_features
        zeros_D = torch.zeros(dim)
        model.set_submodule(name, Bias(zeros_D) if kind == BIAS else TokenMap(torch.zeros(dim, dim), zeros_D))
    return model
