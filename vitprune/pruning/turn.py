"""Turn attention into order and cut it: what of a model goes before its neurons are ranked.

Letters: H units of a group.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from vitprune.calibration.attention_moments import QueryKeySums
from vitprune.calibration.layer_losses import fit_stand_ins
from vitprune.calibration.statistics import GRADIENTS, MOMENTS, Statistics, measure_statistics
from vitprune.data import Batches
from vitprune.models.attention import HEADS, QK, VO, check_attention, find_attention, split_attention
from vitprune.models.left_out import BIAS, Bias, TokenMap
from vitprune.models.units import LAYERS, Group, find_groups, find_layers
from vitprune.options import DEFAULT_RIDGE
from vitprune.pruning.apply import remove_neurons
from vitprune.pruning.compensate import compensate
from vitprune.pruning.plan import Plan
from vitprune.pruning.rotate import rotate_queries_keys, rotate_values, sort_heads


@dataclass(frozen=True)
class Turned:
    """A model whose attention stands in order, with what was measured on the way.

    Attributes:
        model: with ``SplitAttention``; answers as the one it came from.
        statistics: of its FFNs and of what its attentions' projections read, by group name, in the new basis.
        losses: group name -> what each dimension of the values, and each head, costs [H]; float64, nats per image,
            falling.
        stand_ins: attention or FFN -> the constant and the map that come nearest to it.
    """

    model: nn.Module
    statistics: Mapping[str, Statistics]
    losses: Mapping[str, Tensor] = field(default_factory=dict)
    stand_ins: Mapping[str, tuple[Bias, TokenMap]] = field(default_factory=dict)


def turn_attention(
    model: nn.Module,
    batches: Batches,
    parts: Sequence[str],
    wanted: frozenset[str] = frozenset(),
    *,
    ridge: float = DEFAULT_RIDGE,
    seed: int = 0,
) -> Turned:
    """Turn the dimensions of a model's attention into the order of what they are worth.

    Args:
        model: timm Vision Transformer in eval mode; stays as it is.
        batches: calibration images and labels, readable more than once.
        parts: keys of ``PARTS``; queries and keys, values and layers are looked at where they are named.
        wanted: statistics of the FFNs beside ``moments`` and ``gradients``, in the words of ``measure_statistics``.
        ridge: λ of what stands in for layers.
        seed: of everything drawn at random.

    Raises:
        VitpruneError: if the model lacks a part, or ``batches`` is empty.

    >>> import timm, torch
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=5).eval()
    >>> batches = [(torch.randn(2, 3, 32, 32), torch.zeros(2, dtype=torch.int64))]
    >>> sorted(turn_attention(model, batches, ["qk", "vo"]).statistics)
    ['blocks.0.attn.vo', 'blocks.0.mlp']
    """
    check_attention(model, [part for part in parts if part in (QK, VO, HEADS)])
    model = split_attention(model)
    names = [name for name, module in find_attention(model).items() if hasattr(module, "q")]
    sums = QueryKeySums()
    groups = [*find_groups(model), *find_groups(model, [VO])]
    wanted = wanted | {MOMENTS, GRADIENTS}
    with sums.watching(model, names if QK in parts else []):
        statistics = measure_statistics(model, groups, batches, wanted, seed=seed)
    losses: dict[str, Tensor] = {}
    moments = sums.finish()
    if HEADS in parts:
        model, statistics, moments, of_heads = sort_heads(model, statistics, moments, ridge=ridge)
        losses.update({f"{name}.{HEADS}": loss_H for name, loss_H in of_heads.items()})
    if QK in parts:
        model = rotate_queries_keys(model, moments)
    if VO in parts:
        of_values = {name: statistics[f"{name}.{VO}"] for name in names}
        model, turned, of_dimensions = rotate_values(model, of_values)
        statistics = {**statistics, **{f"{name}.{VO}": of_name for name, of_name in turned.items()}}
        losses.update({f"{name}.{VO}": loss_H for name, loss_H in of_dimensions.items()})
    stand_ins = fit_stand_ins(model, layers_that_can_go(model), batches, ridge=ridge) if LAYERS in parts else {}
    return Turned(model, statistics, losses, stand_ins)


def layers_that_can_go(model: nn.Module) -> list[Group]:
    """Find the layers that can go as a whole: not an attention by whose keys tokens merge.

    >>> import timm, torch
    >>> len(layers_that_can_go(timm.create_model("vit_tiny_patch16_224", depth=2)))
    4
    """
    merging = {name for name, module in model.named_modules() if getattr(module, "merge", None) is not None}
    return [group for group in find_layers(model) if group.module not in {f"{name}.attn" for name in merging}]


def cut(turned: Turned, plan: Plan, compensation: str, *, ridge: float = DEFAULT_RIDGE) -> nn.Module:
    """Return a model without the units and layers that a plan takes out of it; what is left stands in for them.

    Args:
        turned: from ``turn_attention``.
        plan: of any kinds of units of ``turned.model``.
        compensation: ``none``, ``bias`` or ``ridge``; layers are stood in for by what was fitted to them.
        ridge: λ relative to the mean variance of the units.

    >>> import timm, torch
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=5).eval()
    >>> batches = [(torch.randn(2, 3, 32, 32), torch.zeros(2, dtype=torch.int64))]
    >>> plan = Plan({"blocks.0.attn.qk": torch.arange(64) < 32}, kinds={"blocks.0.attn.qk": "qk"})
    >>> cut(turn_attention(model, batches, ["qk"]), plan, "ridge").blocks[0].attn.qk_width
    32
    """
    model = compensate(turned.model, plan, turned.statistics, compensation=compensation, ridge=ridge)
    model = remove_neurons(model, plan)
    for layer, kind in (plan.facts.stand_ins or {}).items():
        constant, map_of_tokens = turned.stand_ins[layer]
        model.set_submodule(layer, copy.deepcopy(constant if kind == BIAS else map_of_tokens))
    return model
