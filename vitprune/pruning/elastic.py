"""Make a model elastic: rank its units once, compensate it at some ratios, and serve every ratio from that.

Letters: H units of a group.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitprune.calibration.criteria import REGISTRY as CRITERIA
from vitprune.calibration.criteria import check_needs
from vitprune.data import Batches
from vitprune.discovery.discover import Discovery
from vitprune.entry import entry
from vitprune.errors import VitpruneError
from vitprune.images.coverage import warn_of_few_classes
from vitprune.models.attention import HEADS, QK, VO
from vitprune.models.elastic_file import Elastic, Ranking, Stop, groups_left
from vitprune.models.facts import Facts
from vitprune.models.identity import architecture, hash_weights, how_opened
from vitprune.models.units import FFN, LAYERS, Group, find_groups, kind_of, take_units
from vitprune.options import COMPENSATIONS as COMPENSATION_NAMES
from vitprune.options import (
    DEFAULT_ALLOCATION,
    DEFAULT_COMPENSATION,
    DEFAULT_CRITERION,
    DEFAULT_FLOOR,
    DEFAULT_RIDGE,
    DEFAULT_STEP,
    check_choice,
)
from vitprune.progress import Track, expect_work, untracked
from vitprune.pruning.allocate import allocate, compare_across
from vitprune.pruning.compensate import check_ridge
from vitprune.pruning.compensations import REGISTRY as COMPENSATIONS
from vitprune.pruning.compensations import check_compensation, needed_statistics
from vitprune.pruning.decide import PIXELS, TOKENS, check_parts
from vitprune.pruning.decide_parts import NUM_IMAGES, keep_back, multiple_of
from vitprune.pruning.plan import Plan
from vitprune.pruning.prune import apply_in, list_seen, open_session, prune_turned
from vitprune.pruning.rank_parts import Worth, rank_parts
from vitprune.pruning.schedule import Schedule, Stage, finish, list_work, needs_steps, walk
from vitprune.pruning.session import Session
from vitprune.pruning.target import Target, target_neurons
from vitprune.pruning.turn import Turned, turn_attention
from vitprune.seen_images import files_of, watch

DEFAULT_RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)


@entry
def make_elastic(
    model: nn.Module,
    batches: Batches | None = None,
    *,
    ratios: Sequence[float] = DEFAULT_RATIOS,
    criterion: str = DEFAULT_CRITERION,
    allocation: str = DEFAULT_ALLOCATION,
    compensate: str = DEFAULT_COMPENSATION,
    floor: float = DEFAULT_FLOOR,
    ridge: float = DEFAULT_RIDGE,
    step: float = DEFAULT_STEP,
    parts: Sequence[str] = (FFN,),
    found: Discovery | None = None,
    seed: int = 0,
    track: Track = untracked,
) -> Elastic:
    """Rank the units once, and compensate the model at some ratios; any ratio up to the largest can then be loaded.

    At each of these ratios the model is what ``prune`` gives with the same arguments; but where the floor is all that
    any FFN has left, leftovers of its rounding may go to other FFNs, because larger ratios keep subsets of smaller
    ones. With parts beside neurons, neurons are ranked once for all ratios, on the model that has all the rest; a stop
    is what ``prune_as_planned`` makes of its plan.

    Args:
        model: timm Vision Transformer in eval mode; stays as it is.
        batches: calibration images and labels, readable more than once.
        ratios: shares of the units of every part to remove, each in (0, 1), at which the model is compensated.
        criterion: key of ``CRITERIA``.
        allocation: ``uniform`` or ``global``.
        compensate: key of ``COMPENSATIONS``.
        floor: share of its neurons that ``global`` leaves to each FFN at least.
        ridge: λ relative to the mean variance of the hidden neurons.
        step: share that goes between two measurements of the scores, in (0, 1]; 1 measures once.
        parts: keys of ``PARTS`` but ``tokens`` and ``pixels``: what may go. Whole heads and layers go at the
            ratios named.
        found: a discovery on this model, for criterion ``jas``.
        seed: of everything drawn at random.
        track: wraps (items, description) of long loops, for progress.

    Returns:
        The ranking and what compensation changes, for ``save_elastic``. In memory at once are the tensors that
        compensation changes at all these ratios.

    Raises:
        VitpruneError: if the model has no supported FFN, an argument is out of range, or images are missing.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=2)
    >>> elastic = make_elastic(model, ratios=[0.5], criterion="magnitude", compensation="none")
    >>> sum(elastic.ranking.widths(0.25).values())
    1152
    """
    ratios = _check_ratios(ratios)
    check_choice("compensation", compensate, COMPENSATION_NAMES)
    row = COMPENSATIONS[compensate]
    check_needs(model, criterion, batches=batches, found=found)
    check_ridge(ridge)
    parts = check_parts(model, parts)
    if TOKENS in parts:
        raise VitpruneError("part tokens: which tokens merge is chosen when an elastic file is loaded; leave it out")
    if PIXELS in parts:
        raise VitpruneError("part pixels: resize the model before (set_image_size); leave it out")
    check_compensation(compensate, has_images=batches is not None)
    of_parts = parts != (FFN,)
    expect_work(list_work(criterion, ratios[-1], step, compensate, of_parts=of_parts, num_models=len(ratios)))
    schedule = Schedule(criterion, allocation, row.bridge, floor=floor)
    # Refuse an impossible ratio before any image is read.
    if FFN in parts:
        level = {group.name: torch.zeros(group.num_units) for group in find_groups(model)}
        largest = target_neurons(model, ratios[-1])
        allocate(level, largest, allocation=allocation, across_ffns=True, floor=floor)
    # Means move into the biases between the ratios.
    wanted = needed_statistics(criteria=[criterion], compensations=[compensate], bridged=row.reads_images)
    needs = {"found": found, "wanted": wanted, "ridge": ridge, "seed": seed, "track": track}
    if row.reads_images:
        warn_of_few_classes(model, files_of(batches))
    batches = watch(batches)
    turned, worth = None, Worth({})
    if parts != (FFN,):
        if batches is None:
            raise VitpruneError(f"parts {', '.join(parts)} are ranked by images; pass `batches`")
        fitted, kept_back = keep_back(batches, NUM_IMAGES)
        turned = turn_attention(model, fitted, parts, wanted, ridge=ridge, seed=seed)
        worth = rank_parts(turned, fitted, parts, kept_back, ridge=ridge, seed=seed, track=track)
    session = (
        Session(model, batches, **needs)
        if turned is None
        else open_session(model, turned.model, turned, batches, **needs)
    )
    if row.by_block:
        _ = session.calls
    ranking = Ranking({}, {}, ratios[-1])
    if FFN in parts:
        ranking = rank_units(session, ratios[-1], schedule, step=step)
    if turned is not None:
        ranking = _rank_beside(ranking, turned, worth, ratios, allocation, floor)
    base = session.model
    groups = find_groups(base, [part for part in parts if part != LAYERS])
    dense = take_units(base.state_dict(), groups_left(groups, ranking.widths(0)), ranking.order)
    stops = []
    for ratio in (0.0, *ratios):
        widths, left_out = ranking.widths(ratio), ranking.left_out(ratio)
        pruned = base
        if ratio:
            session.track = lambda items, what, ratio=ratio: track(items, f"{what} at {ratio:g}")
            pruned = _at_stop(session, ranking, ratio, turned, batches, compensate, needs)
        kept = {name: order_H[: widths[name]] for name, order_H in ranking.order.items()}
        stops.append(Stop(ratio, widths, _changed(dense, pruned, groups, kept), left_out))
    means = {}
    if row.reads_images:
        statistics = session.statistics if turned is None else turned.statistics
        means = {
            group.name: statistics[group.name].mean_H[group.columns(ranking.order[group.name])]
            for group in groups
            if group.kind in (FFN, VO)
        }
    facts = Facts(
        architecture=architecture(model),
        weights_sha256=hash_weights(model),
        opened=how_opened(model),
        criterion=criterion,
        allocation=allocation,
        round_to=1,
        floor=floor,
        compensation=compensate,
        mode="remove",
        ridge=ridge,
        seed=seed,
        step=step if needs_steps(criterion) else 1.0,
        calibration=list_seen(session, criterion),
    )
    made = None if turned is None else turned.model
    # Without weights that change there is nothing to move: the bias says it all, at every ratio.
    return Elastic(ranking, tuple(stops), means, mixed=row.changes_weights, facts=facts, turned=made)


def _at_stop(
    session: Session,
    ranking: Ranking,
    ratio: float,
    turned: Turned | None,
    batches: Batches | None,
    compensation: str,
    needs: Mapping[str, Any],
) -> nn.Module:
    """Return the model of a stop."""
    keep = ranking.keep(ratio)
    if turned is None:
        return apply_in(session, Plan(keep), compensation=compensation)
    kinds = {name: kind_of(name) for name in keep if kind_of(name) != FFN}
    plan = Plan(keep, Facts(stand_ins=ranking.left_out(ratio) or None), kinds)
    return prune_turned(
        session.dense, turned, plan, batches, compensation=compensation, **{**needs, "track": session.track}
    )


def _rank_beside(
    neurons: Ranking, turned: Turned, worth: Worth, ratios: Sequence[float], allocation: str, floor: float
) -> Ranking:
    """Add to a ranking of neurons when dimensions of attention, heads and layers go."""
    order, budgets = dict(neurons.order), dict(neurons.budgets)
    for kind in (QK, VO, HEADS):
        losses = {name: loss_H for name, loss_H in worth.losses.items() if kind_of(name) == kind}
        if losses:
            multiples = {name: 1 if kind == HEADS else multiple_of(len(loss_H)) for name, loss_H in losses.items()}
            counts = {name: torch.arange(len(loss_H) + 1, dtype=torch.float64) for name, loss_H in losses.items()}
            limit = sum(map(len, losses.values())) * (1 - ratios[-1])
            smallest = allocate(
                losses,
                Target("neurons", limit, 0.0, counts),
                allocation="uniform",
                across_ffns=True,
                round_to=multiples,
            )
            order.update({name: torch.arange(len(loss_H)) for name, loss_H in losses.items()})
            budgets.update(_budget_dimensions(losses, multiples, smallest, allocation, floor))
    best: dict[str, str] = {}
    for each in sorted(worth.stand_ins, key=lambda each: each.loss):
        best.setdefault(each.layer, each.kind)
    layers = [group.module for group in find_groups(turned.model, [LAYERS])] if best else []
    # In the order in which plans have them.
    names = [group.name for group in find_groups(turned.model, [FFN, QK, VO, HEADS]) if group.name in order]
    return Ranking(
        {name: order[name] for name in names},
        {name: budgets[name] for name in names},
        neurons.largest,
        tuple(ratios),
        tuple(layers),
        tuple(best.items()),
    )


def _budget_dimensions(
    losses: Mapping[str, Tensor],
    multiples: Mapping[str, int],
    smallest: Mapping[str, int],
    allocation: str,
    floor: float,
) -> dict[str, Tensor]:
    """Return how many units of the kind the model must be allowed for each dimension to be kept.

    Args:
        losses: group name -> what each dimension costs [H], falling.
        multiples: group name -> how many go at once.
        smallest: group name -> what ``uniform`` leaves at the largest ratio.
        allocation: key of ``ALLOCATIONS``.
        floor: share of its units that ``global`` leaves to each group at least.
    """
    if allocation == "uniform":
        # A bunch stays where the share that all keep reaches its end.
        shares = {
            name: (torch.arange(len(loss_H)) // multiples[name] + 1).double() * multiples[name] / len(loss_H)
            for name, loss_H in losses.items()
        }
        every = torch.cat(list(shares.values())).sort().values
        return {name: torch.searchsorted(every, share_H, right=True) for name, share_H in shares.items()}
    least, bunches = {}, []
    for name, loss_H in losses.items():
        step = multiples[name]
        least[name] = min(max(step, math.ceil(len(loss_H) * floor / step) * step), smallest[name])
        worth = loss_H.reshape(-1, step).mean(1).cummin(0).values
        bunches += [(-float(worth[start // step]), name, start) for start in range(least[name], len(loss_H), step)]
    budgets = {name: torch.zeros(len(loss_H), dtype=torch.int64) for name, loss_H in losses.items()}
    spent = sum(least.values())
    for _worth, name, start in sorted(bunches, key=lambda bunch: bunch[0]):
        spent += multiples[name]
        budgets[name][start : start + multiples[name]] = spent
    return budgets


def _check_ratios(ratios: Sequence[float]) -> list[float]:
    ratios = sorted(set(ratios))
    if not ratios or not 0 < ratios[0] <= ratios[-1] < 1:
        raise VitpruneError(f"ratios must be in (0, 1), at least one; got {ratios}")
    return ratios


def rank_units(session: Session, largest: float, schedule: Schedule, *, step: float = DEFAULT_STEP) -> Ranking:
    """Walk a schedule once, and tell for each unit when it goes.

    Args:
        session: of the dense model, which stays as it is.
        largest: how far to walk, in (0, 1).
        schedule: how to rank and what to do between stops; ``round_to`` must be 1.
        step: share that goes between two measurements of the scores, in (0, 1]; 1 measures once.
    """
    target = target_neurons(session.model, largest)
    before, tails = None, []
    for stage in walk(session, target, schedule, step=step):
        if before is not None:
            tails.append(_leave(before, stage.kept, schedule))
        before = stage
    last = finish(session, stage, target, schedule)
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
    return Ranking(order, budgets, largest)


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
    shared = compare_across(before.scores, CRITERIA[schedule.criterion].across_ffns)
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
    dense: Mapping[str, Tensor], pruned: nn.Module, groups: Sequence[Group], kept: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the tensors of a pruned model that are not slices of the dense model's; on the CPU."""
    widths = {name: len(units) for name, units in kept.items()}
    left = groups_left(groups, widths)
    # Of neurons, a pruned model has those that are left in the dense model's order.
    state = take_units(pruned.state_dict(), left, {name: _places(units) for name, units in kept.items()})
    # An attention with fewer heads is stored as it is.
    sliced = [group for group in left if group in groups_left(groups, {each.name: each.num_units for each in groups})]
    slices = take_units(dense, sliced, {name: torch.arange(width) for name, width in widths.items()})
    return {
        key: value.cpu() for key, value in state.items() if key not in slices or not torch.equal(value, slices[key])
    }
