"""Forward-mode derivatives of linear layers and attention.

torch's own forward mode multiplies a linear layer's input with the zero tangent of its weights, goes through a softmax
twice, and has no rule for fused attention.

Letters: R rows (images x quadrature nodes), A attention heads, N tokens, E width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.forward_ad import make_dual, unpack_dual
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from vitprune.errors import VitpruneError


class LeanTangents(TorchFunctionMode):
    """While it lasts, inside a dual level, linear layers and attention carry tangents by the rules below.

    Weights and attention masks are constants. What has no rule here goes torch's way.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        rule = _RULES.get(function, function)
        return rule(*args, **(kwargs or {}))


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    x, moved = unpack_dual(input)
    answer = functional.linear(x, weight, bias)
    return answer if moved is None else make_dual(answer, functional.linear(moved, weight))


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **options,
) -> Tensor:
    """Return softmax(scale q kᵀ + mask) v for q, k, v [R, A, N, E]."""
    if dropout_p or any(options.values()):
        raise VitpruneError(
            "the path search cannot follow this attention (dropout or grouped queries); the criteria that prune by "
            "images can, such as `criterion` taylor"
        )
    (q, q_moved), (k, k_moved), (v, v_moved) = (_unpack(tensor) for tensor in (query, key, value))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, q_moved = q * scale, q_moved * scale
    logits = q @ k.transpose(-2, -1)
    if is_causal:
        attn_mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
    if attn_mask is not None:
        logits = logits.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else logits + attn_mask
    weights = logits.softmax(-1)
    moved = q_moved @ k.transpose(-2, -1)
    moved += q @ k_moved.transpose(-2, -1)
    moved *= weights
    moved -= weights * moved.sum(-1, keepdim=True)
    return make_dual(weights @ v, moved @ v + weights @ v_moved)


def _unpack(tensor: Tensor) -> tuple[Tensor, Tensor]:
    primal, tangent = unpack_dual(tensor)
    return primal, torch.zeros_like(primal) if tangent is None else tangent


_RULES = {functional.linear: _linear, functional.scaled_dot_product_attention: _attention}
