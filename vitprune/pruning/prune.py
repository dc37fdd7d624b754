"""The verb: score, plan, compensate and take the units out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vitprune.calibration.criteria import REGISTRY as CRITERIA
from vitprune.calibration.criteria import check_needs
from vitprune.calibration.statistics import Statistics
from vitprune.data import Batches, label_names_of, remember_names
from vitprune.discovery.discover import Discovery
from vitprune.entry import entry
from vitprune.errors import VitpruneError
from vitprune.images.coverage import warn_of_few_classes
from vitprune.images.resized_batches import follow_size
from vitprune.models.attention import split_attention
from vitprune.models.block_calls import BlockCall
from vitprune.models.facts import Asked, Facts
from vitprune.models.identity import architecture, hash_weights, how_opened
from vitprune.models.image_size import set_image_size
from vitprune.models.macs import ffn_share, measure_sizes
from vitprune.models.merging import describe_merging, set_merging, unmerged
from vitprune.models.units import FFN, find_groups, find_left
from vitprune.options import COMPENSATIONS as COMPENSATION_NAMES
from vitprune.options import CRITERIA as CRITERION_NAMES
from vitprune.options import (
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
from vitprune.progress import Track, expect_work, untracked
from vitprune.pruning.allocate import allocate
from vitprune.pruning.apply import mask_neurons, remember, remove_neurons
from vitprune.pruning.choose_tokens import reduce_tokens_first
from vitprune.pruning.compensate import check_ridge
from vitprune.pruning.compensations import REGISTRY as COMPENSATIONS
from vitprune.pruning.compensations import check_compensation, needed_statistics
from vitprune.pruning.decide import PIXELS, TOKENS, check_parts
from vitprune.pruning.decide_parts import NUM_IMAGES, Decided, decide_parts, keep_back
from vitprune.pruning.plan import Plan, fit_plan, plan_from_widths
from vitprune.pruning.schedule import Schedule, finish, list_work, needs_steps, walk
from vitprune.pruning.sequential import weigh_tokens
from vitprune.pruning.session import Session
from vitprune.pruning.target import Target, target_neurons
from vitprune.pruning.turn import Turned, cut, turn_attention
from vitprune.seen_images import SeenImages, files_of, names_in, watch
from vitprune.views import data_config

_TAKE_OUT: Mapping[str, Callable[[nn.Module, Plan], nn.Module]] = {"remove": remove_neurons, "mask": mask_neurons}


@entry
def plan_pruning(
    model: nn.Module,
    scores: Mapping[str, Tensor],
    *,
    criterion: str,
    ratio: float | None = None,
    target: Target | None = None,
    allocation: str = DEFAULT_ALLOCATION,
    round_to: int = 1,
    floor: float = DEFAULT_FLOOR,
) -> Plan:
    """Decide from scores which units every group keeps.

    Args:
        model: the model that the scores are of.
        scores: group name -> scores [H]; higher is more important.
        criterion: key of ``CRITERIA``; says whether scores of different groups compare.
        ratio: share of all FFN neurons to remove, in [0, 1); the plan never removes less.
        target: what the model may cost instead.
        allocation: ``uniform`` or ``global``.
        round_to: every width is a multiple of it.
        floor: share of its units that ``global`` leaves to each group at least.

    Raises:
        VitpruneError: if an argument is out of range, or a group would be left empty.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=2)
    >>> from vitprune import score_neurons
    >>> plan_pruning(model, score_neurons(model, "magnitude"), criterion="magnitude", pruning_ratio=0.5).num_neurons
    768
    """
    target = _target(model, ratio, target)
    across = CRITERIA[criterion].across_ffns
    widths = allocate(scores, target, allocation=allocation, across_ffns=across, round_to=round_to, floor=floor)
    facts = Facts(criterion=criterion, allocation=allocation, round_to=round_to, floor=floor)
    return explain(model, plan_from_widths(scores, widths), target, ratio, facts)


@entry
def apply_plan(
    model: nn.Module,
    plan: Plan,
    *,
    mode: str = "remove",
    compensate: str = "none",
    ridge: float = DEFAULT_RIDGE,
    batches: Batches | None = None,
    statistics: Mapping[str, Statistics] | None = None,
    seed: int = 0,
    calls: Mapping[str, BlockCall] | None = None,
    track: Track = untracked,
) -> nn.Module:
    """Return a pruned copy of the model; it knows the images that had a say in it (``calibration``).

    Args:
        model: the dense model; stays as it is.
        plan: which units stay.
        mode: ``remove`` makes the linear layers smaller; ``mask`` keeps their shapes.
        compensate: key of ``COMPENSATIONS``.
        ridge: λ relative to the mean variance of the units.
        batches: calibration images, for any compensation but ``none``; readable more than once.
        statistics: of this model, to share them between plans: with ``moments``, ``bias`` and ``ridge`` need no images;
            with ``gradients``, the others need not measure how much each token counts.
        seed: of ``distill`` and of how much each token counts.
        calls: from ``study_blocks`` on this model, where it is there already.
        track: wraps (items, description) of long loops, for progress.

    Raises:
        VitpruneError: if the plan is not for this model, an argument is out of range, or images are missing.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=1)
    >>> plan = Plan({"blocks.0.mlp": torch.arange(768) < 500})
    >>> apply_plan(model, plan).blocks[0].mlp.fc2.in_features
    500
    """
    check_choice("mode", mode, MODES)
    check_ridge(ridge)
    fit_plan(model, plan)
    check_choice("compensation", compensate, COMPENSATION_NAMES)
    measured = statistics is not None and COMPENSATIONS[compensate].stand_in is not None
    check_compensation(compensate, has_images=batches is not None or measured)
    wanted = needed_statistics(compensations=[compensate])
    session = Session(
        model, batches, wanted=wanted, statistics=statistics, calls=calls, ridge=ridge, seed=seed, track=track
    )
    return apply_in(session, plan, mode=mode, compensation=compensate)


def apply_in(session: Session, plan: Plan, *, mode: str = "remove", compensation: str = "none") -> nn.Module:
    """Do what ``apply_plan`` does, with what a session has already."""
    compensated = COMPENSATIONS[compensation].apply(session, plan)
    return remember(_TAKE_OUT[mode](compensated, plan), session.seen.sha256)


@entry
def prune(
    model: nn.Module,
    batches: Batches | None = None,
    *,
    ratio: float | None = None,
    target: Target | None = None,
    criterion: str = DEFAULT_CRITERION,
    allocation: str = DEFAULT_ALLOCATION,
    compensate: str = DEFAULT_COMPENSATION,
    mode: str = "remove",
    found: Discovery | None = None,
    round_to: int = 1,
    floor: float = DEFAULT_FLOOR,
    ridge: float = DEFAULT_RIDGE,
    step: float = DEFAULT_STEP,
    parts: Sequence[str] = (FFN,),
    dense: nn.Module | None = None,
    decided: Decided | None = None,
    seed: int = 0,
    track: Track = untracked,
) -> tuple[nn.Module, Plan]:
    """Remove the FFN neurons that matter least, or whatever of some parts matters least, in one call.

    The images that had a say are recorded in the plan and in the model, so that ``evaluate`` refuses them.

    Args:
        model: timm Vision Transformer in eval mode; stays as it is. Its tokens may merge (``set_merging``).
        batches: calibration images and labels, readable more than once (scores and compensation each read them).
        ratio: share of the units of every part to remove, in [0, 1); half of them if neither this nor
            ``target`` is given.
        target: what the model may cost instead; built for the same parts. With part ``tokens``, of
            multiply-accumulates.
        criterion: key of ``CRITERIA``; ranks neurons. What other parts cost is always estimated in nats.
        allocation: ``uniform`` or ``global``.
        compensate: key of ``COMPENSATIONS``.
        mode: ``remove`` or ``mask``.
        found: a discovery on this model, for criterion ``jas``.
        round_to: every width is a multiple of it.
        floor: share of its neurons that ``global`` leaves to each FFN at least.
        ridge: λ relative to the mean variance of the hidden neurons.
        step: share that goes between two measurements of the scores, in (0, 1]; 1 measures once.
        parts: keys of ``PARTS``: what may go.
        dense: the model that sizes are compared with, where ``model`` is one that merges tokens or is fed smaller
            images; None: ``model``.
        decided: from ``decide_parts`` for this model, these parts and this target, where it is there already.
        seed: of everything drawn at random.
        track: wraps (items, description) of long loops, for progress.

    Returns:
        The pruned model and its plan.

    Raises:
        VitpruneError: if the model has no supported FFN, an argument is out of range, or images are missing.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32).eval()
    >>> batches = [(torch.randn(4, 3, 32, 32), torch.arange(4))]
    >>> pruned, plan = prune(model, batches, pruning_ratio=0.25, criterion="variance", compensation="ridge", step=1)
    >>> plan.pruning_ratio, plan.facts.criterion
    (0.25, 'variance')
    """
    check_choice("mode", mode, MODES)
    check_choice("compensation", compensate, COMPENSATION_NAMES)
    row = COMPENSATIONS[compensate]
    check_choice("criterion", criterion, CRITERION_NAMES)
    if ratio != 0:  # 0: tokens merge or images are smaller, and all units stay
        check_needs(model, criterion, batches=batches, found=found)
    check_ridge(ridge)
    if ratio is None and target is None:
        ratio = DEFAULT_RATIO
    parts = check_parts(model, parts, mode=mode)
    check_compensation(compensate, has_images=batches is not None)
    if row.reads_images:
        warn_of_few_classes(model, files_of(batches))
    batches = watch(batches)
    if TOKENS in parts or PIXELS in parts:
        if target is None or batches is None:
            part, instead = (
                (TOKENS, "a schedule (set_merging)") if TOKENS in parts else (PIXELS, "a size (set_image_size)")
            )
            raise VitpruneError(f"part {part} needs a target and images; for a share, name {instead}")
        dense = model if dense is None else dense
        widths = {"allocation": allocation, "round_to": round_to, "floor": floor}
        model, target, parts = reduce_tokens_first(
            model, batches, target, parts, ridge=ridge, seed=seed, track=track, **widths
        )
        batches = follow_size(batches, model, dense)
    facts = Facts(
        criterion=criterion,
        allocation=allocation,
        round_to=round_to,
        floor=floor,
        step=step if needs_steps(criterion) else 1.0,
        ridge=ridge,
        seed=seed,
    )
    asked = target
    if parts == (FFN,):
        target = asked = _target(model, ratio, target)
        # Refuse an impossible target before any image is read.
        level = {group.name: torch.zeros(group.num_units) for group in find_groups(model)}
        allocate(level, target, allocation=allocation, across_ffns=True, round_to=round_to, floor=floor)
    share = ratio or 0.0 if target is None else target.share
    expect_work(list_work(criterion, share, step, compensate, of_parts=parts != (FFN,)))
    if parts != (FFN,) and decided is None:
        decided = decide_parts(
            model,
            batches,
            parts,
            pruning_ratio=ratio,
            target=target,
            wanted=CRITERIA[criterion].statistics,
            allocation=allocation,
            round_to=round_to,
            floor=floor,
            ridge=ridge,
            seed=seed,
            track=track,
        )
    target = target if decided is None else decided.target
    widths = None if decided is None else decided.neurons
    schedule = Schedule(criterion, allocation, row.bridge, round_to, floor, widths)
    narrowed = None if decided is None else decided.turned
    neurons = model if decided is None else cut(decided.turned, decided.plan, row.bridge, ridge=ridge)
    ranks_neurons = FFN in parts and bool(find_left(neurons)) and target.share > 0
    wanted = needed_statistics(
        criteria=[criterion] if ranks_neurons else [],
        compensations=[compensate],
        bridged=ranks_neurons and len(schedule.stops(target, step)) > 1,
    )
    session = open_session(
        model, neurons, narrowed, batches, found=found, wanted=wanted, ridge=ridge, seed=seed, track=track
    )
    if row.by_block:
        _ = session.calls  # a model whose blocks cannot be run one at a time is refused before its units are scored
    if ranks_neurons:
        *_earlier, stage = walk(session, target, schedule, step=step)
        plan = finish(session, stage, target, schedule)
    else:
        plan = Plan({group.name: torch.ones(group.num_units, dtype=torch.bool) for group in find_left(neurons)})
    if asked is not None:
        predicted = target.predict(
            plan.widths if ranks_neurons else {name: len(c) - 1 for name, c in target.costs.items()}
        )
        facts = replace(facts, target=Asked(asked.kind, asked.limit, predicted, asked.dense))
    facts = replace(
        facts,
        architecture=architecture(model),
        weights_sha256=hash_weights(model if dense is None else dense),
        opened=how_opened(model if dense is None else dense),
        pruning_ratio_asked=ratio,
    )
    whole = replace(plan, facts=facts) if decided is None else decided.complete(plan, facts)
    return _carry_out(session, whole, mode=mode, compensation=compensate, dense=dense)


def open_session(
    model: nn.Module, neurons: nn.Module, turned: Turned | None, batches: Batches | None, **needs: Any
) -> Session:
    """Return the session of what is left of a model before its neurons go, which aims at the model unmerged."""
    weights = None
    if turned is not None:
        weights = weigh_tokens(model, turned.statistics)
    return Session(neurons, batches, dense=unmerged(model), token_weights=weights, **needs)


@entry
def prune_as_planned(
    model: nn.Module,
    plan: Plan,
    batches: Batches | None = None,
    *,
    mode: str = "remove",
    compensation: str = DEFAULT_COMPENSATION,
    ridge: float = DEFAULT_RIDGE,
    seed: int = 0,
    track: Track = untracked,
) -> tuple[nn.Module, Plan]:
    """Prune by a plan that is there already, of another checkpoint perhaps.

    Arguments and errors as in ``apply_plan``.

    Returns:
        The pruned model, and the plan with what is true of this model.
    """
    check_choice("mode", mode, MODES)
    check_ridge(ridge)
    dense, model = model, shape_as_planned(model, plan)
    batches = None if batches is None else follow_size(batches, model, dense)
    parts = check_parts(model, plan.parts, mode=mode)
    fit_plan(model if parts == (FFN,) else split_attention(model), plan)
    check_compensation(compensation, has_images=batches is not None)
    wanted = needed_statistics(compensations=[compensation])
    neurons, turned, batches = model, None, watch(batches)
    if parts != (FFN,):
        if batches is None:
            raise VitpruneError(f"a plan of {', '.join(plan.parts)} turns attention by images; pass `batches`")
        fitted, _kept_back = keep_back(batches, NUM_IMAGES)
        turned = turn_attention(model, fitted, plan.parts, ridge=ridge, seed=seed)
        neurons = cut(turned, _before_neurons(plan), COMPENSATIONS[compensation].bridge, ridge=ridge)
    session = open_session(model, neurons, turned, batches, wanted=wanted, ridge=ridge, seed=seed, track=track)
    plan = plan.with_facts(weights_sha256=hash_weights(dense), opened=how_opened(dense), ridge=ridge)
    return _carry_out(session, plan, mode=mode, compensation=compensation, dense=dense)


def prune_turned(
    model: nn.Module, turned: Turned, plan: Plan, batches: Batches | None, *, compensation: str, **needs: Any
) -> nn.Module:
    """Return what a plan leaves of a model whose attention stands in order.

    Args:
        model: that is aimed at, whose tokens do not merge.
        turned: from ``turn_attention``, of it.
        plan: of all that goes.
        batches: calibration images and labels, readable more than once.
        compensation: key of ``COMPENSATIONS``.
        needs: of the session, as ``open_session`` takes them.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=5).eval()
    >>> batches = [(torch.randn(2, 3, 32, 32), torch.zeros(2, dtype=torch.int64))]
    >>> plan = Plan({"blocks.0.attn.qk": torch.arange(64) < 32}, kinds={"blocks.0.attn.qk": "qk"})
    >>> turned = turn_attention(model, batches, ["qk"])
    >>> prune_turned(model, turned, plan, batches, compensation="none").blocks[0].attn.qk_width
    32
    """
    bridge, ridge = COMPENSATIONS[compensation].bridge, needs.get("ridge", DEFAULT_RIDGE)
    neurons = cut(turned, _before_neurons(plan), bridge, ridge=ridge)
    session = open_session(model, neurons, turned, batches, **needs)
    return apply_in(session, _of_neurons(neurons, plan), compensation=compensation)


def shape_as_planned(model: nn.Module, plan: Plan) -> nn.Module:
    """Return a model whose tokens merge, and whose images are as large, as a plan says; as it is where they do already.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=2).eval()
    >>> plan = Plan({}, Facts(merge=(60, 0), image_size=(160, 160)))
    >>> describe_merging(shape_as_planned(model, Plan({}, Facts(merge=(40, 0), image_size=(160, 160)))))
    [40, 0]
    """
    facts = plan.facts
    if facts.image_size is not None and tuple(data_config(model)["input_size"][1:]) != facts.image_size:
        model = set_image_size(model, facts.image_size)
    if facts.merge is not None and describe_merging(model) != list(facts.merge):
        model = set_merging(model, facts.merge)
    return model


def _before_neurons(plan: Plan) -> Plan:
    """Return a plan with all neurons, but of the FFNs that go as a whole."""
    left_out = plan.left_out
    whole = {
        name: torch.full_like(keep, name not in left_out) for name, keep in plan.keep.items() if plan.kind(name) == FFN
    }
    return replace(plan, keep={**plan.keep, **whole})


def _of_neurons(model: nn.Module, plan: Plan) -> Plan:
    """Return which neurons stay of the FFNs that a model has left: all, where a plan does not speak of them."""
    every = {group.name: torch.ones(group.num_units, dtype=torch.bool) for group in find_left(model)}
    return Plan({name: plan.keep.get(name, keep) for name, keep in every.items()}, plan.facts)


def _carry_out(
    session: Session, plan: Plan, *, mode: str, compensation: str, dense: nn.Module | None = None
) -> tuple[nn.Module, Plan]:
    """Prune, and say in the plan which images had a say and how large the model became.

    Args:
        session: of the model whose neurons go, which may have lost of its attention already.
        plan: everything that goes.
        mode: key of ``MODES``.
        compensation: key of ``COMPENSATIONS``.
        dense: the model that sizes are compared with; None: that which is aimed at.
    """
    of_neurons = plan if plan.parts == (FFN,) else _of_neurons(session.model, plan)
    pruned = apply_in(session, of_neurons, mode=mode, compensation=compensation)
    remember_names(pruned, names_in(session.batches) or plan.facts.label_names or ())
    dense = session.dense if dense is None else dense
    merge, image_size = describe_merging(session.model), tuple(data_config(session.model)["input_size"][1:])
    plan = plan.with_facts(
        compensation=compensation,
        mode=mode,
        label_names=label_names_of(pruned) or None,
        calibration=list_seen(session, plan.facts.criterion, plan.calibration),
        sizes=measure_sizes(pruned),
        sizes_dense=measure_sizes(dense),
        ffn_share=ffn_share(dense),
        merge=None if merge is None else tuple(merge),
        image_size=None if image_size == tuple(data_config(dense)["input_size"][1:]) else image_size,
    )
    return remember(pruned, plan.calibration), plan


def list_seen(session: Session, criterion: str | None, before: frozenset[str] = frozenset()) -> SeenImages:
    """Return the images that had a say in a session: read there, in the scores of a discovery, or ``before``."""
    scored_on = SeenImages()
    if criterion in CRITERIA and "found" in CRITERIA[criterion].needs and session.found is not None:
        scored_on = session.found.seen
    seen = session.seen
    named = scored_on if seen.data is None else seen
    return named.with_hashes(seen.sha256, scored_on.sha256, before)


def _target(model: nn.Module, pruning_ratio: float | None, target: Target | None) -> Target:
    if (pruning_ratio is None) == (target is None):
        raise VitpruneError("say how far to prune: either pruning_ratio or target")
    return target_neurons(model, pruning_ratio) if target is None else target


def explain(model: nn.Module, plan: Plan, target: Target, pruning_ratio: float | None, facts: Facts) -> Plan:
    """Record in a plan what it was made for, and check that it fits the model."""
    asked: dict[str, Any] = {
        "architecture": architecture(model),
        "weights_sha256": hash_weights(model),
        "pruning_ratio_asked": pruning_ratio,
        "target": Asked(target.kind, target.limit, target.predict(plan.widths), target.dense),
    }
    plan = Plan(plan.keep, replace(facts, **asked))
    fit_plan(model, plan)
    return plan
