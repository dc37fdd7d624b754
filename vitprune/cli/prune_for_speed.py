"""``vitprune prune --speedup`` and ``--target-latency``: as fast as asked for, by all that a model can lose."""

from __future__ import annotations

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


def check_images_for(batches: Any, option: str) -> None:
    if batches is None:
        raise VitpruneError(f"{option} weighs what goes on calibration images; pass --data DIR")


def run_for_speed(
    network: Any, batches: Any, *, backends: Sequence[str], allow: Sequence[str], export: str | None, **asked: Any
):
    from vitprune.speed.fit_latency import list_formats
    from vitprune.speed.prune_for_speed import prune_for_speed

    formats = list_formats(backends, allow)
    if export is not None and not any(each.is_file for each in formats):
        raise VitpruneError(f"--export writes a file for ONNX Runtime, not for {', '.join(backends)}; name its backend")
    return prune_for_speed(network, batches, formats=formats, track=track, **asked)


def export_for_speed(result: Any, path: str, batches: Any):
    from vitprune.data import take_evenly
    from vitprune.export.onnx_file import export_onnx
    from vitprune.speed.bench import operators_for

    return export_onnx(
        result.model,
        path,
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
    print("loss: KL(dense || candidate), nats per image, on calibration images that nothing was fitted to")


def show_speed(result: Any, output: str, report: Any) -> None:
    measured = ", ".join(
        f"{speedup:.2f} x at batch {size}" for size, speedup in zip(result.batch_sizes, result.speedups, strict=True)
    )
    print(
        f"asked {result.asked_speedup:.2f} x, predicted {result.predicted_speedup:.2f} x, measured {measured} "
        f"(dense {result.dense_ms:.2f} ms): {result.backend}, {result.precision}"
    )
    if report is not None:
        print(report)
    elif result.precision != "float32":
        print(f"it is that fast in {result.precision}: 'vitprune export {output} FILE.onnx --int8' writes it")
