"""What ``vitprune prune`` is asked for: its options sorted, and checked against each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vitprune import options
from vitprune.cli.arguments import OPENING
from vitprune.cli.inputs import check_data, refuse_without_data
from vitprune.cli.prune_for_speed import check_export
from vitprune.cli.several_processes import refuse_timing
from vitprune.errors import VitpruneError


@dataclass(frozen=True)
class PruneRequest:
    """What the options ask for, sorted by what they decide.

    Attributes:
        given: every option but source and output, by its name.
        decisions: how units are chosen, where that was said.
        targets: what the model may cost.
        shapes: what may go, how tokens merge, how large images are.
        opening: what was said of the model beside its name.
    """

    given: SimpleNamespace
    decisions: Mapping[str, Any]
    targets: Mapping[str, float]
    shapes: Mapping[str, Any]
    opening: Mapping[str, Any]

    @classmethod
    def read(cls, given: SimpleNamespace) -> PruneRequest:
        """Sort the options of a call."""
        if given.criterion is not None:
            options.check_choice("criterion", given.criterion, options.CRITERIA)
        given = SimpleNamespace(**{**vars(given), "round_to": _parse_round_to(given.round_to)})

        def said(*names: str) -> dict[str, Any]:
            return {name: getattr(given, name) for name in names if getattr(given, name) is not None}

        decisions = said("ratio", "criterion", "allocation", "round_to", "floor", "step")
        return cls(
            given,
            decisions={"pruning_ratio" if name == "ratio" else name: value for name, value in decisions.items()},
            targets=said("target_params", "target_macs", "target_latency", "speedup", "max_drop"),
            shapes=said("parts", "merge", "image_size"),
            opening={name: getattr(given, name) for name in OPENING},
        )

    @property
    def for_speed(self) -> bool:
        """Whether something is asked of the speed."""
        return bool({"target_latency", "speedup", "max_drop"} & self.targets.keys())

    @property
    def timed(self) -> bool:
        """Whether something is timed here."""
        return self.for_speed or self.given.round_to == "auto"


def check_output(source: str, output: str, export: str | None, *, overwrite: bool) -> None:
    """Refuse outputs that cannot be written."""
    from vitprune.files import refuse_existing
    from vitprune.speed.speed_folder import SPEED_FILES

    refuse_existing(output, overwrite=overwrite, owned=None if Path(source).suffix == ".onnx" else SPEED_FILES)
    if Path(output).resolve() == Path(source).resolve():
        raise VitpruneError(f"{output} is the model itself; choose another output")
    if export is not None:
        check_export(export, overwrite=overwrite)


def check_together(source: str, asked: PruneRequest) -> None:
    """Refuse options that contradict each other, before a model is fetched or built."""
    from vitprune.discovery.run import is_run
    from vitprune.pruning.schedule import needs_steps
    from vitprune.speed.fit_latency import list_formats

    given, decisions, targets, shapes = asked.given, asked.decisions, asked.targets, asked.shapes
    check_deciders(given, {**decisions, **targets, **shapes})
    if given.keep_paths is not None and not is_run(source):
        raise VitpruneError("--keep-paths takes the paths of a run; name the folder that 'vitprune discover' wrote")
    check_timing(asked)
    if len(targets) + (given.ratio is not None) > 1:
        named = [*targets, *(["ratio"] if given.ratio is not None else [])]
        raise VitpruneError(f"one target at a time, got {', '.join(named)}")
    if asked.for_speed and (given.merge, given.image_size) != (None, None):
        raise VitpruneError("--speedup and --target-latency choose how tokens merge; leave --merge, --image-size out")
    if asked.for_speed and given.backend:
        list_formats(given.backend, given.allow or [])
    if given.floor is not None and given.allocation == "uniform":
        raise VitpruneError("--floor is for --allocation global; uniform leaves every FFN the same share")
    criterion = given.criterion or options.DEFAULT_CRITERION
    if given.step not in (None, 1) and not needs_steps(criterion):
        raise VitpruneError(f"--step: the scores of criterion {criterion} do not change on the way; leave it out")
    refuse_without_data(
        given.data, class_map=given.class_map, classes=given.classes, images_per_class=given.images_per_class
    )
    check_data(given.data, given.class_map)
    if given.eval_data is not None:
        check_data(given.eval_data)


def check_timing(asked: PruneRequest) -> None:
    """Refuse what goes with a speed where none is asked for, and what a speed cannot have."""
    given = asked.given
    if asked.timed:
        refuse_timing(f"--{next(iter(asked.targets), 'round-to auto').replace('_', '-')}")
    if (given.max_drop is None) != (given.eval_data is None):
        raise VitpruneError("--max-drop is judged on --eval-data DIR; name both or neither")
    if not asked.timed and (given.backend, given.latency_batch_size) != (None, None):
        raise VitpruneError("--backend and --latency-batch-size go with --target-latency, --speedup or --round-to auto")
    if not asked.for_speed and (given.allow, given.export) != (None, None):
        raise VitpruneError("--allow and --export go with --speedup or --target-latency")
    if asked.for_speed and given.mode == "mask":
        name = next(name for name in ("target_latency", "speedup", "max_drop") if name in asked.targets)
        raise VitpruneError(
            f"--{name.replace('_', '-')} is for --mode remove; a masked model is as slow as the dense one"
        )


def check_deciders(given: SimpleNamespace, others: Mapping[str, Any]) -> None:
    """Refuse a plan, or paths to keep, beside what decides differently."""
    if given.keep_paths is not None and (given.plan is not None or others):
        named = [*({} if given.plan is None else {"plan": given.plan}), *others]
        raise VitpruneError(f"--keep-paths decides what stays; leave {', '.join(named)} out")
    if given.plan is not None and others:
        raise VitpruneError(f"--plan decides what stays; leave {', '.join(others)} out")


def _parse_round_to(round_to: str | None) -> int | str | None:
    if round_to in (None, "auto"):
        return round_to
    if not round_to.isdecimal() or int(round_to) < 1:
        raise VitpruneError(f"round_to must be a number of at least 1, or auto; got {round_to}")
    return int(round_to)
