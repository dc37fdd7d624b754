"""The verb: score, plan, compensate and take the neurons out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vitprune.data import Batches
from vitprune.discovery.criteria import REGISTRY, check_needs, score_neurons
from vitprune.discovery.discover import Discovery
from vitprune.discovery.moments import Moments, measure_moments
from vitprune.errors import VitpruneError
from vitprune.feed_forward import find_feed_forwards
from vitprune.models import architecture, hash_weights
from vitprune.options import (
    COMPENSATIONS,
    DEFAULT_ALLOCATION,
    DEFAULT_COMPENSATION,
    DEFAULT_CRITERION,
    DEFAULT_FLOOR,
    DEFAULT_RATIO,
    DEFAULT_RIDGE,
    MODES,
    check_choice,
)
from vitprune.pruning.allocate import allocate
from vitprune.pruning.apply import mask_neurons, remove_neurons
from vitprune.pruning.compensate import check_ridge, compensate
from vitprune.pruning.plan import Plan, fit_plan, plan_from_widths


def plan_pruning(
    model: nn.Module,
    scores: Mapping[str, Tensor],
    *,
    pruning_ratio: float,
    criterion: str,
    allocation: str = DEFAULT_ALLOCATION,
    round_to: int = 1,
    floor: float = DEFAULT_FLOOR,
    facts: Mapping[str, Any] | None = None,
) -> Plan:
    """Decide from scores which neurons every FFN keeps.

    Args:
        model: the model that the scores are of.
        scores: FFN name -> scores [H]; higher is more important.
        pruning_ratio: share of all FFN neurons to remove, in [0, 1); the plan never removes less.
        criterion: key of ``CRITERIA``; says whether scores of different FFNs compare.
        allocation: ``uniform`` or ``global``.
        round_to: every width is a multiple of it.
        floor: share of its neurons that ``global`` leaves to each FFN at least.
        facts: recorded in the plan beside the arguments.

    Raises:
        VitpruneError: if an argument is out of range, or an FFN would be left empty.
    """
    widths = allocate(
        scores,
        pruning_ratio,
        allocation=allocation,
        across_ffns=REGISTRY[criterion].across_ffns,
        round_to=round_to,
        floor=floor,
    )
    recorded = {
        "architecture": architecture(model),
        "weights_sha256": hash_weights(model),
        "criterion": criterion,
        "allocation": allocation,
        "pruning_ratio_asked": pruning_ratio,
        "round_to": round_to,
        "floor": floor,
        **(facts or {}),
    }
    plan = plan_from_widths(scores, widths, recorded)
    fit_plan(model, plan)
    return plan


def apply_plan(
    model: nn.Module,
    plan: Plan,
    *,
    mode: str = "remove",
    compensation: str = "none",
    ridge: float = DEFAULT_RIDGE,
    batches: Batches | None = None,
    moments: Mapping[str, Moments] | None = None,
) -> nn.Module:
    """Return a pruned copy of the model.

    Args:
        model: the dense model; stays as it is.
        plan: which neurons stay.
        mode: ``remove`` makes the linear layers smaller; ``mask`` keeps their shapes.
        compensation: key of ``COMPENSATIONS``.
        ridge: λ of ``ridge``, relative to the mean variance of the hidden neurons.
        batches: calibration images, for ``bias`` and ``ridge`` where ``moments`` is not given.
        moments: from ``measure_moments`` on this model, to share them between plans.

    Raises:
        VitpruneError: if the plan is not for this model, an argument is out of range, or images are missing.
    """
    check_choice("mode", mode, MODES)
    check_choice("compensation", compensation, COMPENSATIONS)
    ffns = fit_plan(model, plan)
    if compensation != "none":
        if moments is None:
            if batches is None:
                raise VitpruneError(f"compensation {compensation} needs calibration images; pass --data DIR")
            moments = measure_moments(model, ffns, batches)
        model = compensate(model, plan, moments, compensation=compensation, ridge=ridge)
    return remove_neurons(model, plan) if mode == "remove" else mask_neurons(model, plan)


def prune(
    model: nn.Module,
    batches: Batches | None = None,
    *,
    pruning_ratio: float = DEFAULT_RATIO,
    criterion: str = DEFAULT_CRITERION,
    allocation: str = DEFAULT_ALLOCATION,
    compensation: str = DEFAULT_COMPENSATION,
    mode: str = "remove",
    found: Discovery | None = None,
    round_to: int = 1,
    floor: float = DEFAULT_FLOOR,
    ridge: float = DEFAULT_RIDGE,
    seed: int = 0,
) -> tuple[nn.Module, Plan]:
    """Remove the FFN neurons that matter least, in one call.

    Args:
        model: timm Vision Transformer in eval mode; stays as it is.
        batches: calibration images and labels, readable more than once (scores and compensation each read them).
        pruning_ratio: share of all FFN neurons to remove, in [0, 1).
        criterion: key of ``CRITERIA``.
        allocation: ``uniform`` or ``global``.
        compensation: ``none``, ``bias`` or ``ridge``.
        mode: ``remove`` or ``mask``.
        found: a discovery on this model, for criterion ``jas``.
        round_to: every width is a multiple of it.
        floor: share of its neurons that ``global`` leaves to each FFN at least.
        ridge: λ of ``ridge`` and ``obs``, relative to the mean variance of the hidden neurons.
        seed: of criteria that draw at random.

    Returns:
        The pruned model and its plan.

    Raises:
        VitpruneError: if the model has no supported FFN, an argument is out of range, or images are missing.
    """
    check_choice("mode", mode, MODES)
    check_choice("compensation", compensation, COMPENSATIONS)
    check_needs(model, criterion, batches=batches, found=found)
    dense = {ffn.name: torch.zeros(ffn.num_neurons) for ffn in find_feed_forwards(model)}
    # Refuse an impossible target before any image is read.
    allocate(dense, pruning_ratio, allocation=allocation, across_ffns=True, round_to=round_to, floor=floor)
    check_ridge(ridge)
    if compensation != "none" and batches is None:
        raise VitpruneError(f"compensation {compensation} needs calibration images; pass --data DIR")
    moments = None
    if batches is not None and (compensation != "none" or "moments" in REGISTRY[criterion].needs):
        moments = measure_moments(model, find_feed_forwards(model), batches)
    scores = score_neurons(model, criterion, batches=batches, found=found, moments=moments, ridge=ridge, seed=seed)
    plan = plan_pruning(
        model,
        scores,
        pruning_ratio=pruning_ratio,
        criterion=criterion,
        allocation=allocation,
        round_to=round_to,
        floor=floor,
        facts={"compensation": compensation, "mode": mode, "ridge": ridge, "seed": seed},
    )
    pruned = apply_plan(model, plan, mode=mode, compensation=compensation, ridge=ridge, moments=moments)
    return pruned, plan
