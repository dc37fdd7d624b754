"""What a model costs, by a measure that a target is told in: multiply-accumulates, or milliseconds on a machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from vitprune.models.macs import count_macs
from vitprune.pruning.target import Target, target_macs


@dataclass(frozen=True)
class Meter:
    """A measure of whole models, and of their units by width.

    Attributes:
        kind: key of ``TARGETS``.
        count: model -> what it costs.
        target: model, limit and ``kinds`` of units -> a target, as ``target_macs`` makes one.
        share_of: dense model -> schedule of merging -> what it leaves, as a share of what the dense model costs; None
            where that is of the multiply-accumulates.
    """

    kind: str
    count: Callable[[nn.Module], float]
    target: Callable[..., Target]
    share_of: Callable[[nn.Module], Callable[[Sequence[int]], float]] | None = None


MACS = Meter("macs", count_macs, target_macs)
