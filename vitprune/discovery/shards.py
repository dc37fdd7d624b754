"""Paths of many images, written in shards as they are found: what is finished survives, whoever found it.

A shard is a fixed stretch of the images, whatever the number of processes, so that the same request ends in the same
files after any interruption.

Letters: I images, L FFNs, K neurons per FFN, C classes, H hidden neurons.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

from torch import Tensor, nn

from vitprune.data import ImageBatches, ImageSet, ReadBatch
from vitprune.discovery.discover import Discovery, Part, Search, combine, find_part
from vitprune.errors import VitpruneError
from vitprune.files import read_tensors, write_tensors
from vitprune.processes import Processes
from vitprune.progress import Track, untracked

_TENSORS = ("neurons", "joint_scores", "labels", "predictions", "completeness_errors")


@dataclass(frozen=True)
class Shards:
    """How images are cut into shards, and where these are kept.

    Attributes:
        folder: of the shard files; belongs to one request alone.
        images: all of them.
        batch_size: images decoded and searched together.
        batches_per_shard: how many of these make a shard.
    """

    folder: Path
    images: ImageSet
    batch_size: int
    batches_per_shard: int

    @property
    def num_images(self) -> int:
        """Images in every shard but the last."""
        return self.batch_size * self.batches_per_shard

    def __len__(self) -> int:
        return -(-len(self.images) // self.num_images)

    def path(self, number: int) -> Path:
        """Return the file of a shard."""
        return self.folder / f"shard-{number:06}.safetensors"

    def missing(self) -> list[int]:
        """Return the numbers of the shards that are not there yet."""
        return [number for number in range(len(self)) if not self.path(number).is_file()]


def find_shards(
    model: nn.Module,
    search: Search,
    shards: Shards,
    numbers: Sequence[int],
    *,
    num_workers: int = 0,
    strict: bool = False,
    memory: float | None = None,
    track: Track = untracked,
) -> None:
    """Find and write some shards, one after another; each is there as a whole or not at all.

    Args:
        model: in eval mode.
        search: as planned for this model.
        shards: what to write.
        numbers: which of them, ascending.
        num_workers: processes that decode images.
        strict: refuse an undecodable image instead of leaving it out.
        memory: as in ``discover``.
        track: wraps (batches, description), for progress.

    Raises:
        VitpruneError: if the model has no isotropic trunk, or a shard cannot be written.
    """
    if not numbers:
        return
    # One loader for all shards: its processes go on decoding while a shard is written.
    size, total = shards.num_images, len(shards.images)
    places = [place for number in numbers for place in range(number * size, min((number + 1) * size, total))]
    batches = ImageBatches(
        shards.images.at(places), model, batch_size=shards.batch_size, num_workers=num_workers, strict=strict
    )
    reading = iter(track(_Read(batches), "discover"))
    for position, number in enumerate(numbers):
        last = position == len(numbers) - 1
        stretch = _Stretch(reading if last else islice(reading, shards.batches_per_shard))
        part = find_part(model, search, stretch, memory=memory)
        write_shard(shards, number, part, stretch.files, stretch.skipped)


def write_shard(
    shards: Shards, number: int, part: Part | None, files: Sequence[str], skipped: Sequence[tuple[str, str]]
) -> None:
    """Write one shard, as a whole or not at all.

    Args:
        shards: which it belongs to.
        number: its number.
        part: what was found on its images; None if none of them could be decoded.
        files: names of the images that could be decoded, in the order of ``part``.
        skipped: the other names, with the reason.
    """
    facts = {"files": files, "skipped": skipped, "classes": [] if part is None else part.classes}
    tensors = {}
    if part is not None:
        tensors = {name: getattr(part, name) for name in _TENSORS if getattr(part, name) is not None}
        tensors |= {f"score_sums.{name}": sum_CH for name, sum_CH in part.score_sums.items()}
    write_tensors(shards.path(number), tensors, kind="shard", facts=facts)


def read_shards(search: Search, shards: Shards) -> tuple[Discovery, ImageSet, list[str]]:
    """Put all shards together.

    Returns:
        The discovery, the images that it is of, and the names of images that could not be decoded.

    Raises:
        VitpruneError: if no image could be decoded.
    """
    files: list[str] = []
    skipped: list[list[str]] = []

    def read() -> Iterator[Part]:
        for number in range(len(shards)):
            tensors, facts = read_tensors(shards.path(number), kind="shard")
            files.extend(facts["files"])
            skipped.extend(facts["skipped"])
            if facts["files"]:
                yield Part(
                    **{name: tensors.get(name) for name in _TENSORS},
                    classes=tuple(facts["classes"]),
                    score_sums={ffn.name: tensors[f"score_sums.{ffn.name}"] for ffn in search.ffns},
                )

    parts = read()
    first = next(parts, None)
    if first is None:
        name, reason = skipped[0]
        raise VitpruneError(f"{shards.images.root}: no image could be decoded (first: {name}, {reason})")
    found = combine(search, chain([first], parts))
    return found, shards.images.only(files), [name for name, _reason in skipped]


def describe_images(images: ImageSet) -> str:
    """Return a hash of the names, sizes and labels of image files; their content is not read."""
    sizes = [(images.root / name).stat().st_size for name in images.files]
    listed = json.dumps([images.files, images.labels, sizes])
    return hashlib.sha256(listed.encode()).hexdigest()[:16]


def share(numbers: Sequence[int], processes: Processes) -> list[int]:
    """Return the shards that are this process's to find."""
    return list(numbers[processes.rank :: processes.count])


class _Read:
    """Batches as they are read from disk, with their number for a progress bar."""

    def __init__(self, batches: ImageBatches) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[ReadBatch]:
        return self.batches.read()


class _Stretch:
    """The batches of one shard; remembers the names of the files that were read."""

    def __init__(self, batches: Iterator[ReadBatch]) -> None:
        self.batches = batches
        self.files: list[str] = []
        self.skipped: list[tuple[str, str]] = []

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self.batches:
            self.files += batch.files
            self.skipped += batch.skipped
            if batch.images is not None:
                yield batch.images, batch.labels
