"""How many neurons each FFN keeps."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from vitprune.errors import VitpruneError
from vitprune.options import ALLOCATIONS, DEFAULT_FLOOR, check_choice


def allocate(
    scores: Mapping[str, Tensor],
    pruning_ratio: float,
    *,
    allocation: str,
    across_ffns: bool,
    round_to: int = 1,
    floor: float = DEFAULT_FLOOR,
) -> dict[str, int]:
    """Decide the widths; at least the asked share of neurons is removed, never less.

    Rounding is part of the decision: neurons are handed out in groups of ``round_to``, best groups first.

    Args:
        scores: FFN name -> scores [H]; higher is more important.
        pruning_ratio: share of all FFN neurons to remove, in [0, 1).
        allocation: key of ``ALLOCATIONS``.
        across_ffns: whether scores of different FFNs share a unit; if not, ``global`` divides each FFN's scores by
            their root mean square.
        round_to: every width is a multiple of it; at ratio 0 all widths stay as they are.
        floor: share of its neurons that ``global`` leaves to each FFN at least, in [0, 1]; capped by the ratio asked.

    Returns:
        FFN name -> neurons to keep.

    Raises:
        VitpruneError: if an argument is out of range, or an FFN would be left empty.

    >>> scores = {"a": torch.tensor([4.0, 3.0, 2.0, 1.0]), "b": torch.tensor([0.4, 0.3, 0.2, 0.1])}
    >>> allocate(scores, 0.5, allocation="global", across_ffns=True, floor=0.25)
    {'a': 3, 'b': 1}
    """
    if not 0 <= pruning_ratio < 1:
        raise VitpruneError(f"pruning_ratio must be in [0, 1), got {pruning_ratio}")
    if round_to < 1:
        raise VitpruneError(f"round_to must be at least 1, got {round_to}")
    if not 0 <= floor <= 1:
        raise VitpruneError(f"floor must be in [0, 1], got {floor}")
    check_choice("allocation", allocation, ALLOCATIONS)
    if pruning_ratio == 0:
        return {name: len(score_H) for name, score_H in scores.items()}
    smallest = {name: _round_down(len(score_H), 1 - pruning_ratio, round_to) for name, score_H in scores.items()}
    if allocation == "uniform":
        widths = smallest
    else:
        widths = _allocate_global(scores, smallest, pruning_ratio, across_ffns, round_to, floor)
    empty = [name for name, width in widths.items() if width < 1]
    if empty:
        rounding = f" in steps of {round_to}" if round_to > 1 else ""
        raise VitpruneError(
            f"pruning_ratio {pruning_ratio}{rounding} leaves {empty[0]} ({len(scores[empty[0]])} neurons) empty; "
            "ask for less"
        )
    return widths


def _round_down(num_neurons: int, share: float, round_to: int) -> int:
    # 768 * (1 - 0.9) is 76.79999999999998 in floating point: the tolerance keeps exact products exact.
    return math.floor(num_neurons * share / round_to + 1e-9) * round_to


def _allocate_global(scores, smallest, pruning_ratio, across_ffns, round_to, floor) -> dict[str, int]:
    widths, groups = {}, []
    for name, score_H in scores.items():
        score_H = score_H.double()
        if not across_ffns:
            score_H = score_H / score_H.square().mean().sqrt().clamp_min(torch.finfo(torch.float64).tiny)
        # The floor cannot ask for more than the uniform share, or the target could not be met.
        at_least = max(round_to, math.ceil(len(score_H) * floor / round_to) * round_to)
        widths[name] = min(at_least, smallest[name])
        ranked = score_H.sort(descending=True).values
        for start in range(widths[name], len(ranked) - round_to + 1, round_to):
            groups.append((-float(ranked[start : start + round_to].mean()), len(groups), name))
    budget = math.floor(sum(map(len, scores.values())) * (1 - pruning_ratio) + 1e-9) - sum(widths.values())
    for _cost, _position, name in sorted(groups)[: budget // round_to]:
        widths[name] += round_to
    return widths
