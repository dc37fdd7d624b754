"""The verb: train what pruning left towards the model that it came from."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitprune.answer_loss import answer_loss
from vitprune.answers import ask, of_classes
from vitprune.data import Batches, ImageBatches, ImageSet, hash_images, on_device
from vitprune.entry import entry
from vitprune.errors import VitpruneError
from vitprune.files import open_resumable
from vitprune.models.identity import hash_weights
from vitprune.models.units import find_groups
from vitprune.processes import Processes
from vitprune.progress import Track, untracked
from vitprune.pruning.apply import remember, silence
from vitprune.pruning.plan import Plan, fit_plan
from vitprune.seen_images import check_unseen, seen_by
from vitprune.training.augmented_images import AugmentedImages, seed_of, seeded
from vitprune.training.loop import STATE_FILE, STEPS_FILE, EpochRow, Trained, train
from vitprune.training.losses import choose_losses, pair_up
from vitprune.training.settings import Training, check_training
from vitprune.training.sharded_teacher import spread_teacher
from vitprune.views import data_config

UNFINISHED_FILES = frozenset({STATE_FILE, STEPS_FILE})


@dataclass(frozen=True)
class Recovered:
    """What training gave back.

    Attributes:
        model: with the weights of the best epoch; it knows the images that had a say in it.
        plan: of the model before, with these images too; None where it has none.
        rows: one for each epoch.
        best: the number of the best one.
        before: what held-back images cost before training, and their accuracy; None where there are none.
        sha256: hashes of the images trained on and held back.
        is_flattered: whether ``before`` is of images that the model was fitted to already, so that it looks better on
            them than it is.
    """

    model: nn.Module
    plan: Plan | None
    rows: tuple[EpochRow, ...]
    best: int
    before: tuple[float | None, float | None]
    sha256: frozenset[str]
    is_flattered: bool = False


@entry
def recover(
    model: nn.Module,
    images: ImageSet,
    *,
    teacher: nn.Module | None = None,
    training: Training | None = None,
    plan: Plan | None = None,
    folder: str | Path | None = None,
    overwrite: bool = False,
    processes: Processes | None = None,
    shard_teacher: bool = False,
    log_step: Callable[[Mapping[str, Any]], None] = lambda row: None,
    log_epoch: Callable[[EpochRow], None] = lambda row: None,
    track: Track = untracked,
) -> Recovered:
    """Train a pruned model towards the dense one it came from, or on labels, or both.

    All weights move; what the plan took out stays out. By default no labels are read. The images that had a say are
    recorded in the model and in the plan, so that ``evaluate`` refuses them.

    Args:
        model: pruned or not; stays as it is.
        images: to train on; a share of them is held back, to choose the best epoch.
        teacher: model of the same classes and input; None only where ``labels`` is the only loss.
        training: how; None: the defaults.
        plan: of ``model``, where it has one; units that it masks stay masked.
        folder: where a killed run is gone on with; kept after it, for whoever saves the result to take away. None:
            nothing is kept.
        overwrite: whether a folder that another training left may be replaced.
        processes: that train together, each with its share of every step's images; None: this one alone.
        shard_teacher: whether the teacher's blocks are shared out among the processes, where no GPU holds all of them.
        log_step: takes a row for every step.
        log_epoch: takes a row for every epoch.
        track: wraps (steps, description), for progress: of the whole training; of each epoch, where it goes by the
            clock.

    Raises:
        VitpruneError: if teacher and model differ in classes or input, a setting means nothing, or a loss is no number.

    Source:
        Hinton et al., "Distilling the knowledge in a neural network", arXiv:1503.02531.

    >>> import tempfile, timm
    >>> from PIL import Image
    >>> from vitprune.data import find_images
    >>> dense = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=2)
    >>> with tempfile.TemporaryDirectory() as root:
    ...     for number in range(4):
    ...         (Path(root) / "ab"[number % 2]).mkdir(exist_ok=True)
    ...         Image.new("RGB", (40, 40), (60 * number, 0, 0)).save(Path(root) / "ab"[number % 2] / f"{number}.png")
    ...     images = find_images(root, 2)
    ...     recovered = recover(dense, images, teacher=dense, training=Training(epochs=2, batch_size=2, held_back=0.25))
    >>> len(recovered.rows)
    2
    """
    training = Training() if training is None else training
    processes = Processes() if processes is None else processes
    check_training(training)
    if teacher is None and (training.losses is None or set(training.losses) != {"labels"}):
        raise VitpruneError("the losses compare with a `teacher`, which is missing; pass one, or train on labels alone")
    teacher = copy.deepcopy(model) if teacher is None else teacher
    check_pair(model, teacher)
    if training.losses is None:
        training = replace(training, losses=choose_losses(model, teacher))
    trained_on, held_back = split_images(images, training)
    check_unseen(held_back, hash_images(trained_on), "the training images; some are copies")
    if "labels" not in training.losses:
        trained_on = ImageSet(trained_on.root, trained_on.files, (0,) * len(trained_on))
    device = next(model.parameters()).device
    student, frozen_teacher = copy.deepcopy(model), copy.deepcopy(teacher).requires_grad_(False)
    frozen_teacher = spread_teacher(frozen_teacher, processes, device) if shard_teacher else frozen_teacher.to(device)
    student.requires_grad_(True)
    pair = pair_up(student, frozen_teacher, training)
    config = data_config(model)
    judge = _make_judge(frozen_teacher, _read(held_back, model, training), "labels" in training.losses)
    hashes = frozenset(hash_images(images)) - {""}
    if folder is not None:
        request = {
            "model": hash_weights(model),
            "teacher": hash_weights(teacher),
            "images": sorted(hashes),
            "processes": processes.count,
            "training": asdict(training),
        }
        if processes.rank == 0:
            open_resumable(folder, request, owned=UNFINISHED_FILES, overwrite=overwrite)
        processes.wait()
    with seeded(seed_of(training.seed, "training")):
        before = judge(student.eval())
        trained = train(
            *pair,
            AugmentedImages(trained_on, config, training, rank=processes.rank, count=processes.count),
            training,
            judge=judge,
            folder=None if folder is None else Path(folder),
            after_step=_keep_masked(student, plan),
            log_step=log_step,
            log_epoch=log_epoch,
            processes=processes,
            track=track,
        )
    is_flattered = bool(seen_by(model) & set(hash_images(held_back)))
    return replace(_finish(model, plan, trained, before, hashes), is_flattered=is_flattered)


def _finish(
    model: nn.Module,
    plan: Plan | None,
    trained: Trained,
    before: tuple[float | None, float | None],
    hashes: frozenset[str],
) -> Recovered:
    result = trained.model
    for mine, theirs in zip(result.modules(), model.modules(), strict=True):
        mine.training = theirs.training
    for mine, theirs in zip(result.parameters(), model.parameters(), strict=True):
        mine.requires_grad_(theirs.requires_grad)
    if plan is not None:
        plan = plan.with_facts(calibration=plan.facts.calibration.with_hashes(hashes))
    return Recovered(remember(result, hashes), plan, trained.rows, trained.best, before, hashes)


def check_pair(model: nn.Module, teacher: nn.Module) -> None:
    """Refuse a teacher of other classes or other images.

    Raises:
        VitpruneError: saying both sides.

    >>> import timm
    >>> first, second = (timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=n) for n in (5, 6))
    >>> check_pair(first, second)
    Traceback (most recent call last):
        ...
    vitprune.errors.VitpruneError: `teacher` answers 6 classes, the model 5; they must be the same
    """
    if model.num_classes != teacher.num_classes:
        raise VitpruneError(
            f"`teacher` answers {teacher.num_classes} classes, the model {model.num_classes}; they must be the same"
        )
    names = [getattr(each, "label_names", None) for each in (model, teacher)]
    if all(names) and tuple(names[0]) != tuple(names[1]):
        first = next((mine, other) for mine, other in zip(*names, strict=True) if mine != other)
        raise VitpruneError(f"`teacher` calls a class '{first[1]}' that the model calls '{first[0]}'")
    configs = [data_config(each) for each in (model, teacher)]
    for key in ("input_size", "mean", "std"):
        mine, other = (list(config[key]) for config in configs)
        if mine != other:
            raise VitpruneError(f"`teacher` takes images of {key} {other}, the model of {mine}; they must be the same")
    if getattr(model, "num_features", None) != getattr(teacher, "num_features", None):
        raise VitpruneError(
            f"`teacher` has features of width {teacher.num_features}, the model of {model.num_features}; "
            "take the model that it was pruned from"
        )


def split_images(images: ImageSet, training: Training) -> tuple[ImageSet, ImageSet]:
    """Return the images to train on and those that are held back, drawn by the seed.

    Raises:
        VitpruneError: if there is nothing to train on.

    >>> images = ImageSet(None, tuple("abcdefghij"), (0,) * 10)
    >>> [len(each) for each in split_images(images, Training(held_back=0.2))]
    [8, 2]
    """
    order = list(range(len(images)))
    random.Random(seed_of(training.seed, "held back")).shuffle(order)
    count = round(training.held_back * len(images))
    if training.held_back and not count:
        count = 1
    if len(images) - count < 1:
        raise VitpruneError(f"{len(images)} images: {count} are held back, and none is left to train on")
    return images.at(sorted(order[count:])), images.at(sorted(order[:count]))


def _read(images: ImageSet, model: nn.Module, training: Training) -> Batches:
    if not len(images):
        return ()
    return ImageBatches(images, model, batch_size=2 * training.batch_size, num_workers=training.num_workers)


@torch.no_grad()
def _make_judge(teacher: nn.Module, batches: Batches, labelled: bool):
    """Return what says how near a model is to the teacher (nats, or 1 - cosine without classes), and its accuracy."""
    teacher.eval()

    @torch.no_grad()
    def judge(model: nn.Module) -> tuple[float | None, float | None]:
        losses, right = [], []
        for images, labels in on_device(model, batches):
            answers = ask(model, images)
            if labelled:
                answers = of_classes(answers)
                losses.append(nn.functional.cross_entropy(answers.double(), labels, reduction="none"))
                right.append(answers.argmax(-1) == labels)
            else:
                loss = answer_loss(teacher)
                losses.append(loss.diverge(loss.refer(ask(teacher, images)), answers))
        if not losses:
            return None, None
        return float(torch.cat(losses).mean()), float(torch.cat(right).double().mean()) if labelled else None

    return judge


def _keep_masked(model: nn.Module, plan: Plan | None) -> Callable[[nn.Module], None]:
    """Return what zeroes again the units that a plan masks; nothing, where it removed them."""
    if plan is None or plan.facts.mode != "mask":
        return lambda _model: None
    fit_plan(model, plan)
    groups = find_groups(model, plan.parts)
    return lambda trained: silence(trained, groups, plan)
