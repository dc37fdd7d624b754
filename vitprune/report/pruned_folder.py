"""A pruned folder as a report sees it: beside the model that came from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from vitprune.discovery.run import Run
from vitprune.evaluation.model_facts import ModelFacts, describe_network
from vitprune.models.load import load
from vitprune.models.macs import measure_sizes
from vitprune.models.saved_folder import build_dense
from vitprune.models.units import FFN, KINDS
from vitprune.pruning.plan import Plan, read_plan
from vitprune.speed.speed_folder import SpeedRecord, load_speed
from vitprune.training.recovery_folder import Recovery, load_recovery


@dataclass(frozen=True)
class PrunedModel:
    """A pruned folder.

    Attributes:
        plan: which neurons stay, and where the decision came from.
        model: the pruned model.
        dense: what was pruned, of the same architecture and classes; its ``weights_sha256`` is that of the weights
            which the plan was applied to.
        dense_widths: FFN name -> its neurons in ``dense``.
        label_names: folder names of its classes, where it knows them; else empty.
        recovery: how it was trained afterwards; None where it was not.
        speed: how fast it was to be, and what was looked at for that; None where nobody asked.
    """

    plan: Plan
    model: ModelFacts
    dense: ModelFacts
    dense_widths: Mapping[str, int]
    label_names: tuple[str, ...]
    recovery: Recovery | None = None
    speed: SpeedRecord | None = None


def load_pruned(folder: str | Path) -> PrunedModel:
    """Read a pruned folder.

    Raises:
        VitpruneError: if it is none, or its files do not fit each other.
    """
    folder = Path(folder)
    plan, network = read_plan(folder), load(folder)
    sizes = plan.facts.sizes_dense
    if sizes is None:  # earlier versions did not store them
        sizes = measure_sizes(build_dense(folder))
    model = describe_network(network, str(folder), sizes=plan.facts.sizes)
    return PrunedModel(
        plan=plan,
        model=model,
        dense=replace(model, weights_sha256=plan.facts.weights_sha256 or "", **asdict(sizes)),
        dense_widths={name: len(keep) for name, keep in plan.only(FFN).keep.items()},
        label_names=tuple(getattr(network, "label_names", None) or ()),
        recovery=load_recovery(folder),
        speed=load_speed(folder),
    )


def count_removed(pruned: PrunedModel) -> tuple[int, int]:
    """Return how many FFN neurons the dense model has more, and how many it has."""
    dense = sum(pruned.dense_widths.values())
    return dense - pruned.plan.num_neurons, dense


def widths_of(pruned: PrunedModel) -> dict[str, tuple[int, int]]:
    """Return FFN name -> neurons kept, neurons of the dense model."""
    return {name: (width, pruned.dense_widths[name]) for name, width in pruned.plan.only(FFN).widths.items()}


def list_other_parts(pruned: PrunedModel) -> list[tuple[str, int, int]]:
    """Return name, units kept and units of the dense model of each group that is no FFN's neurons."""
    others = pruned.plan.only(*(kind for kind in KINDS if kind != FFN))
    return [(name, width, len(others.keep[name])) for name, width in others.widths.items()]


def same_weights(pruned: PrunedModel, run: Run) -> bool:
    """Tell whether a pruned model was made of the weights that a run is of."""
    return pruned.dense.weights_sha256 == run.weights_sha256
