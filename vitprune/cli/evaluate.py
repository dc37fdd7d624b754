"""``vitprune evaluate``: measure accuracy."""

from __future__ import annotations

from jsonargparse import ArgumentParser

from vitprune.cli.arguments import add_checkpoint, add_device, add_images, add_ratio
from vitprune.cli.inputs import choose_images, make_batches, open_model, refuse_overlap, report_skipped
from vitprune.cli.terminal import Tracked, print_table

SUMMARY = "measure accuracy"


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", type=str, help="timm name, folder of a saved model, elastic file, or .onnx file")
    add_checkpoint(parser)
    add_ratio(parser)
    add_images(parser, required=True, batch_size=64, what="evaluation images")
    add_device(parser)


def run(
    model, checkpoint, ratio, data, class_map, classes, images_per_class, strict, batch_size, workers, seed, device
):
    from vitprune.data import describe_class
    from vitprune.evaluation.accuracy import evaluate

    network = open_model(model, checkpoint, device, ratio)
    images = choose_images(network, data, class_map, classes, images_per_class, seed)
    refuse_overlap(model, network, images)
    batches = make_batches(images, network, batch_size=batch_size, workers=workers, strict=strict)
    measured = evaluate(network, Tracked(batches, "evaluate"))
    skipped = report_skipped(batches)
    answer = {
        "top1": measured.top1,
        "top5": measured.top5,
        "num_images": measured.num_images,
        "num_classes": network.num_classes,
        "top1_interval": list(measured.top1_interval),
        "per_class": {
            images.class_names[index]: {"top1": top1, "num_images": measured.images_by_class[index]}
            for index, top1 in measured.top1_by_class.items()
        },
        "skipped": skipped,
    }

    def show() -> None:
        low, high = measured.top1_interval
        print(f"top-1 {measured.top1:.4f} (95 % interval {low:.4f} .. {high:.4f})")
        print(f"top-5 {measured.top5:.4f}")
        seen = len(measured.top1_by_class)
        print(f"{measured.num_images} images of {seen} classes; the model chooses among {network.num_classes}")
        ranked = sorted(measured.top1_by_class.items(), key=lambda pair: pair[1])[:10]
        rows = [
            (describe_class(images.class_names[index]), str(measured.images_by_class[index]), f"{top1:.3f}")
            for index, top1 in ranked
        ]
        title = "per class" if len(ranked) == len(measured.top1_by_class) else "per class, the ten lowest (--json: all)"
        print_table(title, ("class", "images", "top-1"), rows)

    return answer, show
