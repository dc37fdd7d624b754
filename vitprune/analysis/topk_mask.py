"""The paper's pruning experiment: keep the top-K neurons of each FFN and mask a share of the others.

Letters: B images, N tokens, H hidden neurons, L FFNs, C classes, K neurons per FFN.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn

from vitprune.answers import ask, of_classes
from vitprune.data import Batches, on_device
from vitprune.discovery.discover import Discovery, check_class_scores
from vitprune.errors import VitpruneError
from vitprune.models.path_layers import find_path_layers
from vitprune.models.trunk import resolve_scope, scope_slice
from vitprune.models.units import hook_hidden
from vitprune.options import CLEAN, ONE_PLAN, ORACLE
from vitprune.progress import Track, untracked
from vitprune.sharing import sum_of_all

# Neurons per FFN to spare, and shares of the others to mask, where nobody says otherwise.
TOP_KS, MASK_SHARES = (1, 5, 10, 20, 50), (0.1, 0.3, 0.5, 1.0)


@dataclass(frozen=True)
class TopKRow:
    """What one way to mask leaves of the accuracy.

    Attributes:
        mask: ``oracle class`` (each image masked by the scores of its *true* class, which no deployed model knows),
            ``one plan for all`` (the mean over classes), or ``clean``.
        tokens: where neurons are masked: ``cls``, ``patch`` or ``all``.
        top_k: neurons per FFN that are never masked.
        mask_share: share of the other neurons that is masked, lowest scores first, in [0, 1].
        num_neurons_masked: in all FFNs.
        probability: mean probability of the true class, in [0, 1].
        top1: accuracy, in [0, 1].
        num_images: evaluated.
    """

    mask: str
    tokens: str
    top_k: int
    mask_share: float
    num_neurons_masked: int
    probability: float
    top1: float
    num_images: int


@torch.no_grad()
def measure_topk_mask(
    model: nn.Module,
    batches: Batches,
    found: Discovery,
    *,
    top_ks: Sequence[int] = TOP_KS,
    mask_shares: Sequence[float] = MASK_SHARES,
    tokens: Sequence[str] = ("cls", "all"),
    depth: int | None = None,
    track: Track = untracked,
) -> list[TopKRow]:
    """Mask the neurons that a class needs least and measure what the model still knows.

    Args:
        model: timm Vision Transformer in eval mode.
        batches: images other than the run's, and their labels, all of classes that the run has scores of.
        found: class scores.
        top_ks: nodes per layer of the paths to spare.
        mask_shares: shares of the others to mask, each in [0, 1].
        tokens: scopes, each ``cls``, ``patch`` or ``all``.
        depth: mask in the first so many layers only; None: in all.
        track: wraps (items, description), for progress.

    Returns:
        The undisturbed model's row first, then one per combination and kind of mask.

    Raises:
        VitpruneError: if an argument is out of range, an image's class is not in ``found``, or that has paths only.

    Source:
        arXiv:2503.09046, figure "top-K"; neurons are ranked by their mean score in the path search rather than by how
        often they lie on a path, and the one-plan figure is ours.
    """
    check_class_scores(found)
    for share in mask_shares:
        if not 0 <= share <= 1:
            raise VitpruneError(f"mask share must be in [0, 1], got {share}")
    layers = find_path_layers(model, found.nodes)
    if min(top_ks, default=0) < 1 or max(top_ks) > min(layer.num_units for layer in layers):
        raise VitpruneError(f"top_k must be between 1 and the number of neurons, got {list(top_ks)}")
    if depth is not None and not 1 <= depth <= len(layers):
        raise VitpruneError(f"depth must be between 1 and {len(layers)}, got {depth}")
    masked_in = {layer.name for layer in layers[:depth]}
    rows = [TopKRow(CLEAN, "", 0, 0.0, 0, *_measure(model, batches, found, None, slice(None)))]
    combinations = list(product((ORACLE, ONE_PLAN), tokens, top_ks, mask_shares))
    for kind, scope, top_k, share in track(combinations, "mask"):
        factors = {name: _factors(found.class_scores[name], kind, top_k, share) for name in masked_in}
        num_masked = sum(int((factor_CH[0] == 0).sum()) for factor_CH in factors.values())
        measured = _measure(model, batches, found, factors, scope_slice(model, resolve_scope(model, scope)))
        rows.append(TopKRow(kind, scope, top_k, share, num_masked, *measured))
    return rows


def _factors(scores_CH: Tensor, kind: str, top_k: int, share: float) -> Tensor:
    """Return 0 for the masked neurons of every class, 1 for the others [C, H]."""
    if kind == ONE_PLAN:
        scores_CH = scores_CH.mean(0, keepdim=True).expand_as(scores_CH)
    order_CH = scores_CH.sort(dim=1, descending=True, stable=True).indices
    num_others = scores_CH.shape[1] - top_k
    masked = order_CH[:, scores_CH.shape[1] - round(share * num_others) :]
    return torch.ones_like(scores_CH).scatter_(1, masked, 0.0)


def _measure(model, batches, found: Discovery, factors, scope: slice) -> tuple[float, float, int]:
    row_of = {index: row for row, index in enumerate(found.classes)}
    layers = [] if factors is None else [each for each in find_path_layers(model, found.nodes) if each.name in factors]
    probability, right, count = 0.0, 0, 0
    for images, labels in on_device(model, batches):
        absent = [int(label) for label in labels if int(label) not in row_of]
        if absent:
            raise VitpruneError(f"class {absent[0]} has images but no scores in the run; choose with `classes`")
        rows_B = torch.tensor([row_of[int(label)] for label in labels])

        def mask(name: str, h_BNH: Tensor, rows_B: Tensor = rows_B) -> Tensor:
            h_BNH = h_BNH.clone()
            h_BNH[:, scope] *= factors[name][rows_B].unsqueeze(1).to(h_BNH.device, h_BNH.dtype)
            return h_BNH

        with hook_hidden(model, layers, mask):
            probabilities_BC = of_classes(ask(model, images)).float().softmax(-1)
        probability += float(probabilities_BC.gather(1, labels.unsqueeze(1)).sum())
        right += int((probabilities_BC.argmax(1) == labels).sum())
        count += len(labels)
    if count == 0:
        raise VitpruneError("no images to evaluate on")
    probability, right, count = sum_of_all(probability, right, count)
    return probability / count, right / count, count
