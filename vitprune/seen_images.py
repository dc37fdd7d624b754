"""Which images had a say in a model, so that nobody measures its accuracy on them.

An image is known by what is in it: by the hash of its file, and by the hash of the pixels that a model reads. The
second also knows images that never were files, and copies of a file in another format.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from vitprune.data import Batches, ImageSet, hash_images
from vitprune.errors import VitpruneError
from vitprune.images.number_classes import check_numbering
from vitprune.images.resized_batches import resize_batches
from vitprune.sharing import gather_texts


@dataclass(frozen=True)
class SeenImages:
    """Images that had a say in a model.

    Attributes:
        sha256: hashes of their files and of their pixels (16 hexadecimal digits each).
        data: folder of those read last; None where they were no files.
        files: of these, relative to ``data``.
        labels: of these.
    """

    sha256: frozenset[str] = frozenset()
    data: str | None = None
    files: tuple[str, ...] = ()
    labels: tuple[int, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.sha256)

    def with_hashes(self, *others: Iterable[str]) -> SeenImages:
        """Return these and other images, of which only the hashes are kept."""
        return replace(self, sha256=self.sha256.union(*others) - {""})

    def as_json(self) -> dict[str, Any]:
        """Return JSON values."""
        named = {} if self.data is None else {"data": self.data, "files": self.files, "labels": self.labels}
        return {**named, "sha256": sorted(self.sha256)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> SeenImages:
        """Read what ``as_json`` gave."""
        return cls(
            frozenset(content.get("sha256", ())),
            content.get("data"),
            tuple(content.get("files", ())),
            tuple(content.get("labels", ())),
        )


def hash_pixels(images: Tensor) -> list[str]:
    """Return a hash of each image [B, channels, height, width] as a model reads it (16 hexadecimal digits).

    >>> import torch
    >>> first, second = hash_pixels(torch.tensor([0.5, 0.25]).view(2, 1, 1, 1))
    >>> first == second, first == hash_pixels(torch.full((1, 1, 1, 1), 0.5, dtype=torch.float64))[0]
    (False, True)
    """
    pixels = images.detach().cpu().float().contiguous().numpy()
    return [hashlib.sha256(image.tobytes()).hexdigest()[:16] for image in pixels]


def files_of(batches: Any) -> ImageSet | None:
    """Return the files that batches are read from; None where they are not read from files."""
    images = getattr(batches, "images", None)
    return images if isinstance(images, ImageSet) else None


def check_labels(model: Any, batches: Any) -> None:
    """Refuse batches read from files whose labels are unknown, or numbered in another way than the model's classes.

    Args:
        model: a timm model, or an opened ONNX file.
        batches: whose labels are about to be read.

    Raises:
        VitpruneError: as ``check_numbering`` does.
    """
    images = files_of(batches)
    if images is not None:
        check_numbering(model, images)


def names_in(batches: Any) -> tuple[str, ...]:
    """Return what a model's classes are called by the files that batches are read from; empty where not sure."""
    images = files_of(batches)
    return () if images is None else images.label_names


def stamp_files(images: ImageSet | None) -> list[tuple[int, int] | None]:
    """Return size and time of change (nanoseconds) of each file; None where there is none, nothing for no files.

    >>> from pathlib import Path
    >>> stamp_files(ImageSet(Path("nowhere"), ("a.png",), (0,)))
    [None]
    """
    stamps: list[tuple[int, int] | None] = []
    for name in () if images is None else images.files:
        try:
            status = (images.root / name).stat()
        except OSError:  # gone, or inside of an archive
            stamps.append(None)
        else:
            stamps.append((status.st_size, status.st_mtime_ns))
    return stamps


class WatchedBatches:
    """Batches that remember which images they gave, as of the first complete pass over them.

    Args:
        batches: pairs of images [B, channels, height, width] and labels.
        before: hashes of the same images as they were read before, at another size.
    """

    def __init__(self, batches: Batches, before: Iterable[str] = ()) -> None:
        self.batches, self.before = batches, frozenset(before)
        self.seen = SeenImages()
        self._stamps: list[tuple[int, int] | None] | None = None

    def of_model(self, model: Any) -> WatchedBatches:
        """Return the same images as another model reads them; how they were read until now is remembered as well."""
        return WatchedBatches(resize_batches(self.batches, model), self.before | self.seen.sha256)

    def __len__(self) -> int:
        return len(self.batches)

    @property
    def images(self) -> ImageSet | None:
        """The files that they are read from; None where they are not read from files."""
        return files_of(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self._stamps = stamp_files(files_of(self.batches)) if self._stamps is None else self._stamps
        if self.seen:
            yield from self.batches
            self._check_unchanged()
            return
        hashes: list[str] = []
        for images, labels in self.batches:
            hashes += hash_pixels(images)
            yield images, labels
        self.seen = SeenImages(self.before.union(gather_texts(hashes)))
        images = files_of(self.batches)
        if images is not None:
            images = images.only(self.batches.files_read)
            self.seen = SeenImages(
                self.seen.sha256.union(hash_images(images)) - {""}, str(images.root), images.files, images.labels
            )
        self._check_unchanged()

    def _check_unchanged(self) -> None:
        """Refuse files that are others now than when they were read first: no hash would say what was read."""
        images = files_of(self.batches)
        stamps = stamp_files(images)
        changed = next((place for place, stamp in enumerate(stamps) if stamp != self._stamps[place]), None)
        if changed is not None:
            raise VitpruneError(f"{images.root / images.files[changed]}: it changed while it was read; start again")


def watch(batches: Batches | None) -> WatchedBatches | None:
    """Return batches that remember which images they gave; those that do already, as they are."""
    return batches if batches is None or isinstance(batches, WatchedBatches) else WatchedBatches(batches)


def seen_by(model: Any) -> frozenset[str]:
    """Return the hashes of the images that had a say in a model or an opened file; empty where nothing is known."""
    return frozenset(getattr(model, "calibration", ()))


def check_unseen(images: ImageSet, seen: Iterable[str], name: str = "this model") -> None:
    """Refuse evaluation images that had a say in what ``name`` stands for, by the hashes of their files.

    Raises:
        VitpruneError: saying how many, and naming the first.
    """
    shared = find_seen(images, seen)
    if shared:
        raise VitpruneError(
            f"{len(shared)} of {len(images)} evaluation images were calibration images of {name} "
            f"(first: {shared[0]}); evaluate on others"
        )


def find_seen(images: ImageSet, seen: Iterable[str]) -> list[str]:
    """Return the names of the images whose files had a say."""
    seen = frozenset(seen) - {""}
    if not seen:
        return []
    return [name for name, digest in zip(images.files, hash_images(images), strict=True) if digest in seen]


class UnseenBatches:
    """Batches for evaluation: images that had a say are refused before a model answers them, or counted.

    Those that are read from files are looked at by file before anything is read, others by pixels as they come.

    Args:
        batches: pairs of images [B, channels, height, width] and labels.
        seen: hashes of the images that had a say.
        allow_overlap: count them instead of refusing.

    Raises:
        VitpruneError: if an image had a say and ``allow_overlap`` is off.
    """

    def __init__(self, batches: Batches, seen: Iterable[str], *, allow_overlap: bool) -> None:
        self.batches, self.allow_overlap = batches, allow_overlap
        self.num_overlap = 0
        self._seen_pixels = frozenset(seen)
        images = files_of(batches)
        if images is None or not self._seen_pixels:
            return
        if allow_overlap:
            self.num_overlap = len(find_seen(images, seen))
        else:
            check_unseen(images, seen)
        self._seen_pixels = frozenset()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in self.batches:
            shared = self._count(images) if self._seen_pixels else 0
            if shared and not self.allow_overlap:
                raise VitpruneError(
                    f"{shared} of {len(images)} evaluation images were calibration images of this model "
                    "(of the batch read last); evaluate on others"
                )
            self.num_overlap += shared
            yield images, labels

    def _count(self, images: Tensor) -> int:
        return sum(digest in self._seen_pixels for digest in hash_pixels(images))


def as_numbers(hashes: Sequence[str]) -> list[int]:
    """Return hashes as signed 64-bit integers, which tensors hold.

    >>> as_hashes(as_numbers(["00000000000000ff", "ffffffffffffffff"]))
    ['00000000000000ff', 'ffffffffffffffff']
    """
    return [int.from_bytes(bytes.fromhex(digest), "big", signed=True) for digest in hashes]


def as_hashes(numbers: Iterable[int]) -> list[str]:
    """Return what ``as_numbers`` was given."""
    return [number.to_bytes(8, "big", signed=True).hex() for number in numbers]
