"""``vitprune recover``: train a pruned model towards the dense one."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import ArgumentParser

from vitprune import options
from vitprune.cli.arguments import add_device, add_output, listed
from vitprune.cli.inputs import check_data, choose, find_images, load_model, pick_device
from vitprune.cli.training_options import add_training, make_training, show_training, train_and_save
from vitprune.errors import VitpruneError

SUMMARY = "train a pruned model towards the dense one"


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", type=str, help="folder of a pruned model, or of any saved model")
    parser.add_argument(
        "--data", type=str, required=True, help="training images: folder of class folders, list of images, or .tar"
    )
    parser.add_argument("--class-map", type=str, help="class name per line, CSV of names and indices, or JSON")
    parser.add_argument("--teacher", type=str, help="model to learn from (default: the dense model of the plan)")
    parser.add_argument("--teacher-checkpoint", type=str, help="its weights, as for --checkpoint elsewhere")
    parser.add_argument(
        "--losses",
        type=str,
        nargs="+",
        help=f"what is minimised, NAME or NAME=WEIGHT: {listed(options.LOSSES)} "
        "(answers=1 blocks=5; features=1 where a model has no blocks)",
    )
    parser.add_argument("--labels", action="store_true", help="cross-entropy with the labels beside the other losses")
    parser.add_argument("--temperature", type=float, default=2.0, help="of the loss answers")
    parser.add_argument(
        "--shard-teacher",
        action="store_true",
        help="share the teacher's blocks out among torchrun's processes, where no GPU holds all of it (FSDP)",
    )
    add_training(parser, epochs=8, lr=2e-4)
    add_device(parser)
    add_output(parser, "folder of the recovered model to write; a killed run goes on")


def run(
    model,
    data,
    class_map,
    teacher,
    teacher_checkpoint,
    losses,
    labels,
    temperature,
    shard_teacher,
    tensorboard,
    device,
    output,
    overwrite,
    **options,
):
    from dataclasses import replace

    from vitprune.files import refuse_existing
    from vitprune.processes import join_processes
    from vitprune.pruning.plan import find_plan
    from vitprune.training.losses import choose_losses
    from vitprune.training.recovery_folder import RECOVERED_FILES, describe_recovery
    from vitprune.training.sharded_teacher import check_several
    from vitprune.training.teacher import open_teacher
    from vitprune.training.tensorboard_log import check_tensorboard

    weights = None if losses is None else _parse_losses(losses)
    if labels and weights is not None:
        weights.setdefault("labels", 1.0)
    if tensorboard is not None:
        check_tensorboard()
    training = make_training(weights, options, temperature=temperature)
    refuse_existing(output, overwrite=overwrite, owned=RECOVERED_FILES)
    if Path(output).resolve() == Path(model).resolve():
        raise VitpruneError(f"{output} is the model itself; choose another output")
    if Path(model).suffix in (".safetensors", ".onnx"):
        raise VitpruneError(f"{model}: only a folder can be trained; prune to one ratio, or save one, first")
    check_data(data, class_map)
    with join_processes(exchanging=True) as processes:
        if shard_teacher:
            check_several(processes)
        where = pick_device(device, processes)
        network = load_model(model, None, where)
        plan = find_plan(model)
        taught_by = None
        if weights is None or set(weights) != {"labels"} or teacher is not None:
            whole = "cpu" if shard_teacher else where
            taught_by = open_teacher(network, plan, teacher, checkpoint=teacher_checkpoint, device=whole)
        if weights is None:
            weights = {**choose_losses(network, taught_by), **({"labels": 1.0} if labels else {})}
            training = replace(training, losses=weights)
        images = find_images(choose(data, class_map), network, labels_matter="labels" in weights)
        recovered = train_and_save(
            network,
            images,
            training,
            output,
            overwrite=overwrite,
            processes=processes,
            tensorboard=tensorboard,
            teacher=taught_by,
            shard_teacher=shard_teacher,
            plan=plan,
        )
    if recovered is None:
        return None
    answer = {"output": output, **describe_recovery(recovered, training)}

    def show() -> None:
        show_training(recovered)
        print(f"wrote {output}")

    return answer, show


def _parse_losses(given: list[str]) -> dict[str, float]:
    weights = {}
    for each in given:
        name, equals, weight = each.partition("=")
        try:
            weights[name] = float(weight) if equals else 1.0
        except ValueError:
            raise VitpruneError(f"--losses {each}: expected NAME or NAME=WEIGHT, such as answers=1") from None
    return weights
