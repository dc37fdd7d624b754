"""``vitprune finetune``: give a model a classifier for one's own classes, and train it on one's own images."""

from __future__ import annotations

from jsonargparse import ArgumentParser

from vitprune.cli.arguments import add_checkpoint, add_device, add_output
from vitprune.cli.inputs import check_data, check_model, load_model, pick_device
from vitprune.cli.training_options import add_training, make_training, show_training, train_and_save

SUMMARY = "train a model with a new classifier on one's own classes"


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", type=str, help="timm name, or folder of a saved model")
    add_checkpoint(parser)
    parser.add_argument("--data", type=str, required=True, help="folder of class folders: training images")
    add_training(parser, epochs=10, lr=2e-4)
    add_device(parser)
    add_output(parser, "folder of the model to write; a killed run goes on")


def run(
    model, checkpoint, checkpoint_key, model_args, image_size, mean, std, crop, interpolation, class_names, data,
    tensorboard, device, output, overwrite, **options,
):  # fmt: skip
    from vitprune.data import find_images
    from vitprune.files import refuse_existing
    from vitprune.models.classifier import new_classifier
    from vitprune.processes import join_processes
    from vitprune.pruning.plan import find_plan
    from vitprune.training.recovery_folder import RECOVERED_FILES, describe_recovery
    from vitprune.training.tensorboard_log import check_tensorboard

    if tensorboard is not None:
        check_tensorboard()
    training = make_training({"labels": 1.0}, options)
    refuse_existing(output, overwrite=overwrite, owned=RECOVERED_FILES)
    opening = {
        "checkpoint_key": checkpoint_key, "model_args": model_args, "image_size": image_size, "mean": mean, "std": std,
        "crop": crop, "interpolation": interpolation, "class_names": class_names,
    }  # fmt: skip
    check_model(model, checkpoint, opening)
    check_data(data)
    with join_processes(exchanging=True) as processes:
        images = find_images(data, None)
        names = [images.class_names[index] for index in sorted(images.class_names)]
        network = load_model(model, checkpoint, pick_device(device, processes), opening=opening)
        network = new_classifier(network, names, seed=training.seed)
        trained = train_and_save(
            network, images, training, output,
            overwrite=overwrite, processes=processes, tensorboard=tensorboard, plan=find_plan(model),
        )  # fmt: skip
    if trained is None:
        return None
    answer = {"output": output, "classes": names, **describe_recovery(trained, training)}

    def show() -> None:
        show_training(trained)
        print(f"wrote {output}, which answers {len(names)} classes")

    return answer, show
