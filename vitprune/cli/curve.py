"""``vitprune curve``: measure accuracy at many sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from vitprune import options
from vitprune.cli.arguments import add_checkpoint, add_device, add_images, listed
from vitprune.cli.inputs import (
    choose_images,
    describe_calibration,
    images_of,
    make_batches,
    open_source,
    plan_of,
    refuse_shared,
    refuse_without_data,
    report_skipped,
    warn_of_few_classes,
)
from vitprune.cli.terminal import print_table, track
from vitprune.errors import VitpruneError

SUMMARY = "measure accuracy at many sizes"


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("source", type=str, help="run folder of 'discover', timm name, or folder of a saved model")
    add_checkpoint(parser)
    add_images(parser, required=False, batch_size=32, what="calibration images (default: those of the run)")
    parser.add_argument("--eval-data", type=str, required=True, help="folder of class folders: evaluation images")
    parser.add_argument("--eval-images-per-class", type=int, help="random sample of each class of --eval-data")
    parser.add_argument(
        "--ratios", type=str, nargs="+", help="shares to remove: numbers or FIRST:LAST:STEP (0.1:0.8:0.1)"
    )
    parser.add_argument(
        "--criteria", type=str, nargs="+", default=[options.DEFAULT_CRITERION], help=listed(options.CRITERIA)
    )
    parser.add_argument(
        "--allocations", type=str, nargs="+", default=[options.DEFAULT_ALLOCATION], help=listed(options.ALLOCATIONS)
    )
    parser.add_argument(
        "--compensations",
        type=str,
        nargs="+",
        default=[options.DEFAULT_COMPENSATION],
        help=listed(options.COMPENSATIONS),
    )
    parser.add_argument(
        "--step", type=float, default=options.DEFAULT_STEP, help="share that goes before scores are measured anew"
    )
    parser.add_argument(
        "--max-drop",
        type=float,
        help="find the largest ratio that costs less top-1 than this at 95 percent confidence, instead of --ratios",
    )
    add_device(parser)
    parser.add_argument("-o", "--output", type=str, required=True, help="folder to write; a killed run goes on there")
    parser.add_argument("--overwrite", action="store_true", help="replace an output of other arguments")


def run(
    source, checkpoint, data, class_map, classes, images_per_class, strict, batch_size, workers, seed, eval_data,
    eval_images_per_class, ratios, criteria, allocations, compensations, step, max_drop, device, output, overwrite,
):  # fmt: skip
    from vitprune.evaluation.curve import Curve, find_largest_ratio, measure_curve, parse_ratios
    from vitprune.evaluation.curve_folder import CURVE_FILES, POINTS_FOLDER, CurveRecord, save_curve
    from vitprune.files import open_resumable

    several = {"criteria": criteria, "allocations": allocations, "compensations": compensations}
    if max_drop is not None:
        if ratios is not None:
            raise VitpruneError("--max-drop looks for the ratio itself; leave --ratios out")
        for name, values in several.items():
            if len(values) > 1:
                raise VitpruneError(f"--max-drop prunes in one way; name one of --{name}, not {len(values)}")
    shares = parse_ratios(["0.1:0.8:0.1"] if ratios is None else ratios)
    run, network = open_source(source, checkpoint, device)
    refuse_without_data(data, class_map=class_map, classes=classes, images_per_class=images_per_class)
    images = images_of(source, run, network, data, class_map, classes, images_per_class, seed)
    if images is None:
        raise VitpruneError("curve needs calibration images; pass --data DIR")
    others = choose_images(network, eval_data, class_map, None, eval_images_per_class, seed)
    used = describe_calibration(
        images, None if run is None else run.images, plan_of(source if run is None else run.model)
    )
    refuse_shared(others, used["sha256"], source)
    calibration, evaluation = (
        make_batches(each, network, batch_size=batch_size, workers=workers, strict=strict) for each in (images, others)
    )
    request = {**_describe_run(source, run, network, images, others), "step": step, "seed": seed}
    folder = open_resumable(output, request, owned=CURVE_FILES, overwrite=overwrite)
    curve = Curve(**several, step=step, seed=seed, folder=folder / POINTS_FOLDER)
    calibrated = set(compensations) != {"none"}
    for each, what in ((images, "calibration"), (others, "evaluation"))[0 if calibrated else 1 :]:
        warn_of_few_classes(network, each, what)
    found = None if run is None else run.found
    largest = None
    if max_drop is None:
        points = measure_curve(network, calibration, evaluation, curve, ratios=shares, found=found, track=track)
    else:
        largest, points = find_largest_ratio(
            network, calibration, evaluation, curve, max_drop=max_drop, found=found, track=track
        )
    skipped = [name for batches in (calibration, evaluation) for name in report_skipped(batches)]
    record = CurveRecord(tuple(points), max_drop, largest, str(others.root), others.files, skipped, request)
    save_curve(record, folder)
    rows = [vars(point) for point in points]
    answer = {"output": output, "points": rows, "max_drop": max_drop, "largest_ratio": largest, "skipped": skipped}

    def show() -> None:
        dense, *pruned = points
        # What is the same in every row goes into the title: the table shall fit 80 columns.
        names = ("criterion", "allocation", "compensation")
        varied = [name for name in names if len({getattr(point, name) for point in pruned}) > 1]
        shared = [str(getattr(pruned[0], name)) for name in names if name not in varied] if pruned else []
        cells = [
            (
                *(getattr(point, name) for name in varied),
                "dense" if point is dense else f"{point.pruning_ratio:.2f}",
                f"{point.num_parameters / 1e6:.2f} M",
                f"{point.top1:.4f}",
                f"{point.top1_low:.3f} .. {point.top1_high:.3f}",
                *(
                    ("", "", "")
                    if point is dense
                    else (f"{point.drop:+.4f}", f"{point.drop_bound:+.4f}", f"{point.p_value:.2g}")
                ),
            )
            for point in points
        ]
        columns = (*varied, "removed", "params", "top-1", "95 % interval", "drop", "at most", "p")
        print_table(", ".join(["accuracy against size", *shared]), columns, cells)
        print("at most: 95 % upper bound of the drop, paired with the dense model; p: McNemar")
        if largest is not None:
            print(
                f"largest ratio that costs at most {max_drop:g} top-1, at 95 % confidence: {largest:.2f} "
                f"({points[0].num_images} images)"
            )
        print(f"wrote {output}: curve.csv, curve.json, curve.png, curve.svg")

    return answer, show


def _describe_run(source: str, run, network, images, others) -> dict[str, Any]:
    """Say everything that a curve's points depend on beside their own names."""
    from vitprune import __version__
    from vitprune.data import data_config, hash_images
    from vitprune.discovery.run import RUN_FILES
    from vitprune.files import hash_file
    from vitprune.models.identity import architecture, hash_weights

    return {
        "vitprune": __version__,
        "architecture": architecture(network),
        "transform": data_config(network),
        "weights": hash_weights(network),
        "calibration images": sorted(zip(hash_images(images), images.labels, strict=True)),
        "evaluation images": sorted(zip(hash_images(others), others.labels, strict=True)),
        "run": None if run is None else {name: hash_file(Path(source) / name) for name in sorted(RUN_FILES)},
    }
