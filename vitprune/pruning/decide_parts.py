"""Decide what of a model goes by trying whole candidates on images that nothing was fitted to.

Estimates of different kinds are off by different factors, and what goes together costs more than it does one by one: so
the factors are chosen by what the candidates lose that they lead to. What is decided here for good is what of attention
goes and which layers; neurons are ranked anew, in steps, on the model that this leaves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from vitprune.answer_loss import answer_loss
from vitprune.answers import ask
from vitprune.calibration.layer_losses import StandIn
from vitprune.data import Batches, on_device, take_evenly
from vitprune.errors import VitpruneError
from vitprune.models.attention import HEADS, QK, VO, split_attention
from vitprune.models.facts import Facts
from vitprune.models.left_out import MAP
from vitprune.models.units import FFN, KINDS, LAYERS, find_groups, kind_of
from vitprune.options import DEFAULT_RIDGE
from vitprune.progress import Track, untracked
from vitprune.pruning.allocate import allocate
from vitprune.pruning.decide import Decision, Whole, decide, fix
from vitprune.pruning.plan import Plan, plan_from_widths
from vitprune.pruning.rank_parts import Worth, rank_parts
from vitprune.pruning.target import Target, count_tokens, target_neurons
from vitprune.pruning.turn import Turned, cut, turn_attention
from vitprune.sharing import mean_of_all

# How many of the calibration images the decision is made on; all see what is left of the model.
NUM_IMAGES = 512
# Every fourth batch of these is kept back, to try candidates on.
KEPT_BACK = 4
# By what estimates are multiplied beside those of neurons, to begin with.
FIRST_FACTORS = {QK: 1.0, VO: 1.0, HEADS: 4.0, LAYERS: 1.0}
NUM_CANDIDATES = 12
# Neurons that are weighed together against dimensions and layers.
BUNCH = 8


@dataclass(frozen=True)
class Decided:
    """What of a model's attention and layers goes, and what its neurons may still cost.

    Attributes:
        turned: the model with its attention in order.
        parts: kinds of units that may go.
        decision: widths and layers.
        target: for the neurons of the model that is left.
    """

    turned: Turned
    parts: tuple[str, ...]
    decision: Decision
    target: Target | None

    @property
    def neurons(self) -> dict[str, int] | None:
        """How many neurons each FFN that is left keeps; None where their own ranking decides."""
        widths = {
            name: width
            for name, width in self.decision.widths.items()
            if kind_of(name) == FFN and name not in self.decision.left_out
        }
        return widths or None

    @property
    def in_shape(self) -> nn.Module:
        """A model of the widths that were decided, for its time: which neurons stay is still open."""
        plan, widths = self.plan, self.neurons or {}
        first = {name: torch.arange(len(plan.keep[name])) < width for name, width in widths.items()}
        return cut(self.turned, replace(plan, keep={**plan.keep, **first}), "none")

    @property
    def plan(self) -> Plan:
        """What goes before neurons are ranked: dimensions, heads, layers."""
        keep, kinds, left_out = {}, {}, self.decision.left_out
        for group in find_groups(self.turned.model, [kind for kind in KINDS if kind == FFN or kind in self.parts]):
            if group.kind == LAYERS:
                keep[group.name] = torch.tensor([group.module not in left_out])
            elif group.module in left_out:
                keep[group.name] = torch.zeros(group.num_units, dtype=torch.bool)
            else:
                width = group.num_units if group.kind == FFN else self.decision.widths.get(group.name, group.num_units)
                keep[group.name] = torch.arange(group.num_units) < width
            if group.kind != FFN:
                kinds[group.name] = group.kind
        facts = Facts(stand_ins={name: each.kind for name, each in left_out.items()} or None)
        return Plan(keep, facts, kinds)

    def complete(self, neurons: Plan, facts: Facts) -> Plan:
        """Return the plan of everything, with which neurons of the model that is left stay."""
        whole = self.plan
        facts = replace(facts, stand_ins=whole.facts.stand_ins)
        return replace(whole, keep={**whole.keep, **neurons.keep}, facts=facts)


@dataclass(frozen=True)
class Studied:
    """What a decision is made from, whatever the target.

    Attributes:
        turned: the model with its attention in order.
        worth: what every unit and layer is worth.
        kept_back: images to try candidates on.
    """

    turned: Turned
    worth: Worth
    kept_back: Batches


def study_parts(
    model: nn.Module,
    batches: Batches,
    parts: Sequence[str],
    wanted: frozenset[str] = frozenset(),
    *,
    ridge: float = DEFAULT_RIDGE,
    seed: int = 0,
    track: Track = untracked,
) -> Studied:
    """Measure what ``decide_parts`` decides from; arguments as there."""
    fitted, kept_back = keep_back(batches, NUM_IMAGES)
    turned = turn_attention(model, fitted, parts, wanted, ridge=ridge, seed=seed)
    return Studied(turned, rank_parts(turned, fitted, parts, kept_back, ridge=ridge, seed=seed, track=track), kept_back)


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
    studied: Studied | None = None,
    track: Track = untracked,
) -> Decided:
    """Decide what of attention and which layers go, and what that leaves to the neurons.

    Args:
        model: timm Vision Transformer in eval mode; its tokens may merge.
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
        studied: from ``study_parts`` of this model, where it is there already.
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
        if level and LAYERS not in parts:  # what layers save is known once they are weighed
            decide(level, target, **options)
    studied = studied or study_parts(model, batches, parts, wanted, ridge=ridge, seed=seed, track=track)
    turned, worth = studied.turned, studied.worth
    if target is None:
        decision = _decide_by_ratio(worth, parts, pruning_ratio, options)
        remaining = target_neurons(cut(turned, Decided(turned, parts, decision, None).plan, "none"), pruning_ratio)
        return Decided(turned, parts, decision, remaining)
    trial = propose(turned, parts, worth, target, split, ridge=ridge, **options)
    decision = _search(trial, studied.kept_back, track)
    whole = Whole(decision.left_out, {name: width for name, width in decision.widths.items() if kind_of(name) == HEADS})
    scaled = {name: cost_H * whole.share(name, worth.losses) for name, cost_H in target.costs.items()}
    kept = {
        name: decision.widths.get(name, len(cost_H) - 1)
        for name, cost_H in target.costs.items()
        if kind_of(name) != FFN or name in decision.left_out
    }
    spent = sum(trial.extra.get((name, each.kind), 0.0) for name, each in decision.left_out.items())
    return Decided(turned, parts, decision, fix(replace(target, costs=scaled), kept, spent))


def keep_back(batches: Batches, num_images: int) -> tuple[Batches, Batches]:
    """Return some images to fit to, and a third as many others to try candidates on; of one batch, the same.

    >>> images = [(torch.zeros(32, 3, 2, 2), torch.zeros(32, dtype=torch.int64)) for _ in range(6)]
    >>> [len(each) for each in keep_back(images, 128)]
    [3, 1]
    """
    some = take_evenly(batches, num_images)
    fitted = [batch for number, batch in enumerate(some) if number % KEPT_BACK != KEPT_BACK - 1]
    return fitted, some[KEPT_BACK - 1 :: KEPT_BACK] or some


@dataclass(frozen=True)
class Trial:
    """What it takes to try a candidate; names as in ``decide_parts`` and ``decide``."""

    turned: Turned
    parts: tuple[str, ...]
    worth: Worth
    target: Target
    extra: Mapping[tuple[str, str], float]
    options: Mapping[str, Any]
    ridge: float

    @property
    def factors(self) -> dict[str, float]:
        """By what estimates are multiplied to begin with, by kind."""
        return {kind: FIRST_FACTORS[kind] for kind in self.parts if kind != FFN}

    def decide(self, factors: Mapping[str, float]) -> Decision:
        """Decide with estimates multiplied by a factor for each kind."""
        losses = {name: loss_H * factors.get(kind_of(name), 1.0) for name, loss_H in self.worth.losses.items()}
        stand_ins = [replace(each, loss=each.loss * factors.get(LAYERS, 1.0)) for each in self.worth.stand_ins]
        return decide(losses, self.target, stand_ins, self.extra, **self.options)

    def model(self, decision: Decision) -> nn.Module:
        """Return the candidate with all that goes, refitted at once."""
        plan = Decided(self.turned, self.parts, decision, None).plan
        chosen = plan_from_widths(
            {name: loss_H for name, loss_H in self.worth.losses.items() if kind_of(name) == FFN}, decision.widths
        )
        return cut(self.turned, replace(plan, keep={**plan.keep, **chosen.keep}), "ridge", ridge=self.ridge)


def propose(
    turned: Turned,
    parts: Sequence[str],
    worth: Worth,
    target: Target,
    model: nn.Module,
    *,
    ridge: float,
    round_to: Mapping[str, int],
    **options: Any,
) -> Trial:
    """Return what tries candidates for a target; neurons are weighed by the bunch.

    Args:
        turned: from ``turn_attention``, for these parts.
        parts: from ``check_parts``.
        worth: from ``rank_parts``.
        target: of all FFNs and attentions.
        model: that the target is of, with ``SplitAttention``.
        ridge: λ of what stands in.
        round_to: group name -> every width is a multiple of it.
        options: ``allocation`` and ``floor``, as ``decide`` takes them.
    """
    extra = {(layer, MAP): _cost_of_map(target, model, layer) for layer in turned.stand_ins}
    coarse = {
        name: step * BUNCH if kind_of(name) == FFN and len(target.costs[name]) > 16 * step * BUNCH else step
        for name, step in round_to.items()
    }
    return Trial(turned, tuple(parts), worth, target, extra, {**options, "round_to": coarse}, ridge)


@torch.no_grad()
def _search(trial: Trial, batches: Batches, track: Track) -> Decision:
    """Return the decision whose model, refitted at once, loses least on images that were kept back."""
    images = [images for images, _labels in on_device(trial.turned.model, batches)]
    loss_of = answer_loss(trial.turned.model)
    dense = [loss_of.refer(ask(trial.turned.model, each)) for each in images]
    tried: dict[tuple[Any, ...], float] = {}

    def measure(decision: Decision) -> float:
        key = (*decision.widths.items(), *((name, each.kind) for name, each in decision.left_out.items()))
        if key not in tried:
            model = trial.model(decision)
            losses = [loss_of.diverge(answers, ask(model, each)) for answers, each in zip(dense, images, strict=True)]
            tried[key] = mean_of_all(torch.cat(losses))
        return tried[key]

    factors = trial.factors
    decision = trial.decide(factors)
    best = measure(decision)
    steps = [(kind, factor) for kind in factors for factor in (2.0, 0.5)]
    waiting = list(steps)
    for _number in track(range(NUM_CANDIDATES), "candidates"):
        if not waiting or (len(factors) == 1 and FFN not in trial.parts):
            break
        kind, factor = waiting.pop(0)
        candidate = {**factors, kind: factors[kind] * factor}
        try:
            decided = trial.decide(candidate)
        except VitpruneError:
            continue
        loss = measure(decided)
        if loss < best:
            best, factors, decision = loss, candidate, decided
            # On in the same direction; the other kinds are asked anew, the opposite is known.
            waiting = [(kind, factor), *(step for step in steps if step[0] != kind)]
    return decision


def _decide_by_ratio(worth: Worth, parts: Sequence[str], ratio: float, options: Mapping[str, Any]) -> Decision:
    widths: dict[str, int] = {}
    for kind in parts:
        of_kind = {name: loss_H for name, loss_H in worth.losses.items() if kind_of(name) == kind}
        if kind == FFN or not of_kind:
            continue
        counts = {name: torch.arange(len(loss_H) + 1, dtype=torch.float64) for name, loss_H in of_kind.items()}
        limit = sum(len(loss_H) for loss_H in of_kind.values()) * (1 - ratio)
        chosen = {**options, "round_to": {name: options["round_to"].get(name, 1) for name in of_kind}}
        widths.update(allocate(of_kind, Target("neurons", limit, 0.0, counts), across_ffns=True, **chosen))
    left_out: dict[str, StandIn] = {}
    num_layers = len({each.layer for each in worth.stand_ins})
    for each in sorted(worth.stand_ins, key=lambda each: each.loss):
        if len(left_out) < int(num_layers * ratio + 1e-9):
            left_out.setdefault(each.layer, each)
    return Decision(widths, left_out, 0.0)


def _cost_of_map(target: Target, model: nn.Module, layer: str) -> float:
    """Return what a linear map of tokens costs where a layer was: neurons and dimensions tell the price of a weight."""
    if layer in target.maps:
        return target.maps[layer]
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
