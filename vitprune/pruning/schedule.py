"""Decide a plan in several steps, each on what the pruning so far has made of the model."""

from __future__ import annotations


import torch
from torch import Tensor, nn

from vitprune.data import Batches
from vitprune.discovery.criteria import REGISTRY, check_needs, score_neurons
from vitprune.discovery.discover import Discovery
from vitprune.discovery.statistics import MOMENTS, Statistics, measure_statistics
from vitprune.errors import VitpruneError
from vitprune.feed_forward import find_feed_forwards
from vitprune.options import DEFAULT_FLOOR, DEFAULT_RIDGE, DEFAULT_STEP
from vitprune.pruning.allocate import allocate
from vitprune.pruning.apply import remove_neurons
from vitprune.pruning.compensate import compensate
from vitprune.pruning.plan import Plan, plan_from_widths
from vitprune.pruning.target import Target


def list_stops(share: float, step: float) -> list[float]:
    """Return the shares at which scores are measured anew: multiples of ``step`` below ``share``, then ``share``.

    Args:
        share: what is to go in the end, in [0, 1].
        step: in (0, 1].

    Raises:
        VitpruneError: if ``step`` is out of range.

    >>> list_stops(0.35, 0.1)
    [0.1, 0.2, 0.3, 0.35]
    """
    if not 0 < step <= 1:
        raise VitpruneError(f"step must be in (0, 1], got {step}")
    below = []
    while (len(below) + 1) * step < share - 1e-9:
        below.append(round((len(below) + 1) * step, 12))
    return [*below, share]


def plan_in_steps(
    model: nn.Module,
    target: Target,
    *,
    batches: Batches | None,
    criterion: str,
    allocation: str,
    compensation: str,
    found: Discovery | None = None,
    round_to: int = 1,
    floor: float = DEFAULT_FLOOR,
    ridge: float = DEFAULT_RIDGE,
    step: float = DEFAULT_STEP,
    seed: int = 0,
    wanted: frozenset[str] = frozenset(),
) -> tuple[Plan, dict[str, Statistics]]:
    """Remove a share, compensate, measure and score what is left, and go on until the target is met.

    The steps only find out which neurons stay; compensating the dense model for the whole plan comes after. Criteria
    that look at no images need one step.

    Args:
        model: timm Vision Transformer in eval mode; stays as it is.
        target: what the model may cost.
        batches: calibration images and labels; read once per step and criterion.
        criterion: key of ``CRITERIA``.
        allocation: key of ``ALLOCATIONS``.
        compensation: ``none``, ``bias`` or ``ridge``: of the steps in between.
        found: a discovery on this model, for criterion ``jas``.
        round_to: every width is a multiple of it.
        floor: share of its dense neurons that ``global`` leaves to each FFN at least.
        ridge: λ of the compensation and of ``obs``, relative to the mean variance of the hidden neurons.
        step: share of what the FFN neurons cost that goes between two measurements, in (0, 1]; 1 measures once.
        seed: of random scores and of sampled labels.
        wanted: further statistics of the dense model to measure on the way.

    Returns:
        The plan, without facts, and the statistics of the dense model.

    Raises:
        VitpruneError: if an argument is out of range, an FFN would be left empty, or images are missing.
    """
    row = REGISTRY[criterion]
    check_needs(model, criterion, batches=batches, found=found)
    ffns = find_feed_forwards(model)
    looks_at_images = bool({"statistics", "batches"} & set(row.needs))
    stops = list_stops(target.share, step if looks_at_images else 1.0)
    kept = {ffn.name: torch.arange(ffn.num_neurons) for ffn in ffns}
    current, dense_statistics = model, {}
    for number, share in enumerate(stops):
        last = number == len(stops) - 1
        measured = row.statistics | (wanted if number == 0 else frozenset())
        if not last and compensation != "none":
            measured |= {MOMENTS}
        statistics = {}
        if measured:
            if batches is None:
                raise VitpruneError(f"compensation {compensation} needs calibration images; pass --data DIR")
            statistics = measure_statistics(current, find_feed_forwards(current), batches, measured, seed=seed + number)
        if number == 0:
            dense_statistics = statistics
        scores = score_neurons(
            current, criterion, batches=batches, found=found, statistics=statistics or None, ridge=ridge, seed=seed
        )
        part = target if last else target.partly(share)
        widths = allocate(
            scores, part, allocation=allocation, across_ffns=row.across_ffns, round_to=round_to, floor=floor
        )
        inner = plan_from_widths(scores, widths, {})
        kept = {name: index[inner.keep[name]] for name, index in kept.items()}
        if not last:
            bridged = compensate(current, inner, statistics, compensation=compensation, ridge=ridge)
            current = remove_neurons(bridged, inner)
    return Plan({ffn.name: _mask(ffn.num_neurons, kept[ffn.name]) for ffn in ffns}), dense_statistics


def _mask(num_neurons: int, kept: Tensor) -> Tensor:
    mask = torch.zeros(num_neurons, dtype=torch.bool)
    mask[kept] = True
    return mask


def bridge_of(compensation: str) -> str:
    """Return the compensation between steps that comes nearest to a final one."""
    return compensation if compensation in ("none", "bias") else "ridge"
