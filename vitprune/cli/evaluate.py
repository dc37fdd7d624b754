"""``vitprune evaluate``: measure accuracy, alone or against another model on the same images."""

from __future__ import annotations

from typing import Any

from jsonargparse import ArgumentParser

from vitprune.cli.arguments import add_checkpoint, add_device, add_images, add_ratio
from vitprune.cli.inputs import check_data, check_model, choose, pick_device, read_opening, say_found, say_transform
from vitprune.cli.terminal import Tracked, note, print_table
from vitprune.errors import VitpruneError

SUMMARY = "measure accuracy"


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", type=str, help="timm name, folder of a saved model, elastic file, .onnx or .xml file")
    add_checkpoint(parser)
    add_ratio(parser)
    add_images(parser, required=True, batch_size=64, what="evaluation images")
    parser.add_argument(
        "--against", type=str, help="another model, such as the dense one, to compare with image by image"
    )
    parser.add_argument(
        "--against-checkpoint",
        type=str,
        help="its weights, as for --checkpoint; default: those that MODEL was pruned from, where it says so",
    )
    parser.add_argument(
        "--knn",
        type=str,
        metavar="DIR",
        help="of a model without classes: folder of images of known classes, whose nearest neighbours answer",
    )
    parser.add_argument("--num-neighbours", type=int, help="how many neighbours vote (20)")
    parser.add_argument(
        "--allow-overlap",
        action="store_true",
        help="measure on calibration images as well, and count them",
    )
    add_device(parser)
    parser.add_argument("-o", "--output", type=str, help="folder for evaluation.json and images.jsonl (every answer)")
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")


def run(
    model, checkpoint, ratio, merge, data, class_map, classes, images_per_class, strict, batch_size, workers, seed,
    against, against_checkpoint, knn, num_neighbours, allow_overlap, device, output, overwrite, **opening,
):  # fmt: skip
    from vitprune.data import ImageChoice
    from vitprune.evaluation.embeddings import NUM_NEIGHBOURS
    from vitprune.evaluation.embeddings_folder import EMBEDDINGS_FILES, EmbeddingComparison
    from vitprune.evaluation.evaluation_folder import EVALUATION_FILES
    from vitprune.evaluation.judge import judge
    from vitprune.evaluation.open_model import Reading, Source
    from vitprune.files import refuse_existing

    if output is not None:
        refuse_existing(output, overwrite=overwrite, owned=EVALUATION_FILES | EMBEDDINGS_FILES)
    if against is None and against_checkpoint is not None:
        raise VitpruneError("--against-checkpoint has the weights of --against MODEL, which is missing")
    check_model(model, checkpoint, opening)
    if against is not None:
        check_model(against, against_checkpoint, {})
    check_data(data, class_map)
    if knn is None and num_neighbours is not None:
        raise VitpruneError("--num-neighbours vote among the images of --knn DIR, which is missing")
    check_data(knn)
    told, images = judge(
        Source(model, checkpoint, ratio, merge, read_opening(opening)),
        choose(data, class_map, classes, images_per_class, seed),
        against=None if against is None else Source(against, against_checkpoint),
        device=pick_device(device),
        onnx_device=device,
        reading=Reading(batch_size, workers, strict, Tracked),
        allow_overlap=allow_overlap,
        knn=None if knn is None else ImageChoice(knn),
        num_neighbours=num_neighbours or NUM_NEIGHBOURS,
    )
    if isinstance(told, EmbeddingComparison):
        return _tell_embeddings(told, images, output)
    return _tell_accuracy(told, images, model, against, output, by_neighbours=knn is not None)


def _tell_embeddings(comparison, images, output):
    from vitprune.evaluation.embeddings import describe_fidelity
    from vitprune.evaluation.embeddings_folder import EMBEDDINGS_FILES, save_embeddings

    say_found(images, 0)
    say_transform(comparison.model.transform)
    if comparison.skipped:
        note(f"skipped {len(comparison.skipped)} images that cannot be decoded (first: {comparison.skipped[0]})")
    if output is not None:
        save_embeddings(comparison, output)
    answer = {**describe_fidelity(comparison.fidelity), "skipped": list(comparison.skipped), "output": output}

    def show() -> None:
        print(comparison.fidelity)
        if output is not None:
            print(f"wrote {output}: {', '.join(sorted(EMBEDDINGS_FILES))}")

    return answer, show


def _tell_accuracy(evaluation, images, model: str, against: str | None, output: str | None, *, by_neighbours: bool):
    from vitprune.data import describe_class
    from vitprune.evaluation.evaluation_folder import EVALUATION_FILES, describe_evaluation, save_evaluation

    reference = evaluation.against
    say_found(images, evaluation.judged.model.num_classes)
    say_transform(evaluation.judged.model.transform)
    if reference is not None and reference.model.transform != evaluation.judged.model.transform:
        say_transform(reference.model.transform, against)
    if evaluation.skipped:
        note(f"skipped {len(evaluation.skipped)} images that cannot be decoded (first: {evaluation.skipped[0]})")
    if evaluation.judged.answers.are_shares and not by_neighbours:
        note("the model answers probabilities (it ends in a softmax), which are taken as they are")
    if evaluation.judged.answers.num_overlap:
        note(f"warning: {evaluation.judged.answers.num_overlap} of these images had a say in the model")
    if output is not None:
        save_evaluation(evaluation, output)
    answer = {**describe_evaluation(evaluation), "output": output}

    def show() -> None:
        if evaluation.fidelity is not None:
            print(evaluation.fidelity)
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
