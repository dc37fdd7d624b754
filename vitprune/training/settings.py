"""How a model is trained: what is minimised, by which optimiser, on which images, for how long."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from vitprune.errors import VitpruneError
from vitprune.options import LOSSES, check_choice


@dataclass(frozen=True)
class Augmentation:
    """How training images differ from the files, in the words of timm's ``create_transform``.

    Attributes:
        scale: smallest and largest share of the image that a crop covers.
        hflip: probability of mirroring.
        color_jitter: strength; 0 for none.
        auto_augment: policy such as ``rand-m9-mstd0.5-inc1``; None for none.
        re_prob: probability of erasing a part.
        mixup: alpha of mixing two images; 0 for none.
        cutmix: alpha of pasting a part of another image; 0 for none.
    """

    scale: tuple[float, float] = (0.5, 1.0)
    hflip: float = 0.5
    color_jitter: float = 0.0
    auto_augment: str | None = None
    re_prob: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0


@dataclass(frozen=True)
class Training:
    """How a model is trained; names and meanings are those of timm's ``train.py`` where it has them.

    Attributes:
        losses: key of ``LOSSES`` -> weight, positive; None: what ``choose_losses`` takes for the model.
        temperature: of ``answers``, positive.
        smoothing: of ``labels``, in [0, 1).
        epochs: passes over the training images.
        minutes: to train for, in place of ``epochs``; the learning rate then follows the clock.
        batch_size: images per step of each process, at once unless ``grad_accum_steps`` says otherwise.
        grad_accum_steps: batches whose gradients make one step.
        opt: optimiser, by its timm name.
        lr: largest learning rate.
        weight_decay: of all weights but biases and norms.
        layer_decay: factor of the learning rate from each block to the one before it; None for none.
        clip_grad: largest norm of the gradient; None for no limit.
        sched: schedule of the learning rate, by its timm name.
        warmup_epochs: during which the learning rate rises; may be a fraction.
        ema_decay: of a running mean of the weights, which then is what is kept; None for none.
        amp_dtype: ``bfloat16`` or ``float16`` autocast; None for the weights' own type.
        held_back: share of the images that are not trained on, and choose the best epoch; in [0, 1).
        patience: epochs without a better one after which training stops; None for never.
        augmentation: of training images.
        num_workers: processes that decode; 0 for this one.
        seed: of everything drawn at random.
    """

    losses: Mapping[str, float] | None = None
    temperature: float = 2.0
    smoothing: float = 0.1
    epochs: int = 8
    minutes: float | None = None
    batch_size: int = 32
    grad_accum_steps: int = 1
    opt: str = "adamw"
    lr: float = 2e-4
    weight_decay: float = 0.01
    layer_decay: float | None = None
    clip_grad: float | None = 1.0
    sched: str = "cosine"
    warmup_epochs: float = 0.5
    ema_decay: float | None = None
    amp_dtype: str | None = None
    held_back: float = 0.1
    patience: int | None = None
    augmentation: Augmentation = field(default_factory=Augmentation)
    num_workers: int = 0
    seed: int = 0


def check_training(training: Training) -> None:
    """Refuse settings that mean nothing.

    Raises:
        VitpruneError: naming the setting and its value.

    >>> check_training(Training(lr=0.0))
    Traceback (most recent call last):
        ...
    vitprune.errors.VitpruneError: `lr` must be positive, got 0.0
    """
    losses = {"answers": 1.0} if training.losses is None else training.losses
    for name in losses:
        check_choice("losses", name, LOSSES)
    if not losses or min(losses.values()) <= 0:
        raise VitpruneError(f"`losses` must name at least one of {', '.join(LOSSES)}, with positive weights")
    positive = ("temperature", "epochs", "batch_size", "grad_accum_steps", "lr")
    optional = ("minutes", "layer_decay", "clip_grad", "ema_decay", "patience")
    given = [name for name in optional if getattr(training, name) is not None]
    for name in (*positive, *given):
        if not getattr(training, name) > 0:
            raise VitpruneError(f"`{name}` must be positive, got {getattr(training, name)}")
    for name in ("smoothing", "held_back"):
        if not 0 <= getattr(training, name) < 1:
            raise VitpruneError(f"`{name}` must be in [0, 1), got {getattr(training, name)}")
    for name in ("weight_decay", "warmup_epochs", "num_workers"):
        if getattr(training, name) < 0:
            raise VitpruneError(f"`{name}` must not be negative, got {getattr(training, name)}")
    if training.ema_decay is not None and training.ema_decay >= 1:
        raise VitpruneError(f"`ema_decay` must be in (0, 1), got {training.ema_decay}")
    low, high = training.augmentation.scale
    if not 0 < low <= high <= 1:
        raise VitpruneError(f"`scale` must be two rising shares in (0, 1], got {low} and {high}")
    check_choice("amp_dtype", training.amp_dtype or "float32", ("float32", "bfloat16", "float16"))
    if training.patience is not None and training.held_back == 0:
        raise VitpruneError("`patience` asks images that are held back; `held_back` is 0")
