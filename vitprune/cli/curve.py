"""``vitprune curve``: measure accuracy at many sizes."""

from __future__ import annotations

from jsonargparse import ArgumentParser

from vitprune import options
from vitprune.cli.arguments import add_checkpoint, add_device, add_images, listed
from vitprune.cli.inputs import (
    calibration_images,
    check_data,
    choose,
    find_images,
    make_batches,
    open_source,
    reads_labels,
    refuse_without_data,
    report_skipped,
    say_transform,
    warn_of_few_classes,
)
from vitprune.cli.several_processes import refuse_timing
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
        "--speedups",
        type=str,
        nargs="+",
        help="instead, over all parts: how many times as fast as the dense float32 model, numbers or FIRST:LAST:STEP "
        "(1.25:3:0.25), beside what fewer pixels, merging, neurons or 8 bits alone give",
    )
    # No defaults here: what goes with --ratios must not be ignored beside --speedups.
    parser.add_argument(
        "--criteria", type=str, nargs="+", help=f"{listed(options.CRITERIA)} ({options.DEFAULT_CRITERION})"
    )
    parser.add_argument(
        "--allocations", type=str, nargs="+", help=f"{listed(options.ALLOCATIONS)} ({options.DEFAULT_ALLOCATION})"
    )
    parser.add_argument(
        "--compensations", type=str, nargs="+", help=f"{listed(options.COMPENSATIONS)} ({options.DEFAULT_COMPENSATION})"
    )
    parser.add_argument(
        "--step", type=float, help=f"share that goes before scores are measured anew ({options.DEFAULT_STEP})"
    )
    parser.add_argument(
        "--parts", nargs="+", choices=tuple(options.PARTS), help=f"of --speedups: what may go: {listed(options.PARTS)}"
    )
    parser.add_argument("--backend", type=str, nargs="+", help=f"of --speedups: {listed(options.BACKENDS)}")
    parser.add_argument(
        "--allow",
        nargs="+",
        choices=tuple(options.ALLOWED_PRECISIONS),
        help=f"of --speedups, beside float32: {listed(options.ALLOWED_PRECISIONS)}",
    )
    parser.add_argument(
        "--latency-batch-size", type=int, nargs="+", help="of --speedups: images per run (1); the least speed-up counts"
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
    eval_images_per_class, ratios, speedups, criteria, allocations, compensations, step, parts, backend, allow,
    latency_batch_size, max_drop, device, output, overwrite, **opening,
):  # fmt: skip
    from vitprune.cli import front
    from vitprune.evaluation.curve import Curve, parse_ratios
    from vitprune.evaluation.curve_folder import record_curve
    from vitprune.files import check_place, refuse_foreign
    from vitprune.pruning.compensations import reads_images

    check_place(output, is_folder=True)
    refuse_foreign(output)
    if speedups is not None:
        refuse_timing("--speedups")
        front.check_alone(
            ratios=ratios, max_drop=max_drop, criteria=criteria, allocations=allocations, compensations=compensations,
            step=step,
        )  # fmt: skip
    elif any(given is not None for given in (parts, backend, allow, latency_batch_size)):
        raise VitpruneError("--parts, --backend, --allow and --latency-batch-size go with --speedups")
    criteria = criteria or [options.DEFAULT_CRITERION]
    allocations = allocations or [options.DEFAULT_ALLOCATION]
    compensations = compensations or [options.DEFAULT_COMPENSATION]
    step = options.DEFAULT_STEP if step is None else step
    several = {"criteria": criteria, "allocations": allocations, "compensations": compensations}
    if max_drop is not None:
        if ratios is not None:
            raise VitpruneError("--max-drop looks for the ratio itself; leave --ratios out")
        for name, values in several.items():
            if len(values) > 1:
                raise VitpruneError(f"--max-drop prunes in one way; name one of --{name}, not {len(values)}")
    shares = parse_ratios(["0.1:0.8:0.1"] if ratios is None else ratios)
    refuse_without_data(data, class_map=class_map, classes=classes, images_per_class=images_per_class)
    check_data(data, class_map)
    check_data(eval_data)
    run, network = open_source(source, checkpoint, device, opening)
    images = calibration_images(
        source, run, network, data, class_map, classes, images_per_class, seed, labels_matter=reads_labels(criteria)
    )
    if images is None:
        raise VitpruneError("curve needs calibration images; pass --data DIR")
    others = find_images(choose(eval_data, class_map, None, eval_images_per_class, seed), network)
    calibration, evaluation = (
        make_batches(each, network, batch_size=batch_size, workers=workers, strict=strict) for each in (images, others)
    )
    calibrated = any(map(reads_images, compensations))
    for each, what in ((images, "calibration"), (others, "evaluation"))[0 if calibrated else 1 :]:
        warn_of_few_classes(network, each, what)
    say_transform(network)
    if speedups is not None:
        answer, show = front.measure(
            network, calibration, evaluation, speedups=speedups, backends=backend or [], allow=allow or [],
            parts=parts, batch_sizes=latency_batch_size or [1], seed=seed, output=output, overwrite=overwrite,
        )  # fmt: skip
        for batches in (calibration, evaluation):
            report_skipped(batches)
        return answer, show
    record = record_curve(
        network,
        calibration,
        evaluation,
        Curve(**several, step=step, seed=seed),
        output,
        ratios=shares,
        max_drop=max_drop,
        found=None if run is None else run.found,
        source=None if run is None else source,
        overwrite=overwrite,
        track=track,
    )
    for batches in (calibration, evaluation):
        report_skipped(batches)
    points, largest = record.points, record.largest_ratio
    rows = [vars(point) for point in points]
    skipped = list(record.skipped)
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
