"""``vitprune prune --speedup`` and ``--target-latency``: as fast as asked for, by all that a model can lose."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vitprune.cli.inputs import report_skipped
from vitprune.cli.terminal import Tracked, print_table, track
from vitprune.errors import VitpruneError


def check_export(path: str, *, overwrite: bool) -> None:
    from vitprune.files import refuse_existing

    if Path(path).suffix != ".onnx":
        raise VitpruneError(f"--export {path}: an ONNX file ends in .onnx")
    refuse_existing(path, overwrite=overwrite)


def check_images_for(batches: Any, option: str) -> None:
    if batches is None:
        raise VitpruneError(f"{option} weighs what goes on calibration images; pass --data DIR")


def run_for_speed(
    network: Any,
    batches: Any,
    parity: Any,
    output: str,
    export: str | None,
    *,
    backends: Sequence[str],
    allow: Sequence[str],
    **asked: Any,
):
    import time

    from vitprune.data import take_evenly
    from vitprune.export.onnx_file import export_onnx
    from vitprune.speed.bench import operators_for
    from vitprune.speed.fit_latency import list_formats
    from vitprune.speed.prune_for_speed import prune_for_speed
    from vitprune.speed.speed_folder import describe_speed, save_for_speed

    formats = list_formats(backends, allow)
    if export is not None and not any(each.is_file for each in formats):
        raise VitpruneError(f"--export writes a file for ONNX Runtime, not for {', '.join(backends)}; name its backend")
    started = time.perf_counter()
    result = prune_for_speed(network, batches, formats=formats, track=track, **asked)
    seconds = time.perf_counter() - started
    skipped = report_skipped(parity)
    save_for_speed(result, output)
    report = None
    if export is not None:
        report = export_onnx(
            result.model,
            export,
            Tracked(take_evenly(parity, 64), "parity"),
            plan=result.plan,
            precision=result.precision,
            operators=operators_for([result.backend]),
        )
    facts = result.plan.facts
    answer = {
        "output": output,
        "export": export,
        "speed": describe_speed(result),
        "widths": result.plan.widths,
        "widths_dense": {name: len(keep) for name, keep in result.plan.keep.items()},
        "parts": result.plan.parts,
        "stand_ins": facts.stand_ins,
        "merge": facts.merge,
        "num_parameters": facts.sizes.num_parameters,
        "num_parameters_dense": facts.sizes_dense.num_parameters,
        "macs": facts.sizes.macs,
        "macs_dense": facts.sizes_dense.macs,
        "seconds": seconds,
        "skipped": skipped,
    }

    def show() -> None:
        _show(result, answer, report)

    return answer, show


def _show(result: Any, answer: dict[str, Any], report: Any) -> None:
    from vitprune.cli.prune import show_parts
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
    show_parts(result.plan, seconds=answer["seconds"], merge=answer["merge"])
    measured = ", ".join(
        f"{speedup:.2f} x at batch {size}" for size, speedup in zip(result.batch_sizes, result.speedups, strict=True)
    )
    print(
        f"asked {result.asked_speedup:.2f} x, predicted {result.predicted_speedup:.2f} x, measured {measured} "
        f"(dense {result.dense_ms:.2f} ms): {result.backend}, {result.precision}"
    )
    print(f"parameters {answer['num_parameters_dense']:,} -> {answer['num_parameters']:,}")
    print(f"multiply-accumulates {answer['macs_dense'] / 1e6:,.1f} -> {answer['macs'] / 1e6:,.1f} M")
    print(f"wrote {answer['output']}")
    if report is not None:
        print(report)
    elif result.precision != "float32":
        print(
            f"it is that fast in {result.precision}: vitprune export {answer['output']} FILE.onnx --{result.precision}"
        )
