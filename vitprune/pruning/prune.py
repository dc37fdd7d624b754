"""The verb: score, plan, compensate and take the neurons out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vitprune.calibration.criteria import REGISTRY, check_needs
from vitprune.calibration.statistics import GRADIENTS, MOMENTS, Statistics, measure_statistics
from vitprune.data import Batches
from vitprune.discovery.discover import Discovery
from vitprune.errors import VitpruneError
from vitprune.models.block_calls import BlockCall, study_blocks
from vitprune.models.classifier import has_classifier
from vitprune.models.identity import architecture, hash_weights
from vitprune.models.units import find_feed_forwards
from vitprune.options import (
    COMPENSATIONS,
    DEFAULT_ALLOCATION,
    DEFAULT_COMPENSATION,
    DEFAULT_CRITERION,
    DEFAULT_FLOOR,
    DEFAULT_RATIO,
    DEFAULT_RIDGE,
    DEFAULT_STEP,
    MODES,
    check_choice,
)
from vitprune.progress import Track, untracked
from vitprune.pruning.allocate import allocate
from vitprune.pruning.apply import mask_neurons, remove_neurons
from vitprune.pruning.compensate import check_ridge, compensate
from vitprune.pruning.distill import distill
from vitprune.pruning.plan import Plan, fit_plan, plan_from_widths
from vitprune.pruning.schedule import Schedule, bridge_of, list_stops, needs_steps, plan_in_steps
from vitprune.pruning.sequential import compensate_sequentially, weigh_tokens
from vitprune.pruning.target import Target, target_neurons

SEQUENTIAL = ("sequential-ffn", "sequential", "distill")


def plan_pruning(
    model: nn.Module,
    scores: Mapping[str, Tensor],
    *,
    criterion: str,
    pruning_ratio: float | None = None,
    target: Target | None = None,
    allocation: str = DEFAULT_ALLOCATION,
    round_to: int = 1,
    floor: float = DEFAULT_FLOOR,
    facts: Mapping[str, Any] | None = None,
) -> Plan:
    """Decide from scores which neurons every FFN keeps.

    Args:
        model: the model that the scores are of.
        scores: FFN name -> scores [H]; higher is more important.
        criterion: key of ``CRITERIA``; says whether scores of different FFNs compare.
        pruning_ratio: share of all FFN neurons to remove, in [0, 1); the plan never removes less.
        target: what the model may cost instead.
        allocation: ``uniform`` or ``global``.
        round_to: every width is a multiple of it.
        floor: share of its neurons that ``global`` leaves to each FFN at least.
        facts: recorded in the plan beside the arguments.

    Raises:
        VitpruneError: if an argument is out of range, or an FFN would be left empty.
    """
    target = _target(model, pruning_ratio, target)
    across = REGISTRY[criterion].across_ffns
    widths = allocate(scores, target, allocation=allocation, across_ffns=across, round_to=round_to, floor=floor)
    plan = plan_from_widths(scores, widths, {})
    decisions = {"criterion": criterion, "allocation": allocation, "round_to": round_to, "floor": floor}
    return with_facts(model, plan, target, pruning_ratio, {**decisions, **(facts or {})})


def apply_plan(
    model: nn.Module,
    plan: Plan,
    *,
    mode: str = "remove",
    compensation: str = "none",
    ridge: float = DEFAULT_RIDGE,
    batches: Batches | None = None,
    statistics: Mapping[str, Statistics] | None = None,
    seed: int = 0,
    calls: Mapping[str, BlockCall] | None = None,
    track: Track = untracked,
) -> nn.Module:
    """Return a pruned copy of the model.

    Args:
        model: the dense model; stays as it is.
        plan: which neurons stay.
        mode: ``remove`` makes the linear layers smaller; ``mask`` keeps their shapes.
        compensation: key of ``COMPENSATIONS``.
        ridge: λ relative to the mean variance of the hidden neurons.
        batches: calibration images, for any compensation but ``none``; readable more than once.
        statistics: of this model, to share them between plans: with ``moments``, ``bias`` and ``ridge`` need no images;
            with ``gradients``, the others need not measure how much each token counts.
        seed: of ``distill`` and of how much each token counts.
        calls: from ``study_blocks`` on this model, where it is there already.
        track: wraps (items, description) of long loops, for progress.

    Raises:
        VitpruneError: if the plan is not for this model, an argument is out of range, or images are missing.
    """
    check_choice("mode", mode, MODES)
    check_choice("compensation", compensation, COMPENSATIONS)
    check_ridge(ridge)
    ffns = fit_plan(model, plan)
    one_shot = compensation in ("bias", "ridge")
    if compensation != "none" and batches is None and not (one_shot and statistics is not None):
        raise VitpruneError(f"compensation {compensation} needs calibration images; pass --data DIR")
    result = model
    if one_shot:
        if statistics is None:
            statistics = measure_statistics(model, ffns, batches, {MOMENTS})
        result = compensate(model, plan, statistics, compensation=compensation, ridge=ridge)
    elif compensation != "none":
        if statistics is None or next(iter(statistics.values())).energy_N is None:
            statistics = (
                measure_statistics(model, ffns, batches, {GRADIENTS}, seed=seed) if has_classifier(model) else None
            )
        weights = None if statistics is None else weigh_tokens(model, statistics)
        result = compensate_sequentially(
            model,
            plan,
            batches,
            weights=weights,
            towards_stream=compensation != "sequential-ffn",
            ridge=ridge,
            calls=calls,
            track=track,
        )
        if compensation == "distill":
            result = distill(
                model,
                result,
                plan,
                batches,
                weights=weights,
                seed=seed,
                track=track,
            )
    return remove_neurons(result, plan) if mode == "remove" else mask_neurons(result, plan)


def prune(
    model: nn.Module,
    batches: Batches | None = None,
    *,
    pruning_ratio: float | None = None,
    target: Target | None = None,
    criterion: str = DEFAULT_CRITERION,
    allocation: str = DEFAULT_ALLOCATION,
    compensation: str = DEFAULT_COMPENSATION,
    mode: str = "remove",
    found: Discovery | None = None,
    round_to: int = 1,
    floor: float = DEFAULT_FLOOR,
    ridge: float = DEFAULT_RIDGE,
    step: float = DEFAULT_STEP,
    seed: int = 0,
    track: Track = untracked,
) -> tuple[nn.Module, Plan]:
    """Remove the FFN neurons that matter least, in one call.

    Args:
        model: timm Vision Transformer in eval mode; stays as it is.
        batches: calibration images and labels, readable more than once (scores and compensation each read them).
        pruning_ratio: share of all FFN neurons to remove, in [0, 1); half of them if neither this nor ``target`` is
            given.
        target: what the model may cost instead.
        criterion: key of ``CRITERIA``.
        allocation: ``uniform`` or ``global``.
        compensation: key of ``COMPENSATIONS``.
        mode: ``remove`` or ``mask``.
        found: a discovery on this model, for criterion ``jas``.
        round_to: every width is a multiple of it.
        floor: share of its neurons that ``global`` leaves to each FFN at least.
        ridge: λ relative to the mean variance of the hidden neurons.
        step: share that goes between two measurements of the scores, in (0, 1]; 1 measures once.
        seed: of everything drawn at random.
        track: wraps (items, description) of long loops, for progress.

    Returns:
        The pruned model and its plan.

    Raises:
        VitpruneError: if the model has no supported FFN, an argument is out of range, or images are missing.
    """
    check_choice("mode", mode, MODES)
    check_choice("compensation", compensation, COMPENSATIONS)
    check_needs(model, criterion, batches=batches, found=found)
    check_ridge(ridge)
    if pruning_ratio is None and target is None:
        pruning_ratio = DEFAULT_RATIO
    target = _target(model, pruning_ratio, target)
    # Refuse an impossible target before any image is read.
    level = {ffn.name: torch.zeros(ffn.num_neurons) for ffn in find_feed_forwards(model)}
    allocate(level, target, allocation=allocation, across_ffns=True, round_to=round_to, floor=floor)
    list_stops(target.share, step)
    if compensation != "none" and batches is None:
        raise VitpruneError(f"compensation {compensation} needs calibration images; pass --data DIR")
    calls = None
    if compensation in SEQUENTIAL:
        # A model whose blocks cannot be run one at a time is refused before its neurons are scored.
        calls = study_blocks(model, find_feed_forwards(model), batches)
    schedule = Schedule(criterion, allocation, bridge_of(compensation), round_to, floor, ridge, seed)
    wanted = needed_statistics(model, compensation)
    plan, statistics = plan_in_steps(
        model, target, schedule, batches=batches, found=found, step=step, wanted=wanted, track=track
    )
    decisions = {"criterion": criterion, "allocation": allocation, "round_to": round_to, "floor": floor}
    applied = {"compensation": compensation, "mode": mode, "ridge": ridge, "seed": seed}
    applied["step"] = step if needs_steps(criterion) else 1.0
    plan = with_facts(model, plan, target, pruning_ratio, {**decisions, **applied})
    pruned = apply_plan(
        model,
        plan,
        mode=mode,
        compensation=compensation,
        ridge=ridge,
        batches=batches,
        statistics=statistics or None,
        seed=seed,
        calls=calls,
        track=track,
    )
    return pruned, plan


def needed_statistics(model: nn.Module, compensation: str) -> frozenset[str]:
    """Return what a compensation reads of the dense model's statistics."""
    if compensation in ("bias", "ridge"):
        return frozenset({MOMENTS})
    return frozenset({GRADIENTS}) if compensation != "none" and has_classifier(model) else frozenset()


def _target(model: nn.Module, pruning_ratio: float | None, target: Target | None) -> Target:
    if (pruning_ratio is None) == (target is None):
        raise VitpruneError("say how far to prune: either pruning_ratio or target")
    return target_neurons(model, pruning_ratio) if target is None else target


def with_facts(
    model: nn.Module, plan: Plan, target: Target, pruning_ratio: float | None, facts: Mapping[str, Any]
) -> Plan:
    """Record in a plan what it was made for, and check that it fits the model."""
    asked = {
        "kind": target.kind,
        "limit": target.limit,
        "predicted": target.predict(plan.widths),
        "dense": target.dense,
    }
    recorded = {
        "architecture": architecture(model),
        "weights_sha256": hash_weights(model),
        "pruning_ratio_asked": pruning_ratio,
        "target": asked,
        **facts,
    }
    plan = Plan(plan.keep, recorded)
    fit_plan(model, plan)
    return plan
