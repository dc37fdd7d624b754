"""The training loop: steps, epochs, a checkpoint that a killed run goes on from.

Letters: B images.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from vitprune.errors import VitpruneError
from vitprune.processes import Processes
from vitprune.progress import Track, untracked
from vitprune.training.augmented_images import AugmentedImages, TrainingBatch, seed_of, seeded
from vitprune.training.losses import Outputs, sum_losses
from vitprune.training.settings import Training
from vitprune.training.training_state import TrainingState, read_state_file, write_state

STATE_FILE, STEPS_FILE = "state.safetensors", "steps.jsonl"
# A training by the clock is scheduled in so many parts.
PARTS_OF_CLOCK = 10_000
# Seconds between two checkpoints within an epoch.
CHECKPOINT_SECONDS = 300.0


@dataclass(frozen=True)
class EpochRow:
    """What one epoch came to.

    Attributes:
        epoch: from 1.
        steps: taken so far.
        lr: of the last step.
        loss: mean of the weighted sum over the epoch's steps.
        losses: mean of each loss.
        held_back: what the images that are held back cost, as ``judge`` gives it; None without any.
        accuracy: of these, in [0, 1]; None where they have no labels.
        images_per_second: of all processes.
        seconds: of training so far.
    """

    epoch: int
    steps: int
    lr: float
    loss: float
    losses: Mapping[str, float]
    held_back: float | None
    accuracy: float | None
    images_per_second: float
    seconds: float


@dataclass(frozen=True)
class Trained:
    """What a training came to.

    Attributes:
        model: with the weights of the best epoch.
        rows: one for each epoch.
        best: the number of that epoch.
    """

    model: nn.Module
    rows: tuple[EpochRow, ...]
    best: int


def train(
    student: Outputs,
    teacher: Outputs,
    images: AugmentedImages,
    training: Training,
    *,
    judge: Callable[[nn.Module], tuple[float | None, float | None]],
    folder: Path | None = None,
    after_step: Callable[[nn.Module], None] = lambda model: None,
    log_step: Callable[[Mapping[str, Any]], None] = lambda row: None,
    log_epoch: Callable[[EpochRow], None] = lambda row: None,
    processes: Processes | None = None,
    track: Track = untracked,
) -> Trained:
    """Train a student towards a teacher.

    Everything random is drawn from the seed, the epoch and the step, so a run that was killed ends where one that was
    not would have; bit for bit on a CPU, with as many threads, if it does not go by the clock.

    Args:
        student: in the mode to keep; trained in place.
        teacher: left as it is.
        images: to train on.
        training: how.
        judge: model -> what held-back images cost, and their accuracy; less is better. None where there are none.
        folder: where a killed run goes on from: its state, written after every epoch and every few minutes, and a line
            for every step; None: nothing is kept.
        after_step: changes weights after each step, to keep zero what is masked.
        log_step: takes a row for every step; of the first process.
        log_epoch: takes a row for every epoch; of the first process.
        processes: that train together; None: this one alone.
        track: wraps (steps, description), for progress: of the whole training; of each epoch, where it goes by the
            clock.

    Raises:
        VitpruneError: if a loss is no number, naming step and files, or memory does not hold one image at a time.
    """
    processes = Processes() if processes is None else processes
    run = _Run(student, teacher, images, training, folder, after_step, log_step, processes)
    modes = {module: module.training for module in student.modules()}
    try:
        rows = [EpochRow(**row) for row in run.state.log]
        with closing(run.follow(track)) as steps:
            while not run.finished(rows):
                rows.append(run.epoch(judge, rows, steps))
                if processes.rank == 0:
                    log_epoch(rows[-1])
            if training.minutes is None:
                next(steps, None)  # the progress ends where the last step was taken
        run.restore_best()
    finally:
        for module, mode in modes.items():
            module.training = mode
    return Trained(student.model, tuple(rows), run.best_epoch(rows))


class _Run:
    """A training under way: the modules that change, and where it stands."""

    def __init__(
        self,
        student: Outputs,
        teacher: Outputs,
        images: AugmentedImages,
        training: Training,
        folder: Path | None,
        after_step: Callable[[nn.Module], None],
        log_step: Callable[[Mapping[str, Any]], None],
        processes: Processes,
    ) -> None:
        self.student, self.teacher, self.images, self.training = student, teacher, images, training
        self.folder, self.after_step, self.log_step, self.processes = folder, after_step, log_step, processes
        self.device = next(student.parameters()).device
        model = student.model
        try:
            self.optimizer = create_optimizer_v2(
                model,
                opt=training.opt,
                lr=training.lr,
                weight_decay=training.weight_decay,
                layer_decay=training.layer_decay,
            )
        except (AssertionError, ValueError, KeyError) as error:
            raise VitpruneError(f"`opt` {training.opt}: timm cannot make it for this model ({error})") from error
        self.steps_per_epoch = math.ceil(images.num_batches / training.grad_accum_steps)
        self.scheduler = self._make_scheduler()
        self.ema = ModelEmaV3(model, decay=training.ema_decay) if training.ema_decay is not None else None
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=training.amp_dtype == "float16")
        augmentation = training.augmentation
        self.mixup = None
        if augmentation.mixup or augmentation.cutmix:
            self.mixup = Mixup(
                mixup_alpha=augmentation.mixup,
                cutmix_alpha=augmentation.cutmix,
                label_smoothing=0.0,  # cross-entropy smooths
                num_classes=max(model.num_classes, 2),  # one output stands for two classes
            )
        self.micro_batches = 1
        self.wrapped: nn.Module = student
        if processes.count > 1:
            self.wrapped = nn.parallel.DistributedDataParallel(
                student,
                device_ids=[self.device] if self.device.type == "cuda" else None,
                find_unused_parameters=not {"answers", "labels"} & set(training.losses),
            )
        self.state = TrainingState(0, 0, 0.0, {}, {})
        self.best: Mapping[str, Tensor] = {}
        if folder is not None and (folder / STATE_FILE).is_file():
            self._go_on(read_state_file(folder / STATE_FILE))
        if folder is not None and processes.rank == 0:
            _forget_steps(folder / STEPS_FILE, self.state)
        self.started = time.perf_counter() - self.state.seconds
        self.saved = time.perf_counter()

    def _make_scheduler(self):
        training, total = self.training, self._num_updates
        warmup = round(training.warmup_epochs * (self.steps_per_epoch if training.minutes is None else total / 10))
        try:
            scheduler, _epochs = create_scheduler_v2(
                self.optimizer,
                sched=training.sched,
                num_epochs=total,
                warmup_epochs=min(warmup, total - 1),
                warmup_lr=training.lr / 100,
                min_lr=training.lr / 100,
                step_on_epochs=True,  # an "epoch" of the schedule is a step here
            )
        except (AssertionError, ValueError, KeyError) as error:
            raise VitpruneError(f"`sched` {training.sched}: timm cannot make it ({error})") from error
        if scheduler is None:
            raise VitpruneError(f"`sched` {training.sched}: timm has none of this name; take cosine")
        return scheduler

    @property
    def _num_updates(self) -> int:
        return self.training.epochs * self.steps_per_epoch if self.training.minutes is None else PARTS_OF_CLOCK

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def finished(self, rows: Sequence[EpochRow]) -> bool:
        training = self.training
        if training.minutes is not None:
            if self.state.epoch and self.seconds >= 60 * training.minutes:
                return True
        elif self.state.epoch >= training.epochs:
            return True
        return training.patience is not None and bool(rows) and len(rows) - self.best_epoch(rows) >= training.patience

    @staticmethod
    def best_epoch(rows: Sequence[EpochRow]) -> int:
        """Return the number of the epoch that held-back images like best; the last, where there are none."""
        judged = [row for row in rows if row.held_back is not None]
        return min(judged, key=lambda row: row.held_back).epoch if judged else len(rows)

    def _go_on(self, state: TrainingState) -> None:
        self.student.model.load_state_dict(state.model)
        self.optimizer.load_state_dict(state.optimizer)
        if self.ema is not None:
            self.ema.module.load_state_dict(state.ema)
        if state.scaler:
            self.scaler.load_state_dict(state.scaler)
        self.best, self.state = state.best, replace(state, model={}, optimizer={}, ema={}, best={})

    def follow(self, track: Track) -> Generator[int, None, None]:
        """Yield once for every step that is to come, so that ``track`` sees how far the whole training is."""
        training = self.training
        if training.minutes is None:
            done = self.state.epoch * self.steps_per_epoch + self.state.step
            yield from track(range(done, self._num_updates), "train")
        while training.minutes is not None:
            gone = f"{self.seconds / 60:.0f} of {training.minutes:g} minutes are over"
            yield from track(range(self.state.step, self.steps_per_epoch), f"epoch {self.state.epoch + 1} ({gone})")

    def epoch(
        self,
        judge: Callable[[nn.Module], tuple[float | None, float | None]],
        rows: Sequence[EpochRow],
        steps: Iterator[int],
    ) -> EpochRow:
        """Train one epoch, or what is left of it."""
        training, first = self.training, self.state.step
        self.wrapped.train()
        self.teacher.eval()
        totals = dict(self.state.totals)
        began, done, lr = time.perf_counter(), 0, training.lr
        batches = self.images.read(self.state.epoch, first=first * training.grad_accum_steps)
        for step in range(first, self.steps_per_epoch):
            if training.minutes is not None and self._out_of_time():
                break
            next(steps)
            group = _take(batches, training.grad_accum_steps)
            lr = self._set_lr(step)
            with seeded(seed_of(training.seed, "step", self.state.epoch, step, self.processes.rank)):
                parts = self._step(group, step)
            done += 1
            totals = {name: totals.get(name, 0.0) + value for name, value in parts.items()}
            self.state = replace(self.state, step=step + 1, totals=totals)
            if self.processes.rank == 0:
                taken = self.state.epoch * self.steps_per_epoch + step + 1
                self._log({"epoch": self.state.epoch + 1, "step": step + 1, "steps": taken, "lr": lr, **parts})
            if time.perf_counter() - self.saved > CHECKPOINT_SECONDS:
                self._save()
        seconds = time.perf_counter() - began
        number = self.state.epoch + 1
        kept = self.student.model if self.ema is None else self.ema.module
        self.wrapped.eval()
        held_back, accuracy = judge(kept)
        means = {name: value / max(self.state.step, 1) for name, value in totals.items()}
        row = EpochRow(
            epoch=number,
            steps=self.state.epoch * self.steps_per_epoch + self.state.step,
            lr=lr,
            loss=means.pop("loss", math.nan),
            losses=means,
            held_back=held_back,
            accuracy=accuracy,
            images_per_second=done * training.grad_accum_steps * training.batch_size * self.processes.count / seconds,
            seconds=self.seconds,
        )
        if self.best_epoch([*rows, row]) == number:
            self.best = copy.deepcopy(kept.state_dict())
        log = (*self.state.log, {**vars(row), "losses": dict(row.losses)})
        self.state = replace(self.state, epoch=number, step=0, log=log, totals={})
        self._save()
        return row

    def _log(self, row: Mapping[str, Any]) -> None:
        self.log_step(row)
        if self.folder is not None:
            with (self.folder / STEPS_FILE).open("a") as stream:
                stream.write(json.dumps(row) + "\n")

    def _out_of_time(self) -> bool:
        out = torch.tensor(float(self.seconds >= 60 * self.training.minutes))
        if self.processes.count > 1:  # all stop at the same step
            out = out.to(self.device)
            torch.distributed.broadcast(out, 0)
        return bool(out)

    def _set_lr(self, step: int) -> float:
        if self.training.minutes is None:
            position = self.state.epoch * self.steps_per_epoch + step
        else:
            position = min(PARTS_OF_CLOCK - 1, int(self.seconds / (60 * self.training.minutes) * PARTS_OF_CLOCK))
        self.scheduler.step(position)
        return max(group["lr"] for group in self.optimizer.param_groups)

    def _step(self, group: Sequence[TrainingBatch], step: int) -> dict[str, float]:
        """Take one step on some batches; where memory does not hold one at once, in parts of it."""
        while True:
            try:
                return self._try_step(group, step)
            except torch.OutOfMemoryError as error:
                self.optimizer.zero_grad(set_to_none=True)
                largest = max(len(batch.images) for batch in group)
                if self.processes.count > 1 or self.micro_batches >= largest:
                    raise VitpruneError(
                        f"out of memory at epoch {self.state.epoch + 1}, step {step + 1}; lower `batch_size` "
                        f"({self.training.batch_size}) and raise `grad_accum_steps`"
                    ) from error
                self.micro_batches *= 2
                torch.cuda.empty_cache()

    def _try_step(self, group: Sequence[TrainingBatch], step: int) -> dict[str, float]:
        parts: dict[str, float] = {}
        parameters = [each for each in self.student.parameters() if each.requires_grad]
        pieces = [piece for batch in group for piece in self._pieces(batch)]
        for number, (images, labels, share, files) in enumerate(pieces):
            share /= len(group)
            with self._synchronised(number + 1 == len(pieces)):
                with self._autocast():
                    with torch.no_grad():
                        wanted = self.teacher(images)
                    total, of_piece = sum_losses(self.wrapped(images), wanted, labels, self.training)
                if not torch.isfinite(total):
                    raise VitpruneError(
                        f"epoch {self.state.epoch + 1}, step {step + 1}: the loss is {total.item()} "
                        f"({len(files)} images, first {files[0]}); the last checkpoint stays as it is: lower `lr` "
                        f"({self.training.lr:g}), or take float32"
                    )
                self.scaler.scale(total * share).backward()
            for name, value in {"loss": total.item(), **of_piece}.items():
                parts[name] = parts.get(name, 0.0) + share * value
        self.scaler.unscale_(self.optimizer)
        if self.training.clip_grad is not None:
            nn.utils.clip_grad_norm_(parameters, self.training.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.after_step(self.student.model)
        if self.ema is not None:
            self.ema.update(self.student.model)
        return parts

    def _pieces(self, batch: TrainingBatch) -> Iterator[tuple[Tensor, Tensor, float, tuple[str, ...]]]:
        """Cut a batch in as many parts as memory asks for, with the share of the batch that each is."""
        images, labels = batch.images.to(self.device), batch.labels.to(self.device)
        if self.mixup is not None and len(images) % 2 == 0:  # timm mixes pairs
            images, labels = self.mixup(images, labels)
        size = math.ceil(len(images) / self.micro_batches)
        for start in range(0, len(images), size):
            part = slice(start, start + size)
            dtype = next(self.student.parameters()).dtype
            yield images[part].to(dtype), labels[part], len(images[part]) / len(images), batch.files[part]

    def _synchronised(self, last: bool) -> AbstractContextManager:
        return nullcontext() if last or self.wrapped is self.student else self.wrapped.no_sync()

    def _autocast(self) -> AbstractContextManager:
        if self.training.amp_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=getattr(torch, self.training.amp_dtype))

    def _save(self) -> None:
        self.saved = time.perf_counter()
        if self.folder is None or self.processes.rank:
            return
        write_state(
            replace(
                self.state,
                seconds=self.seconds,
                model=self.student.model.state_dict(),
                optimizer=self.optimizer.state_dict(),
                ema={} if self.ema is None else self.ema.module.state_dict(),
                best=self.best,
                scaler=self.scaler.state_dict(),
            ),
            self.folder / STATE_FILE,
        )

    def restore_best(self) -> None:
        """Give the student the weights of its best epoch."""
        if self.best:
            self.student.model.load_state_dict(self.best)


def _forget_steps(path: Path, state: TrainingState) -> None:
    """Drop the lines of steps that a killed run took after its last checkpoint; they come again."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # cut off where the run was killed
            break
        if (row["epoch"] - 1, row["step"]) > (state.epoch, state.step):
            break
        kept.append(line + "\n")
    path.write_text("".join(kept))


def _take(batches: Iterator[TrainingBatch], count: int) -> list[TrainingBatch]:
    """Return the next batches, at most so many."""
    return [batch for _number, batch in zip(range(count), batches, strict=False)]
