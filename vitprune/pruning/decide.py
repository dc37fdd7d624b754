"""Decide what of a model goes, over all its parts: the loss that each costs, over what it saves.

Neurons, dimensions of attention and whole layers compete in one ranking.

Letters: H units of a group.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from vitprune.calibration.layer_losses import StandIn
from vitprune.errors import VitpruneError
from vitprune.models.attention import HEADS, QK, VO, check_attention
from vitprune.models.image_size import check_image_size
from vitprune.models.merging import check_merging, describe_merging
from vitprune.models.units import FFN, LAYERS, find_groups, find_layers, kind_of, module_of
from vitprune.options import PARTS, TARGETS, check_choice
from vitprune.pruning.allocate import allocate
from vitprune.pruning.target import Target

# Parts that are not made of units: fewer tokens, decided before these.
TOKENS, PIXELS = "tokens", "pixels"
OUTER = (TOKENS, PIXELS)


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
    if TOKENS in ordered:
        check_merging(model)
        if describe_merging(model) is not None:
            raise VitpruneError("part tokens: the tokens of this model merge already; leave it out")
    if PIXELS in ordered:
        _check_pixels(model)
    find_groups(model)
    if LAYERS in ordered:
        find_layers(model)
        check_attention(model, [QK, VO])
    return ordered


def _check_pixels(model: nn.Module) -> None:
    check_image_size(model)
    try:
        check_merging(model)
    except VitpruneError as error:
        raise VitpruneError(
            f"part pixels: an image size is chosen for trunks of equal blocks alone ({error}); resize it yourself "
            "(set_image_size)"
        ) from error
    if describe_merging(model) is not None:
        raise VitpruneError("part pixels: the tokens of this model merge already; leave it out")


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

    Layers and heads are left out one after another, as long as that leaves more for the others than it costs.

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

    >>> import torch
    >>> losses = {"a": torch.tensor([4.0, 3.0, 2.0, 1.0]), "b": torch.tensor([0.4, 0.3, 0.2, 0.1])}
    >>> target = Target("macs", limit=4, fixed=0, costs={name: torch.arange(5.0) for name in losses})
    >>> decide(losses, target, allocation="global", round_to={"a": 1, "b": 1}, floor=0.25).widths
    {'a': 3, 'b': 1}
    """
    options = {"allocation": allocation, "round_to": round_to, "floor": floor}
    costs = stand_in_costs or {}
    state = Whole({}, {name: len(loss_H) for name, loss_H in losses.items() if kind_of(name) == HEADS})
    best = _attempt(state, losses, target, costs, **options)
    while True:
        trials = [(whole, _attempt(whole, losses, target, costs, **options)) for whole in state.one_less(stand_ins)]
        met = [(whole, trial) for whole, trial in trials if trial is not None]
        if best is None and not met:
            if not trials:
                raise VitpruneError(
                    f"target of {target.limit:g} {TARGETS[target.kind]}: it cannot be met by what may go; ask for more"
                )
            # Nothing less than several layers meets the target: first what costs least for what it saves.
            before = state.cost(target, costs)
            state = min(
                (whole for whole, _ in trials),
                key=lambda whole, before=before: whole.loss(losses) / max(before - whole.cost(target, costs), 1e-12),
            )
            continue
        whole, better = min(met, key=lambda each: each[1].loss, default=(state, best))
        if best is not None and better.loss >= best.loss:
            return best
        state, best = whole, better


@dataclass(frozen=True)
class Whole:
    """Which layers and heads go, before widths are allotted.

    Attributes:
        left_out: name of an attention or FFN -> what stands in for it.
        heads: group name of heads -> how many stay.
    """

    left_out: Mapping[str, StandIn]
    heads: Mapping[str, int]

    def one_less(self, stand_ins: Sequence[StandIn]) -> Iterator[Whole]:
        """Yield what has one layer or one head less."""
        for each in stand_ins:
            if each.layer not in self.left_out:
                yield Whole({**self.left_out, each.layer: each}, self.heads)
        for name, width in self.heads.items():
            if width > 1 and module_of(name) not in self.left_out:
                yield Whole(self.left_out, {**self.heads, name: width - 1})

    def loss(self, losses: Mapping[str, Tensor]) -> float:
        """Return what these layers and heads cost."""
        of_heads = [losses[name][width:] for name, width in self.heads.items() if module_of(name) not in self.left_out]
        return sum(each.loss for each in self.left_out.values()) + sum(float(loss_H.sum()) for loss_H in of_heads)

    def share(self, name: str, losses: Mapping[str, Tensor]) -> float:
        """Return which share of its heads the layer of a group of dimensions keeps."""
        heads = f"{module_of(name)}.{HEADS}"
        return self.heads[heads] / len(losses[heads]) if heads in self.heads and kind_of(name) != FFN else 1.0

    def cost(self, target: Target, costs: Mapping[tuple[str, str], float]) -> float:
        """Return what the model costs without these layers, nothing else taken out."""
        left = [cost_H[-1] for name, cost_H in target.costs.items() if module_of(name) not in self.left_out]
        return float(sum(left)) + sum(costs.get((name, each.kind), 0.0) for name, each in self.left_out.items())


def _attempt(
    whole: Whole,
    losses: Mapping[str, Tensor],
    target: Target,
    costs: Mapping[tuple[str, str], float],
    *,
    round_to: Mapping[str, int],
    **options: Any,
) -> Decision | None:
    """Allot widths beside what goes as a whole; None where the target cannot be met."""
    gone = {name for name in target.costs if module_of(name) in whole.left_out}
    # Dimensions of fewer heads cost less and are worth less.
    scaled = replace(target, costs={name: cost_H * whole.share(name, losses) for name, cost_H in target.costs.items()})
    open_losses = {
        name: loss_H * whole.share(name, losses)
        for name, loss_H in losses.items()
        if name not in gone and kind_of(name) != HEADS
    }
    kept = {name: len(cost_H) - 1 for name, cost_H in target.costs.items() if name not in open_losses}
    extra = sum(costs.get((name, each.kind), 0.0) for name, each in whole.left_out.items())
    remaining = fix(scaled, {**kept, **dict.fromkeys(gone, 0)}, extra)
    widths: dict[str, int] = {}
    if open_losses:
        try:
            multiples = {name: round_to[name] for name in open_losses}
            widths = allocate(open_losses, remaining, across_ffns=True, round_to=multiples, **options)
        except VitpruneError:
            return None
    elif remaining.fixed > target.limit * (1 + 1e-12):
        return None
    loss = whole.loss(losses) + sum(
        float(loss_H.sort().values[: len(loss_H) - widths[name]].sum()) for name, loss_H in open_losses.items()
    )
    heads = {name: 0 if module_of(name) in whole.left_out else width for name, width in whole.heads.items()}
    return Decision({**widths, **heads, **dict.fromkeys(gone, 0)}, dict(whole.left_out), loss)


def fix(target: Target, widths: Mapping[str, int], extra: float = 0.0) -> Target:
    """Return a target whose groups of these names are decided already.

    Args:
        target: of all groups.
        widths: group name -> units that it keeps.
        extra: what else the model costs.

    >>> import torch
    >>> costs = {"a": torch.arange(5.0), "b": torch.arange(3.0)}
    >>> fix(Target("macs", limit=4, fixed=1, costs=costs), {"b": 1}).fixed
    2.0
    """
    fixed = target.fixed + extra + sum(float(target.costs[name][width]) for name, width in widths.items())
    costs = {name: cost_H for name, cost_H in target.costs.items() if name not in widths}
    return replace(target, fixed=fixed, costs=costs)
