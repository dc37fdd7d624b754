"""Options of commands that train, and how they show it."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from vitprune.cli.inputs import say_transform
from vitprune.cli.terminal import note, print_table, track

UNFINISHED = ".unfinished"
# Options that are settings of ``Training`` and of ``Augmentation`` by another name.
_TRAINING = {"model_ema_decay": "ema_decay", "workers": "num_workers"}
_AUGMENTATION = {"aa": "auto_augment", "reprob": "re_prob"}


def add_training(parser: ArgumentParser, *, epochs: int, lr: float) -> None:
    parser.add_argument("--smoothing", type=float, default=0.1, help="of the labels")
    parser.add_argument("--epochs", type=int, default=epochs, help="passes over the images")
    parser.add_argument("--minutes", type=float, help="train for so long instead")
    parser.add_argument("--batch-size", type=int, default=32, help="images at once, of each process")
    parser.add_argument("--grad-accum-steps", type=int, default=1, help="batches of one step")
    parser.add_argument("--opt", type=str, default="adamw", help="optimiser, by its timm name")
    parser.add_argument("--lr", type=float, default=lr, help="largest learning rate")
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
    parser.add_argument("--tensorboard", type=str, help="folder to log losses to, where tensorboard is installed")
    parser.add_argument("--seed", type=int, default=0, help="of every random choice")


def make_training(losses: dict[str, float] | None, options: dict[str, Any], **more: Any):
    """Return the settings that options ask for."""
    from vitprune.training.settings import Augmentation, Training, check_training

    names = vars(Augmentation()).keys()
    named = {_AUGMENTATION.get(name, name): value for name, value in options.items()}
    augmentation = {name: tuple(v) if isinstance(v, list) else v for name, v in named.items() if name in names}
    others = {_TRAINING.get(name, name): value for name, value in named.items() if name not in names}
    training = Training(losses=losses, augmentation=Augmentation(**augmentation), **others, **more)
    check_training(training)
    return training


def train_and_save(
    network: Any,
    images: Any,
    training: Any,
    output: str,
    *,
    overwrite: bool,
    processes: Any,
    tensorboard: str | None,
    **taught: Any,
):
    """Train a model and write its folder; None in all processes but the first."""
    from vitprune.training.loop import STEPS_FILE
    from vitprune.training.recover import recover
    from vitprune.training.recovery_folder import save_recovery
    from vitprune.training.tensorboard_log import log_to_tensorboard

    unfinished, first = Path(f"{output}{UNFINISHED}"), processes.rank == 0
    if first:
        say_transform(network)
    logged = nullcontext((lambda row: None,) * 2)
    if tensorboard is not None and first:
        logged = log_to_tensorboard(tensorboard)
    with logged as (log_step, log_epoch):

        def say_epoch(row: Any) -> None:
            note(describe_epoch(row))
            log_epoch(row)

        trained = recover(
            network,
            images,
            training=training,
            folder=unfinished,
            overwrite=overwrite,
            processes=processes,
            log_step=log_step,
            log_epoch=say_epoch,
            track=track if first else lambda items, _description: items,
            **taught,
        )
    if not first:
        return None
    save_recovery(trained, training, output, steps=unfinished / STEPS_FILE)
    shutil.rmtree(unfinished)
    return trained


def describe_epoch(row: Any) -> str:
    losses = ", ".join(f"{name} {value:.4g}" for name, value in row.losses.items())
    held_back = "" if row.held_back is None else f"; held back {row.held_back:.4f}"
    accuracy = "" if row.accuracy is None else f", accuracy {row.accuracy:.1%}"
    return f"epoch {row.epoch}: {losses}{held_back}{accuracy}; {row.images_per_second:.0f} images/s"


def show_training(recovered: Any) -> None:
    rows = []
    for row in recovered.rows:
        held_back = "" if row.held_back is None else f"{row.held_back:.4f}"
        accuracy = "" if row.accuracy is None else f"{row.accuracy:.1%}"
        speed, minutes = f"{row.images_per_second:.0f}", f"{row.seconds / 60:.1f}"
        rows.append((str(row.epoch), f"{row.loss:.4f}", held_back, accuracy, speed, minutes))
    print_table("training", ("epoch", "loss", "held back", "accuracy", "images/s", "minutes"), rows)
    before = recovered.before[0]
    if before is not None:
        best = next(row for row in recovered.rows if row.epoch == recovered.best)
        print(f"held-back images: loss {before:.4f} before, {best.held_back:.4f} after epoch {recovered.best}")
        if recovered.is_flattered:
            print("(the pruning was fitted to them too, so that 'before' looks better than it is: evaluate on others)")
        elif best.held_back > before:
            print("that is worse: train for longer, lower --lr, or stay with the model as it was")
