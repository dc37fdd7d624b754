"""Where few quadrature nodes do not tell which neurons score highest.

Letters: Q quadrature nodes, B images, H hidden neurons, K neurons per FFN.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Measured on DeiT-Tiny with 2 Gauss-Legendre nodes, 83 photos x 12 layers: 5 wrong choices, with margins of at most 0.143
# of their spread; 5.6 % of all choices are as close as that.
DOUBT = 0.15


def find_doubtful(score_QBH: Tensor, score_BH: Tensor, top_k: int) -> Tensor:
    """Return the images whose K best neurons the nodes do not settle; int64 [F], ascending.

    A selected neuron leads another by a margin, and each node alone would give another margin. The order of the two is
    settled if the margin is at least ``DOUBT`` times the spread (largest less smallest) of the nodes' margins.

    Args:
        score_QBH: the scores that each node alone would give.
        score_BH: their weighted sum.
        top_k: K.

    >>> a_settled, a_doubtful = [[3.0, 1.0], [5.0, 2.0]], [[3.0, 1.0], [1.0, 2.8]]
    >>> score_QBH = torch.tensor([a_settled, a_doubtful]).transpose(0, 1)
    >>> find_doubtful(score_QBH, score_QBH.mean(0), 1)
    tensor([1])
    """
    best_BK = score_BH.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    others_BH = torch.ones_like(score_BH, dtype=torch.bool).scatter_(1, best_BK, False)
    doubtful_B = torch.zeros(len(score_BH), dtype=torch.bool, device=score_BH.device)
    for best_B1 in best_BK.split(1, dim=1):
        margin_QBH = score_QBH.gather(2, best_B1.expand(len(score_QBH), -1, -1)) - score_QBH
        margin_BH = score_BH.gather(1, best_B1) - score_BH
        close_BH = margin_BH < DOUBT * (margin_QBH.amax(0) - margin_QBH.amin(0))
        doubtful_B |= (close_BH & others_BH).any(1)
    return doubtful_B.nonzero().squeeze(1)
