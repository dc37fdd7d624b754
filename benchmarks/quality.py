"""Accuracy of every criterion and compensation on real weights and photos; writes a dated table, JSON and picture.

    python benchmarks/quality.py --checkpoint deit_tiny_patch16_224.safetensors \
        --calibration imagenet-train-1000 --evaluation nips17-1000 --folder quality

Hardware, versions and the command are recorded beside the figures. Finished points stay in --folder, so a stopped run
goes on there. Hours on 2 CPU cores (the one-shot rows alone: 79 minutes on one thread), and less with fewer ratios or
--criteria; a list of ratios may be empty. The scores of integrated gradients and of the path search come from
--slow-images of the calibration images; compensation sees all of them.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from datetime import date

from common import RESULTS, describe_machine, open_points, read_batches, refuse_overlap, track
from jsonargparse import auto_cli

import vitprune
from vitprune.calibration.criteria import integrated_gradients
from vitprune.evaluation.curve import Curve, CurvePoint, measure_curve
from vitprune.figures.curve_figure import draw_curve
from vitprune.figures.style import save_figure
from vitprune.files import write_table
from vitprune.options import CRITERIA

EIGHT = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
SLOW = ("integrated-gradients", "jas")


def main(
    checkpoint: str,
    calibration: str,
    evaluation: str,
    folder: str,
    model: str = "deit_tiny_patch16_224",
    one_shot_ratios: list[float] = EIGHT,
    sequential_ratios: list[float] = [0.3, 0.5, 0.7],  # noqa: B006 (read only)
    default_ratios: list[float] = EIGHT,
    distill_ratios: list[float] = [0.5, 0.7],  # noqa: B006
    criteria: list[str] | None = None,
    allocations: list[str] = ["global"],  # noqa: B006
    slow_images: int = 250,
    label: str = "all",
):
    """Measure the table.

    Args:
        checkpoint: weights of the model.
        calibration: folder of class folders that scores and compensation come from.
        evaluation: folder of class folders with other images.
        folder: where finished points are kept; of these arguments alone.
        model: timm name.
        one_shot_ratios: shares of FFN neurons to remove at once by every criterion, with compensation none and ridge;
            beside them variance with uniform widths and ridge, as CORP and VBP do.
        sequential_ratios: shares to remove at once by every criterion with sequential compensation.
        default_ratios: shares to remove by vitprune's default, in steps.
        distill_ratios: shares to remove by the default with distill as well.
        criteria: how neurons are ranked (default: all).
        allocations: how many go of each FFN, where they go at once.
        slow_images: images for the path search and integrated gradients.
        label: names the files in benchmarks/results, where several runs share the work.
    """
    criteria = list(CRITERIA) if criteria is None else criteria
    network = vitprune.load(model, checkpoint=checkpoint)
    images = vitprune.find_images(calibration, network.num_classes)
    evaluated = vitprune.find_images(evaluation, network.num_classes)
    refuse_overlap(images, evaluated)
    points_folder = open_points(folder, network, images, evaluated)
    full, few, others = (read_batches(chosen, network) for chosen in (images, images.head(slow_images), evaluated))
    found = vitprune.discover(network, track(few, "discover")) if "jas" in criteria else None
    scores = {}
    if "integrated-gradients" in criteria:
        scores["integrated-gradients"] = integrated_gradients(network, track(few, "integrated gradients"))
    one_shot = Curve(criteria, allocations, ["none", "ridge"], step=1.0, folder=points_folder / "points")
    in_steps = Curve(["obs"], ["global"], ["sequential"], folder=points_folder / "default")
    baseline = replace(one_shot, criteria=["variance"], allocations=["uniform"], compensations=["ridge"])
    points = []
    for curve, shares in (
        (one_shot, one_shot_ratios),
        (baseline, one_shot_ratios),
        (replace(one_shot, compensations=["sequential"]), sequential_ratios),
        (in_steps, default_ratios),
        (replace(in_steps, compensations=["distill"]), distill_ratios),
    ):
        if shares:
            points += measure_curve(
                network, full, others, curve, ratios=shares, found=found, scores=scores, track=track
            )
    points = [points[0], *(point for point in points if point.criterion != "dense")]
    name = f"{date.today()}-quality-{label}-{model}"
    result = {
        **describe_machine(),
        "num_calibration_images": len(images),
        "slow_criteria": {"criteria": [c for c in SLOW if c in criteria], "num_images": slow_images},
        "rows": [asdict(point) for point in points],
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    write_table(RESULTS / f"{name}.csv", points, CurvePoint)
    # One line shows what sequential compensation brings; lines without compensation only where there are few criteria.
    hidden = {("sequential", 1.0), *((("none", 1.0),) if len(criteria) > 3 else ())}
    shown = [point for point in points if point.criterion == "dense" or (point.compensation, point.step) not in hidden]
    title = f"{model}, {points[0].num_images} photos, no retraining"
    save_figure(draw_curve(shown, title=title), RESULTS / f"{name}.png")
    for point in points:
        line = f"{point.criterion:21}{point.allocation:9}{point.compensation:13}{point.step:5.2f}"
        print(f"{line}{point.pruning_ratio:6.2f} {point.top1:.3f} {point.drop:+.3f} p {point.p_value:.2g}")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
