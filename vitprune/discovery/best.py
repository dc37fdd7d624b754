"""Which neurons of an FFN score highest, and of which images that is in doubt.

Letters: V variants, B images, F some of them, H hidden neurons, K neurons per FFN.
"""

from __future__ import annotations

import torch
from torch import Tensor


def best_neurons(score_BH: Tensor, top_k: int) -> Tensor:
    """Return the K neurons with the highest scores [B, K] (int64), best first; ties go to the lower index.

    >>> best_neurons(torch.tensor([[1.0, 3.0, 3.0]]), 2)
    tensor([[1, 2]])
    """
    # Only a stable sort breaks ties alike on every device.
    return score_BH.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]


def find_doubtful(score_BH: Tensor, variants_VBH: Tensor, top_k: int, *, share: float, noise: float = 0) -> Tensor:
    """Return the images whose K best neurons are in doubt; int64 [F], ascending.

    A selected neuron leads another one by a margin. Their order is settled if the margin is at least ``share`` times
    the spread (largest less smallest) of the margins that the variants give, and ``noise`` standard deviations of the
    image's scores beside that.

    Args:
        score_BH: scores of the neurons.
        variants_VBH: scores of the same neurons by other estimates, at least 2.
        top_k: K.
        share: not negative; higher settles less.
        noise: not negative; likewise.

    >>> a_settled, a_doubtful = [[3.0, 1.0], [5.0, 2.0]], [[3.0, 1.0], [1.0, 2.9]]
    >>> variants_VBH = torch.tensor([a_settled, a_doubtful]).transpose(0, 1)
    >>> find_doubtful(variants_VBH.mean(0), variants_VBH, 1, share=0.1)
    tensor([1])
    """
    best_BK = best_neurons(score_BH, top_k)
    others_BH = torch.ones_like(score_BH, dtype=torch.bool).scatter_(1, best_BK, False)
    noise_B1 = noise * score_BH.std(1, keepdim=True)
    doubtful_B = torch.zeros(len(score_BH), dtype=torch.bool, device=score_BH.device)
    for best_B1 in best_BK.split(1, dim=1):
        margin_VBH = variants_VBH.gather(2, best_B1.expand(len(variants_VBH), -1, -1)) - variants_VBH
        margin_BH = score_BH.gather(1, best_B1) - score_BH
        close_BH = margin_BH < share * (margin_VBH.amax(0) - margin_VBH.amin(0)) + noise_B1
        doubtful_B |= (close_BH & others_BH).any(1)
    return doubtful_B.nonzero().squeeze(1)
