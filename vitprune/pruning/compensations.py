"""Compensations: what makes a pruned model good again, each a row with what it needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from vitprune.calibration.criteria import REGISTRY as CRITERIA
from vitprune.calibration.statistics import GRADIENTS, MOMENTS
from vitprune.errors import VitpruneError
from vitprune.options import COMPENSATIONS, check_choice
from vitprune.pruning.compensate import STAND_INS, compensate
from vitprune.pruning.distill import distill
from vitprune.pruning.plan import Plan
from vitprune.pruning.sequential import compensate_sequentially
from vitprune.pruning.session import Session
from vitprune.sharing import refuse_sharing


@dataclass(frozen=True)
class Compensation:
    """How to make a model good.

    Attributes:
        apply: (session, plan) -> the session's model with its kept units standing in for the others; same shapes.
        statistics: of the dense model that it cannot do without.
        weighs_tokens: whether it asks how much each token counts, of a model with a classifier.
        reads_images: whether it does anything at all.
        by_block: whether it runs the blocks one at a time.
        bridge: the one that comes nearest to it between two rankings.
        stand_in: what it makes of one projection by itself; None where it takes more than that.
        changes_weights: whether more than biases change.
        alone: what to use instead where processes share images, of one that cannot.
    """

    apply: Callable[[Session, Plan], nn.Module]
    statistics: frozenset[str] = frozenset()
    weighs_tokens: bool = False
    reads_images: bool = True
    by_block: bool = False
    bridge: str = "ridge"
    stand_in: Callable[..., tuple[Tensor, Tensor]] | None = None
    changes_weights: bool = True
    alone: str | None = None


def _leave(session: Session, plan: Plan) -> nn.Module:
    return session.model


def _at_once(session: Session, plan: Plan, *, name: str) -> nn.Module:
    return compensate(session.model, plan, session.statistics, compensation=name, ridge=session.ridge)


def _by_block(session: Session, plan: Plan, *, towards_stream: bool) -> nn.Module:
    return compensate_sequentially(
        session.model,
        plan,
        session.batches,
        weights=session.token_weights,
        towards_stream=towards_stream,
        ridge=session.ridge,
        calls=session.calls,
        dense=session.dense,
        track=session.track,
    )


def _distill(session: Session, plan: Plan) -> nn.Module:
    if session.dense is not session.model:
        raise VitpruneError(
            "compensation distill is for models that lose neurons alone, not attention, layers or tokens; "
            "use sequential"
        )
    compensated = _by_block(session, plan, towards_stream=True)
    return distill(
        session.model,
        compensated,
        plan,
        session.batches,
        weights=session.token_weights,
        seed=session.seed,
        track=session.track,
    )


def _one_shot(name: str, **needs) -> Compensation:
    return Compensation(
        partial(_at_once, name=name), statistics=frozenset({MOMENTS}), bridge=name, stand_in=STAND_INS[name], **needs
    )


REGISTRY: Mapping[str, Compensation] = {
    "none": Compensation(_leave, reads_images=False, bridge="none", changes_weights=False),
    "bias": _one_shot("bias", changes_weights=False),
    "ridge": _one_shot("ridge"),
    "sequential-ffn": Compensation(partial(_by_block, towards_stream=False), weighs_tokens=True, by_block=True),
    "sequential": Compensation(partial(_by_block, towards_stream=True), weighs_tokens=True, by_block=True),
    "distill": Compensation(
        _distill, weighs_tokens=True, by_block=True, alone="use sequential, and train what comes of it (`recover`)"
    ),
}


def reads_images(name: str) -> bool:
    """Return whether a compensation asks for calibration images at all.

    Raises:
        VitpruneError: if there is no such compensation.
    """
    check_choice("compensation", name, COMPENSATIONS)
    return REGISTRY[name].reads_images


def check_compensation(name: str, *, has_images: bool) -> Compensation:
    """Return a row of the registry, after checking that there is what it needs.

    Raises:
        VitpruneError: if there is no such compensation, images are missing, or processes share them and it cannot.
    """
    if reads_images(name) and not has_images:
        raise VitpruneError(f"compensation {name} needs calibration images; pass `batches`")
    row = REGISTRY[name]
    if row.alone is not None:
        refuse_sharing(f"compensation {name}", row.alone)
    return row


def needed_statistics(
    *, criteria: Sequence[str] = (), compensations: Sequence[str] = (), bridged: bool = False
) -> frozenset[str]:
    """Return which statistics of the dense model criteria and compensations read.

    Args:
        criteria: keys of ``CRITERIA``.
        compensations: keys of ``COMPENSATIONS``.
        bridged: whether the model is ranked in several steps, with a compensation between them.
    """
    wanted = frozenset().union(*(CRITERIA[name].statistics for name in criteria))
    for name in compensations:
        row = REGISTRY[name]
        wanted |= row.statistics
        if row.weighs_tokens:
            wanted |= {GRADIENTS}
        if bridged:
            wanted |= REGISTRY[row.bridge].statistics
    return wanted
