"""Criteria: how much each neuron matters, for every neuron of every FFN.

Letters: B images, N tokens, H hidden neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitprune.answers import ask, loss_of
from vitprune.calibration.second_order import obs
from vitprune.calibration.statistics import (
    ABSOLUTE,
    FISHER,
    GRADIENTS,
    MOMENTS,
    TAYLOR,
    Statistics,
    measure_statistics,
)
from vitprune.data import Batches, on_device
from vitprune.discovery.discover import Discovery, check_class_scores, only_ffns
from vitprune.discovery.quadrature import parse_fixed_quadrature
from vitprune.entry import entry
from vitprune.errors import VitpruneError
from vitprune.models.units import Group, find_groups, hook_hidden
from vitprune.options import CRITERIA, DEFAULT_RIDGE, check_choice
from vitprune.progress import Track, untracked
from vitprune.seen_images import check_labels
from vitprune.sharing import sum_of_all
from vitprune.views import has_classifier

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
    return {group.name: torch.rand(group.num_units, generator=generator) for group in find_groups(model)}


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
    for group in find_groups(model):
        square_H = model.get_submodule(group.read_by).weight.double().square().sum(0)
        square_H = square_H.view(-1, group.unit_size).sum(1)
        units = torch.arange(group.num_units, device=square_H.device)
        for part in group.owned:
            if part.axis == 1:
                continue
            up = model.get_submodule(part.linear)
            row_square = up.weight.double().square().sum(1)
            if up.bias is not None:
                row_square = row_square + up.bias.double().square()
            rows = part.indices(units, group.num_units, group.unit_size)
            of_units = row_square[rows].view(part.copies, group.num_units, group.unit_size)
            square_H = square_H + of_units.sum((0, 2))
        scores[group.name] = square_H.sqrt().float().cpu()
    return scores


def activation(model: nn.Module, statistics: Mapping[str, Statistics]) -> Scores:
    r"""Take the mean absolute hidden activation.

    .. math:: s_i = \frac{1}{BN} \sum_{b,n} |h_{bni}|

    Args:
        model: timm Vision Transformer.
        statistics: of its FFNs, with ``absolute``.

    Returns:
        FFN name -> scores [H]; float64, non-negative; higher is more important.
    """
    return {name: of_ffn.absolute_H for name, of_ffn in statistics.items()}


@torch.no_grad()
def variance(model: nn.Module, statistics: Mapping[str, Statistics]) -> Scores:
    r"""Take the variance that a neuron brings into the FFN's output.

    .. math:: s_i = \mathrm{Var}(h_i) \, \|W^{down}_{:,i}\|^2

    It is the squared error that removal leaves once the mean has moved into the bias.

    Args:
        model: timm Vision Transformer.
        statistics: of its FFNs, with ``moments``.

    Returns:
        FFN name -> scores [H]; float64, non-negative; higher is more important.

    Source:
        The ranking of CORP (arXiv:2602.05243) and of variance-based pruning (arXiv:2507.12988).
    """
    return {
        name: of_ffn.covariance_HH.diagonal().clamp_min(0) * down.square().sum(0)
        for name, of_ffn, down in _with_down_projs(model, statistics)
    }


@torch.no_grad()
def wanda(model: nn.Module, statistics: Mapping[str, Statistics]) -> Scores:
    r"""Take the size of the weights that read a neuron times the size of the neuron.

    .. math:: s_i = \sum_d |W^{down}_{di}| \cdot \sqrt{\mathbb{E}[h_i^2]}

    Args:
        model: timm Vision Transformer.
        statistics: of its FFNs, with ``moments``.

    Returns:
        FFN name -> scores [H]; float64, non-negative; higher is more important.

    Source:
        Sun et al., ICLR 2024 (arXiv:2306.11695), who rank single weights; here a neuron's weights are summed.
    """
    return {
        name: (of_ffn.covariance_HH.diagonal().clamp_min(0) + of_ffn.mean_H.square()).sqrt() * down.abs().sum(0)
        for name, of_ffn, down in _with_down_projs(model, statistics)
    }


def taylor(model: nn.Module, statistics: Mapping[str, Statistics]) -> Scores:
    r"""Estimate how much the loss changes when a neuron is zeroed.

    .. math:: s_i = \frac{1}{B} \sum_b \Big| \sum_n h_{bni} \, \frac{\partial L_b}{\partial h_{bni}} \Big|

    Tokens are summed inside the absolute value: removing a neuron removes it from every token at once. L is the
    cross-entropy with the labels given.

    Args:
        model: timm Vision Transformer.
        statistics: of its FFNs, with ``taylor``.

    Returns:
        FFN name -> scores [H]; float64, nats per image, non-negative; higher is more important.

    Source:
        Molchanov et al., ICLR 2017 (arXiv:1611.06440).
    """
    return {name: of_ffn.taylor_H for name, of_ffn in statistics.items()}


def fisher(model: nn.Module, statistics: Mapping[str, Statistics]) -> Scores:
    r"""Estimate to second order how much the loss rises when a neuron is zeroed.

    .. math:: s_i = \frac{1}{2B} \sum_b \Big( \sum_n h_{bni} \, \frac{\partial L_b}{\partial h_{bni}} \Big)^2

    In expectation over labels drawn from the model's own answer: the diagonal of the true Fisher information, which
    needs no labels.

    Args:
        model: timm Vision Transformer.
        statistics: of its FFNs, with ``fisher``.

    Returns:
        FFN name -> scores [H]; float64, nats per image, non-negative; higher is more important.

    Source:
        Theis et al., arXiv:1801.05787, and Liu et al., ICML 2021 (arXiv:2108.00708), who use the given labels.
    """
    return {name: of_ffn.fisher_H / 2 for name, of_ffn in statistics.items()}


@entry
def integrated_gradients(model: nn.Module, batches: Batches, *, quadrature: str = "gauss-legendre:4") -> Scores:
    r"""Attribute the loss to neurons along the way from a silent FFN to the real one.

    .. math:: s_i = \frac{1}{B} \sum_b \Big| \sum_n h_{bni} \int_0^1
        \frac{\partial L_b}{\partial h_{bni}}(\alpha h) \, d\alpha \Big|

    One FFN is scaled at a time and later FFNs run free. Before the absolute value, an image's sum over neurons is the
    loss with the FFN minus the loss with its hidden vector at zero (completeness).

    Args:
        model: timm Vision Transformer in eval mode; images -> logits [B, C].
        batches: pairs of images [B, 3, height, width] (normalised by the model's own transform) and class labels [B]
            (int64). Read once; each batch costs a forward and a backward pass per FFN and node.
        quadrature: ``gauss-legendre:NODES`` or ``riemann:STEPS``.

    Returns:
        FFN name -> scores [H]; float64, nats per image, non-negative; higher is more important.

    Raises:
        VitpruneError: if ``batches`` is empty.

    Source:
        Sundararajan et al., ICML 2017 (arXiv:1703.01365), on hidden neurons as in Dai et al., ACL 2022
        (arXiv:2104.08696, knowledge neurons), who attribute the probability.
    """
    groups = find_groups(model)
    rule = parse_fixed_quadrature(quadrature)
    sums = {group.name: torch.zeros(group.num_units, dtype=torch.float64) for group in groups}
    count = 0
    for images, labels in on_device(model, batches):
        for group in groups:
            slopes = 0
            for node, weight in zip(rule.nodes, rule.weights, strict=True):
                loss, hidden, scaled = _loss_at(model, group, images, labels, node)
                slopes = slopes + weight * torch.autograd.grad(loss, scaled)[0]
            sums[group.name] += (hidden * slopes).flatten(1, -2).sum(1).abs().sum(0, dtype=torch.float64).cpu()
        count += len(images)
    if count == 0:
        raise VitpruneError("no calibration images")
    count, *totals = sum_of_all(count, *sums.values())
    return {name: total / count for name, total in zip(sums, totals, strict=True)}


def _loss_at(model: nn.Module, group: Group, images: Tensor, labels: Tensor, scale: float):
    """Return the summed loss with one group's hidden vector scaled, that vector, and the leaf that was put in."""
    seen: list[Tensor] = []

    def replace(_name: str, hidden: Tensor) -> Tensor:
        seen.extend((hidden.detach(), (hidden.detach() * scale).requires_grad_()))
        return seen[1]

    with torch.enable_grad(), hook_hidden(model, [group], replace):
        loss = loss_of(ask(model, images), labels, "criterion integrated-gradients")
    return loss, *seen


def jas(found: Discovery) -> Scores:
    r"""Take a neuron's mean score in the path search, over what the weakest neuron of its FFN has.

    .. math:: s_i = \frac{1}{C} \sum_c S_{ci} - \min_j \frac{1}{C} \sum_c S_{cj}

    A joint score holds that of the path before it, which is the same for all neurons of an FFN and grows from one FFN
    to the next: without the difference, one ranking over all FFNs would compare paths, not neurons.

    Args:
        found: result of ``discover``, by any method.

    Returns:
        FFN name -> scores [H]; float32, non-negative; higher is more important.

    Raises:
        VitpruneError: if ``found`` has paths only, or paths through attention alone.

    Source:
        arXiv:2503.09046 keeps the K neurons most often on a class's paths; this ranks all neurons, for all classes.
    """
    found = only_ffns(found)
    check_class_scores(found)
    means = {name: scores.mean(0) for name, scores in found.class_scores.items()}
    return {name: mean_H - mean_H.min() for name, mean_H in means.items()}


@dataclass(frozen=True)
class Criterion:
    """How to compute a criterion.

    Attributes:
        score: the function.
        needs: names of the arguments that it takes beside the model, as in ``score_neurons``.
        statistics: what ``statistics`` must hold, in the words of ``measure_statistics``.
        across_ffns: True where scores of different FFNs share a unit, so that one ranking needs no normalisation.
        needs_labels: True where the score comes from the loss of the labels given.
    """

    score: Callable[..., Scores]
    needs: tuple[str, ...] = ("statistics",)
    statistics: frozenset[str] = frozenset()
    across_ffns: bool = False
    needs_labels: bool = False


REGISTRY: Mapping[str, Criterion] = {
    "random": Criterion(random, needs=("seed",), across_ffns=True),
    "magnitude": Criterion(magnitude, needs=()),
    "activation": Criterion(activation, statistics=frozenset({ABSOLUTE})),
    "variance": Criterion(variance, statistics=frozenset({MOMENTS})),
    "wanda": Criterion(wanda, statistics=frozenset({MOMENTS})),
    "taylor": Criterion(taylor, statistics=frozenset({TAYLOR}), across_ffns=True, needs_labels=True),
    "fisher": Criterion(fisher, statistics=frozenset({FISHER}), across_ffns=True),
    "integrated-gradients": Criterion(integrated_gradients, needs=("batches",), across_ffns=True, needs_labels=True),
    "jas": Criterion(lambda _model, found: jas(found), needs=("found",)),
    "obs": Criterion(
        obs,
        needs=("statistics", "ridge", "track"),
        statistics=frozenset({MOMENTS, GRADIENTS}),
        across_ffns=True,
    ),
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
        raise VitpruneError(f"criterion {criterion} needs the scores of a run; pass `found`")
    if "found" in row.needs:
        check_class_scores(only_ffns(found))
    if {"batches", "statistics"} & set(row.needs) and batches is None:
        raise VitpruneError(f"criterion {criterion} needs calibration images; pass `batches`")
    if row.needs_labels:
        if not has_classifier(model):
            raise VitpruneError(
                f"criterion {criterion} needs a classifier, but the model has none (num_classes=0); obs and fisher "
                "go by its embeddings"
            )
        check_labels(model, batches)


@entry
def score_neurons(
    model: nn.Module,
    criterion: str,
    *,
    batches: Batches | None = None,
    found: Discovery | None = None,
    statistics: Mapping[str, Statistics] | None = None,
    ridge: float = DEFAULT_RIDGE,
    seed: int = 0,
    track: Track = untracked,
) -> Scores:
    """Score every neuron by a criterion of the registry.

    Args:
        model: timm Vision Transformer in eval mode.
        criterion: key of ``CRITERIA``.
        batches: calibration images with labels; only for criteria that need them.
        found: a discovery on this model; only for ``jas``.
        statistics: from ``measure_statistics`` on this model, with what the criterion's row in ``REGISTRY`` says;
            measured here from ``batches`` where they are not given.
        ridge: λ of ``obs``, relative to the mean variance of the hidden neurons; positive.
        seed: of random scores and of the estimate of the Fisher information.
        track: wraps (items, description) of long loops, for progress.

    Returns:
        FFN name -> scores [H]; higher is more important.

    Raises:
        VitpruneError: if the criterion is unknown or lacks what it needs.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=1)
    >>> score_neurons(model, "magnitude")["blocks.0.mlp"].shape
    torch.Size([768])
    """
    row = REGISTRY.get(criterion)
    given = {"batches": batches, "found": found, "statistics": statistics, "ridge": ridge, "seed": seed, "track": track}
    if row is None or statistics is None or "statistics" not in row.needs:
        check_needs(model, criterion, batches=batches, found=found)
        if "statistics" in row.needs:
            given["statistics"] = measure_statistics(model, find_groups(model), batches, row.statistics, seed=seed)
    return row.score(model, **{name: given[name] for name in row.needs})


def _with_down_projs(
    model: nn.Module, statistics: Mapping[str, Statistics]
) -> Iterator[tuple[str, Statistics, Tensor]]:
    for group in find_groups(model):
        yield group.name, statistics[group.name], model.get_submodule(group.read_by).weight.double().cpu()
