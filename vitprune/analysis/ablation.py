"""What nodes of a path are set to when they are ablated.

Zero is the paper's choice, and takes a neuron out as pruning does. A mean keeps what the layers behind are used to, and
takes out only what tells images apart. Another image's value keeps the spread as well.

Letters: B images of a batch, N tokens, T scoped tokens, H nodes of a layer, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vitprune.answers import ask
from vitprune.data import Batches, on_device
from vitprune.errors import VitpruneError
from vitprune.models.units import Group, hook_hidden
from vitprune.options import ABLATIONS, check_choice
from vitprune.sharing import sum_of_all

ZERO, MEAN, CLASS_MEAN, RESAMPLE, DOUBLE = ABLATIONS
# That need other images' activations, in the form of means or as they are.
OF_MEANS = (MEAN, CLASS_MEAN)
FACTORS: Mapping[str, float] = {ZERO: 0.0, DOUBLE: 2.0}


@dataclass(frozen=True)
class Means:
    """Mean activations of the scoped tokens over some images.

    Attributes:
        of_all: layer name -> [T, H].
        of_class: layer name -> [C, T, H]; empty where nobody asked.
        rows: class index -> row of ``of_class``.
    """

    of_all: Mapping[str, Tensor]
    of_class: Mapping[str, Tensor] = field(default_factory=dict)
    rows: Mapping[int, int] = field(default_factory=dict)


@torch.no_grad()
def measure_means(
    model: nn.Module,
    layers: Sequence[Group],
    batches: Batches,
    *,
    tokens: slice,
    classes: Sequence[int] = (),
) -> Means:
    """Average what layers hand to their output projections, per token position.

    Args:
        model: timm Vision Transformer in eval mode.
        layers: to watch.
        batches: pairs of images and labels; read once.
        tokens: positions that count.
        classes: to average separately as well; each must have an image.

    Raises:
        VitpruneError: if there are no images, or none of a class.
    """
    rows = {index: row for row, index in enumerate(classes)}
    sums: dict[str, Tensor] = {}
    counts = torch.zeros(len(classes) + 1, dtype=torch.float64)
    for images, labels in on_device(model, batches):
        places = torch.tensor([rows.get(int(label), len(rows)) for label in labels], device=images.device)

        def add(name: str, h_BNH: Tensor, places: Tensor = places) -> None:
            part_BTH = h_BNH[:, tokens].double()
            if name not in sums:
                sums[name] = part_BTH.new_zeros((len(rows) + 1, *part_BTH.shape[1:]))
            sums[name].index_add_(0, places, part_BTH)

        with hook_hidden(model, layers, add):
            ask(model, images)
        counts.index_add_(0, places.cpu(), torch.ones(len(places), dtype=torch.float64))
    if not sums:
        raise VitpruneError("no images to average activations of")
    counts, *totals = sum_of_all(counts, *sums.values())
    missing = [index for index, row in rows.items() if not counts[row]]
    if missing:
        raise VitpruneError(f"class {missing[0]} has no image to average activations of")
    dtype = next(model.parameters()).dtype
    of_all, of_class = {}, {}
    for name, total in zip(sums, totals, strict=True):
        of_all[name] = (total.sum(0) / counts.sum()).to(dtype)
        if rows:
            each_C11 = counts[: len(rows)].to(total.device).view(-1, 1, 1)
            of_class[name] = (total[: len(rows)] / each_C11).to(dtype)
    return Means(of_all, of_class, rows)


def substitutes(
    kind: str, labels: Tensor, *, means: Means | None = None, donated: Mapping[str, Tensor] | None = None
) -> Mapping[str, Tensor] | None:
    """Return what the nodes of a batch are set to: layer name -> [B or 1, T, H]; None where that is a multiple.

    Args:
        kind: key of ``ABLATIONS``.
        labels: int64 [B].
        means: for ``mean`` and ``class-mean``.
        donated: for ``resample``: another image's activations for each, from ``record_hidden``.

    Raises:
        VitpruneError: if the kind is unknown, or what it needs is absent.
    """
    check_choice("ablation", kind, ABLATIONS)
    if kind in FACTORS:
        return None
    if kind == RESAMPLE:
        if donated is None:
            raise VitpruneError("ablation resample needs other images; pass `donors`")
        return donated
    if means is None or (kind == CLASS_MEAN and not means.of_class):
        raise VitpruneError(f"ablation {kind} needs the means of images; pass `reference`")
    if kind == MEAN:
        return {name: mean_TH.unsqueeze(0) for name, mean_TH in means.of_all.items()}
    absent = [int(label) for label in labels if int(label) not in means.rows]
    if absent:
        raise VitpruneError(f"class {absent[0]} has no image among those that are averaged")
    places = torch.tensor([means.rows[int(label)] for label in labels])
    return {name: mean_CTH[places.to(mean_CTH.device)] for name, mean_CTH in means.of_class.items()}


@contextmanager
def ablated(
    model: nn.Module,
    layers: Sequence[Group],
    ablate: Mapping[str, Tensor],
    *,
    kind: str,
    values: Mapping[str, Tensor] | None,
    tokens: slice,
) -> Iterator[None]:
    """Ablate nodes while it lasts; all else runs free.

    Args:
        model: timm Vision Transformer in eval mode.
        layers: that have nodes to ablate.
        ablate: layer name -> bool [B, H]; True for the nodes of each image to ablate.
        kind: key of ``ABLATIONS``.
        values: from ``substitutes``.
        tokens: positions at which they are ablated.

    >>> import timm
    >>> from vitprune import find_feed_forwards
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=5).eval()
    >>> ffns, images = find_feed_forwards(model), torch.randn(2, 3, 32, 32)
    >>> nothing = {"blocks.0.mlp": torch.zeros(2, 768, dtype=torch.bool)}
    >>> clean = model(images)
    >>> with ablated(model, ffns, nothing, kind="zero", values=None, tokens=slice(None)):
    ...     torch.equal(model(images), clean)
    True
    """

    def replace(name: str, h_BNH: Tensor) -> Tensor:
        part_BTH = h_BNH[:, tokens]
        value_BTH = part_BTH * FACTORS[kind] if values is None else values[name]
        h_BNH = h_BNH.clone()
        h_BNH[:, tokens] = torch.where(ablate[name].unsqueeze(1), value_BTH, part_BTH)
        return h_BNH

    with hook_hidden(model, [layer for layer in layers if layer.name in ablate], replace):
        yield
