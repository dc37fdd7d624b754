"""Criteria: how much each neuron matters, for every neuron of every FFN.

Letters: B images, N tokens, H hidden neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitprune.data import Batches, on_device
from vitprune.discovery.discover import Discovery
from vitprune.discovery.moments import Moments
from vitprune.discovery.second_order import obs
from vitprune.errors import VitpruneError
from vitprune.feed_forward import FeedForward, capture, find_feed_forwards, hook_hidden
from vitprune.options import CRITERIA, DEFAULT_RIDGE, check_choice

Scores = dict[str, Tensor]


def random(model: nn.Module, *, seed: int = 0) -> Scores:
    """Draw scores uniformly from [0, 1): the baseline that every criterion has to beat.

    Args:
        model: timm Vision Transformer.
        seed: of the draw; the same seed gives the same scores on every machine.

    Returns:
        FFN name -> scores [H]; float32.
    """
    generator = torch.Generator().manual_seed(seed)
    return {ffn.name: torch.rand(ffn.num_neurons, generator=generator) for ffn in find_feed_forwards(model)}


@torch.no_grad()
def magnitude(model: nn.Module) -> Scores:
    r"""Take the norm of all weights that a neuron owns.

    .. math:: s_i = \sqrt{\|W^{up}_{i,:}\|^2 + (b^{up}_i)^2 + \|W^{down}_{:,i}\|^2}

    Args:
        model: timm Vision Transformer. A gated FFN counts both rows of a neuron.

    Returns:
        FFN name -> scores [H]; float32, non-negative; higher is more important.

    Source:
        Li et al., ICLR 2017 (arXiv:1608.08710), over the group of coupled weights as in arXiv:2301.12900.
    """
    scores = {}
    for ffn in find_feed_forwards(model):
        down = model.get_submodule(ffn.down_proj)
        square_H = down.weight.double().square().sum(0)
        rows = ffn.up_rows(torch.arange(ffn.num_neurons))
        for name in ffn.up_projs:
            up = model.get_submodule(name)
            row_square = up.weight.double().square().sum(1)
            if up.bias is not None:
                row_square = row_square + up.bias.double().square()
            square_H = square_H + row_square[rows.to(row_square.device)].view(-1, ffn.num_neurons).sum(0)
        scores[ffn.name] = square_H.sqrt().float().cpu()
    return scores


@torch.no_grad()
def activation(model: nn.Module, batches: Batches) -> Scores:
    r"""Take the mean absolute hidden activation.

    .. math:: s_i = \frac{1}{BN} \sum_{b,n} |h_{bni}|

    Args:
        model: timm Vision Transformer in eval mode.
        batches: pairs of images [B, 3, height, width] (normalised by the model's own transform) and labels, which are
            not used. Read once.

    Returns:
        FFN name -> scores [H]; float32, non-negative; higher is more important.

    Raises:
        VitpruneError: if the model has no supported FFN, or ``batches`` is empty.
    """
    ffns = find_feed_forwards(model)
    sums, counts = _zeros(ffns), dict.fromkeys((ffn.name for ffn in ffns), 0)

    def add(name: str, h_BNH: Tensor) -> None:
        rows = h_BNH.reshape(-1, h_BNH.shape[-1])
        sums[name] += rows.abs().double().sum(0).cpu()
        counts[name] += len(rows)

    for images, _labels in on_device(model, batches):
        with hook_hidden(model, ffns, add):
            model(images)
    _refuse_empty(counts)
    return {name: (total / counts[name]).float() for name, total in sums.items()}


def taylor(model: nn.Module, batches: Batches) -> Scores:
    r"""Estimate how much the loss changes when a neuron is zeroed.

    .. math:: s_i = \frac{1}{B} \sum_b \Big| \sum_n h_{bni} \, \frac{\partial L_b}{\partial h_{bni}} \Big|

    Tokens are summed inside the absolute value: removing a neuron removes it from every token at once.

    Args:
        model: timm Vision Transformer in eval mode; images -> logits [B, C].
        batches: pairs of images [B, 3, height, width] (normalised by the model's own transform) and class labels [B]
            (int64). Read once.

    Returns:
        FFN name -> scores [H]; float32, nats per image, non-negative; higher is more important.

    Raises:
        VitpruneError: if the model has no supported FFN or no classifier, or ``batches`` is empty.

    Source:
        Molchanov et al., ICLR 2017 (arXiv:1611.06440).
    """
    ffns = find_feed_forwards(model)
    sums, count = _zeros(ffns), 0
    for images, labels in on_device(model, batches):
        with capture(model, ffns) as hidden:
            loss = nn.functional.cross_entropy(model(images), labels, reduction="sum")
            gradients = torch.autograd.grad(loss, list(hidden.values()))
        for (name, h_BNH), gradient in zip(hidden.items(), gradients, strict=True):
            product = (h_BNH.detach() * gradient).flatten(1, -2).sum(1)
            sums[name] += product.abs().double().sum(0).cpu()
        count += len(images)
    _refuse_empty({"images": count})
    return {name: (total / count).float() for name, total in sums.items()}


def jas(found: Discovery) -> Scores:
    """Take the mean over classes of a neuron's mean score in the path search.

    Args:
        found: result of ``discover``, by any method.

    Returns:
        FFN name -> scores [H]; float32, of either sign; higher is more important.

    Source:
        arXiv:2503.09046 keeps the K neurons most often on a class's paths; this ranks all neurons, for all classes.
    """
    return {name: scores.mean(0) for name, scores in found.class_scores.items()}


@dataclass(frozen=True)
class Criterion:
    """How to compute a criterion.

    Attributes:
        score: the function.
        needs: names of the arguments that it takes beside the model, as in ``score_neurons``.
        across_ffns: True where scores of different FFNs share a unit, so that one ranking needs no normalisation.
        needs_classifier: True where the score comes from the loss.
    """

    score: Callable[..., Scores]
    needs: tuple[str, ...]
    across_ffns: bool
    needs_classifier: bool = False


REGISTRY: Mapping[str, Criterion] = {
    "random": Criterion(random, ("seed",), True),
    "magnitude": Criterion(magnitude, (), False),
    "activation": Criterion(activation, ("batches",), False),
    "taylor": Criterion(taylor, ("batches",), True, needs_classifier=True),
    "obs": Criterion(obs, ("batches", "moments", "ridge", "seed"), True, needs_classifier=True),
    "jas": Criterion(jas, ("found",), False),
}


def check_needs(
    model: nn.Module, criterion: str, *, batches: Batches | None = None, found: Discovery | None = None
) -> None:
    """Refuse a criterion that is unknown or lacks what it needs; arguments as in ``score_neurons``.

    Raises:
        VitpruneError: saying what is missing and where to get it.
    """
    check_choice("criterion", criterion, CRITERIA)
    row = REGISTRY[criterion]
    if "found" in row.needs and found is None:
        raise VitpruneError(
            f"criterion {criterion} needs the scores of a run; "
            "run 'vitprune discover MODEL --data DIR -o RUN' first and prune RUN"
        )
    if "batches" in row.needs and batches is None:
        raise VitpruneError(f"criterion {criterion} needs calibration images; pass --data DIR")
    if row.needs_classifier and getattr(model, "num_classes", 1) < 1:
        raise VitpruneError(f"criterion {criterion} needs a classifier, but the model has none (num_classes=0)")


def score_neurons(
    model: nn.Module,
    criterion: str,
    *,
    batches: Batches | None = None,
    found: Discovery | None = None,
    moments: Mapping[str, Moments] | None = None,
    ridge: float = DEFAULT_RIDGE,
    seed: int = 0,
) -> Scores:
    """Score every neuron by a criterion of the registry.

    Args:
        model: timm Vision Transformer in eval mode.
        criterion: key of ``CRITERIA``.
        batches: calibration images with labels; only for criteria that need them.
        found: a discovery on this model; only for ``jas``.
        moments: from ``measure_moments`` on this model; ``obs`` measures them itself where they are not given.
        ridge: λ of ``obs``, relative to the mean variance of the hidden neurons; positive.
        seed: only for criteria that draw at random.

    Returns:
        FFN name -> scores [H]; higher is more important.

    Raises:
        VitpruneError: if the criterion is unknown or lacks what it needs.
    """
    check_needs(model, criterion, batches=batches, found=found)
    row = REGISTRY[criterion]
    if "found" in row.needs:
        return row.score(found)
    given = {"batches": batches, "moments": moments, "ridge": ridge, "seed": seed}
    return row.score(model, **{name: given[name] for name in row.needs})


def _zeros(ffns: list[FeedForward]) -> dict[str, Tensor]:
    return {ffn.name: torch.zeros(ffn.num_neurons, dtype=torch.float64) for ffn in ffns}


def _refuse_empty(counts: Mapping[str, int]) -> None:
    if 0 in counts.values():
        raise VitpruneError("no calibration images")
