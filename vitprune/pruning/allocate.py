"""How many neurons each FFN keeps."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from vitprune.errors import VitpruneError
from vitprune.options import ALLOCATIONS, DEFAULT_FLOOR, check_choice
from vitprune.pruning.target import Target


def allocate(
    scores: Mapping[str, Tensor],
    target: Target,
    *,
    allocation: str,
    across_ffns: bool,
    round_to: int | Mapping[str, int] = 1,
    floor: float = DEFAULT_FLOOR,
) -> dict[str, int]:
    """Decide the widths; the model never costs more than the target allows.

    Rounding is part of the decision: neurons are handed out in groups of ``round_to``, best groups first, where a group
    is judged by its mean score per unit of the target's cost.

    Args:
        scores: FFN name -> scores of the neurons that are left; higher is more important.
        target: limit and costs; its tables tell the dense widths.
        allocation: key of ``ALLOCATIONS``.
        across_ffns: whether scores of different FFNs share a unit; if not, ``global`` divides each FFN's scores by
            their root mean square.
        round_to: every width is a multiple of it, or of what it says for the group's name; where nothing has to go all
            widths stay as they are.
        floor: share of its dense neurons that ``global`` leaves to each FFN at least, in [0, 1]; capped by what
            ``uniform`` would leave it.

    Returns:
        FFN name -> neurons to keep.

    Raises:
        VitpruneError: if an argument is out of range, or an FFN would be left empty.

    >>> scores = {"a": torch.tensor([4.0, 3.0, 2.0, 1.0]), "b": torch.tensor([0.4, 0.3, 0.2, 0.1])}
    >>> costs = {name: torch.arange(5.0) for name in scores}
    >>> half = Target("neurons", limit=4, fixed=0, costs=costs)
    >>> allocate(scores, half, allocation="global", across_ffns=True, floor=0.25)
    {'a': 3, 'b': 1}
    """
    multiples = dict(round_to) if isinstance(round_to, Mapping) else dict.fromkeys(scores, round_to)
    if min(multiples.values()) < 1:
        raise VitpruneError(f"round_to must be at least 1, got {min(multiples.values())}")
    if not 0 <= floor <= 1:
        raise VitpruneError(f"floor must be in [0, 1], got {floor}")
    check_choice("allocation", allocation, ALLOCATIONS)
    left = {name: len(score_H) for name, score_H in scores.items()}
    if target.predict(left) <= target.limit:
        return left
    smallest = _allocate_uniform(left, target, multiples)
    widths = smallest
    if allocation == "global":
        widths = _allocate_global(scores, smallest, target, across_ffns, multiples, floor)
    empty = [name for name, width in widths.items() if width < 1]
    if empty:
        rounding = f" in steps of {multiples[empty[0]]}" if multiples[empty[0]] > 1 else ""
        raise VitpruneError(
            f"removing {target.share:.3g} of the FFNs{rounding} leaves {empty[0]} ({left[empty[0]]} neurons) empty; "
            "ask for less"
        )
    return widths


def compare_across(scores: Mapping[str, Tensor], across_ffns: bool) -> dict[str, Tensor]:
    """Return scores (float64) that share a unit: where they do not yet, relative to each FFN's root mean square."""
    tiny = torch.finfo(torch.float64).tiny
    wide = {name: score_H.double() for name, score_H in scores.items()}
    if across_ffns:
        return wide
    return {name: score_H / score_H.square().mean().sqrt().clamp_min(tiny) for name, score_H in wide.items()}


def _allocate_uniform(left: Mapping[str, int], target: Target, multiples: Mapping[str, int]) -> dict[str, int]:
    """Keep the largest share of the dense widths, the same everywhere, that the target allows."""

    def at(share: float) -> dict[str, int]:
        # 768 * (1 - 0.9) is 76.79999999999998 in floating point: the tolerance keeps exact products exact.
        asked = {name: math.floor((len(target.costs[name]) - 1) * share / multiples[name] + 1e-9) for name in left}
        return {name: min(asked[name], left[name] // multiples[name]) * multiples[name] for name in left}

    shares = sorted({width / (len(cost_H) - 1) for cost_H in target.costs.values() for width in range(len(cost_H))})
    low, high = 0, len(shares) - 1
    while low < high:
        middle = (low + high + 1) // 2
        if target.predict(at(shares[middle])) <= target.limit * (1 + 1e-12):
            low = middle
        else:
            high = middle - 1
    return at(shares[low])


def _allocate_global(scores, smallest, target: Target, across_ffns, multiples, floor) -> dict[str, int]:
    widths, groups = {}, []
    for name, score_H in compare_across(scores, across_ffns).items():
        round_to = multiples[name]
        at_least = max(round_to, math.ceil((len(target.costs[name]) - 1) * floor / round_to) * round_to)
        # The floor cannot ask for more than the uniform share, or the target could not be met.
        widths[name] = min(at_least, smallest[name])
        ranked = score_H.sort(descending=True).values
        worth = math.inf
        for start in range(widths[name], len(ranked) - round_to + 1, round_to):
            price = float(target.costs[name][start + round_to] - target.costs[name][start])
            gain = float(ranked[start : start + round_to].mean())
            # No group may pass one of its own FFN that is better but dearer per neuron.
            worth = min(worth, gain / price if price > 0 else math.inf)
            groups.append((-worth, len(groups), name, price))
    spent, full = target.predict(widths), set()
    for _worth, _position, name, price in sorted(groups):
        if name not in full and spent + price <= target.limit * (1 + 1e-12):
            widths[name] += multiples[name]
            spent += price
        else:
            full.add(name)
    return widths
