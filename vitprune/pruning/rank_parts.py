"""What parts of a model are worth, in one currency: nats that an image's answer loses.

Letters: H units of a group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vitprune.calibration.attention_moments import measure_query_key_losses
from vitprune.calibration.layer_losses import StandIn, measure_stand_ins
from vitprune.calibration.second_order import obs
from vitprune.data import Batches, take_evenly
from vitprune.models.attention import HEADS, QK, VO, find_attention
from vitprune.models.units import FFN, LAYERS, find_groups
from vitprune.options import DEFAULT_RIDGE
from vitprune.progress import Track, untracked
from vitprune.pruning.turn import Turned
from vitprune.views import has_classifier

# Of the calibration images, how many tell what the last dimensions of queries and keys are worth, and whole layers.
NUM_FISHER, NUM_MEASURED = 256, 48


@dataclass(frozen=True)
class Worth:
    """What the parts of a model are worth.

    Attributes:
        losses: group name -> what each unit costs when it goes after those worth less [H]; float64, nats per image.
        stand_ins: what may stand where whole layers were.
    """

    losses: Mapping[str, Tensor]
    stand_ins: Sequence[StandIn] = ()


def rank_parts(
    turned: Turned,
    batches: Batches,
    parts: Sequence[str],
    *,
    ridge: float = DEFAULT_RIDGE,
    seed: int = 0,
    track: Track = untracked,
) -> Worth:
    """Estimate what neurons, dimensions and layers cost.

    Neurons by criterion ``obs``, values by their discarded singular values, queries and keys by the Fisher information
    of their last dimensions together, layers by trying.

    Of a model without classifier nothing is known but the order of its queries' and keys' dimensions.

    Args:
        turned: from ``turn_attention``, for the same parts.
        batches: calibration images and labels, readable more than once.
        parts: keys of ``PARTS``.
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
    if not has_classifier(turned.model):
        groups = find_groups(turned.model, [QK]) if QK in parts else []
        return Worth({group.name: torch.arange(group.num_units, 0, -1).double() for group in groups})
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
        stand_ins = measure_stand_ins(turned.model, turned.stand_ins, take_evenly(batches, NUM_MEASURED), track=track)
    return Worth(losses, stand_ins)


def _per_unit(tail_H: Tensor) -> Tensor:
    """Turn what the units from each on cost together into what each adds; falling, so that the first are kept."""
    added_H = tail_H - torch.cat([tail_H[1:], tail_H.new_zeros(1)])
    tiny = torch.finfo(torch.float64).tiny
    return added_H.flip(0).clamp_min(tiny).cummax(0).values.flip(0)


def kind_of(group: str) -> str:
    """Return the kind of a group's units, by its name.

    >>> kind_of("blocks.0.attn.qk"), kind_of("blocks.0.mlp")
    ('qk', 'ffn')
    """
    kind = group.rpartition(".")[2]
    return kind if kind in (QK, VO, HEADS, LAYERS) else FFN
