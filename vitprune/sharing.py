"""Calibration images shared among processes: each reads its part, and what is summed or gathered is of all.

Of every batch, process r of R has the images r, r + R, r + 2 R ...: images keep their order whatever R is, so that
seeds and halves, which go by an image's place among all, stay as they are with one process.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from vitprune.errors import VitpruneError
from vitprune.processes import Processes, join_processes

Rows = TypeVar("Rows", bound=Sequence)

_ALONE = Processes()
_current = [_ALONE]


def sharing() -> Processes:
    """Return which of the processes that share images this is; the only one where none do.

    >>> sharing()
    Processes(rank=0, count=1, local_rank=0)
    """
    return _current[-1]


@contextmanager
def share_images() -> Iterator[Processes]:
    """Meet the processes that ``torchrun`` started, and share the images of all that is called inside.

    Batches of files (``ImageBatches``) then give each process its part; other batches must be different ones on each
    process, as ``torch.utils.data.DistributedSampler`` makes them, and of one size but for the last. All processes
    come to the same result, to rounding the one of a single process; write it on the first of them alone.

    Yields:
        Which process this is, and of how many.

    Raises:
        VitpruneError: where images are read, if another process has ended.

    >>> with share_images() as processes:
    ...     processes.count
    1
    """
    with join_processes(exchanging=True) as processes:
        _current.append(processes)
        try:
            yield processes
        finally:
            _current.pop()


def refuse_sharing(what: str, remedy: str) -> None:
    """Refuse what several processes cannot do together.

    Raises:
        VitpruneError: where there are several.

    >>> refuse_sharing("compensation distill", "use another")
    """
    if sharing().count > 1:
        raise VitpruneError(f"{what} runs on one process, and {sharing().count} share their images here; {remedy}")


def sum_of_all(*values: Tensor | float) -> tuple[Any, ...]:
    """Return each value summed over all processes; tensors as float64, where they are.

    >>> sum_of_all(2, torch.ones(2))
    (2, tensor([1., 1.]))
    """
    if sharing().count == 1:
        return values
    numbers = [value for value in values if not isinstance(value, Tensor)]
    # Small numbers go together: a message costs more than what is in it.
    small = torch.tensor(numbers, dtype=torch.float64, device=_device(values))
    totals = [value.detach().double().clone() if isinstance(value, Tensor) else None for value in values]
    with _explained():
        for total in (small, *(total for total in totals if total is not None)):
            if total.numel():
                torch.distributed.all_reduce(total)
    of_numbers = iter(small.tolist())
    return tuple(
        total if total is not None else type(value)(next(of_numbers))
        for value, total in zip(values, totals, strict=True)
    )


def mean_of_all(values_I: Tensor) -> float:
    """Return the mean of one value for each image, over the images of all processes.

    >>> mean_of_all(torch.tensor([1.0, 3.0]))
    2.0
    """
    if sharing().count == 1:
        return float(values_I.mean())
    total, count = sum_of_all(values_I.double().sum(), len(values_I))
    return float(total) / count


def from_first(tensor: Tensor) -> Tensor:
    """Return the first process's tensor, which has one shape on all of them."""
    if sharing().count == 1:
        return tensor
    result = tensor.detach().contiguous().clone()
    with _explained():
        torch.distributed.broadcast(result, 0)
    return result


def told_by_first(value: Any) -> Any:
    """Return the JSON value that the first process has; what the others bring is not looked at."""
    if sharing().count == 1:
        return value
    told = json.dumps(value).encode() if sharing().rank == 0 else b""
    length = from_first(torch.tensor(len(told)))
    content = torch.zeros(int(length), dtype=torch.uint8)
    content[: len(told)] = torch.frombuffer(bytearray(told), dtype=torch.uint8) if told else content[:0]
    return json.loads(bytes(from_first(content).tolist()).decode())


def places(count: int, before: int = 0) -> Tensor:
    """Return the places of this process's images among those of all: int64 [count].

    Args:
        count: images of this process.
        before: images of this process that came before them.

    >>> places(2, before=3).tolist()
    [3, 4]
    """
    here = sharing()
    return (torch.arange(count) + before) * here.count + here.rank


def own_rows(rows: Rows) -> Rows:
    """Return those of all rows, one for each image, that are of this process's images.

    >>> own_rows([1, 2, 3])
    [1, 2, 3]
    """
    here = sharing()
    return rows if here.count == 1 else rows[here.rank :: here.count]


def gather_rows(rows: Tensor) -> Tensor:
    """Return the rows of all processes [I, ...], one for each image, in the order of the images.

    Args:
        rows: [i, ...]; of this process's images, in their order.

    >>> gather_rows(torch.arange(3)).tolist()
    [0, 1, 2]
    """
    if sharing().count == 1:
        return rows
    parts = _gather(rows)
    result = rows.new_empty((sum(map(len, parts)), *rows.shape[1:]))
    for rank, part in enumerate(parts):
        if len(result[rank :: len(parts)]) != len(part):
            counts = ", ".join(str(len(each)) for each in parts)
            raise VitpruneError(
                f"processes read {counts} images, which is no division of one row of images; use `ImageBatches`, or a "
                "sampler that deals images out in turn"
            )
        result[rank :: len(parts)] = part
    return result


def join_rows(rows: Tensor) -> Tensor:
    """Return the rows of all processes, those of the first one first.

    >>> join_rows(torch.arange(3)).tolist()
    [0, 1, 2]
    """
    return rows if sharing().count == 1 else torch.cat(_gather(rows))


def gather_texts(texts: Sequence[str]) -> list[str]:
    """Return the texts of all processes, those of the first one first."""
    if sharing().count == 1:
        return list(texts)
    told = torch.frombuffer(bytearray(json.dumps(list(texts)).encode()), dtype=torch.uint8)
    return [text for part in _gather(told) for text in json.loads(bytes(part.tolist()).decode())]


def deal_out(rows: Tensor, places_I: Tensor, wanted: Sequence[int], batch_size: int) -> list[Tensor]:
    """Return this process's share of batches that are made of some images of all processes.

    Args:
        rows: [i, ...]; images of this process, or what belongs to them.
        places_I: int64 [i]; their places among those of all.
        wanted: places of the images that the batches are made of, in their order; each on one process.
        batch_size: of the batches of all processes together; a multiple of their number.
    """
    order = torch.cat(_gather(places_I)).tolist()
    by_place = dict(zip(order, torch.cat(_gather(rows)), strict=True))
    starts = range(0, len(wanted), batch_size)
    batches = (own_rows(wanted[start : start + batch_size]) for start in starts)
    return [torch.stack([by_place[place] for place in batch]) for batch in batches if len(batch)]


@contextmanager
def own_output(path: str | Path | None) -> Iterator[str | Path | None]:
    """Yield the path to write to: the one given on the first process, on the others one that nobody keeps."""
    if path is None or sharing().rank == 0:
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / Path(path).name


def _gather(rows: Tensor) -> list[Tensor]:
    """Return the rows of each process, however many it has."""
    here = sharing()
    counts = torch.zeros(here.count, dtype=torch.int64)
    counts[here.rank] = len(rows)
    with _explained():
        torch.distributed.all_reduce(counts)
        longest = int(counts.max())
        padded = rows.new_zeros((longest, *rows.shape[1:]))
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in range(here.count)]
        torch.distributed.all_gather(parts, padded)
    return [part[:count] for part, count in zip(parts, counts.tolist(), strict=True)]


def _device(values: Sequence[Any]) -> torch.device:
    return next((value.device for value in values if isinstance(value, Tensor)), torch.device("cpu"))


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise VitpruneError(f"process {sharing().rank} stops because another one did; see its message") from error
