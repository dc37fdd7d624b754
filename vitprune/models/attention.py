"""Attention whose query/key and value widths need not be equal, and how a model of timm gets it.

timm's ``Attention`` computes queries, keys and values of one width in one product. Here each has a product of its own,
so that a dimension of queries and keys, one of values, or a whole head can be taken out by itself.

Letters: B images, N tokens, D embedding width, h heads, d width of a head, q of its queries and keys, v of its values.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import use_fused_attn
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from vitprune.entry import entry
from vitprune.errors import VitpruneError
from vitprune.models.left_out import is_left_out

# Kinds of units that attention has; see ``units``.
QK, VO, HEADS = "qk", "vo", "heads"


class SplitAttention(nn.Module):
    """Multi-head self-attention with linear layers ``q``, ``k``, ``v`` and ``proj``.

    Rows of ``q``, ``k`` and ``v`` and columns of ``proj`` stand head by head.

    Attributes:
        num_heads: h.
        scale: what logits are multiplied with; that of the model it came from, whatever width is left.
        fused_attn: whether torch's fused kernels are used.

    >>> attention = SplitAttention(dim=12, num_heads=3, qk_width=2, v_width=4, scale=0.5)
    >>> attention(torch.randn(2, 5, 12)).shape
    torch.Size([2, 5, 12])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qk_width: int,
        v_width: int,
        scale: float,
        *,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads, self.scale = num_heads, scale
        self.fused_attn = use_fused_attn()
        self.q = nn.Linear(dim, num_heads * qk_width, bias=qkv_bias)
        self.k = nn.Linear(dim, num_heads * qk_width, bias=qkv_bias)
        self.v = nn.Linear(dim, num_heads * v_width, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(num_heads * v_width, dim, bias=proj_bias)
        self.proj_drop = nn.Dropout(proj_drop)

    @property
    def qk_width(self) -> int:
        """Width of a head's queries and keys."""
        return self.q.out_features // self.num_heads

    @property
    def v_width(self) -> int:
        """Width of a head's values."""
        return self.v.out_features // self.num_heads

    def split(self, x_BNX: Tensor) -> Tensor:
        """Return what is computed for all heads [B, N, h * x] head by head [B, h, N, x]."""
        return x_BNX.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def forward(self, x_BND: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Return the attention's output [B, N, D].

        Args:
            x_BND: normalised tokens.
            attn_mask: added to the logits, broadcast to [B, h, N, N]; None for none.
            is_causal: not supported, as no Vision Transformer asks for it.
        """
        return self.attend(x_BND, x_BND, attn_mask, is_causal)[0]

    def attend(
        self, from_BMD: Tensor, x_BND: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return the output [B, M, D] for queries of some tokens, and the keys of all [B, h, N, q]."""
        query, key, value = self.split(self.q(from_BMD)), self.split(self.k(x_BND)), self.split(self.v(x_BND))
        drop = self.attn_drop.p if self.training else 0.0
        if self.fused_attn:
            mixed = nn.functional.scaled_dot_product_attention(
                query, key, value, attn_mask=attn_mask, dropout_p=drop, is_causal=is_causal, scale=self.scale
            )
        else:
            if is_causal:
                raise VitpruneError("attention without fused kernels is not causal")
            logits = (query * self.scale) @ key.transpose(-2, -1)
            logits = logits if attn_mask is None else logits + attn_mask
            mixed = self.attn_drop(logits.softmax(dim=-1)) @ value
        return self.proj_drop(self.proj(mixed.transpose(1, 2).flatten(2))), key


def find_attention(model: nn.Module) -> dict[str, nn.Module]:
    """Return the attention of the Transformer blocks, by name, in block order.

    >>> import timm
    >>> list(find_attention(timm.create_model("vit_tiny_patch16_224", depth=2)))
    ['blocks.0.attn', 'blocks.1.attn']
    """
    return {
        f"{name}.attn": module.attn
        for name, module in model.named_modules()
        if isinstance(getattr(module, "attn", None), nn.Module) and hasattr(module, "mlp")
    }


def why_not(attention: nn.Module, kind: str) -> str | None:
    """Say why units of a kind cannot be taken out of an attention; None where they can.

    Args:
        attention: of a block.
        kind: ``qk``, ``vo`` or ``heads``.
    """
    if type(attention) is SplitAttention or is_left_out(attention):
        return None
    name = type(attention).__name__
    # Exact types: a subclass may compute its answer in another way.
    if type(attention) is not Attention:
        where = type(attention).__module__.rpartition(".")[2]
        return _REASONS.get(f"{where}.{name}") or _REASONS.get(name) or f"{name} is no attention that vitprune knows"
    if kind == QK and not _is_identity(attention.q_norm, attention.k_norm):
        return f"{name} normalises queries and keys, so taking one of their dimensions out would change the others"
    if kind in (VO, HEADS) and not _is_identity(getattr(attention, "norm", nn.Identity())):
        return f"{name} normalises what its heads answer, so taking one out would change the others"
    if getattr(attention, "gate", None) is not None:
        return f"{name} gates what its heads answer"
    return None


_REASONS: Mapping[str, str] = {
    "EvaAttention": "EvaAttention turns queries and keys by rotary position embeddings",
    "AttentionRope": "AttentionRope turns queries and keys by rotary position embeddings",
    "WindowAttention": "WindowAttention adds a position bias within windows",
    "beit.Attention": "BEiT's attention adds a bias for the positions of two tokens",
    "vision_transformer_sam.Attention": "SAM's attention adds a bias for the positions of two tokens",
    "TalkingHeadAttn": "TalkingHeadAttn mixes its heads",
    "ClassAttn": "ClassAttn asks for the class token alone",
    "XCA": "XCA normalises queries and keys and attends to channels",
}


def _is_identity(*modules: nn.Module) -> bool:
    return all(isinstance(module, nn.Identity) for module in modules)


def check_attention(model: nn.Module, kinds: Sequence[str]) -> None:
    """Refuse kinds of units that a model's attention does not have.

    Raises:
        VitpruneError: naming the first kind, where, and why.
    """
    found = find_attention(model)
    for kind in kinds:
        if not found:
            raise VitpruneError(f"part {kind}: {type(model).__name__} has no block with attention and an FFN")
        for name, attention in found.items():
            reason = why_not(attention, kind)
            if reason:
                raise VitpruneError(f"part {kind}: {name}: {reason}")


@entry
@torch.no_grad()
def split_attention(model: nn.Module, names: Sequence[str] | None = None) -> nn.Module:
    """Return a copy in which attention is ``SplitAttention``; its answers are the same but for rounding.

    Args:
        model: timm Vision Transformer.
        names: of the attentions; None: of every block that has one that is not left out.

    Raises:
        VitpruneError: if one of them cannot be written so.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=1).eval()
    >>> type(split_attention(model).blocks[0].attn).__name__
    'SplitAttention'
    """
    result = copy.deepcopy(model)
    found = find_attention(result)
    for name in found if names is None else names:
        attention = found[name]
        if type(attention) is Attention:
            for kind in (QK, VO):
                reason = why_not(attention, kind)
                if reason:
                    raise VitpruneError(f"{name}: {reason}")
            result.set_submodule(name, _split(attention))
        elif names is not None and type(attention) is not SplitAttention:
            raise VitpruneError(f"{name}: {why_not(attention, QK)}")
    return result


def _split(attention: nn.Module) -> SplitAttention:
    qkv, proj = attention.qkv, attention.proj
    result = SplitAttention(
        qkv.in_features,
        attention.num_heads,
        attention.head_dim,
        attention.head_dim,
        attention.scale,
        qkv_bias=qkv.bias is not None,
        proj_bias=proj.bias is not None,
        attn_drop=attention.attn_drop.p,
        proj_drop=attention.proj_drop.p,
    ).to(qkv.weight)
    for linear, weight in zip((result.q, result.k, result.v), qkv.weight.chunk(3), strict=True):
        linear.weight.copy_(weight)
    if qkv.bias is not None:
        for linear, bias in zip((result.q, result.k, result.v), qkv.bias.chunk(3), strict=True):
            linear.bias.copy_(bias)
    result.proj.load_state_dict(proj.state_dict())
    result.fused_attn = attention.fused_attn
    return result.train(attention.training)


def describe_attention(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return what weights do not tell of each ``SplitAttention``, by name; JSON values."""
    return {
        name: {"num_heads": module.num_heads, "scale": module.scale}
        for name, module in model.named_modules()
        if type(module) is SplitAttention
    }


def restore_attention(model: nn.Module, described: Mapping[str, Mapping[str, Any]]) -> nn.Module:
    """Return a copy of a freshly built dense model with the attention that ``describe_attention`` described."""
    result = split_attention(model, list(described)) if described else model
    for name, facts in described.items():
        attention = result.get_submodule(name)
        attention.num_heads, attention.scale = facts["num_heads"], facts["scale"]
    return result
