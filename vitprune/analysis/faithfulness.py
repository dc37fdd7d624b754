r"""How much of an answer the best nodes carry by themselves, and how little is left without them.

Keep the best share :math:`k` of the nodes of every layer and ablate all others: what is left of the true class's
probability, as a share of the undisturbed model's, is the *faithfulness* :math:`f(k)`. Ablate the best and keep the
others: what is lost is the *completeness* :math:`c(k)`. Rankings are compared by the areas under both curves.

Letters: B images of a batch, I of all, S shares, H nodes of a layer, C classes.

Source:
    The curves of Wang et al., ICLR 2023 (arXiv:2211.00593), over all sizes as in MIB (arXiv:2504.13151), whose circuits
    are of edges and whose areas count from the fully ablated model; here they count from no answer at all, so that no
    class divides by a small number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
from scipy.integrate import trapezoid
from torch import Tensor, nn

from vitprune.analysis.ablation import (
    CLASS_MEAN,
    OF_MEANS,
    RESAMPLE,
    Means,
    ablated,
    measure_means,
    substitutes,
)
from vitprune.analysis.finished_passes import read_pass, write_pass
from vitprune.answers import ask, of_classes
from vitprune.data import Batches, on_device
from vitprune.discovery.discover import Discovery, check_class_scores, score_images
from vitprune.discovery.methods import plan_search
from vitprune.entry import entry
from vitprune.errors import VitpruneError
from vitprune.intervals import Interval, mean_interval
from vitprune.models.path_layers import find_path_layers, record_hidden
from vitprune.models.trunk import resolve_scope, scope_slice
from vitprune.models.units import Group
from vitprune.options import ABLATIONS, check_choice
from vitprune.progress import Track, untracked
from vitprune.sharing import gather_rows

# Of the nodes of every layer, at least one; 0 and 1 belong to every curve.
SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
BY_CLASS, BY_IMAGE, FOR_ALL = "class", "image", "all"

# Images and labels of a batch -> layer name -> scores [B or 1, H]; higher is better.
Ranking = Callable[[Tensor, Tensor], Mapping[str, Tensor]]


@dataclass(frozen=True)
class FaithfulnessRow:
    """How one ranking does under one kind of ablation.

    Attributes:
        method: that ranks the nodes: key of ``METHODS`` or ``CRITERIA``.
        ranked: by ``class`` (mean scores of the image's class in the run), ``image`` (the image's own scores, with its
            label known), or for ``all`` alike.
        tokens: where nodes are ablated.
        ablation: key of ``ABLATIONS``.
        shares: of the nodes of every layer, 0 and 1 among them.
        kept: mean over classes of the true class's probability, with only the best share kept.
        removed: the same with the best share ablated.
        faithfulness: area under ``kept``, as a share of the clean probability; mean over classes.
        faithfulness_advantage: how much higher the first method's is, class by class; None for the first itself.
        completeness: area over ``removed``, likewise.
        completeness_advantage: likewise.
        num_images: of other images than those that nodes were ranked by.
    """

    method: str
    ranked: str
    tokens: str
    ablation: str
    shares: tuple[float, ...]
    kept: tuple[float, ...]
    removed: tuple[float, ...]
    faithfulness: Interval
    faithfulness_advantage: Interval | None
    completeness: Interval
    completeness_advantage: Interval | None
    num_images: int


def rank_by_class(found: Discovery) -> Ranking:
    """Rank nodes by the mean scores of an image's class.

    Raises:
        VitpruneError: if the discovery has paths only; on use, if a class has no scores.
    """
    check_class_scores(found)
    row_of = {index: row for row, index in enumerate(found.classes)}

    def rank(_images: Tensor, labels: Tensor) -> Mapping[str, Tensor]:
        absent = [int(label) for label in labels if int(label) not in row_of]
        if absent:
            raise VitpruneError(f"class {absent[0]} has images but no scores in the run; choose with `classes`")
        rows = torch.tensor([row_of[int(label)] for label in labels])
        return {name: found.class_scores[name][rows] for name in found.layers}

    return rank


def rank_by_image(model: nn.Module, found: Discovery, *, seed: int = 0) -> Ranking:
    """Rank nodes by an image's own scores, found as those of a discovery were.

    Args:
        model: that it is of.
        found: says how.
        seed: of method ``random``.
    """
    search = plan_search(
        model,
        method=found.method,
        tokens=found.tokens,
        quadrature=found.quadrature,
        target=found.target,
        quantity=found.quantity,
        precision=found.precision,
        nodes=found.nodes,
        seed=seed,
    )
    return lambda images, labels: score_images(model, search, images, labels)


def rank_alike(scores: Mapping[str, Tensor]) -> Ranking:
    """Rank nodes by one score for all images, layer name -> [H]."""
    rows = {name: score_H.unsqueeze(0) for name, score_H in scores.items()}
    return lambda _images, _labels: rows


@entry
def measure_faithfulness(
    model: nn.Module,
    batches: Batches,
    rankings: Mapping[tuple[str, str], Ranking],
    *,
    nodes: Sequence[str] = ("ffn",),
    tokens: Sequence[str] = ("cls",),
    ablations: Sequence[str] = ("zero",),
    shares: Sequence[float] = SHARES,
    classes: Sequence[int] = (),
    reference: Batches | None = None,
    donors: Batches | None = None,
    folder: str | Path | None = None,
    track: Track = untracked,
) -> list[FaithfulnessRow]:
    """Measure the curves of several rankings.

    Args:
        model: timm Vision Transformer in eval mode.
        batches: pairs of images and labels that no ranking was made of; read once per ranking, kind and scope.
        rankings: (method, ``class``, ``image`` or ``all``) -> ranking. Those by class are compared with the first by
            class, those by image with the first by image, and those for all with the first of them all.
        nodes: what is ranked, as ``find_path_layers`` takes it.
        tokens: where to ablate, each ``cls``, ``patch`` or ``all``.
        ablations: keys of ``ABLATIONS``.
        shares: to keep and to ablate, in (0, 1), ascending.
        classes: of ``reference``, for ``class-mean``.
        reference: images of the rankings, whose means ``mean`` and ``class-mean`` take.
        donors: for ``resample``: another image for each of ``batches``, in as large batches.
        folder: keeps finished passes, which another call then takes over; the caller makes sure that it is of the same
            model, images and rankings.
        track: wraps (items, description), for progress.

    Returns:
        One row per scope, kind and ranking.

    Raises:
        VitpruneError: if an argument is unknown or out of range, or what an ablation needs is not given.

    >>> import timm
    >>> from vitprune import discover
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=5).eval()
    >>> batches = [(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 4]))]
    >>> by_class = rank_by_class(discover(model, batches))
    >>> (row,) = measure_faithfulness(model, batches, {("jas", "class"): by_class}, shares=[0.5])
    >>> row.shares, row.kept[-1] == row.removed[0]
    ((0.0, 0.5, 1.0), True)
    """
    if not rankings:
        raise VitpruneError("no rankings to compare")
    if any(not 0 < share < 1 for share in shares) or list(shares) != sorted(set(shares)):
        raise VitpruneError(f"shares must be in (0, 1) and ascending, got {list(shares)}")
    for kind in ablations:
        check_choice("ablation", kind, ABLATIONS)
        if kind in OF_MEANS and reference is None:
            raise VitpruneError(f"ablation {kind} needs the means of images; pass `reference`")
        if kind == RESAMPLE and donors is None:
            raise VitpruneError("ablation resample needs other images; pass `donors`")
    layers = find_path_layers(model, nodes)
    rows = []
    for scope, kind in product(tokens, ablations):
        slice_ = scope_slice(model, resolve_scope(model, scope))
        means: list[Means] = []

        def measure(name: str, ranking: Ranking | None, scope=scope, kind=kind, slice_=slice_, means=means) -> Curves:
            known = read_pass(folder, f"faithfulness-{scope}-{kind}-{name}")
            if known is not None:
                return Curves(**known)
            if kind in OF_MEANS and not means:
                watched = track(reference, f"means at {scope}")
                wanted = classes if kind == CLASS_MEAN else ()
                means.append(measure_means(model, layers, watched, tokens=slice_, classes=wanted))
            curves = _measure(
                model,
                layers,
                track(batches, f"{name}: ablate at {scope}, {kind}"),
                ranking,
                shares=shares,
                kind=kind,
                tokens=slice_,
                means=means[0] if means else None,
                donors=donors if kind == RESAMPLE else None,
            )
            write_pass(folder, f"faithfulness-{scope}-{kind}-{name}", vars(curves))
            return curves

        ends = measure("everything", None)
        of_kind = [
            (method, ranked, measure(f"{method}-{ranked}", ranking).between(ends))
            for (method, ranked), ranking in rankings.items()
        ]
        rows += _rows(of_kind, scope, kind, (0.0, *shares, 1.0))
    return rows


@dataclass(frozen=True)
class Curves:
    """Probabilities of the true class for each share and image.

    Attributes:
        kept: float32 [S, I]; the best share kept.
        removed: float32 [S, I]; the best share ablated.
        label: int64 [I].
    """

    kept: Tensor
    removed: Tensor
    label: Tensor

    def between(self, ends: Curves) -> Curves:
        """Return it with the ends that all curves share: nothing kept, and nothing ablated."""
        nothing, everything = ends.removed[:1], ends.kept[:1]
        return Curves(
            torch.cat([nothing, self.kept, everything]), torch.cat([everything, self.removed, nothing]), self.label
        )


@torch.no_grad()
def _measure(
    model: nn.Module,
    layers: Sequence[Group],
    batches: Batches,
    ranking: Ranking | None,
    *,
    shares: Sequence[float],
    kind: str,
    tokens: slice,
    means: Means | None,
    donors: Batches | None,
) -> Curves:
    """Measure a ranking; without one the ends: everything kept, and everything removed."""
    kept, removed, seen = [], [], []
    others = None if donors is None else iter(on_device(model, donors))
    for images, labels in on_device(model, batches):
        donated = None
        if others is not None:
            donor_images = next(others, (images[:0], labels[:0]))[0]
            if len(donor_images) != len(images):
                raise VitpruneError("`donors` must have as many images in each batch as `batches`")
            donated = record_hidden(model, layers, donor_images, tokens=tokens)
        values = substitutes(kind, labels, means=means, donated=donated)

        def answer(ablate: Mapping[str, Tensor], images=images, labels=labels, values=values) -> Tensor:
            with ablated(model, layers, ablate, kind=kind, values=values, tokens=tokens):
                probabilities_BC = of_classes(ask(model, images)).float().softmax(-1)
            return probabilities_BC.gather(1, labels.unsqueeze(1)).squeeze(1).cpu()

        shape = {layer.name: torch.ones(len(images), layer.num_units, dtype=torch.bool) for layer in layers}
        everything = {name: each.to(images.device) for name, each in shape.items()}
        if ranking is None:
            kept.append(torch.stack([answer({})]))
            removed.append(torch.stack([answer(everything)]))
        else:
            orders = {
                name: score_BH.to(images.device).expand(len(images), -1).argsort(dim=1, descending=True, stable=True)
                for name, score_BH in ranking(images, labels).items()
            }
            best = [{name: _best(order_BH, share) for name, order_BH in orders.items()} for share in shares]
            kept.append(torch.stack([answer({name: ~chosen for name, chosen in of.items()}) for of in best]))
            removed.append(torch.stack([answer(of) for of in best]))
        seen.append(labels.cpu())
    if not seen:
        raise VitpruneError("no images to ablate nodes on")
    kept_SI, removed_SI = (gather_rows(torch.cat(parts, dim=1).T.contiguous()).T for parts in (kept, removed))
    return Curves(kept_SI.contiguous(), removed_SI.contiguous(), gather_rows(torch.cat(seen)))


def _best(order_BH: Tensor, share: float) -> Tensor:
    """Return which nodes are among the best share, at least one: bool [B, H]."""
    count = max(1, round(share * order_BH.shape[1]))
    return torch.zeros_like(order_BH, dtype=torch.bool).scatter_(1, order_BH[:, :count], True)


def _rows(
    measured: Sequence[tuple[str, str, Curves]], scope: str, kind: str, shares: tuple[float, ...]
) -> list[FaithfulnessRow]:
    areas = [_areas(curves, shares) for _method, _ranked, curves in measured]
    rows = []
    for (method, ranked, curves), (faithful, complete) in zip(measured, areas, strict=True):
        first = next((at for at, each in enumerate(measured) if each[1] == ranked), 0)
        first = 0 if ranked == FOR_ALL else first
        is_first = measured[first][:2] == (method, ranked)
        rows.append(
            FaithfulnessRow(
                method=method,
                ranked=ranked,
                tokens=scope,
                ablation=kind,
                shares=shares,
                kept=_curve(curves.kept, curves.label),
                removed=_curve(curves.removed, curves.label),
                faithfulness=mean_interval(faithful),
                faithfulness_advantage=None if is_first else _difference(areas[first][0], faithful),
                completeness=mean_interval(complete),
                completeness_advantage=None if is_first else _difference(areas[first][1], complete),
                num_images=len(curves.label),
            )
        )
    return rows


def _difference(first: Sequence[float], other: Sequence[float]) -> Interval:
    return mean_interval([one - another for one, another in zip(first, other, strict=True)])


def _by_class(values_SI: Tensor, label: Tensor) -> np.ndarray:
    """Return the means over the images of each class [C, S], classes ascending."""
    return np.stack([values_SI[:, label == index].double().mean(1).numpy() for index in label.unique()])


def _curve(values_SI: Tensor, label: Tensor) -> tuple[float, ...]:
    return tuple(_by_class(values_SI, label).mean(0).tolist())


def _areas(curves: Curves, shares: Sequence[float]) -> tuple[list[float], list[float]]:
    """Return the area under ``kept`` and over ``removed`` of each class, as shares of the mean clean probability."""
    kept, removed = (_by_class(values, curves.label) for values in (curves.kept, curves.removed))
    clean = kept[:, -1].mean()
    under, lost = (trapezoid(values, shares, axis=1) for values in (kept, kept[:, -1:] - removed))
    return (under / clean).tolist(), (lost / clean).tolist()
