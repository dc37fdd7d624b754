"""What parts of a model are worth, in one currency: what an image's answer loses, in nats or cosine distance.

Letters: H units of a group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitprune.calibration.attention_moments import measure_query_key_losses
from vitprune.calibration.layer_losses import StandIn, measure_replaced, measure_stand_ins
from vitprune.calibration.second_order import obs
from vitprune.data import Batches, take_evenly
from vitprune.models.attention import HEADS, QK, find_attention
from vitprune.models.units import FFN, find_groups, kind_of
from vitprune.options import DEFAULT_RIDGE
from vitprune.progress import Track, untracked
from vitprune.pruning.apply import mask_neurons
from vitprune.pruning.compensate import compensate
from vitprune.pruning.plan import Plan
from vitprune.pruning.turn import Turned

# Of the calibration images, how many tell what the last dimensions of queries and keys are worth, and whole layers.
NUM_FISHER, NUM_MEASURED = 256, 48
# How many try a share of a group.
NUM_TRIED, SHARE_TRIED = 64, 0.3


@dataclass(frozen=True)
class Worth:
    """What the parts of a model are worth.

    Attributes:
        losses: group name -> what each unit costs when it goes after those worth less [H]; float64, per image.
        stand_ins: what may stand where whole layers were.
    """

    losses: Mapping[str, Tensor]
    stand_ins: Sequence[StandIn] = ()


def rank_parts(
    turned: Turned,
    batches: Batches,
    parts: Sequence[str],
    kept_back: Batches | None = None,
    *,
    ridge: float = DEFAULT_RIDGE,
    seed: int = 0,
    track: Track = untracked,
) -> Worth:
    """Estimate what neurons, dimensions and layers cost.

    Neurons by criterion ``obs``, values by their discarded singular values, queries and keys by the Fisher information
    of their last dimensions together, layers by trying. Of each group a share is then tried by itself, on images that
    nothing was fitted to, and its estimates are multiplied by what they were off by.

    Args:
        turned: from ``turn_attention``, for the same parts.
        batches: calibration images and labels, readable more than once.
        parts: keys of ``PARTS``.
        kept_back: images to try groups and layers on, other than ``batches``; None: the same.
        ridge: λ of what stands in.
        seed: of everything drawn at random.
        track: wraps (items, description) of long loops, for progress.

    >>> import timm
    >>> from vitprune.pruning.turn import turn_attention
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=5).eval()
    >>> batches = [(torch.randn(2, 3, 32, 32), torch.zeros(2, dtype=torch.int64))]
    >>> worth = rank_parts(turn_attention(model, batches, ["qk", "vo"]), batches, ["qk", "vo"])
    >>> {name: len(losses) for name, losses in sorted(worth.losses.items())}
    {'blocks.0.attn.qk': 64, 'blocks.0.attn.vo': 64}
    """
    kept_back = batches if kept_back is None else kept_back
    losses: dict[str, Tensor] = {}
    if FFN in parts:
        losses.update(obs(turned.model, turned.statistics, ridge=ridge, track=track))
    losses.update(turned.losses)
    if QK in parts:
        names = [name for name, module in find_attention(turned.model).items() if hasattr(module, "q")]
        tails = measure_query_key_losses(turned.model, names, take_evenly(batches, NUM_FISHER), seed=seed + 1)
        losses.update({f"{name}.{QK}": _per_unit(tail_H) for name, tail_H in tails.items()})
    stand_ins: Sequence[StandIn] = ()
    if turned.stand_ins:
        stand_ins = measure_stand_ins(turned.model, turned.stand_ins, take_evenly(kept_back, NUM_MEASURED), track=track)
    factors = _measure_factors(turned, losses, take_evenly(kept_back, NUM_TRIED), ridge, track)
    return Worth({name: loss_H * factors.get(name, 1.0) for name, loss_H in losses.items()}, stand_ins)


def _measure_factors(
    turned: Turned, losses: Mapping[str, Tensor], batches: Batches, ridge: float, track: Track
) -> dict[str, float]:
    """Return by how much the estimates of each group fall short where a share of its units goes.

    They were made on the images that the others were refitted to, and take tokens to be independent.
    """
    estimates: dict[str, float] = {}
    tried: dict[str, list[tuple[str, nn.Module]]] = {}
    for name, loss_H in losses.items():
        kind = kind_of(name)
        if kind == HEADS:
            continue
        gone_H = loss_H.argsort(stable=True)[: max(1, round(SHARE_TRIED * len(loss_H)))]
        keep = {group.name: torch.ones(group.num_units).bool() for group in find_groups(turned.model, [kind])}
        keep[name][gone_H] = False
        plan = Plan(keep, kinds=dict.fromkeys(keep, kind) if kind != FFN else {})
        refitted = mask_neurons(compensate(turned.model, plan, turned.statistics, ridge=ridge), plan)
        layer = name.removesuffix(f".{kind}")
        tried.setdefault(layer, []).append((name, refitted.get_submodule(layer)))
        estimates[name] = float(loss_H[gone_H].sum())
    modules = {layer: [module for _name, module in of_layer] for layer, of_layer in tried.items()}
    measured = measure_replaced(turned.model, modules, batches, track=track) if modules else {}
    return {
        name: max(loss, 1e-12) / max(estimates[name], 1e-12)
        for layer, of_layer in tried.items()
        for (name, _module), loss in zip(of_layer, measured[layer], strict=True)
    }


def _per_unit(tail_H: Tensor) -> Tensor:
    """Turn what the units from each on cost together into what each adds; falling, so that the first are kept."""
    added_H = tail_H - torch.cat([tail_H[1:], tail_H.new_zeros(1)])
    tiny = torch.finfo(torch.float64).tiny
    return added_H.flip(0).clamp_min(tiny).cummax(0).values.flip(0)
