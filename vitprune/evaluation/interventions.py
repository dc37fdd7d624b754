"""Scale the neurons of each image's own path and see what the model answers.

Letters: B images, T scoped tokens, H hidden neurons, L FFNs, K neurons per FFN, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vitprune.feed_forward import FeedForward, hook_hidden


@torch.no_grad()
def measure_intervention(
    model: nn.Module,
    ffns: Sequence[FeedForward],
    images: Tensor,
    neurons_BLK: Tensor,
    *,
    factor: float,
    tokens: slice,
) -> Tensor:
    """Return class probabilities [B, C] with the path neurons multiplied by ``factor``; nothing else is held fixed.

    Args:
        model: timm Vision Transformer in eval mode.
        ffns: the FFNs that the path goes through.
        images: [B, 3, height, width], normalised by the model's own transform.
        neurons_BLK: int64; per image the neurons to scale in each FFN.
        factor: 0 removes them, 2 doubles them.
        tokens: at which tokens.

    Source:
        The manipulation experiment of arXiv:2503.09046.
    """
    position_of = {ffn.name: position for position, ffn in enumerate(ffns)}

    def scale(name: str, h_BNH: Tensor) -> Tensor:
        factors_B1H = torch.ones_like(h_BNH[:, :1])
        factors_B1H.scatter_(2, neurons_BLK[:, position_of[name]].unsqueeze(1), factor)
        h_BNH = h_BNH.clone()
        h_BNH[:, tokens] *= factors_B1H
        return h_BNH

    with hook_hidden(model, ffns, scale):
        return model(images).softmax(-1)
