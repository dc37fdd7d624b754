"""Make a model elastic: rank its neurons once, compensate it at some ratios, and serve every ratio from that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitprune.calibration.criteria import REGISTRY, check_needs
from vitprune.calibration.statistics import MOMENTS, Statistics
from vitprune.data import Batches
from vitprune.discovery.discover import Discovery
from vitprune.errors import VitpruneError
from vitprune.models.block_calls import study_blocks
from vitprune.models.elastic_file import Elastic, Ranking, Stop, read_ranking, take_neurons
from vitprune.models.identity import architecture, hash_weights
from vitprune.models.units import FeedForward, find_feed_forwards
from vitprune.options import (
    COMPENSATIONS,
    DEFAULT_ALLOCATION,
    DEFAULT_COMPENSATION,
    DEFAULT_CRITERION,
    DEFAULT_FLOOR,
    DEFAULT_RIDGE,
    DEFAULT_STEP,
    check_choice,
)
from vitprune.progress import Track, untracked
from vitprune.pruning.allocate import allocate, compare_across
from vitprune.pruning.compensate import check_ridge
from vitprune.pruning.plan import Plan
from vitprune.pruning.prune import SEQUENTIAL, apply_plan, needed_statistics
from vitprune.pruning.schedule import Schedule, Stage, bridge_of, finish, list_stops, needs_steps, walk
from vitprune.pruning.target import target_neurons

DEFAULT_RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)


def make_elastic(
    model: nn.Module,
    batches: Batches | None = None,
    *,
    ratios: Sequence[float] = DEFAULT_RATIOS,
    criterion: str = DEFAULT_CRITERION,
    allocation: str = DEFAULT_ALLOCATION,
    compensation: str = DEFAULT_COMPENSATION,
    floor: float = DEFAULT_FLOOR,
    ridge: float = DEFAULT_RIDGE,
    step: float = DEFAULT_STEP,
    found: Discovery | None = None,
    seed: int = 0,
    track: Track = untracked,
) -> Elastic:
    """Rank the neurons once, and compensate the model at some ratios; any ratio up to the largest can then be loaded.

    At each of these ratios the model is what ``prune`` gives with the same arguments; but where the floor is all that
    any FFN has left, leftovers of its rounding may go to other FFNs, because larger ratios keep subsets of smaller
    ones.

    Args:
        model: timm Vision Transformer in eval mode; stays as it is.
        batches: calibration images and labels, readable more than once.
        ratios: shares of all FFN neurons to remove, each in (0, 1), at which the model is compensated.
        criterion: key of ``CRITERIA``.
        allocation: ``uniform`` or ``global``.
        compensation: key of ``COMPENSATIONS``.
        floor: share of its neurons that ``global`` leaves to each FFN at least.
        ridge: λ relative to the mean variance of the hidden neurons.
        step: share that goes between two measurements of the scores, in (0, 1]; 1 measures once.
        found: a discovery on this model, for criterion ``jas``.
        seed: of everything drawn at random.
        track: wraps (items, description) of long loops, for progress.

    Returns:
        The ranking and what compensation changes, for ``save_elastic``. In memory at once are the tensors that
        compensation changes at all these ratios.

    Raises:
        VitpruneError: if the model has no supported FFN, an argument is out of range, or images are missing.
    """
    ratios = _check_ratios(ratios)
    check_choice("compensation", compensation, COMPENSATIONS)
    check_needs(model, criterion, batches=batches, found=found)
    check_ridge(ridge)
    ffns = find_feed_forwards(model)
    # Refuse an impossible ratio before any image is read.
    level = {ffn.name: torch.zeros(ffn.num_neurons) for ffn in ffns}
    allocate(level, target_neurons(model, ratios[-1]), allocation=allocation, across_ffns=True, floor=floor)
    list_stops(ratios[-1], step)
    if compensation != "none" and batches is None:
        raise VitpruneError(f"compensation {compensation} needs calibration images; pass --data DIR")
    calls = study_blocks(model, ffns, batches) if compensation in SEQUENTIAL else None
    schedule = Schedule(criterion, allocation, bridge_of(compensation), floor=floor, ridge=ridge, seed=seed)
    step = step if needs_steps(criterion) else 1.0
    wanted = needed_statistics(model, compensation) | ({MOMENTS} if compensation != "none" else set())
    ranking, statistics = rank_neurons(
        model, ratios[-1], schedule, batches=batches, found=found, step=step, wanted=wanted, track=track
    )
    dense = take_neurons(model.state_dict(), ffns, ranking.order)
    stops = []
    for ratio in (0.0, *ratios):
        widths = ranking.widths(ratio)
        pruned = model
        if ratio:
            pruned = apply_plan(
                model,
                _plan(ranking, ratio, {}),
                compensation=compensation,
                ridge=ridge,
                batches=batches,
                statistics=statistics or None,
                seed=seed,
                calls=calls,
                track=lambda items, what, ratio=ratio: track(items, f"{what} at {ratio:g}"),
            )
        kept = {name: order_H[: widths[name]] for name, order_H in ranking.order.items()}
        stops.append(Stop(ratio, widths, _changed(dense, pruned, ffns, kept)))
    means = {}
    if compensation != "none":
        means = {name: statistics[name].mean_H[order_H] for name, order_H in ranking.order.items()}
    facts = {
        "architecture": architecture(model),
        "weights_sha256": hash_weights(model),
        "criterion": criterion,
        "allocation": allocation,
        "round_to": 1,
        "floor": floor,
        "compensation": compensation,
        "mode": "remove",
        "ridge": ridge,
        "seed": seed,
        "step": step,
    }
    # Without weights that change there is nothing to move: the bias says it all, at every ratio.
    return Elastic(ranking, tuple(stops), means, mixed=compensation not in ("none", "bias"), facts=facts)


def _check_ratios(ratios: Sequence[float]) -> list[float]:
    ratios = sorted(set(ratios))
    if not ratios or not 0 < ratios[0] <= ratios[-1] < 1:
        raise VitpruneError(f"ratios must be in (0, 1), at least one; got {ratios}")
    return ratios


def rank_neurons(
    model: nn.Module,
    largest: float,
    schedule: Schedule,
    *,
    batches: Batches | None,
    found: Discovery | None = None,
    step: float = DEFAULT_STEP,
    wanted: frozenset[str] = frozenset(),
    track: Track = untracked,
) -> tuple[Ranking, Mapping[str, Statistics]]:
    """Walk a schedule once, and tell for each neuron when it goes.

    Args:
        model: timm Vision Transformer in eval mode; stays as it is.
        largest: how far to walk, in (0, 1).
        schedule: how to rank and what to do between stops; ``round_to`` must be 1.
        batches: calibration images and labels; read once per step.
        found: a discovery on this model, for criterion ``jas``.
        step: share that goes between two measurements of the scores, in (0, 1]; 1 measures once.
        wanted: further statistics of the dense model to measure on the way.
        track: wraps (items, description) of long loops, for progress.

    Returns:
        The ranking, and the statistics of the dense model.
    """
    target = target_neurons(model, largest)
    before, statistics, tails = None, None, []
    stages = walk(model, target, schedule, batches=batches, found=found, step=step, wanted=wanted, track=track)
    for stage in stages:
        if before is None:
            statistics = stage.statistics
        else:
            tails.append(_leave(before, stage.kept, schedule))
        before = stage
    last = finish(model, stage, target, schedule)
    kept = {name: last.kept(name) for name in last.keep}
    tails.append(_leave(stage, kept, schedule))
    ranked = _sort(stage, kept)
    order, budgets = {}, {}
    for name in ranked:
        # Of the last stage come those that stay, then those that go last; of the first, those that go first.
        parts = [(ranked[name], torch.zeros_like(ranked[name])), *(tail[name] for tail in reversed(tails))]
        order[name], budgets[name] = (torch.cat(part) for part in zip(*parts, strict=True))
    if schedule.allocation == "uniform":
        budgets = _budget_uniformly(order)
    return Ranking(order, budgets, largest), statistics


def _sort(stage: Stage, chosen: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sort some of the neurons that a stage has left: highest scores first, of equals the lower index."""
    result = {}
    for name, score_K in stage.scores.items():
        ranked = stage.kept[name][score_K.double().sort(descending=True, stable=True).indices]
        result[name] = ranked[torch.isin(ranked, chosen[name])]
    return result


def _leave(before: Stage, after: Mapping[str, Tensor], schedule: Schedule) -> dict[str, tuple[Tensor, Tensor]]:
    """Rank the neurons that go between two stages over all FFNs, as ``allocate`` does.

    Returns:
        FFN name -> those of it, the last to go first, and how many neurons the model must be allowed for each.
    """
    gone = {name: kept[~torch.isin(kept, after[name])] for name, kept in before.kept.items()}
    ranked = _sort(before, gone)
    shared = compare_across(before.scores, REGISTRY[schedule.criterion].across_ffns)
    values = [shared[name][torch.searchsorted(before.kept[name], neurons)] for name, neurons in ranked.items()]
    # Stable: of equals, those of earlier FFNs stay longer.
    position = torch.cat(values).sort(descending=True, stable=True).indices.argsort()
    budgets = sum(len(kept) for kept in after.values()) + 1 + position
    return {
        name: (neurons, budget)
        for (name, neurons), budget in zip(
            ranked.items(), budgets.split([len(neurons) for neurons in ranked.values()]), strict=True
        )
    }


def _budget_uniformly(order: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Let the same share of each FFN go at once: a neuron needs as many as reach the share that reaches itself."""
    shares = {name: torch.arange(1, len(order_H) + 1).double() / len(order_H) for name, order_H in order.items()}
    all_shares = torch.cat(list(shares.values())).sort().values
    return {name: torch.searchsorted(all_shares, share_H, right=True) for name, share_H in shares.items()}


def _places(kept: Tensor) -> Tensor:
    """Return where neurons lie in a pruned model, which has them in ascending order."""
    return kept.argsort().argsort()


def _changed(
    dense: Mapping[str, Tensor], pruned: nn.Module, ffns: Sequence[FeedForward], kept: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the tensors of a pruned model that are not slices of the dense model's; on the CPU."""
    places = {name: _places(neurons) for name, neurons in kept.items()}
    slices = take_neurons(dense, ffns, {name: torch.arange(len(neurons)) for name, neurons in kept.items()})
    state = take_neurons(pruned.state_dict(), ffns, places)
    return {
        key: value.cpu() for key, value in state.items() if key not in slices or not torch.equal(value, slices[key])
    }


def plan_elastic(elastic: Elastic, ratio: float) -> Plan:
    """Return the plan of an elastic model at a ratio, for the dense model.

    Raises:
        VitpruneError: if ``ratio`` is not in [0, 1), or beyond the largest.
    """
    return _plan(elastic.ranking, ratio, elastic.facts)


def read_elastic_plan(path: str | Path, ratio: float | None = None) -> Plan:
    """Read from an elastic file which neurons of the dense model stay at a ratio; None is 0.

    Raises:
        VitpruneError: if the file is missing or no elastic file, or ``ratio`` is out of range or beyond the largest.
    """
    ranking, facts = read_ranking(path)
    return _plan(ranking, ratio or 0.0, facts)


def _plan(ranking: Ranking, ratio: float, facts: Mapping[str, Any]) -> Plan:
    keep = {name: torch.zeros(len(order_H), dtype=torch.bool) for name, order_H in ranking.order.items()}
    for name, width in ranking.widths(ratio).items():
        keep[name][ranking.order[name][:width]] = True
    return Plan(keep, {"pruning_ratio_asked": ratio, **facts} if facts else {})
