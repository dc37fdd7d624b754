"""The isotropic trunk of a Vision Transformer, taken apart: stem -> blocks -> head.

The path search continues a forward pass from the middle of a block, so it needs the parts of a block: attention,
then the FFN split at its hidden vector. That holds for pre-norm blocks of timm's vit, deit, deit3, beit, eva, dinov2,
dinov3 and siglip models. ``check_trunk`` proves it on real input: the parts put together must give the model's logits.

Letters: B images (or images x nodes), N tokens, T scoped tokens, D embedding width,
H hidden neurons.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from vitprune.answers import ask
from vitprune.errors import VitpruneError
from vitprune.models.attention import SplitAttention
from vitprune.models.units import Group, hook_hidden
from vitprune.options import TOKENS, check_choice
from vitprune.views import has_class_token, num_prefix_tokens, num_tokens_read


@dataclass(frozen=True)
class CleanPass:
    """What one undisturbed forward pass leaves behind.

    Attributes:
        stem_BND: tokens that enter the first block.
        block_args: per block, the other arguments that the model hands it (rotary embeddings, position bias).
        hidden_BTH: per layer, what its output projection reads at the scoped tokens, w̄_l.
        logits_BC: the model's answer.
    """

    stem_BND: Tensor
    block_args: tuple[tuple[tuple[Any, ...], dict[str, Any]], ...]
    hidden_BTH: tuple[Tensor, ...]
    logits_BC: Tensor


def resolve_scope(model: nn.Module, tokens: str | None) -> str:
    """Name the token scope: the one asked for, or the class token where the head reads it, else the patches.

    Raises:
        VitpruneError: if the scope is unknown, or ``cls`` is asked of a model without a class token.
    """
    if tokens is None:
        return "cls" if has_class_token(model) and num_tokens_read(model) is not None else "patch"
    check_choice("tokens", tokens, TOKENS)
    if tokens == "cls" and not has_class_token(model):
        raise VitpruneError(f"{type(model).__name__} has no class token; use `tokens` patch")
    return tokens


def scope_slice(model: nn.Module, scope: str) -> slice:
    """Return the scoped tokens as a slice of the sequence; register tokens are neither ``cls`` nor ``patch``."""
    if scope == "cls":
        return slice(0, 1)
    return slice(num_prefix_tokens(model), None) if scope == "patch" else slice(None)


@torch.no_grad()
def record_clean(model: nn.Module, layers: Sequence[Group], images: Tensor, *, tokens: slice) -> CleanPass:
    """Run the model once on images [B, 3, height, width] and keep what the search starts from."""
    block_args, stem, hidden = [], [], []

    def keep_args(_block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not stem:
            stem.append(args[0])
        block_args.append((args[1:], kwargs))

    handles = [block.register_forward_pre_hook(keep_args, with_kwargs=True) for block in model.blocks]
    try:
        with hook_hidden(model, layers, lambda _name, h_BNH: hidden.append(h_BNH[:, tokens])):
            logits = ask(model, images)
    finally:
        for handle in handles:
            handle.remove()
    return CleanPass(stem[0], tuple(block_args), tuple(hidden), logits)


def check_trunk(model: nn.Module, layers: Sequence[Group], images: Tensor) -> None:
    """Refuse a model whose parts, put together by this file, do not give its own logits on ``images``.

    Raises:
        VitpruneError: if the model has no isotropic trunk of pre-norm blocks with one FFN each.
    """
    reason = _trunk_mismatch(model, layers, images)
    if reason:
        raise VitpruneError(
            f"{type(model).__name__} has no isotropic trunk (stem -> blocks -> head): {reason}; the path search cannot "
            "follow it, but the criteria that prune by images can, such as `criterion` taylor"
        )


@torch.no_grad()
def _trunk_mismatch(model: nn.Module, layers: Sequence[Group], images: Tensor) -> str | None:
    num_blocks, found = len(getattr(model, "blocks", [])), [layer.name for layer in layers]
    for kind, called in (("mlp", "FFNs"), ("attn", "attentions")):
        of_kind = [
            name for name in found if name.endswith(f".{kind}") or (kind == "mlp" and not name.endswith(".attn"))
        ]
        if of_kind not in ([], [f"blocks.{index}.{kind}" for index in range(num_blocks)]):
            return f"its {called} are not blocks.0.{kind} .. blocks.N.{kind} but {of_kind[0]} .. {of_kind[-1]}"
    if any(getattr(block, "merge", None) is not None for block in model.blocks):
        return "its tokens merge, and a path goes through all of them"
    if not all(hasattr(model, part) for part in ("norm", "forward_head")):
        return "it has no 'norm' and 'forward_head' after its blocks"
    images = images[:1]
    clean = record_clean(model, layers, images, tokens=slice(None))
    if clean.stem_BND.ndim != 3 or len(clean.block_args) != num_blocks:
        return f"its blocks work on tensors of shape {list(clean.stem_BND.shape)}, not [images, tokens, width]"
    x_BND = clean.stem_BND
    num_read = num_tokens_read(model)
    heads = {layer.name: w_BNH for layer, w_BNH in zip(layers, clean.hidden_BTH, strict=True)}
    for index, (block, args) in enumerate(zip(model.blocks, clean.block_args, strict=True)):
        if not all(hasattr(block, part) for part in ("norm1", "attn", "norm2", "mlp")):
            return f"its {type(block).__name__} lacks one of norm1, attn, norm2, mlp"
        try:
            mid_BND = attend(block, x_BND, args)
            whole_BND = mid_BND + scale_branch(block, 2, block.mlp(block.norm2(mid_BND)))
        except (TypeError, RuntimeError) as error:
            return f"its {type(block).__name__} is not attention followed by an FFN ({error})"
        if not torch.allclose(whole_BND, block(x_BND, *args[0], **args[1]), rtol=1e-4, atol=1e-4):
            return f"its {type(block).__name__} is not x + attention(norm(x)) followed by x + FFN(norm(x))"
        o_BND = heads.get(f"blocks.{index}.attn")
        if o_BND is not None:
            whole_mid = x_BND + scale_branch(block, 1, block.attn.proj(o_BND))
            if not torch.allclose(whole_mid, mid_BND, rtol=1e-4, atol=1e-4):
                return f"its {type(block.attn).__name__} does not end with its output projection"
        if num_read and can_attend_first(block):
            first = attend_first(block, x_BND, num_read)
            if not torch.allclose(first, mid_BND[:, :num_read], rtol=1e-4, atol=1e-4):
                return f"its {type(block.attn).__name__} does more than scaled dot-product attention"
        x_BND = whole_BND
    read_BND = x_BND if num_read is None else x_BND[:, :num_read]
    if not torch.allclose(head(model, read_BND), clean.logits_BC, rtol=1e-3, atol=1e-3):
        return "norm and head on the last block's output do not give its logits"
    return None


def scale_branch(block: nn.Module, branch: int, y: Tensor) -> Tensor:
    """Apply the LayerScale of branch 1 (attention) or 2 (FFN), whichever way the block spells it."""
    layer_scale, gamma = getattr(block, f"ls{branch}", None), getattr(block, f"gamma_{branch}", None)
    if layer_scale is not None:
        return layer_scale(y)
    return y if gamma is None else gamma * y


def attend(block: nn.Module, x_BND: Tensor, args: tuple[tuple[Any, ...], dict[str, Any]]) -> Tensor:
    """Return the residual stream between attention and FFN."""
    return x_BND + scale_branch(block, 1, block.attn(block.norm1(x_BND), *args[0], **args[1]))


def can_attend_first(block: nn.Module) -> bool:
    """Tell whether ``attend_first`` knows this block's attention."""
    return type(block.attn) in (Attention, SplitAttention)


def attend_first(block: nn.Module, x_BND: Tensor, num_tokens: int) -> Tensor:
    """Return ``attend`` for the first tokens only: queries for them, keys and values for all."""
    attn, z_BND = block.attn, block.norm1(x_BND)
    if type(attn) is SplitAttention:
        return x_BND[:, :num_tokens] + scale_branch(block, 1, attn.attend(z_BND[:, :num_tokens], z_BND)[0])
    width = attn.qkv.out_features // 3
    bias = attn.qkv.bias
    q_bias, kv_bias = (None, None) if bias is None else (bias[:width], bias[width:])
    q = nn.functional.linear(z_BND[:, :num_tokens], attn.qkv.weight[:width], q_bias)
    kv = nn.functional.linear(z_BND, attn.qkv.weight[width:], kv_bias)

    def split_heads(tensor: Tensor) -> Tensor:
        return tensor.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)

    key, value = kv.chunk(2, dim=-1)
    query, key, value = attn.q_norm(split_heads(q)), attn.k_norm(split_heads(key)), split_heads(value)
    weights = ((query * attn.scale) @ key.transpose(-2, -1)).softmax(dim=-1)
    mixed = (weights @ value).transpose(1, 2).flatten(2)
    mixed = getattr(attn, "norm", nn.Identity())(mixed)
    if getattr(attn, "gate", None) is not None:
        mixed = mixed * attn.gate(z_BND[:, :num_tokens]).sigmoid()
    return x_BND[:, :num_tokens] + scale_branch(block, 1, attn.proj(mixed))


def head(model: nn.Module, x_BND: Tensor) -> Tensor:
    """Return logits [B, C] from the last block's output (or its leading tokens, where the head reads only those)."""
    return model.forward_head(model.norm(x_BND))


@contextmanager
def plain_attention(model: nn.Module) -> Iterator[None]:
    """Switch fused attention off for a while: its steps then show, and autograd keeps what each needs."""
    fused = [module for module in model.modules() if getattr(module, "fused_attn", False)]
    try:
        for module in fused:
            module.fused_attn = False
        yield
    finally:
        for module in fused:
            module.fused_attn = True
