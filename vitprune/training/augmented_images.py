"""Training images: random crops and more, drawn anew in every epoch, the same for the same seed whatever reads them."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import timm.data
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vitprune.data import ImageSet
from vitprune.errors import VitpruneError
from vitprune.images.decode import read_image
from vitprune.images.image_batches import told_of_killed
from vitprune.training.settings import Training


@dataclass(frozen=True)
class TrainingBatch:
    """Images of one step.

    Attributes:
        images: float32 [B, channels, height, width], normalised.
        labels: int64 [B].
        files: where they are from.
    """

    images: Tensor
    labels: Tensor
    files: tuple[str, ...]


def seed_of(*parts: Any) -> int:
    """Return a seed that differs for each of these, in [0, 2**63).

    >>> seed_of(0, "epoch", 1) == seed_of(0, "epoch", 1), seed_of(0, 1) == seed_of(0, 2)
    (True, False)
    """
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from here on what a seed says, and go on as before afterwards; of python, numpy and torch.

    >>> with seeded(3):
    ...     first = torch.rand(1)
    >>> with seeded(3):
    ...     bool(first == torch.rand(1))
    True
    """
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.random.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


class _Augmented(Dataset):
    def __init__(self, images: ImageSet, config: Mapping[str, Any], training: Training) -> None:
        self.images, self.seed = images, training.seed
        self.mode = "L" if config["input_size"][0] == 1 else "RGB"
        augmentation = training.augmentation
        self.transform = timm.data.create_transform(
            config["input_size"],
            is_training=True,
            interpolation=config["interpolation"],
            mean=config["mean"],
            std=config["std"],
            scale=augmentation.scale,
            hflip=augmentation.hflip,
            color_jitter=augmentation.color_jitter or None,
            auto_augment=augmentation.auto_augment,
            re_prob=augmentation.re_prob,
        )

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, str]:
        epoch, index = key
        name = self.images.files[index]
        try:
            decoded = read_image(self.images.root / name, self.mode)
        except Exception as error:  # decoders raise whatever a damaged file makes them stumble over
            raise VitpruneError(f"{self.images.root / name}: cannot be decoded ({error}); take it away") from error
        with seeded(seed_of(self.seed, epoch, index)):
            return self.transform(decoded), self.images.labels[index], name


def _collate(samples: list[tuple[Tensor, int, str]]) -> TrainingBatch:
    images, labels, files = zip(*samples, strict=True)
    return TrainingBatch(torch.stack(images), torch.tensor(labels, dtype=torch.int64), tuple(files))


class AugmentedImages:
    """Batches for training, in a random order of every epoch; each process has its share of every batch.

    Args:
        images: which images.
        config: the transform, as ``data_config`` describes one.
        training: augmentation, batch size, workers and seed.
        rank: of this process.
        count: of processes; a step of all of them sees ``count * batch_size`` images.

    >>> AugmentedImages(ImageSet(None, tuple("abcdefg"), (0,) * 7), {}, Training(batch_size=2)).num_batches
    3
    """

    def __init__(
        self, images: ImageSet, config: Mapping[str, Any], training: Training, *, rank: int = 0, count: int = 1
    ) -> None:
        self.images, self.config, self.training = images, config, training
        self.rank, self.count = rank, count
        together = training.batch_size * count
        # Of fewer images than a batch there is one batch; else what is left over waits for another epoch.
        self.num_batches = max(1, len(images) // together)

    def indices(self, epoch: int) -> list[list[int]]:
        """Return which images each batch of this process has in an epoch."""
        order = torch.randperm(
            len(self.images), generator=torch.Generator().manual_seed(seed_of(self.training.seed, "order", epoch))
        ).tolist()
        size = self.training.batch_size
        batches = []
        for number in range(self.num_batches):
            start = (number * self.count + self.rank) * size
            batches.append(order[start : start + size])
        return batches

    def read(self, epoch: int, *, first: int = 0) -> Iterator[TrainingBatch]:
        """Read the batches of an epoch from one on; the same epoch gives the same batches."""
        keys = [[(epoch, index) for index in batch] for batch in self.indices(epoch)[first:]]
        loader = DataLoader(
            _Augmented(self.images, self.config, self.training),
            batch_sampler=keys,
            num_workers=self.training.num_workers,
            collate_fn=_collate,
        )
        yield from told_of_killed(loader)
