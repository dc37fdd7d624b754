"""Batches as strangers bring them, made into pairs of images [B, channels, height, width] and labels, or refused.

Letters: B images, C classes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from vitprune.errors import VitpruneError

IMAGES = ("images", "image", "pixel_values", "inputs", "x")
LABELS = ("labels", "label", "targets", "target", "y")
# Stands where an image has no label; nobody numbers a class so.
NO_LABEL = -1
# Of an iterator that can be read once, to read it again.
KEPT_BYTES = 2**29

_EXPECTED = "a batch is a pair of images [B, channels, height, width] and labels [B]"
_READ = threading.local()
# Whether a verb is running, whose caller is told in one line what it cannot do.
DOOR = threading.local()


def inside_door() -> bool:
    """Tell whether a verb is running in this thread."""
    return getattr(DOOR, "inside", False)


def where_read() -> str | None:
    """Return which batch is being read; None where none is."""
    return getattr(_READ, "where", None)


class GivenBatches:
    """Batches of a caller, checked one by one as they are read.

    Iterating yields images (floating point [B, channels, height, width], finite) and labels (int64 [B], ``NO_LABEL``
    where there are none; float [B, C] of zeros and ones where an image may have several classes). An iterator that can
    be read only once is kept, as far as it is small, so that it can be read again.

    Args:
        batches: pairs, dictionaries with an image and a label entry, or images alone.

    >>> given = GivenBatches([{"image": torch.zeros(2, 3, 8, 8), "label": [0, 1]}, torch.zeros(1, 3, 8, 8)])
    >>> [(labels == NO_LABEL).tolist() for _images, labels in given]
    [[False, False], [True]]
    """

    def __init__(self, batches: Any) -> None:
        if isinstance(batches, str | bytes | Mapping) or not hasattr(batches, "__iter__"):
            raise VitpruneError(f"`batches` is a {type(batches).__name__}; {_EXPECTED}: pass a list or loader of them")
        if isinstance(batches, tuple) and len(batches) == 2 and _is_pair(batches):
            raise VitpruneError(
                "`batches` is one pair of images and labels; pass a list of such pairs, [(images, labels)]"
            )
        self.batches = batches
        self._once = batches if hasattr(batches, "__next__") else None
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._kept_bytes = 0
        self._reader: Iterator[tuple[Tensor, Tensor]] | None = None

    def __len__(self) -> int:
        return len(self.batches)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "batches" not in self.__dict__:
            raise AttributeError(name)
        own = getattr(self.batches, name)
        if name == "of_model":
            return lambda model: GivenBatches(own(model))
        return own

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        try:
            if self._once is None:
                yield from self._read(self.batches)
            else:
                yield from self._read_once()
        finally:
            _READ.where = None

    def _read_once(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self._kept_bytes > KEPT_BYTES:
            raise VitpruneError(
                "`batches` is an iterator that can be read only once, and is read again here; pass a list or a loader"
            )
        yield from self._kept
        if self._reader is None:
            self._reader = self._read(self._once)
        for images, labels in self._reader:
            self._kept_bytes += images.numel() * images.element_size()
            self._kept = [*self._kept, (images, labels)] if self._kept_bytes <= KEPT_BYTES else []
            yield images, labels
        if not self._kept_bytes:
            raise VitpruneError("`batches` is an iterator without any batch left; pass a list or a loader")

    def _read(self, batches: Any) -> Iterator[tuple[Tensor, Tensor]]:
        for number, batch in enumerate(batches, 1):
            where = f"batch {number}"
            images, labels = _take_apart(batch, where)
            if isinstance(images, Tensor) and images.ndim == 4:
                where += self._files(len(images))
            images = _check_images(images, where)
            labels = _check_labels(labels, len(images), where)
            if len(images):
                _READ.where = where
                yield images, labels

    def _files(self, count: int) -> str:
        names = list(getattr(self.batches, "files_read", ()))[-count:]
        return f" ({names[0]}{f' .. {names[-1]}' if len(names) > 1 else ''})" if names else ""


def given(batches: Any) -> Any:
    """Return batches that are checked as they are read; those that are already, and None, as they are."""
    inside = batches
    while inside is not None:
        if isinstance(inside, GivenBatches):
            return batches
        inside = getattr(inside, "__dict__", {}).get("batches")
    return batches if batches is None else GivenBatches(batches)


def _is_pair(pair: tuple[Any, Any]) -> bool:
    first, second = pair
    return isinstance(first, Tensor) and first.ndim == 4 and not (isinstance(second, Tensor) and second.ndim == 4)


def _take_apart(batch: Any, where: str) -> tuple[Any, Any]:
    if isinstance(batch, Mapping):
        images, labels = (next((batch[key] for key in keys if key in batch), None) for keys in (IMAGES, LABELS))
        if images is None:
            raise VitpruneError(
                f"{where} has the entries {', '.join(map(str, batch)) or 'of nothing'}; images are looked for as "
                f"{', '.join(IMAGES)}"
            )
        return images, labels
    if isinstance(batch, list | tuple):
        if len(batch) == 2:
            return batch[0], batch[1]
        if len(batch) == 1:
            return batch[0], None
        raise VitpruneError(f"{where} has {len(batch)} entries; {_EXPECTED}")
    return batch, None


def _check_images(images: Any, where: str) -> Tensor:
    images = _as_tensor(images, f"images of {where}")
    # Rows of features are what callables that are no vision models read.
    if images.ndim not in (2, 4):
        raise VitpruneError(f"images of {where} are {list(images.shape)}; {_EXPECTED}")
    if not images.is_floating_point():
        raise VitpruneError(
            f"images of {where} are {_dtype(images)}; pass floating-point images under the model's own transform "
            "(ImageBatches applies it)"
        )
    finite = torch.isfinite(images).flatten(1).all(1)
    if not bool(finite.all()):
        place = int((~finite).nonzero()[0])
        raise VitpruneError(f"images of {where} hold NaN or infinity (image {place} of {len(images)}); leave it out")
    return images


def _check_labels(labels: Any, num_images: int, where: str) -> Tensor:
    if labels is None:
        return torch.full((num_images,), NO_LABEL)
    labels = _as_tensor(labels, f"labels of {where}")
    if labels.ndim == 0 and num_images == 1:
        labels = labels.view(1)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels.squeeze(1)
    if labels.ndim not in (1, 2):
        raise VitpruneError(f"labels of {where} are {list(labels.shape)}; {_EXPECTED}")
    if len(labels) != num_images:
        raise VitpruneError(f"{where} has {num_images} images and {len(labels)} labels")
    if labels.is_complex() or not bool(torch.isfinite(labels).all()):
        raise VitpruneError(f"labels of {where} are no class numbers ({_dtype(labels)}, not all finite)")
    if labels.ndim == 1:
        if labels.is_floating_point() and not torch.equal(labels, labels.round()):
            raise VitpruneError(f"labels of {where} are no whole numbers (first: {float(labels[0]):g})")
        return labels.to(torch.int64)
    if not labels.is_floating_point():
        raise VitpruneError(
            f"labels of {where} are {_dtype(labels)} {list(labels.shape)}; pass class numbers [B] (argmax(1) of "
            "one-hot ones), or floats of zeros and ones [B, C] where an image may have several classes"
        )
    if not bool(((labels == 0) | (labels == 1)).all()):
        raise VitpruneError(
            f"labels of {where} are shares of classes; pass class numbers [B], or zeros and ones [B, C]"
        )
    return labels


def _as_tensor(value: Any, what: str) -> Tensor:
    if isinstance(value, Tensor):
        return value
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise VitpruneError(f"{what} are a {type(value).__name__}, not a tensor; {_EXPECTED}") from error


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
