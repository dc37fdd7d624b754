"""``vitprune elastic``: write one file from which any ratio can be loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from vitprune import options
from vitprune.cli.arguments import add_checkpoint, add_device, add_images, add_output, listed
from vitprune.cli.inputs import (
    calibration_images,
    check_data,
    make_batches,
    open_source,
    reads_labels,
    refuse_without_data,
    report_skipped,
    say_transform,
)
from vitprune.cli.terminal import Tracked, print_table, track
from vitprune.errors import VitpruneError

SUMMARY = "write one file from which any ratio can be loaded"


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("source", type=str, help="run folder of 'discover', timm name, or folder of a saved model")
    add_checkpoint(parser)
    add_images(parser, required=False, batch_size=32, what="calibration images (default: those of the run)")
    parser.add_argument(
        "--ratios",
        type=str,
        nargs="+",
        default=["0.1:0.7:0.1"],
        help="shares to remove at which the model is compensated: numbers or FIRST:LAST:STEP",
    )
    parser.add_argument(
        "--criterion",
        choices=tuple(options.CRITERIA),
        default=options.DEFAULT_CRITERION,
        help=listed(options.CRITERIA),
    )
    parser.add_argument(
        "--allocation",
        choices=tuple(options.ALLOCATIONS),
        default=options.DEFAULT_ALLOCATION,
        help=listed(options.ALLOCATIONS),
    )
    parser.add_argument(
        "--compensate",
        choices=tuple(options.COMPENSATIONS),
        default=options.DEFAULT_COMPENSATION,
        help=listed(options.COMPENSATIONS),
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        default=["ffn"],
        choices=tuple(part for part in options.PARTS if part not in ("tokens", "pixels")),
        help="what may go, the same share of each: as for prune; tokens merge where the file is loaded (--merge)",
    )
    add_device(parser)
    add_output(parser, "elastic file to write (.safetensors)")


def run(
    source, checkpoint, data, class_map, classes, images_per_class, strict, batch_size, workers, seed, ratios,
    criterion, allocation, compensate, parts, device, output, overwrite, **opening,
):  # fmt: skip
    import time

    from vitprune.evaluation.curve import parse_ratios
    from vitprune.files import refuse_existing
    from vitprune.models.elastic_file import save_elastic
    from vitprune.pruning.elastic import make_elastic

    if Path(output).suffix != ".safetensors":
        raise VitpruneError(f"{output}: an elastic file ends in .safetensors")
    refuse_existing(output, overwrite=overwrite)
    stops = [ratio for ratio in parse_ratios(ratios) if ratio > 0]
    refuse_without_data(data, class_map=class_map, classes=classes, images_per_class=images_per_class)
    check_data(data, class_map)
    run, network = open_source(source, checkpoint, device, opening)
    images = calibration_images(
        source, run, network, data, class_map, classes, images_per_class, seed, labels_matter=reads_labels([criterion])
    )
    batches = tracked = None
    if images is not None:
        batches = make_batches(images, network, batch_size=batch_size, workers=workers, strict=strict)
        tracked = Tracked(batches, "calibrate")
        say_transform(network)
    started = time.perf_counter()
    made = make_elastic(
        network,
        tracked,
        ratios=stops,
        criterion=criterion,
        allocation=allocation,
        compensation=compensate,
        parts=parts,
        found=None if run is None else run.found,
        seed=seed,
        track=track,
    )
    seconds = time.perf_counter() - started
    skipped = report_skipped(batches) if tracked is not None and tracked.passes else []
    save_elastic(network, made, output)
    answer = {
        "output": output,
        "ratios": stops,
        "widths": {f"{stop.ratio:g}": stop.widths for stop in made.stops},
        "left_out": {f"{stop.ratio:g}": stop.left_out for stop in made.stops},
        "size_bytes": Path(output).stat().st_size,
        "seconds": seconds,
        "skipped": skipped,
    }

    def show() -> None:
        print_table("compensated at", *_tabulate(made, parts))
        print(f"any ratio up to {stops[-1]:g}: 'vitprune export {output} model.onnx --ratio R', load(.., ratio=R)")
        print(f"wrote {output} ({answer['size_bytes'] / 1e6:.1f} MB) in {seconds:.0f} s")

    return answer, show


def _tabulate(made: Any, parts: Sequence[str]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the heads of a table of the stops, and a row for each."""
    from vitprune.models.units import KINDS, kind_of

    sliced = [part for part in options.PARTS if part in parts and part != "layers"]
    heads = [f"{KINDS[part]}s (of each layer)" for part in sliced]
    rows = []
    for stop in made.stops:
        row = [f"{stop.ratio:g}"]
        for part in sliced:
            widths = [width for name, width in stop.widths.items() if kind_of(name) == part and width]
            row.append(f"{sum(widths)} ({min(widths)} .. {max(widths)})" if widths else "none")
        if "layers" in parts:
            row.append(", ".join(stop.left_out) or "none")
        rows.append(tuple(row))
    return ("removed", *heads, *(["layers left out"] if "layers" in parts else [])), rows
