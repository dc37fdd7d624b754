"""``vitprune prune``: remove the FFN neurons, or whatever else costs time, that matter least."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from jsonargparse import ArgumentParser

from vitprune import options
from vitprune.cli.arguments import add_checkpoint, add_device, add_images, add_output, listed
from vitprune.cli.inputs import (
    calibration_images,
    choose,
    find_images,
    make_batches,
    open_source,
    reads_labels,
    report_skipped,
    say_transform,
)
from vitprune.cli.prune_for_speed import (
    check_images_for,
    describe_within,
    export_for_speed,
    run_for_speed,
    show_candidates,
    show_speed,
    show_tried,
    stages_of,
)
from vitprune.cli.prune_onnx import run_onnx
from vitprune.cli.prune_request import PruneRequest, check_deciders, check_output, check_timing, check_together
from vitprune.cli.terminal import Tracked, note, print_table, track
from vitprune.errors import VitpruneError

SUMMARY = "remove the FFN neurons that matter least"
# On which --merge auto measures.
NUM_IMAGES_OF_SCHEDULES = 128


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "source",
        type=str,
        help="run folder of 'discover', timm name, or folder of a saved model; with --plan also the .onnx file of the "
        "dense model, whose weights are sliced in the graph",
    )
    add_checkpoint(parser, image_size=False)
    add_images(parser, required=False, batch_size=32, what="calibration images (default: those of the run)")
    # No defaults here: a plan that is given decides these, and what was asked for beside it must not be ignored.
    parser.add_argument(
        "--ratio",
        type=float,
        help=f"share of the units of every part to remove ({options.DEFAULT_RATIO}; 0 beside --merge or --image-size)",
    )
    parser.add_argument(
        "--target-params", type=float, help="parameters of the whole model instead, such as 4.5e6, or 0.8 of them"
    )
    parser.add_argument(
        "--target-macs", type=float, help="multiply-accumulates of one image instead, such as 0.9e9, or 0.5 of them"
    )
    parser.add_argument("--target-latency", type=float, help="ms per run on --backend instead, measured here")
    parser.add_argument(
        "--speedup", type=float, help="how many times as fast as the dense float32 model on --backend instead: 2"
    )
    parser.add_argument(
        "--max-drop",
        type=float,
        help="as fast as it gets without losing more top-1 than this on --eval-data, at 95 percent confidence",
    )
    parser.add_argument("--eval-data", type=str, help="of --max-drop: evaluation images in class folders")
    parser.add_argument(
        "--allow",
        nargs="+",
        choices=tuple(options.ALLOWED_PRECISIONS),
        help=f"beside float32, for --speedup and --target-latency: {listed(options.ALLOWED_PRECISIONS)}",
    )
    parser.add_argument("--export", type=str, help="of --speedup and --target-latency: file to write as well, exported")
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=tuple(options.PARTS),
        help=f"what may go: {listed(options.PARTS)} (ffn; of --target-macs and --target-params whatever the model has "
        "of ffn, qk, vo, layers and, of --target-macs without --merge, tokens)",
    )
    parser.add_argument(
        "--merge",
        type=str,
        help="tokens that merge by block: constant:13, every3:39, 3:60,6:60,9:36 (block:tokens), a number for each "
        "block, or auto:0.6 (what changes answers least at this share of the multiply-accumulates)",
    )
    parser.add_argument("--image-size", type=int, nargs="+", help="feed images of this height and width instead")
    parser.add_argument(
        "--backend",
        type=str,
        nargs="+",
        help=f"of --speedup, --target-latency and --round-to auto: {listed(options.BACKENDS)}; of several the best is "
        "taken, and speed-ups refer to the first",
    )
    parser.add_argument(
        "--latency-batch-size",
        type=int,
        nargs="+",
        help="images per run of --speedup and --target-latency (1); a speed-up is reached at each of several",
    )
    parser.add_argument(
        "--keep-classes",
        type=str,
        nargs="+",
        help="only these classes will be asked for (named as for --classes); 'data': those of --data",
    )
    parser.add_argument(
        "--criterion",
        choices=tuple(options.CRITERIA),
        help=f"{listed(options.CRITERIA)} ({options.DEFAULT_CRITERION})",
    )
    parser.add_argument(
        "--allocation",
        choices=tuple(options.ALLOCATIONS),
        help=f"{listed(options.ALLOCATIONS)} ({options.DEFAULT_ALLOCATION})",
    )
    parser.add_argument(
        "--round-to", type=str, help="every width is a multiple of it (1); auto: what --backend is fastest at here"
    )
    parser.add_argument(
        "--floor", type=float, help=f"share that global leaves to each FFN at least ({options.DEFAULT_FLOOR})"
    )
    parser.add_argument(
        "--step", type=float, help=f"share that goes before scores are measured anew; 1: never ({options.DEFAULT_STEP})"
    )
    parser.add_argument(
        "--compensate",
        choices=tuple(options.COMPENSATIONS),
        help=f"{listed(options.COMPENSATIONS)} ({options.DEFAULT_COMPENSATION}; for an .onnx file: that of the plan's "
        "folder)",
    )
    parser.add_argument("--mode", choices=tuple(options.MODES), default="remove", help=listed(options.MODES))
    parser.add_argument(
        "--ridge", type=float, default=options.DEFAULT_RIDGE, help="regularisation, relative to the mean variance"
    )
    parser.add_argument(
        "--keep-paths", type=int, help="of a run: keep this many neurons of each class's path in each FFN, no others"
    )
    parser.add_argument("--plan", type=str, help="apply this plan (file or pruned folder) instead of making one")
    add_device(parser)
    add_output(parser, "folder of the pruned model to write (for an .onnx file: the .onnx file)")


def run(source, output, overwrite, **given):
    from vitprune.pruning.plan import read_plan

    asked = PruneRequest.read(SimpleNamespace(**given))
    check_output(source, output, asked.given.export, overwrite=overwrite)
    plan = None if asked.given.plan is None else read_plan(asked.given.plan)
    if Path(source).suffix == ".onnx":
        return _prune_onnx(source, output, plan, asked)
    check_together(source, asked)
    start = _open(source, plan, asked)
    outcome = _prune(start, asked, output)
    return _write(start, outcome, output, asked)


def _prune_onnx(source: str, output: str, plan: Any, asked: PruneRequest):
    given = asked.given
    check_deciders(given, {**asked.decisions, **asked.targets, **asked.shapes})
    check_timing(asked)
    if plan is None:
        raise VitpruneError(f"{source}: an ONNX file is pruned by a plan; pass --plan (a file, or a pruned folder)")
    unused = {"checkpoint": given.checkpoint, "keep_classes": given.keep_classes, "device": given.device}
    unused = [name for name, value in {**unused, **asked.opening}.items() if value is not None]
    if unused or given.mode != "remove":
        raise VitpruneError(f"{', '.join(unused or ['mode mask'])}: not for ONNX files, whose neurons are removed")
    return run_onnx(
        source, given.plan, plan, output, given.compensate, given.ridge, given.data, given.class_map, given.classes,
        given.images_per_class, given.strict, given.batch_size, given.workers, given.seed,
    )  # fmt: skip


@dataclass(frozen=True)
class _Start:
    """What a pruning starts from.

    Attributes:
        dense: the model that sizes are compared with.
        network: the same, fed the images and merging the tokens that were asked for.
        plan: which units stay, where that is decided already.
        found: the discovery of the run; None where the source is no run.
        batches: calibration images; None where there are none.
        tracked: these, with progress.
        evaluation: images that a drop is judged on.
    """

    dense: Any
    network: Any
    plan: Any
    found: Any
    batches: Any
    tracked: Any
    evaluation: Any


def _open(source: str, plan: Any, asked: PruneRequest) -> _Start:
    from vitprune.data import remember_names
    from vitprune.models.image_size import set_image_size
    from vitprune.models.merging import set_merging
    from vitprune.pruning.keep_paths import plan_paths
    from vitprune.pruning.prune import shape_as_planned
    from vitprune.pruning.specialise import specialise

    given = asked.given
    run, network = open_source(source, given.checkpoint, given.device, asked.opening)
    if plan is not None:
        remember_names(network, plan.facts.label_names or ())
    labels_matter = given.keep_classes is not None or reads_labels([given.criterion or options.DEFAULT_CRITERION])
    images = calibration_images(
        source, run, network, given.data, given.class_map, given.classes, given.images_per_class, given.seed,
        labels_matter=labels_matter,
    )  # fmt: skip
    found = None if run is None else run.found
    if given.keep_classes is not None:
        wanted = _classes_to_keep(given.keep_classes, images, data_given=given.data is not None)
        network, images, found = specialise(network, images, wanted, found=found)
    if given.keep_paths is not None:
        plan = plan_paths(network, found, given.keep_paths)
    dense, network = network, network if plan is None else shape_as_planned(network, plan)
    if given.image_size is not None:
        network = set_image_size(network, _parse_image_size(given.image_size))
    reading = {"batch_size": given.batch_size, "workers": given.workers, "strict": given.strict}
    batches = tracked = evaluation = None
    if images is not None:
        batches = make_batches(images, network, **reading)
        tracked = Tracked(batches, "calibrate")
        say_transform(network)
    if given.eval_data is not None:
        others = find_images(choose(given.eval_data, given.class_map, None, None, given.seed), network)
        evaluation = make_batches(others, network, **reading)
    if given.merge is not None:
        network = set_merging(network, _find_schedule(given.merge, network, tracked))
    return _Start(dense, network, plan, found, batches, tracked, evaluation)


@dataclass(frozen=True)
class _Outcome:
    """What came out.

    Attributes:
        model: the pruned one.
        plan: which units it has.
        seconds: that it took.
        speed: from ``run_for_speed``; None where nothing was asked of the speed of the whole model.
        within: how a drop was kept to; None where none was asked for.
        latency: measured against what was asked for, where FFNs alone were timed; else None.
    """

    model: Any
    plan: Any
    seconds: float
    speed: Any = None
    within: Any = None
    latency: dict[str, Any] | None = None


def _prune(start: _Start, asked: PruneRequest, output: str) -> _Outcome:
    from vitprune.pruning.prune import prune_as_planned

    given = asked.given
    compensate = options.DEFAULT_COMPENSATION if given.compensate is None else given.compensate
    started = time.perf_counter()
    if asked.for_speed and _follows_shapes(start.network, given.parts, given.round_to):
        return _prune_for_speed(start, asked, compensate, output, started)
    if (
        given.max_drop is not None
        or len(given.backend or []) > 1
        or len(given.latency_batch_size or []) > 1
        or (given.allow or given.export)
    ):
        raise VitpruneError(
            "--max-drop, several backends or batch sizes, --allow and --export are for models whose tokens can merge, "
            "and for all their parts; name one backend"
        )
    applied = {"compensation": compensate, "mode": given.mode, "ridge": given.ridge, "seed": given.seed, "track": track}
    if start.plan is not None:
        pruned, plan = prune_as_planned(start.dense, start.plan, start.tracked, **applied)
        return _Outcome(pruned, plan, time.perf_counter() - started)
    return _prune_to_target(start, asked, compensate, applied, started)


def _prune_for_speed(start: _Start, asked: PruneRequest, compensate: str, output: str, started: float) -> _Outcome:
    from vitprune.speed.latency_target import default_backend

    given, network = asked.given, start.network
    check_images_for(start.tracked)
    decided = {name: value for name, value in asked.decisions.items() if name != "pruning_ratio"}
    result, within = run_for_speed(
        network, start.tracked, backends=given.backend or [default_backend(network)], allow=given.allow or [],
        export=given.export, speedup=given.speedup, latency_ms=given.target_latency, max_drop=given.max_drop,
        evaluation=start.evaluation, parts=_choose_parts(network, given.parts, asked.targets, shaped=False),
        batch_sizes=given.latency_batch_size or [1], ridge=given.ridge, seed=given.seed, compensate=compensate,
        found=start.found, output=output, **decided,
    )  # fmt: skip
    return _Outcome(result.model, result.plan, time.perf_counter() - started, result, within)


def _prune_to_target(
    start: _Start, asked: PruneRequest, compensate: str, applied: dict[str, Any], started: float
) -> _Outcome:
    from vitprune.models.merging import describe_merging
    from vitprune.pruning.prune import prune
    from vitprune.speed.latency_target import default_backend, measure_reached

    given, network, decisions = asked.given, start.network, dict(asked.decisions)
    timing = {"backend": None, "batch_size": (given.latency_batch_size or [1])[0]}
    if asked.timed:
        timing["backend"] = (given.backend or [default_backend(network)])[0]
    merges = describe_merging(network) is not None
    shaped = network is not start.dense or merges
    parts = _choose_parts(start.dense, given.parts, asked.targets, shaped=shaped)
    target = _make_target(network, timing, parts, **_in_units(start.dense, **asked.targets))
    if asked.shapes and not asked.targets and parts == ["ffn"] and "parts" not in asked.shapes:
        decisions.setdefault("pruning_ratio", 0.0)
    if given.round_to == "auto":
        decisions["round_to"] = _find_multiple(network, target, given.ratio, timing)
    if start.tracked is not None and parts == ["ffn"]:
        start.tracked.description = _describe_passes(
            network, given.ratio, target, given.criterion, given.step, compensate
        )
    shape = {"parts": parts, "dense": start.dense}
    pruned, plan = prune(network, start.tracked, **decisions, target=target, found=start.found, **shape, **applied)
    seconds = time.perf_counter() - started
    latency = None
    if asked.for_speed:
        latency = vars(measure_reached(network, pruned, plan.facts.target, **timing, track=track))
    return _Outcome(pruned, plan, seconds, latency=latency)


def _write(start: _Start, outcome: _Outcome, output: str, asked: PruneRequest):
    """Write the folder, and return the answer and what shows it."""
    from vitprune.images.resized_batches import resize_batches
    from vitprune.models.saved_folder import save
    from vitprune.speed.speed_folder import describe_speed, save_for_speed

    export, result, within, made = asked.given.export, outcome.speed, outcome.within, outcome.plan
    read = start.tracked is not None and start.tracked.passes
    skipped = report_skipped(start.batches) if read else []
    report = None
    if result is None:
        save(outcome.model, output, plan=made)
    else:
        save_for_speed(result, output, facts=None if within is None else describe_within(within))
        report = (
            None if export is None else export_for_speed(result, export, resize_batches(start.batches, result.model))
        )
        shutil.rmtree(stages_of(output))
    facts = made.facts
    answer = {
        "output": output,
        "export": export,
        "latency": outcome.latency,
        "speed": None if result is None else describe_speed(result),
        "within_drop": None if within is None else describe_within(within),
        "widths": made.widths,
        "widths_dense": {name: len(keep) for name, keep in made.keep.items()},
        "parts": made.parts,
        "stand_ins": facts.stand_ins,
        "merge": facts.merge,
        "image_size": facts.image_size,
        "num_neurons": made.num_neurons,
        "num_neurons_dense": made.num_neurons_dense,
        "pruning_ratio": made.pruning_ratio,
        "target": None if facts.target is None else vars(facts.target),
        "round_to": facts.round_to,
        "classes": list(getattr(start.network, "label_names", None) or ()),
        "num_parameters": facts.sizes.num_parameters,
        "num_parameters_dense": facts.sizes_dense.num_parameters,
        "macs": facts.sizes.macs,
        "macs_dense": facts.sizes_dense.macs,
        "ffn_share": facts.ffn_share,
        "speedup_ceiling": facts.speedup_ceiling,
        "seconds": outcome.seconds,
        "skipped": skipped,
    }

    def show() -> None:
        if within is not None:
            show_tried(within)
        if result is not None:
            show_candidates(result)
        _show(answer, made, mode=asked.given.mode, targeted=bool(asked.targets) and result is None)
        if result is not None:
            show_speed(result, answer["output"], report)

    return answer, show


def _follows_shapes(network, parts: Sequence[str] | None, round_to: int | str | None) -> bool:
    """Tell whether a model's time can be told from its shape; else its FFNs alone are timed."""
    from vitprune.models.merging import check_merging

    if round_to == "auto" or parts == ["ffn"]:
        return False
    try:
        check_merging(network)
    except VitpruneError as error:
        if parts is not None:
            raise
        note(f"neurons alone go: {error}")
        return False
    return True


def _show(answer: dict[str, Any], made: Any, *, mode: str, targeted: bool) -> None:
    from vitprune.data import describe_class

    seconds, latency = answer["seconds"], answer["latency"]
    if made.parts == ("ffn",):
        rows = [(name, str(answer["widths_dense"][name]), str(width)) for name, width in made.widths.items()]
        print_table("neurons", ("FFN", "dense", "kept"), rows)
        print(f"removed {made.pruning_ratio:.1%} of {made.num_neurons_dense} FFN neurons ({mode}) in {seconds:.0f} s")
    else:
        print_table("units kept, of those of the dense model", *_tabulate_parts(made))
        print(f"removed {_count_removed(made)} in {seconds:.0f} s")
    if answer["merge"]:
        merged = ", ".join(f"{r} in block {block}" for block, r in enumerate(answer["merge"]) if r)
        print(f"tokens that merge: {merged}")
    if answer["image_size"]:
        print(f"images of {answer['image_size'][0]} x {answer['image_size'][1]} pixels")
    if targeted:
        asked = made.facts.target
        print(f"target {asked.limit:g} {options.TARGETS[asked.kind]}; predicted {asked.predicted:.6g}")
    if latency is not None:
        print(
            f"measured {latency['median_ms']:.2f} ms, in the same run dense {latency['dense_median_ms']:.2f} ms: "
            f"{latency['speedup']:.2f} x as fast (predicted {latency['predicted_speedup']:.2f} x)"
        )
    if answer["classes"]:
        shown = ", ".join(map(describe_class, answer["classes"][:10]))
        print(f"answers {len(answer['classes'])} classes: {shown}{', ...' if len(answer['classes']) > 10 else ''}")
    print(f"parameters {answer['num_parameters_dense']:,} -> {answer['num_parameters']:,}")
    print(
        f"multiply-accumulates {answer['macs_dense'] / 1e6:,.1f} -> {answer['macs'] / 1e6:,.1f} M: "
        f"at most {answer['speedup_ceiling']:.2f} x faster"
    )
    print(f"(the FFNs of the dense model are {answer['ffn_share']:.0%} of its multiply-accumulates)")
    print(f"wrote {answer['output']}")


def _classes_to_keep(wanted: Sequence[str], images: Any, *, data_given: bool) -> list[str] | None:
    """Return the classes that were named; None for those of the images."""
    if images is None:
        raise VitpruneError("--keep-classes needs images of these classes; pass --data DIR")
    if list(wanted) != ["data"]:
        return list(wanted)
    if not data_given:
        raise VitpruneError("--keep-classes data takes the classes of --data DIR, which is missing")
    return None


def _describe_passes(
    network, ratio: float | None, target, criterion: str | None, step: float | None, compensate: str
) -> str:
    """Say what the images are read for, so that a user sees how much is still to come."""
    from vitprune.pruning.compensations import reads_images
    from vitprune.pruning.schedule import list_stops, needs_steps
    from vitprune.pruning.target import target_neurons

    if not needs_steps(criterion or options.DEFAULT_CRITERION):
        return "calibrate"
    target = target or target_neurons(network, options.DEFAULT_RATIO if ratio is None else ratio)
    stops = list_stops(target.share, options.DEFAULT_STEP if step is None else step)
    then = ", then compensation" if reads_images(compensate) else ""
    return f"calibrate: {len(stops)} {'ranking' if len(stops) == 1 else 'rankings'}{then}"


def _share(target, ratio: float | None) -> float:
    if target is not None:
        return target.share
    return options.DEFAULT_RATIO if ratio is None else ratio


def _find_multiple(network, target, ratio: float | None, timing: dict[str, Any]) -> int:
    from vitprune.speed.latency_target import find_multiple

    note(f"timing widths on {timing['backend']}")
    found = find_multiple(network, _share(target, ratio), **timing)
    note(f"widths are multiples of {found}")
    return found


def _tabulate_parts(made: Any) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the heads of a table of all parts, and a row for each block."""
    parts = [part for part in made.parts if part != "layers"]
    stand_ins = made.facts.stand_ins or {}
    rows: dict[str, dict[str, str]] = {}
    for name, keep in made.keep.items():
        kind = made.kind(name)
        if kind == "layers":
            continue
        module = name.removesuffix(f".{kind}")
        gone = f"none ({stand_ins[module]})" if module in stand_ins else ""
        kept = gone or f"{int(keep.sum())} of {len(keep)}"
        rows.setdefault(module.rpartition(".")[0], {})[kind] = kept
    return ("block", *parts), [(block, *(row.get(part, "") for part in parts)) for block, row in rows.items()]


def _count_removed(made: Any) -> str:
    """Say how many units of each part went."""
    from vitprune.models.units import KINDS

    said = []
    for part in made.parts:
        of_part = made.only(part)
        dense = sum(map(len, of_part.keep.values()))
        said.append(f"{dense - sum(of_part.widths.values()):,} of {dense:,} {KINDS[part]}s")
    return ", ".join(said)


def _parse_image_size(sizes: Sequence[int]) -> int | tuple[int, int]:
    if len(sizes) > 2:
        raise VitpruneError(f"--image-size takes one number, or height and width; got {len(sizes)} numbers")
    return sizes[0] if len(sizes) == 1 else (sizes[0], sizes[1])


def _find_schedule(merge: str, network, batches) -> tuple[int, ...]:
    """Read a schedule, or choose one by measuring."""
    from vitprune.data import take_evenly
    from vitprune.models.merge_schedule import choose_schedule, parse_schedule

    if not merge.startswith("auto"):
        return parse_schedule(merge, network)
    _auto, _colon, share = merge.partition(":")
    try:
        share_of_macs = float(share)
    except ValueError:
        raise VitpruneError(f"--merge {merge}: say which share of the multiply-accumulates, such as auto:0.6") from None
    if batches is None:
        raise VitpruneError("--merge auto measures schedules on calibration images; pass --data DIR")
    return choose_schedule(network, take_evenly(batches, NUM_IMAGES_OF_SCHEDULES), share_of_macs, track=track)


def _choose_parts(network, parts: Sequence[str] | None, targets: dict[str, float], *, shaped: bool) -> list[str]:
    """Return the parts that were named, or those that a target is spread over."""
    from vitprune.pruning.decide import check_parts

    if parts is not None:
        return list(parts)
    if not set(targets):
        return ["ffn"]
    chosen = ["ffn", "qk", "vo", "layers"]
    try:
        check_parts(network, chosen)
    except VitpruneError as error:
        note(f"of units, neurons alone go: {error}")
        chosen = ["ffn"]
    if "target_params" not in targets and not shaped:
        for part, what in (("tokens", "no tokens merge"), ("pixels", "images stay as large")):
            try:
                check_parts(network, [part])
                chosen.append(part)
            except VitpruneError as error:
                note(f"{what}: {error}")
    return chosen


def _in_units(dense, **targets: float) -> dict[str, float]:
    """Return targets that were told as shares of what the dense model has in its units."""
    from vitprune.models.macs import count_macs, count_parameters

    whole = {"target_macs": count_macs, "target_params": count_parameters}
    return {
        name: limit * whole[name](dense) if name in whole and 0 < limit <= 1 else limit
        for name, limit in targets.items()
    }


def _make_target(network, timing: dict[str, Any], parts: Sequence[str], **targets: float):
    """Build the target that was asked for; None where the ratio decides."""
    from vitprune.models.attention import split_attention
    from vitprune.pruning.target import target_macs, target_parameters
    from vitprune.speed.latency_target import measure_target

    if not targets:
        return None
    ((name, limit),) = targets.items()
    kinds = ["ffn"]
    if list(parts) != ["ffn"] and name not in ("target_latency", "speedup"):
        network, kinds = split_attention(network), ["ffn", "qk", "vo"]
    if name == "target_params":
        return target_parameters(network, limit, kinds=kinds)
    if name == "target_macs":
        return target_macs(network, limit, kinds=kinds)
    asked = {"speedup": limit} if name == "speedup" else {"limit": limit}
    return measure_target(network, **asked, **timing, track=track)
