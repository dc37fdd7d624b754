"""Batches of images under a model's own transform."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import timm.data
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vitprune.errors import VitpruneError
from vitprune.images.decode import read_image
from vitprune.images.image_set import ImageSet
from vitprune.sharing import own_rows, sharing
from vitprune.views import data_config


@dataclass(frozen=True)
class ReadBatch:
    """What came of one batch of files.

    Attributes:
        files: those that could be decoded, in order.
        images: float32 [B, channels, height, width], normalised; None where no file could be decoded.
        labels: int64 [B].
        skipped: the other files, with the reason.
    """

    files: tuple[str, ...]
    images: Tensor | None
    labels: Tensor
    skipped: tuple[tuple[str, str], ...]


# What torch says where a process of a loader, or what it had in shared memory, is gone.
_OF_WORKERS = ("DataLoader worker", "shared memory")


class ImageBatches:
    """Batches of an image set under the model's own transform; may be read any number of times.

    Iterating yields images (float32 [B, channels, height, width], normalised) and labels (int64 [B]). Images that
    cannot be decoded are left out; ``skipped`` then names them with the reason, ``files_read`` names the others in
    order, both as of the last complete pass. Processes that share images (``share_images``) read a part each.

    Args:
        images: which images.
        model: whose transform: a timm model, or an opened ONNX file.
        batch_size: B of all batches but the last.
        num_workers: processes that decode; 0 decodes in this one.
        strict: refuse an undecodable image instead of leaving it out.
        transform: as ``data_config`` describes one, in place of the model's own.
    """

    def __init__(
        self,
        images: ImageSet,
        model: Any,
        *,
        batch_size: int = 64,
        num_workers: int = 0,
        strict: bool = False,
        transform: Mapping[str, Any] | None = None,
    ) -> None:
        if batch_size < 1:
            raise VitpruneError(f"batch_size must be at least 1, got {batch_size}")
        if num_workers < 0:
            raise VitpruneError(f"`num_workers` must not be negative, got {num_workers}")
        self.images, self.strict = images, strict
        self.skipped: list[tuple[str, str]] = []
        self.files_read: list[str] = []
        self.batch_size, self.num_workers = batch_size, num_workers
        self._decoded = _Decoded(images, data_config(model) if transform is None else transform)

    def __len__(self) -> int:
        return -(-len(own_rows(range(len(self.images)))) // self.batch_size)

    def of_model(self, model: Any) -> ImageBatches:
        """Return batches of the same images under another model's transform."""
        sizes = {"batch_size": self.batch_size, "num_workers": self.num_workers}
        return ImageBatches(self.images, model, strict=self.strict, **sizes)

    def read(self) -> Iterator[ReadBatch]:
        """Read all batches, those without a single good image among them, and say which files they are of.

        Where processes share images, it is this process's part of them.
        """
        loader = DataLoader(
            self._decoded,
            batch_size=self.batch_size,
            sampler=own_rows(range(len(self.images))),
            num_workers=self.num_workers,
            collate_fn=list,
            pin_memory=False,
        )
        for decoded in told_of_killed(loader):
            good = [(index, image) for index, image, _reason in decoded if image is not None]
            skipped = [(self.images.files[index], reason) for index, image, reason in decoded if image is None]
            if skipped and (self.strict or sharing().count > 1):
                name, reason = skipped[0]
                shared = "" if self.strict else "; several processes share the images by their places: leave it out"
                raise VitpruneError(f"{self.images.root / name}: cannot be decoded ({reason}){shared}")
            yield ReadBatch(
                tuple(self.images.files[index] for index, _image in good),
                torch.stack([image for _index, image in good]) if good else None,
                torch.tensor([self.images.labels[index] for index, _image in good], dtype=torch.int64),
                tuple(skipped),
            )

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.skipped, self.files_read = [], []
        for batch in self.read():
            self.files_read += batch.files
            self.skipped += batch.skipped
            if batch.images is not None:
                yield batch.images, batch.labels
        if sharing().count > 1:
            self._check_enough()
            self.files_read = list(self.images.files)
        if not self.files_read:
            name, reason = self.skipped[0]
            raise VitpruneError(f"{self.images.root}: no image could be decoded (first: {name}, {reason})")

    def _check_enough(self) -> None:
        if len(self.images) < sharing().count:
            raise VitpruneError(
                f"{self.images.root}: {len(self.images)} images are too few for {sharing().count} processes; take fewer"
            )


def told_of_killed(loader: DataLoader) -> Iterator[Any]:
    """Yield the batches of a loader.

    Raises:
        VitpruneError: if one of its processes ends before its time.
    """
    try:
        yield from loader
    except (RuntimeError, ConnectionError, EOFError) as error:
        if isinstance(error, RuntimeError) and not any(said in str(error) for said in _OF_WORKERS):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise VitpruneError(
            f"a process that decodes images ended ({reason}); where memory is short take fewer `num_workers`, or 0"
        ) from error


class _Decoded(Dataset):
    def __init__(self, images: ImageSet, config: Mapping[str, Any]) -> None:
        self.images = images
        self.mode = "L" if config["input_size"][0] == 1 else "RGB"
        self.transform = timm.data.create_transform(**config, is_training=False)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[int, Tensor | None, str]:
        try:
            image = read_image(self.images.root / self.images.files[index], self.mode)
            return index, self.transform(image), ""
        except Exception as error:  # decoders raise whatever a damaged file makes them stumble over
            return index, None, str(error).splitlines()[0] if str(error) else type(error).__name__
