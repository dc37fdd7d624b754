"""``vitprune recover``: train a pruned model towards the dense one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from vitprune import options
from vitprune.cli.arguments import add_device, add_output, listed
from vitprune.cli.inputs import choose, find_images, load_model, pick_device
from vitprune.cli.terminal import note, print_table, track
from vitprune.errors import VitpruneError

SUMMARY = "train a pruned model towards the dense one"
UNFINISHED = ".unfinished"


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", type=str, help="folder of a pruned model, or of any saved model")
    parser.add_argument("--data", type=str, required=True, help="training images: folder of class folders")
    parser.add_argument("--class-map", type=str, help="folder name per line, or JSON {folder: class index}")
    parser.add_argument("--teacher", type=str, help="model to learn from (default: the dense model of the plan)")
    parser.add_argument("--teacher-checkpoint", type=str, help="its weights, as for --checkpoint elsewhere")
    parser.add_argument(
        "--losses",
        type=str,
        nargs="+",
        help=f"what is minimised, NAME or NAME=WEIGHT: {listed(options.LOSSES)} (answers=1 features=1)",
    )
    parser.add_argument("--labels", action="store_true", help="cross-entropy with the labels beside the other losses")
    parser.add_argument("--temperature", type=float, default=2.0, help="of the loss answers")
    parser.add_argument("--smoothing", type=float, default=0.1, help="of the labels")
    parser.add_argument("--epochs", type=int, default=8, help="passes over the images")
    parser.add_argument("--minutes", type=float, help="train for so long instead")
    parser.add_argument("--batch-size", type=int, default=32, help="images at once, of each process")
    parser.add_argument("--grad-accum-steps", type=int, default=1, help="batches of one step")
    parser.add_argument("--opt", type=str, default="adamw", help="optimiser, by its timm name")
    parser.add_argument("--lr", type=float, default=2e-4, help="largest learning rate")
    parser.add_argument("--weight-decay", type=float, default=0.01, help="of weights, not of biases and norms")
    parser.add_argument("--layer-decay", type=float, help="factor of the learning rate from block to block, downward")
    parser.add_argument("--clip-grad", type=float, default=1.0, help="largest norm of the gradient")
    parser.add_argument("--sched", type=str, default="cosine", help="schedule of the learning rate, by its timm name")
    parser.add_argument("--warmup-epochs", type=float, default=0.5, help="during which the learning rate rises")
    parser.add_argument("--model-ema-decay", type=float, help="keep a running mean of the weights with this decay")
    parser.add_argument("--amp-dtype", type=str, help="autocast: bfloat16 or float16 (default: the weights' own type)")
    parser.add_argument("--scale", type=float, nargs=2, default=[0.5, 1.0], help="share of the image that crops cover")
    parser.add_argument("--hflip", type=float, default=0.5, help="probability of mirroring")
    parser.add_argument("--color-jitter", type=float, default=0.0, help="strength")
    parser.add_argument("--aa", type=str, help="timm's policy, such as rand-m9-mstd0.5-inc1")
    parser.add_argument("--reprob", type=float, default=0.0, help="probability of erasing a part")
    parser.add_argument("--mixup", type=float, default=0.0, help="alpha of mixing two images")
    parser.add_argument("--cutmix", type=float, default=0.0, help="alpha of pasting a part of another image")
    parser.add_argument("--held-back", type=float, default=0.1, help="share of the images that choose the best epoch")
    parser.add_argument("--patience", type=int, help="stop after so many epochs without a better one")
    parser.add_argument("--workers", type=int, default=0, help="processes that decode images; 0: this one")
    parser.add_argument("--seed", type=int, default=0, help="of every random choice")
    add_device(parser)
    add_output(parser, "folder of the recovered model to write; a killed run goes on")


def run(
    model, data, class_map, teacher, teacher_checkpoint, losses, labels, temperature, smoothing, epochs, minutes,
    batch_size, grad_accum_steps, opt, lr, weight_decay, layer_decay, clip_grad, sched, warmup_epochs, model_ema_decay,
    amp_dtype, scale, hflip, color_jitter, aa, reprob, mixup, cutmix, held_back, patience, workers, seed, device,
    output, overwrite,
):  # fmt: skip
    from vitprune.files import refuse_existing
    from vitprune.processes import join_processes
    from vitprune.pruning.plan import find_plan
    from vitprune.training.loop import STEPS_FILE
    from vitprune.training.recover import recover
    from vitprune.training.recovery_folder import RECOVERED_FILES, describe_recovery, save_recovery
    from vitprune.training.settings import DEFAULT_LOSSES, Augmentation, Training, check_training
    from vitprune.training.teacher import open_teacher

    weights = dict(DEFAULT_LOSSES) if losses is None else _parse_losses(losses)
    if labels:
        weights.setdefault("labels", 1.0)
    training = Training(
        losses=weights,
        temperature=temperature,
        smoothing=smoothing,
        epochs=epochs,
        minutes=minutes,
        batch_size=batch_size,
        grad_accum_steps=grad_accum_steps,
        opt=opt,
        lr=lr,
        weight_decay=weight_decay,
        layer_decay=layer_decay,
        clip_grad=clip_grad,
        sched=sched,
        warmup_epochs=warmup_epochs,
        ema_decay=model_ema_decay,
        amp_dtype=amp_dtype,
        held_back=held_back,
        patience=patience,
        augmentation=Augmentation(tuple(scale), hflip, color_jitter, aa, reprob, mixup, cutmix),
        num_workers=workers,
        seed=seed,
    )
    check_training(training)
    refuse_existing(output, overwrite=overwrite, owned=RECOVERED_FILES)
    if Path(output).resolve() == Path(model).resolve():
        raise VitpruneError(f"{output} is the model itself; choose another output")
    if Path(model).suffix in (".safetensors", ".onnx"):
        raise VitpruneError(f"{model}: only a folder can be trained; prune to one ratio, or save one, first")
    unfinished = Path(f"{output}{UNFINISHED}")
    with join_processes(for_training=True) as processes:
        where = pick_device(device, processes)
        network = load_model(model, None, where)
        plan = find_plan(model)
        needs_teacher = set(weights) != {"labels"}
        taught_by = None
        if needs_teacher or teacher is not None:
            taught_by = open_teacher(network, plan, teacher, checkpoint=teacher_checkpoint, device=where)
        images = find_images(choose(data, class_map), network, labels_matter="labels" in weights)
        first = processes.rank == 0
        recovered = recover(
            network,
            images,
            teacher=taught_by,
            training=training,
            plan=plan,
            folder=unfinished,
            overwrite=overwrite,
            processes=processes,
            log_epoch=lambda row: note(_describe(row)),
            track=track if first else lambda items, _description: items,
        )
        if not first:
            return None
        save_recovery(recovered, training, output, steps=unfinished / STEPS_FILE)
    shutil.rmtree(unfinished)
    answer = {"output": output, **describe_recovery(recovered, training)}

    def show() -> None:
        rows = [_tabulate(row) for row in recovered.rows]
        heads = ("epoch", "loss", "held back", "accuracy", "images/s", "minutes")
        print_table("training", heads, rows)
        before = recovered.before[0]
        if before is not None:
            best = next(row for row in recovered.rows if row.epoch == recovered.best)
            print(f"held-back images: loss {before:.4f} before, {best.held_back:.4f} after epoch {recovered.best}")
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


def _describe(row: Any) -> str:
    losses = ", ".join(f"{name} {value:.4g}" for name, value in row.losses.items())
    held_back = "" if row.held_back is None else f"; held back {row.held_back:.4f}"
    accuracy = "" if row.accuracy is None else f", accuracy {row.accuracy:.1%}"
    return f"epoch {row.epoch}: {losses}{held_back}{accuracy}; {row.images_per_second:.0f} images/s"


def _tabulate(row: Any) -> tuple[str, ...]:
    held_back = "" if row.held_back is None else f"{row.held_back:.4f}"
    accuracy = "" if row.accuracy is None else f"{row.accuracy:.1%}"
    speed, minutes = f"{row.images_per_second:.0f}", f"{row.seconds / 60:.1f}"
    return str(row.epoch), f"{row.loss:.4f}", held_back, accuracy, speed, minutes
