"""Paths of many images, written in shards as they are found: what is finished survives, whoever found it.

A shard is a fixed stretch of the images, whatever the number of processes, and says which request and which files it is
of. Letters: I images, L FFNs, K neurons per FFN, C classes, H hidden neurons.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitprune.data import ImageBatches, ImageSet, ReadBatch, hash_images
from vitprune.discovery.discover import Discovery, Part, Search, combine, find_part, set_pace
from vitprune.errors import VitpruneError
from vitprune.files import REQUEST_FILE, open_tensors, read_tensors, write_tensors
from vitprune.images.image_tar import find_archive
from vitprune.processes import Processes
from vitprune.progress import Track, untracked
from vitprune.seen_images import SeenImages, hash_pixels
from vitprune.views import data_config

_TENSORS = ("neurons", "joint_scores", "labels", "predictions", "completeness_errors")


@dataclass(frozen=True)
class Shards:
    """How images are cut into shards, and where these are kept.

    Attributes:
        folder: of the shard files.
        request: everything that their content depends on beside the images; JSON values.
        images: all of them.
        batch_size: images decoded together.
        batches_per_shard: how many of these make a shard.
    """

    folder: Path
    request: Mapping[str, Any]
    images: ImageSet
    batch_size: int
    batches_per_shard: int

    @property
    def images_per_shard(self) -> int:
        """Images in every shard but the last."""
        return self.batch_size * self.batches_per_shard

    def __len__(self) -> int:
        return -(-len(self.images) // self.images_per_shard)

    def path(self, number: int) -> Path:
        """Return the file of a shard."""
        return self.folder / f"shard-{number:06}.safetensors"

    def places(self, number: int) -> range:
        """Return which of the images a shard is of."""
        size = self.images_per_shard
        return range(number * size, min((number + 1) * size, len(self.images)))

    @cached_property
    def _request_hash(self) -> str:
        return _hash(self.request)

    def identity(self, number: int) -> str:
        """Return a hash of the request and of a shard's files: names, labels, sizes and times of change."""

        def look_at(name: str) -> tuple[int, int] | None:
            try:
                path = self.images.root / name
                found = (find_archive(path) or path).stat()
            except OSError:  # such an image is skipped, or refused, when it is decoded
                return None
            return found.st_size, found.st_mtime_ns

        places = self.places(number)
        names = self.images.files[places.start : places.stop]
        labels = self.images.labels[places.start : places.stop]
        return _hash([self._request_hash, str(self.images.root), names, labels, [look_at(name) for name in names]])

    def missing(self, *, strict: bool = False) -> list[int]:
        """Return the numbers of the shards that are not there, or are not of this request and these files.

        Args:
            strict: count a shard that skipped an image as missing.
        """
        return [number for number in range(len(self)) if not self._is_there(number, strict)]

    def _is_there(self, number: int, strict: bool) -> bool:
        try:
            with open_tensors(self.path(number), kind="shard") as (_tensors, facts):
                pass
        except VitpruneError:  # absent, or damaged: it is searched again
            return False
        # Earlier versions wrote no hashes.
        known = "sha256" in facts and facts.get("identity") == self.identity(number)
        return known and not (strict and facts["skipped"])

    def remove(self) -> None:
        """Remove the shards, then the folder if nothing else is in it."""
        for pattern in ("shard-*.safetensors", ".shard-*", REQUEST_FILE):
            for path in self.folder.glob(pattern):
                path.unlink()
        if not any(self.folder.iterdir()):
            self.folder.rmdir()


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def find_shards(
    model: nn.Module,
    search: Search,
    shards: Shards,
    numbers: Sequence[int],
    *,
    num_workers: int = 0,
    strict: bool = False,
    memory_gib: float | None = None,
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
        memory_gib: as in ``discover``.
        track: wraps (batches, description), for progress.

    Raises:
        VitpruneError: if the model has no isotropic trunk, or a shard cannot be written.
    """
    if not numbers:
        return
    parameter = next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, *data_config(model)["input_size"], generator=generator).to(parameter.device, parameter.dtype)
    pace = set_pace(model, search, image, memory_gib=memory_gib)
    # One loader for all shards: its processes go on decoding while a shard is written.
    places = [place for number in numbers for place in shards.places(number)]
    batches = ImageBatches(
        shards.images.at(places), model, batch_size=shards.batch_size, num_workers=num_workers, strict=strict
    )
    reading = iter(track(_Read(batches), "discover"))
    for position, number in enumerate(numbers):
        identity = shards.identity(number)  # before its files are read: a later change makes the shard stale
        last = position == len(numbers) - 1
        stretch = _Stretch(reading if last else islice(reading, shards.batches_per_shard))
        part = find_part(model, search, stretch, pace=pace)
        # Now, while the files are still in the system's memory.
        hashes = hash_images(shards.images.at(shards.places(number)).only(stretch.files))
        write_shard(
            shards.path(number),
            part,
            stretch.files,
            stretch.skipped,
            identity=identity,
            hashes=hashes,
            pixels=stretch.pixels,
        )


def write_shard(
    path: Path,
    part: Part | None,
    files: Sequence[str],
    skipped: Sequence[tuple[str, str]],
    *,
    identity: str,
    hashes: Sequence[str],
    pixels: Sequence[str] = (),
) -> None:
    """Write one shard, as a whole or not at all.

    Args:
        path: where.
        part: what was found on its images; None if none of them could be decoded.
        files: names of the images that could be decoded, in the order of ``part``.
        skipped: the other names, with the reason.
        identity: as ``Shards.identity`` gives it.
        hashes: of the content of ``files``.
        pixels: hashes of the images as the model read them.
    """
    classes = [] if part is None else part.classes
    facts = {"identity": identity, "files": files, "sha256": hashes, "pixels": pixels, "skipped": skipped}
    facts["classes"] = classes
    tensors = {}
    if part is not None:
        tensors = {name: getattr(part, name) for name in _TENSORS if getattr(part, name) is not None}
        tensors |= {f"score_sums.{name}": sum_CH for name, sum_CH in part.score_sums.items()}
    write_tensors(path, tensors, kind="shard", facts=facts)


def read_shards(search: Search, shards: Shards) -> tuple[Discovery, ImageSet, list[str], list[str]]:
    """Put all shards together.

    Returns:
        The discovery, the images that it is of, their content hashes, and the names of images that could not be
        decoded.

    Raises:
        VitpruneError: if no image could be decoded.
    """
    files: list[str] = []
    hashes: list[str] = []
    pixels: list[str] = []
    skipped: list[list[str]] = []
    damaged: list[str] = []

    def read() -> Iterator[Part]:
        for number in range(len(shards)):
            try:
                tensors, facts = read_tensors(shards.path(number), kind="shard")
            except VitpruneError as error:
                shards.path(number).unlink(missing_ok=True)
                damaged.append(f"{error}; it was removed, and is searched again when the search is started again")
                raise VitpruneError(damaged[0]) from error
            files.extend(facts["files"])
            hashes.extend(facts["sha256"])
            pixels.extend(facts.get("pixels", ()))
            skipped.extend(facts["skipped"])
            if facts["files"]:
                yield Part(
                    # Tensors as they were read keep the whole file in memory.
                    **{name: tensors[name].clone() if name in tensors else None for name in _TENSORS},
                    classes=tuple(facts["classes"]),
                    score_sums={layer.name: tensors[f"score_sums.{layer.name}"] for layer in search.layers},
                )

    try:
        found = combine(search, read())
    except VitpruneError as error:
        if files or damaged:
            raise
        name, reason = skipped[0]
        raise VitpruneError(f"{shards.images.root}: no image could be decoded (first: {name}, {reason})") from error
    used = shards.images.only(files)
    seen = SeenImages(frozenset((*hashes, *pixels)) - {""}, str(used.root), used.files, used.labels)
    return replace(found, seen=seen), used, hashes, [name for name, _reason in skipped]


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
    """The batches of one shard; remembers which files were read, and what was in them."""

    def __init__(self, batches: Iterator[ReadBatch]) -> None:
        self.batches = batches
        self.files: list[str] = []
        self.pixels: list[str] = []
        self.skipped: list[tuple[str, str]] = []

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self.batches:
            self.files += batch.files
            self.skipped += batch.skipped
            if batch.images is not None:
                self.pixels += hash_pixels(batch.images)
                yield batch.images, batch.labels
