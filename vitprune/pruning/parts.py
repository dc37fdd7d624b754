"""Cut more than FFN neurons: turn attention into order, rank all parts in nats, decide, and take out.

Neurons, dimensions of attention and whole layers compete in one ranking: the loss that each costs, over what it saves.
What is decided here is what of attention goes and which layers; neurons are then ranked anew, in steps, on the model
that this leaves.

Letters: H units of a group.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vitprune.calibration.attention_moments import QueryKeySums, measure_query_key_losses
from vitprune.calibration.layer_losses import StandIn, fit_stand_ins, measure_divergence, measure_stand_ins
from vitprune.calibration.second_order import obs
from vitprune.calibration.statistics import GRADIENTS, MOMENTS, Statistics, measure_statistics
from vitprune.data import Batches, on_device
from vitprune.errors import VitpruneError
from vitprune.models.attention import HEADS, QK, VO, check_attention, find_attention, split_attention
from vitprune.models.facts import Asked, Facts
from vitprune.models.left_out import MAP
from vitprune.models.units import FFN, KINDS, LAYERS, find_groups, find_layers
from vitprune.options import DEFAULT_RIDGE, PARTS, check_choice
from vitprune.progress import Track, untracked
from vitprune.pruning.allocate import allocate
from vitprune.pruning.apply import mask_neurons, remove_neurons
from vitprune.pruning.compensate import STAND_INS, write_down_proj
from vitprune.pruning.plan import Plan, fit_plan
from vitprune.pruning.rotate import rotate_queries_keys, rotate_values
from vitprune.pruning.target import Target, count_tokens, target_neurons
from vitprune.views import has_classifier

# Of the calibration images, how many measure what whole layers are worth; the others fit what stands in for them.
NUM_MEASURED = 64
# How many of them, and which share of a part, tell how far an estimate is off.
NUM_CALIBRATED, SHARE_CALIBRATED = 128, 0.25


@dataclass(frozen=True)
class Ranked:
    """A model whose attention stands in order, with what its units are worth.

    Attributes:
        model: with ``SplitAttention``; answers as the one it came from.
        statistics: of its FFNs and of what its attentions' projections read, by group name.
        losses: group name -> what each unit costs when it goes after those behind it [H]; float64, nats per image.
        stand_ins: what may stand where whole layers were.
    """

    model: nn.Module
    statistics: Mapping[str, Statistics]
    losses: Mapping[str, Tensor]
    stand_ins: Sequence[StandIn] = ()


def rank_parts(
    model: nn.Module,
    batches: Batches,
    parts: Sequence[str],
    wanted: frozenset[str],
    *,
    ridge: float = DEFAULT_RIDGE,
    seed: int = 0,
    track: Track = untracked,
) -> Ranked:
    """Turn a model's attention into order and measure what its parts but the neurons are worth.

    Args:
        model: timm Vision Transformer in eval mode, with a classifier; stays as it is.
        batches: calibration images and labels, readable more than once.
        parts: kinds of units that may go.
        wanted: statistics of the FFNs, in the words of ``measure_statistics``.
        ridge: λ of what stands in for layers.
        seed: of everything drawn at random.
        track: wraps (items, description) of long loops, for progress.

    Raises:
        VitpruneError: if the model lacks a part, or ``batches`` is empty.
    """
    check_attention(model, [part for part in parts if part in (QK, VO, HEADS)])
    model = split_attention(model)
    names = [name for name, module in find_attention(model).items() if hasattr(module, "q")]
    sums = QueryKeySums()
    groups = [*find_groups(model), *find_groups(model, [VO])]
    with sums.watching(model, names if QK in parts else []):
        statistics = measure_statistics(model, groups, batches, wanted | {MOMENTS, GRADIENTS}, seed=seed)
    losses: dict[str, Tensor] = obs(model, statistics, ridge=ridge, track=track) if FFN in parts else {}
    if QK in parts:
        model = rotate_queries_keys(model, sums.finish())
    if VO in parts:
        of_values = {name: statistics[f"{name}.{VO}"] for name in names}
        model, turned, of_dimensions = rotate_values(model, of_values)
        statistics = {**statistics, **{f"{name}.{VO}": of_name for name, of_name in turned.items()}}
        losses.update({f"{name}.{VO}": loss_H for name, loss_H in of_dimensions.items()})
    if QK in parts:
        tails = measure_query_key_losses(model, names, batches, seed=seed + 1)
        losses.update({f"{name}.{QK}": _per_unit(tail_H) for name, tail_H in tails.items()})
    stand_ins: Sequence[StandIn] = ()
    if LAYERS in parts:
        fitted = fit_stand_ins(model, find_layers(model), batches, ridge=ridge)
        stand_ins = measure_stand_ins(model, fitted, _some(batches, NUM_MEASURED), track=track)
    return Ranked(model, statistics, losses, stand_ins)


def _per_unit(tail_H: Tensor) -> Tensor:
    """Turn what the units from each on cost together into what each adds; falling, so that the first are kept."""
    added_H = tail_H - torch.cat([tail_H[1:], tail_H.new_zeros(1)])
    tiny = torch.finfo(torch.float64).tiny
    return added_H.flip(0).clamp_min(tiny).cummax(0).values.flip(0)


def _some(batches: Batches, num_images: int) -> list[tuple[Tensor, Tensor]]:
    """Return about this many images, evenly from all batches."""
    held = list(batches)
    total = sum(len(labels) for _images, labels in held)
    every = max(1, total // num_images)
    return [(images[::every], labels[::every]) for images, labels in held]


@dataclass(frozen=True)
class Decision:
    """What of a model goes, neurons still counted alone.

    Attributes:
        widths: group name -> units to keep, of every part but layers; 0 where a layer goes as a whole.
        left_out: name of an attention or FFN -> what stands in for it.
        loss: what all that is predicted to cost, in nats per image.
    """

    widths: Mapping[str, int]
    left_out: Mapping[str, StandIn]
    loss: float


def decide(
    losses: Mapping[str, Tensor],
    target: Target,
    stand_ins: Sequence[StandIn] = (),
    stand_in_costs: Mapping[tuple[str, str], float] | None = None,
    *,
    allocation: str,
    round_to: Mapping[str, int],
    floor: float,
) -> Decision:
    """Decide widths and whole layers so that the target is met at the least predicted loss.

    Layers are left out one after another, as long as that leaves more for the others than it costs.

    Args:
        losses: group name -> what each unit costs [H], of all groups that may be cut; nats per image.
        target: limit and costs, of these groups and of all others in attention and FFNs.
        stand_ins: what may stand where layers were, and what that costs.
        stand_in_costs: (layer, kind) -> cost of the stand-in, in the target's unit; 0 where it does not say.
        allocation: key of ``ALLOCATIONS``.
        round_to: group name -> every width is a multiple of it.
        floor: share of its units that ``global`` leaves to each group at least.

    Raises:
        VitpruneError: if the target cannot be met.
    """
    costs = stand_in_costs or {}

    def attempt(left_out: Mapping[str, StandIn]) -> Decision:
        gone = {name for name in target.costs if _layer_of(name) in left_out}
        whole = {name: len(cost_H) - 1 for name, cost_H in target.costs.items() if name not in losses}
        fixed = {**whole, **dict.fromkeys(gone, 0)}
        extra = sum(costs.get((name, each.kind), 0.0) for name, each in left_out.items())
        remaining = fix(target, fixed, extra)
        open_losses = {name: loss_H for name, loss_H in losses.items() if name not in gone}
        widths = allocate(
            open_losses,
            remaining,
            allocation=allocation,
            across_ffns=True,
            round_to={name: round_to[name] for name in open_losses},
            floor=floor,
        )
        loss = sum(
            float(loss_H.sort().values[: len(loss_H) - widths[name]].sum()) for name, loss_H in open_losses.items()
        )
        loss += sum(each.loss for each in left_out.values())
        return Decision({**widths, **dict.fromkeys(gone, 0)}, dict(left_out), loss)

    best = attempt({})
    while True:
        better = best
        for each in stand_ins:
            if each.layer in best.left_out:
                continue
            try:
                trial = attempt({**best.left_out, each.layer: each})
            except VitpruneError:  # what would be left cannot meet the target
                continue
            better = min(better, trial, key=lambda decision: decision.loss)
        if better is best:
            return best
        best = better


def _layer_of(group: str) -> str:
    kind = group.rpartition(".")[2]
    return group.removesuffix(f".{kind}") if kind in (QK, VO, HEADS) else group


def fix(target: Target, widths: Mapping[str, int], extra: float = 0.0) -> Target:
    """Return a target whose groups of these names are decided already.

    Args:
        target: of all groups.
        widths: group name -> units that it keeps.
        extra: what else the model costs.

    >>> costs = {"a": torch.arange(5.0), "b": torch.arange(3.0)}
    >>> fix(Target("macs", limit=4, fixed=1, costs=costs), {"b": 1}).fixed
    2.0
    """
    fixed = target.fixed + extra + sum(float(target.costs[name][width]) for name, width in widths.items())
    costs = {name: cost_H for name, cost_H in target.costs.items() if name not in widths}
    return replace(target, fixed=fixed, costs=costs)


def calibrate(
    ranked: Ranked, batches: Batches, parts: Sequence[str], *, ridge: float = DEFAULT_RIDGE
) -> dict[str, Tensor]:
    """Return losses that compare across parts: the estimate of each kind times what it was found to be off by.

    Of each kind alone a share goes, what is left stands in for it, and the rise of KL(dense ‖ pruned) is held against
    the estimate. Estimates see tokens and layers one by one; how much that leaves out differs between kinds.

    Args:
        ranked: from ``rank_parts``.
        batches: calibration images; read once.
        parts: kinds of units.
        ridge: λ of what stands in.
    """
    some = [images for images, _labels in on_device(ranked.model, _some(batches, NUM_CALIBRATED))]
    with torch.no_grad():
        dense = [ranked.model(images).log_softmax(-1) for images in some]
    factors = {}
    for kind in parts:
        groups = list(find_groups(ranked.model, [kind])) if kind in (FFN, QK, VO) else []
        if not groups:
            continue
        keep, estimate = {}, 0.0
        for group in groups:
            loss_H = ranked.losses[group.name]
            gone = loss_H.argsort(stable=True)[: round(SHARE_CALIBRATED * len(loss_H))]
            keep[group.name] = torch.ones(len(loss_H), dtype=torch.bool)
            keep[group.name][gone] = False
            estimate += float(loss_H[gone].sum())
        plan = Plan(keep, kinds={group.name: kind for group in groups if kind != FFN})
        with torch.no_grad():
            pruned = mask_neurons(stand_in_for(ranked.model, plan, ranked.statistics, "ridge", ridge=ridge), plan)
            losses = [
                measure_divergence(dense_BC, pruned(images)) for dense_BC, images in zip(dense, some, strict=True)
            ]
        factors[kind] = max(float(torch.cat(losses).mean()), 1e-12) / max(estimate, 1e-12)
    return {name: loss_H * factors[_kind_of(name)] for name, loss_H in ranked.losses.items()}


def _kind_of(group: str) -> str:
    kind = group.rpartition(".")[2]
    return kind if kind in (QK, VO, HEADS, LAYERS) else FFN


@torch.no_grad()
def stand_in_for(
    model: nn.Module, plan: Plan, statistics: Mapping[str, Statistics], compensation: str, *, ridge: float
) -> nn.Module:
    """Return a copy in which projections read what is left of neurons and values in place of what a plan removes.

    Args:
        model: the model that the plan is for; shapes stay.
        plan: of any kinds.
        statistics: of what each group's reader reads, by group name, with ``moments``.
        compensation: ``none``, ``bias`` or ``ridge``.
        ridge: λ relative to the mean variance of the units.
    """
    result = copy.deepcopy(model)
    solve = STAND_INS.get(compensation)
    for group in fit_plan(model, plan) if solve else ():
        removed = plan.removed(group.name)
        if group.kind not in (FFN, VO, HEADS) or group.module in plan.left_out or len(removed) == 0:
            continue
        reader = result.get_submodule(group.read_by)
        keep_X = torch.ones(reader.in_features, dtype=torch.bool)
        keep_X[group.columns(removed)] = False
        name = f"{group.module}.{VO}" if group.kind == HEADS else group.name
        write_down_proj(reader, *solve(reader.weight.cpu(), statistics[name], keep_X, ridge=ridge))
    return result


def cut(ranked: Ranked, plan: Plan, compensation: str, *, ridge: float = DEFAULT_RIDGE) -> nn.Module:
    """Return a model without the units and layers that a plan takes out of it; what is left stands in for them.

    Args:
        ranked: from ``rank_parts``.
        plan: of any kinds of units of ``ranked.model``.
        compensation: ``none``, ``bias`` or ``ridge``; layers are stood in for by what was fitted to them.
        ridge: λ relative to the mean variance of the units.
    """
    model = stand_in_for(ranked.model, plan, ranked.statistics, compensation, ridge=ridge)
    model = remove_neurons(model, plan)
    kinds = plan.facts.stand_ins or {}
    for each in ranked.stand_ins:
        if kinds.get(each.layer) == each.kind:
            model.set_submodule(each.layer, copy.deepcopy(each.module))
    return model


def check_parts(model: nn.Module, parts: Sequence[str], *, mode: str = "remove") -> tuple[str, ...]:
    """Return parts in the order of ``PARTS``, after checking that the model has them.

    Raises:
        VitpruneError: if a part is unknown, the model lacks it, or it cannot be masked.

    >>> import timm
    >>> check_parts(timm.create_model("vit_tiny_patch16_224", depth=1), ["vo", "ffn"])
    ('ffn', 'vo')
    """
    for part in parts:
        check_choice("parts", part, PARTS)
    ordered = tuple(part for part in PARTS if part in parts)
    if not ordered:
        raise VitpruneError(f"parts must name at least one of {', '.join(PARTS)}")
    if ordered == (FFN,):
        return ordered
    if mode != "remove":
        raise VitpruneError(f"mode {mode} is for neurons alone; parts {', '.join(ordered)} are removed")
    check_attention(model, [part for part in ordered if part in (QK, VO, HEADS)])
    if not has_classifier(model):
        raise VitpruneError(f"parts {', '.join(ordered)} are ranked by loss, but the model has no classifier")
    find_groups(model)
    if LAYERS in ordered:
        find_layers(model)
        check_attention(model, [QK, VO])
    return ordered


@dataclass(frozen=True)
class Decided:
    """What of a model's attention and layers goes, and what its neurons may still cost.

    Attributes:
        ranked: the model with its attention in order.
        decision: widths and layers.
        target: for the neurons of the model that is left.
    """

    ranked: Ranked
    decision: Decision
    target: Target

    @property
    def plan(self) -> Plan:
        """What goes before neurons are ranked: dimensions, heads, layers."""
        keep, kinds, left_out = {}, {}, self.decision.left_out
        for group in find_groups(self.ranked.model, [kind for kind in KINDS if kind != HEADS]):
            if group.kind == LAYERS:
                keep[group.name] = torch.tensor([group.module not in left_out])
            elif group.module in left_out:
                keep[group.name] = torch.zeros(group.num_units, dtype=torch.bool)
            else:
                width = group.num_units if group.kind == FFN else self.decision.widths.get(group.name, group.num_units)
                keep[group.name] = torch.arange(group.num_units) < width
            if group.kind != FFN:
                kinds[group.name] = group.kind
        facts = Facts(stand_ins={name: each.kind for name, each in left_out.items()})
        return Plan(keep, facts, kinds)

    def cut(self, compensation: str, *, ridge: float = DEFAULT_RIDGE) -> nn.Module:
        """Return the model without what goes before neurons are ranked; arguments as of ``cut``."""
        return cut(self.ranked, self.plan, compensation, ridge=ridge)

    def complete(self, neurons: Plan) -> Plan:
        """Return the plan of everything, with which neurons of the model that is left stay."""
        whole = self.plan
        return replace(whole, keep={**whole.keep, **neurons.keep})

    def asked(self, target: Target, neurons: Mapping[str, int]) -> Asked:
        """Return what was asked and what is predicted for these widths of the FFNs that are left."""
        return Asked(target.kind, target.limit, self.target.predict(neurons), target.dense)


def decide_parts(
    model: nn.Module,
    batches: Batches,
    parts: Sequence[str],
    *,
    pruning_ratio: float | None = None,
    target: Target | None = None,
    wanted: frozenset[str] = frozenset(),
    allocation: str,
    round_to: int = 1,
    floor: float,
    ridge: float = DEFAULT_RIDGE,
    seed: int = 0,
    track: Track = untracked,
) -> Decided:
    """Decide what of attention and which layers go, and what that leaves to the neurons.

    Args:
        model: timm Vision Transformer in eval mode, with a classifier; its tokens may merge.
        batches: calibration images and labels, readable more than once.
        parts: from ``check_parts``.
        pruning_ratio: share of the units of every part to go, in [0, 1).
        target: what the model may cost instead, by width of all its FFNs and attentions.
        wanted: statistics of the FFNs that will be asked for, in the words of ``measure_statistics``.
        allocation: key of ``ALLOCATIONS``.
        round_to: every FFN's width is a multiple of it; widths of attention are multiples of 8 where heads are wide.
        floor: share of its units that ``global`` leaves to each group at least.
        ridge: λ of what stands in.
        seed: of everything drawn at random.
        track: wraps (items, description) of long loops, for progress.

    Raises:
        VitpruneError: if the target cannot be met, or is not for these parts.
    """
    if (pruning_ratio is None) == (target is None):
        raise VitpruneError("say how far to prune: either pruning_ratio or target")
    split = split_attention(model)
    groups = find_groups(split, [FFN, QK, VO])
    multiples = {group.name: round_to if group.kind == FFN else multiple_of(group.num_units) for group in groups}
    options = {"allocation": allocation, "round_to": multiples, "floor": floor}
    level = {group.name: torch.zeros(group.num_units) for group in groups if group.kind in parts}
    if target is not None:
        if set(target.costs) != {group.name for group in groups}:
            raise VitpruneError("the target is for other parts than these; build it with `kinds` ffn, qk and vo")
        if level:
            decide(level, target, **options)
    ranked = rank_parts(model, batches, parts, wanted, ridge=ridge, seed=seed, track=track)
    losses = calibrate(ranked, batches, parts, ridge=ridge)
    if target is None:
        decision = _decide_by_ratio(ranked, losses, parts, pruning_ratio, options)
        remaining = target_neurons(cut(ranked, Decided(ranked, decision, None).plan, "none"), pruning_ratio)
        return Decided(ranked, decision, remaining)
    extra = {(each.layer, MAP): _cost_of_map(target, split, each.layer) for each in ranked.stand_ins}
    decision = decide(losses, target, ranked.stand_ins, extra, **options)
    gone = {name: width for name, width in decision.widths.items() if _kind_of(name) != FFN or width == 0}
    spent = sum(extra.get((name, each.kind), 0.0) for name, each in decision.left_out.items())
    others = {name: len(cost_H) - 1 for name, cost_H in target.costs.items() if _kind_of(name) != FFN}
    return Decided(ranked, decision, fix(target, {**others, **gone}, spent))


def _decide_by_ratio(
    ranked: Ranked, losses: Mapping[str, Tensor], parts: Sequence[str], ratio: float, options: Mapping[str, Any]
) -> Decision:
    widths: dict[str, int] = {}
    for kind in parts:
        of_kind = {name: loss_H for name, loss_H in losses.items() if _kind_of(name) == kind}
        if kind == FFN or not of_kind:
            continue
        counts = {name: torch.arange(len(loss_H) + 1, dtype=torch.float64) for name, loss_H in of_kind.items()}
        limit = sum(len(loss_H) for loss_H in of_kind.values()) * (1 - ratio)
        chosen = {**options, "round_to": {name: options["round_to"][name] for name in of_kind}}
        widths.update(allocate(of_kind, Target("neurons", limit, 0.0, counts), across_ffns=True, **chosen))
    left_out: dict[str, StandIn] = {}
    num_layers = len({each.layer for each in ranked.stand_ins})
    for each in sorted(ranked.stand_ins, key=lambda each: each.loss):
        if len(left_out) < int(num_layers * ratio + 1e-9):
            left_out.setdefault(each.layer, each)
    return Decision(widths, left_out, 0.0)


def _cost_of_map(target: Target, model: nn.Module, layer: str) -> float:
    """Return what a linear map of tokens costs where a layer was: neurons and dimensions tell the price of a weight."""
    of_layer = [group for group in find_groups(model, [FFN, QK, VO]) if group.module == layer and group.kind != QK]
    group = of_layer[0]
    dim = model.get_submodule(group.read_by).out_features
    if target.kind == "parameters":
        return float(dim * dim + dim)
    return float(dim * dim * count_tokens(model, [group])[group.name])


def multiple_of(width: int) -> int:
    """Return what widths of attention are multiples of: 8, or less where heads are narrow.

    >>> multiple_of(64), multiple_of(8), multiple_of(6)
    (8, 2, 1)
    """
    return next(step for step in (8, 4, 2, 1) if (width % step == 0 and width >= 4 * step) or step == 1)
