"""``vitprune evaluate``: measure accuracy, alone or against another model on the same images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from vitprune.cli.arguments import add_checkpoint, add_device, add_images, add_ratio
from vitprune.cli.inputs import choose_images, make_batches, open_model, refuse_overlap, report_skipped
from vitprune.cli.terminal import Tracked, note, print_table
from vitprune.errors import VitpruneError

SUMMARY = "measure accuracy"


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", type=str, help="timm name, folder of a saved model, elastic file, or .onnx file")
    add_checkpoint(parser)
    add_ratio(parser)
    add_images(parser, required=True, batch_size=64, what="evaluation images")
    parser.add_argument(
        "--against", type=str, help="another model, such as the dense one, to compare with image by image"
    )
    parser.add_argument("--against-checkpoint", type=str, help="its weights, as for --checkpoint")
    add_device(parser)
    parser.add_argument("-o", "--output", type=str, help="folder for evaluation.json and images.jsonl (every answer)")
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")


def run(
    model, checkpoint, ratio, data, class_map, classes, images_per_class, strict, batch_size, workers, seed, against,
    against_checkpoint, device, output, overwrite,
):  # fmt: skip
    from vitprune.data import describe_class, digest_images, hash_images
    from vitprune.evaluation.evaluation_folder import EVALUATION_FILES, Evaluation, describe_evaluation, save_evaluation
    from vitprune.files import refuse_existing

    if output is not None:
        refuse_existing(output, overwrite=overwrite, owned=EVALUATION_FILES)
    if against is None and against_checkpoint is not None:
        raise VitpruneError("--against-checkpoint has the weights of --against MODEL, which is missing")
    chosen = (data, class_map, classes, images_per_class, seed)
    network = open_model(model, checkpoint, device, ratio)
    images = choose_images(network, *chosen)
    refuse_overlap(model, network, images)
    other, others = None, None
    if against is not None:
        other = open_model(against, against_checkpoint, device)
        others = _same_images(choose_images(other, *chosen), images, against)
        refuse_overlap(against, other, others)
    reading = {"batch_size": batch_size, "workers": workers, "strict": strict}
    judged, batches = _judge(network, images, model, checkpoint, ratio, reading)
    skipped = report_skipped(batches)
    reference = None
    if other is not None:
        reference, reread = _judge(other, others, against, against_checkpoint, None, reading)
        if reread.files_read != batches.files_read:
            raise VitpruneError(f"{data}: images changed while they were read; evaluate again")
    read = images.only(batches.files_read)
    evaluation = Evaluation(
        root=images.root,
        files=read.files,
        images_sha256=digest_images(hash_images(read)),
        skipped=tuple(skipped),
        judged=judged,
        against=reference,
    )
    if output is not None:
        save_evaluation(evaluation, output)
    answer = {**describe_evaluation(evaluation), "output": output}

    def show() -> None:
        if reference is not None:
            _show_comparison(answer, model, against)
        low, high = answer["top1_interval"]
        print(f"top-1 {answer['top1']:.4f} (95 % interval {low:.4f} .. {high:.4f})")
        print(f"top-5 {answer['top5']:.4f}")
        seen = len(answer["per_class"])
        print(f"{answer['num_images']} images of {seen} classes; the model chooses among {answer['num_classes']}")
        ranked = sorted(answer["per_class"].items(), key=lambda pair: pair[1]["top1"])[:10]
        rows = [(describe_class(name), str(of["num_images"]), f"{of['top1']:.3f}") for name, of in ranked]
        title = "per class" if len(ranked) == seen else "per class, the ten lowest (--json: all)"
        print_table(title, ("class", "images", "top-1"), rows)
        if output is not None:
            print(f"wrote {output}: {', '.join(sorted(EVALUATION_FILES))}")

    return answer, show


def _same_images(others, images, against: str):
    """Return the images that both models are asked about, in the numbering of the other model."""
    kept = others.only(images.files)
    if kept.files != images.files:
        missing = next(name for name in images.files if name not in set(kept.files))
        raise VitpruneError(f"{against} has no class for {missing} and {len(images) - len(kept) - 1} more images")
    return kept


def _judge(network, images, model: str, checkpoint: str | None, ratio: float | None, reading: dict[str, Any]):
    from vitprune.evaluation.accuracy import collect_answers
    from vitprune.evaluation.evaluation_folder import Judged, name_classes
    from vitprune.evaluation.model_facts import describe_network

    batches = make_batches(images, network, **reading)
    answers = collect_answers(network, Tracked(batches, f"evaluate {Path(model).name}"))
    if Path(model).suffix == ".onnx":
        from vitprune.evaluation.model_facts import describe_file

        facts = describe_file(model, network)
    else:
        facts = describe_network(network, model, checkpoint=checkpoint, ratio=ratio)
    return Judged(facts, answers, name_classes(network, images, answers)), batches


def _show_comparison(answer: dict[str, Any], model: str, against: str) -> None:
    from vitprune.data import describe_class

    before = answer["against"]
    if before["num_classes"] != answer["num_classes"]:
        note(f"warning: {against} chooses among {before['num_classes']} classes, {model} among {answer['num_classes']}")
    lost, gained = before["lost_images"], before["gained_images"]
    print(f"{against}: top-1 {before['top1']:.4f}, top-5 {before['top5']:.4f}")
    print(f"{model}: top-1 {answer['top1']:.4f}, top-5 {answer['top5']:.4f}")
    print(
        f"drop {before['drop']:+.4f} (at most {before['drop_bound']:+.4f} at 95 % confidence), McNemar p = "
        f"{before['p_value']:.2g}"
    )
    print(f"{len(lost)} images right before and wrong now, {len(gained)} the other way round")
    changes = {
        name: (before["per_class"][name]["top1"], of["top1"], of["num_images"])
        for name, of in answer["per_class"].items()
    }
    ranked = sorted(changes.items(), key=lambda pair: pair[1][1] - pair[1][0])[:10]
    rows = [
        (describe_class(name), str(count), f"{was:.3f}", f"{now:.3f}", f"{now - was:+.3f}")
        for name, (was, now, count) in ranked
    ]
    title = "change per class" if len(ranked) == len(changes) else "change per class, the ten that lost most"
    print_table(title, ("class", "images", "before", "now", "change"), rows)
