"""The layers that a path goes through: FFNs, and where it is asked for, attention.

A *node* of an attention layer is one input feature of its output projection ``proj``: one dimension of what one head
makes of the values. The heads stand side by side in that vector.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vitprune.answers import ask
from vitprune.errors import VitpruneError
from vitprune.models.left_out import is_left_out
from vitprune.models.units import FFN, Group, find_feed_forwards, hook_hidden
from vitprune.options import NODES, check_choice
from vitprune.views import block_of

ATTENTION = "attention"
DEFAULT_NODES = (FFN,)


def find_path_layers(model: nn.Module, nodes: Sequence[str] = DEFAULT_NODES) -> list[Group]:
    """Find the layers whose nodes are of some kinds, in the order in which they run.

    Args:
        model: timm Vision Transformer.
        nodes: keys of ``NODES``.

    Raises:
        VitpruneError: if a kind is unknown, or the model has no such layer in one of its blocks.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=2)
    >>> [(layer.name, layer.num_units) for layer in find_path_layers(model, ["ffn", "attention"])][:2]
    [('blocks.0.attn', 192), ('blocks.0.mlp', 768)]
    """
    if not nodes:
        raise VitpruneError(f"`nodes` must be some of {', '.join(NODES)}")
    for kind in nodes:
        check_choice("nodes", kind, NODES)
    layers: list[Group] = []
    for ffn in find_feed_forwards(model):
        if ATTENTION in nodes:
            layers.append(_attention_before(model, ffn))
        if FFN in nodes:
            layers.append(ffn)
    return layers


def count_heads(model: nn.Module, layers: Sequence[Group]) -> dict[str, int]:
    """Return how many heads each attention among layers has; its features are as many equal parts, side by side.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=1)
    >>> count_heads(model, find_path_layers(model, ["ffn", "attention"]))
    {'blocks.0.attn': 3}
    """
    return {layer.name: model.get_submodule(layer.name).num_heads for layer in layers if layer.kind == ATTENTION}


def count_layers(names: Sequence[str]) -> str:
    """Say how many layers of each kind there are.

    >>> count_layers(["blocks.0.attn", "blocks.0.mlp"]), count_layers(["blocks.0.mlp"])
    ('1 attention and 1 FFN', '1 FFN')
    """
    attentions = sum(kind_of_layer(name) == ATTENTION for name in names)
    counts = [(attentions, "attention"), (len(names) - attentions, "FFN")]
    return " and ".join(f"{count} {called}{'s' if count > 1 else ''}" for count, called in counts if count)


def kind_of_layer(name: str) -> str:
    """Return the key of ``NODES`` that a layer's name stands for.

    >>> kind_of_layer("blocks.3.attn"), kind_of_layer("blocks.3.mlp")
    ('attention', 'ffn')
    """
    return ATTENTION if name.rpartition(".")[2] == "attn" else FFN


def _attention_before(model: nn.Module, ffn: Group) -> Group:
    name = f"{block_of(ffn.name)}.attn"
    module = dict(model.named_modules()).get(name)
    proj, num_heads = getattr(module, "proj", None), getattr(module, "num_heads", 0)
    left_out = module is not None and is_left_out(module)
    if left_out or not isinstance(proj, nn.Linear) or not num_heads or proj.in_features % num_heads:
        reason = "was taken out" if left_out else "does not hand equal heads to a 'proj'"
        raise VitpruneError(f"`nodes` {ATTENTION}: {name} {reason}, so no path goes through it; use `nodes` {FFN}")
    return Group(name, ATTENTION, proj.in_features, (), f"{name}.proj")


@torch.no_grad()
def record_hidden(model: nn.Module, layers: Sequence[Group], images: Tensor, *, tokens: slice) -> dict[str, Tensor]:
    """Return what layers hand to their output projections for images [B, ...]: layer name -> [B, T, H]."""
    kept: dict[str, Tensor] = {}
    with hook_hidden(model, layers, lambda name, h_BNH: kept.update({name: h_BNH[:, tokens].clone()})):
        ask(model, images)
    return kept
