"""Heads of attention, by what the path search says of their dimensions.

Letters: C classes, L attentions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vitprune.discovery.discover import Discovery, check_class_scores
from vitprune.errors import VitpruneError


def head_scores(found: Discovery) -> dict[str, Tensor]:
    """Return how much each head brings to a class: the sum of the mean scores of its dimensions.

    Args:
        found: with attention among its nodes.

    Returns:
        Name of an attention -> float32 [C, heads]; rows as ``found.classes``.

    Raises:
        VitpruneError: if its paths go through no attention, or it has paths only.

    >>> import timm
    >>> from vitprune import discover
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=5).eval()
    >>> batches = [(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 4]))]
    >>> head_scores(discover(model, batches, nodes=["attention"]))["blocks.0.attn"].shape
    torch.Size([2, 3])
    """
    if not found.heads:
        raise VitpruneError("the paths of the run go through no attention; discover with `nodes` ffn and attention")
    check_class_scores(found)
    return {name: found.class_scores[name].unflatten(1, (heads, -1)).sum(2) for name, heads in found.heads.items()}


def class_heads(found: Discovery, *, highest: bool = True) -> dict[int, Tensor]:
    """Return, for each class, the nodes of one whole head of every attention: the one that brings most, or least.

    Returns:
        class index -> int64 [L, D]; L attentions, D dimensions of the widest head. A narrower head repeats its first.

    Raises:
        VitpruneError: as in ``head_scores``.

    >>> import timm
    >>> from vitprune import discover
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=5).eval()
    >>> batches = [(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 4]))]
    >>> heads = class_heads(discover(model, batches, nodes=["attention"]))
    >>> {index: tuple(nodes.shape) for index, nodes in heads.items()}
    {0: (1, 64), 4: (1, 64)}
    """
    scores = head_scores(found)
    widths = {name: found.class_scores[name].shape[1] // heads for name, heads in found.heads.items()}
    widest = max(widths.values())
    chosen: dict[int, Tensor] = {}
    for row, index in enumerate(found.classes):
        nodes = []
        for name, score_CA in scores.items():
            head = int((score_CA[row] if highest else -score_CA[row]).argmax())
            places = torch.arange(widest)
            nodes.append(head * widths[name] + torch.where(places < widths[name], places, 0))
        chosen[index] = torch.stack(nodes)
    return chosen


def node_names(found: Discovery) -> Callable[[str, int], str]:
    """Return how a node of a layer is written: a neuron as its index, a dimension of attention as head and place in it.

    >>> import timm
    >>> from vitprune import discover
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=5).eval()
    >>> batches = [(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 4]))]
    >>> named = node_names(discover(model, batches, nodes=["ffn", "attention"]))
    >>> named("blocks.0.attn", 130), named("blocks.0.mlp", 130)
    ('h2.2', '130')
    """
    widths = {name: found.class_scores[name].shape[1] // heads for name, heads in found.heads.items()}
    return lambda layer, node: f"h{node // widths[layer]}.{node % widths[layer]}" if layer in widths else str(node)
