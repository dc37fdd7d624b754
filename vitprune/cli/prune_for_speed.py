"""``vitprune prune --speedup`` and ``--target-latency``: as fast as asked for, by all that a model can lose."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vitprune.cli.terminal import Tracked, print_table, track
from vitprune.errors import VitpruneError

NUM_PARITY_IMAGES = 64


def check_export(path: str, *, overwrite: bool) -> None:
    from vitprune.files import refuse_existing

    if Path(path).suffix != ".onnx":
        raise VitpruneError(f"--export {path}: an ONNX file ends in .onnx")
    refuse_existing(path, overwrite=overwrite)
    refuse_existing(_for_openvino(path), overwrite=overwrite)


def _for_openvino(path: str) -> str:
    return str(Path(path).with_suffix(".xml"))


def check_images_for(batches: Any) -> None:
    if batches is None:
        raise VitpruneError("what goes for speed is weighed on calibration images; pass --data DIR")


def run_for_speed(
    network: Any,
    batches: Any,
    *,
    backends: Sequence[str],
    allow: Sequence[str],
    export: str | None,
    speedup: float | None,
    latency_ms: float | None,
    max_drop: float | None,
    evaluation: Any,
    output: str,
    **asked: Any,
):
    """Return the result, and how it was found within a drop; None where that was not asked."""
    from vitprune.cli.terminal import note
    from vitprune.evaluation.prune_within_drop import prune_within_drop
    from vitprune.speed.fit_latency import list_formats
    from vitprune.speed.prune_for_speed import prune_for_speed
    from vitprune.speed.speed_candidates import OutOfReachError

    formats = list_formats(backends, allow)
    if export is not None and not any(each.is_file for each in formats):
        raise VitpruneError(f"--export writes a file for ONNX Runtime, not for {', '.join(backends)}; name its backend")
    asked |= {"formats": formats, "track": track, "stages": stages_of(output)}
    note(f"the same command goes on where it was killed, from {stages_of(output)}")
    try:
        if max_drop is None:
            return prune_for_speed(network, batches, speedup, latency_ms=latency_ms, **asked), None
        within = prune_within_drop(network, batches, evaluation, max_drop, **asked)
    except OutOfReachError:
        shutil.rmtree(stages_of(output), ignore_errors=True)
        raise
    return within.result, within


def stages_of(output: str) -> Path:
    """Return the folder beside an output that keeps what is finished until it is written."""
    path = Path(output)
    return path.with_name(f"{path.name}.unfinished")


def describe_within(within: Any) -> dict[str, Any]:
    from dataclasses import asdict

    facts = {name: getattr(within, name) for name in ("max_drop", "dense_top1", "num_images")}
    return {**facts, "tried": [asdict(each) for each in within.tried]}


def show_tried(within: Any) -> None:
    rows = [
        (
            f"{each.asked_speedup:.2f} x" + (" (taken)" if each.speedup == within.result.speedup else ""),
            "out of reach" if each.speedup is None else f"{each.speedup:.2f} x",
            each.precision or "",
            *("" if value is None else f"{value:+.4f}" for value in (each.drop, each.drop_bound)),
            "yes" if each.within else "no",
        )
        for each in within.tried
    ]
    title = f"speed-ups tried, dense top-1 {within.dense_top1:.4f} on {within.num_images} images"
    print_table(title, ("asked", "measured", "precision", "drop", "at most", f"within {within.max_drop:g}"), rows)
    print("at most: 95 % upper bound of the drop, paired with the dense model")


def export_for_speed(result: Any, path: str, batches: Any):
    from vitprune.data import take_evenly
    from vitprune.export.onnx_file import export_onnx
    from vitprune.speed.bench import operators_for

    # What OpenVINO quantised by itself is in its own pair of files.
    own = (result.backend, result.precision) == ("openvino", "int8")
    return export_onnx(
        result.model,
        _for_openvino(path) if own else path,
        Tracked(take_evenly(batches, NUM_PARITY_IMAGES), "parity"),
        plan=result.plan,
        precision=result.precision,
        operators=operators_for([result.backend]),
    )


def show_candidates(result: Any) -> None:
    from vitprune.figures.candidates_figure import describe_candidate

    rows = [
        (
            describe_candidate(each) + (" (taken)" if each.chosen else ""),
            f"{each.loss:.4f}",
            f"{each.predicted_speedup:.2f}",
            "" if each.measured_speedup is None else f"{each.measured_speedup:.2f}",
        )
        for each in result.candidates
    ]
    print_table("candidates, each refitted at once", ("candidate", "loss", "predicted x", "measured x"), rows)
    print(
        "loss: how far answers are from the dense model's (KL in nats; of encoders, cosine distance), per image, on "
        "calibration images that nothing was fitted to"
    )
    for wanted, reason in result.refused.items():
        print(f"{wanted}: not so fast ({reason})")


def show_speed(result: Any, output: str, report: Any) -> None:
    from vitprune.speed.settle_widths import TOLERANCE

    measured = ", ".join(
        f"{speedup:.2f} x at batch {size}" for size, speedup in zip(result.batch_sizes, result.speedups, strict=True)
    )
    print(
        f"asked {result.asked_speedup:.2f} x, predicted {result.predicted_speedup:.2f} x, measured {measured} "
        f"(dense {result.dense_ms:.2f} ms): {result.backend}, {result.precision}"
    )
    if result.speedup < TOLERANCE * result.asked_speedup:
        print("slower than asked for: the times of this machine kept changing; try again when it is idle")
    if report is not None:
        print(report)
    elif result.precision != "float32":
        file = "FILE.xml" if result.backend == "openvino" else "FILE.onnx"
        print(f"'vitprune export {output} {file} --precision {result.precision}' writes what is that fast")
