"""Make a model elastic: rank its neurons once, compensate it at some ratios, and serve every ratio from that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from vitprune.calibration.criteria import REGISTRY as CRITERIA
from vitprune.calibration.criteria import check_needs
from vitprune.data import Batches
from vitprune.discovery.discover import Discovery
from vitprune.errors import VitpruneError
from vitprune.models.elastic_file import Elastic, Ranking, Stop
from vitprune.models.facts import Facts
from vitprune.models.identity import architecture, hash_weights
from vitprune.models.units import Group, take_units
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
from vitprune.progress import Track, untracked
from vitprune.pruning.allocate import allocate, compare_across
from vitprune.pruning.compensate import check_ridge
from vitprune.pruning.compensations import REGISTRY as COMPENSATIONS
from vitprune.pruning.compensations import check_compensation, needed_statistics
from vitprune.pruning.plan import Plan
from vitprune.pruning.prune import apply_in, list_seen
from vitprune.pruning.schedule import Schedule, Stage, finish, list_stops, needs_steps, walk
from vitprune.pruning.session import Session
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

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=2)
    >>> elastic = make_elastic(model, ratios=[0.5], criterion="magnitude", compensation="none")
    >>> sum(elastic.ranking.widths(0.25).values())
    1152
    """
    ratios = _check_ratios(ratios)
    check_choice("compensation", compensation, COMPENSATION_NAMES)
    row = COMPENSATIONS[compensation]
    check_needs(model, criterion, batches=batches, found=found)
    check_ridge(ridge)
    largest = target_neurons(model, ratios[-1])
    list_stops(ratios[-1], step)
    check_compensation(compensation, has_images=batches is not None)
    schedule = Schedule(criterion, allocation, row.bridge, floor=floor)
    # Means move into the biases between the ratios.
    bridged = row.reads_images
    wanted = needed_statistics(model, criteria=[criterion], compensations=[compensation], bridged=bridged)
    session = Session(model, batches, found=found, wanted=wanted, ridge=ridge, seed=seed, track=track)
    # Refuse an impossible ratio before any image is read.
    level = {group.name: torch.zeros(group.num_units) for group in session.groups}
    allocate(level, largest, allocation=allocation, across_ffns=True, floor=floor)
    if row.by_block:
        _ = session.calls
    ranking = rank_units(session, ratios[-1], schedule, step=step)
    dense = take_units(model.state_dict(), session.groups, ranking.order)
    stops = []
    for ratio in (0.0, *ratios):
        widths = ranking.widths(ratio)
        pruned = model
        if ratio:
            session.track = lambda items, what, ratio=ratio: track(items, f"{what} at {ratio:g}")
            pruned = apply_in(session, Plan(ranking.keep(ratio)), compensation=compensation)
        kept = {name: order_H[: widths[name]] for name, order_H in ranking.order.items()}
        stops.append(Stop(ratio, widths, _changed(dense, pruned, session.groups, kept)))
    means = {}
    if row.reads_images:
        means = {name: session.statistics[name].mean_H[order_H] for name, order_H in ranking.order.items()}
    facts = Facts(
        architecture=architecture(model),
        weights_sha256=hash_weights(model),
        criterion=criterion,
        allocation=allocation,
        round_to=1,
        floor=floor,
        compensation=compensation,
        mode="remove",
        ridge=ridge,
        seed=seed,
        step=step if needs_steps(criterion) else 1.0,
        calibration=list_seen(session, criterion),
    )
    # Without weights that change there is nothing to move: the bias says it all, at every ratio.
    return Elastic(ranking, tuple(stops), means, mixed=row.changes_weights, facts=facts)


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
    places = {name: _places(neurons) for name, neurons in kept.items()}
    slices = take_units(dense, groups, {name: torch.arange(len(neurons)) for name, neurons in kept.items()})
    state = take_units(pruned.state_dict(), groups, places)
    return {
        key: value.cpu() for key, value in state.items() if key not in slices or not torch.equal(value, slices[key])
    }
