"""Discover the paths of many images into a run folder, so that a killed process loses its unfinished shard at most."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitprune.data import ImageBatches, ImageSet, digest_images, find_class
from vitprune.discovery.class_means import COSINE, answer_by_class_means
from vitprune.discovery.memory import budget_bytes
from vitprune.discovery.methods import REGISTRY, plan_search
from vitprune.discovery.run import RUN_FILES, Run, save_run
from vitprune.discovery.saturation import describe_saturation
from vitprune.discovery.search import Search
from vitprune.discovery.shards import Shards, find_shards, read_shards, share
from vitprune.entry import entry
from vitprune.errors import VitpruneError, VitpruneNote
from vitprune.files import held, open_resumable, refuse_existing
from vitprune.images.number_classes import check_numbering
from vitprune.models.identity import architecture, hash_weights, said_beside
from vitprune.models.path_layers import DEFAULT_NODES
from vitprune.options import TARGET_CLASSES
from vitprune.processes import Processes
from vitprune.progress import Track, untracked
from vitprune.views import data_config

# A run names its images in the header of a safetensors file, which may have 100 MB.
MOST_NAME_BYTES = 80_000_000


@dataclass(frozen=True)
class Progress:
    """What came of a discovery beside its run.

    Attributes:
        skipped: images that could not be decoded.
        num_searched: images searched by this call; the others were there already.
        seconds: that the search took.
    """

    skipped: tuple[str, ...]
    num_searched: int
    seconds: float


def silent(_text: str) -> None:
    """Say nothing."""


@entry
def discover_run(
    model: nn.Module,
    images: ImageSet,
    output: str | Path,
    *,
    source: str,
    checkpoint: str | Path | None = None,
    batch_size: int = 8,
    num_workers: int = 0,
    strict: bool = False,
    shard_size: int = 256,
    memory_gib: float | None = None,
    overwrite: bool = False,
    processes: Processes | None = None,
    track: Track = untracked,
    note: Callable[[str], None] = silent,
    **asked: Any,
) -> tuple[Run, Progress] | None:
    """Find the paths of images as ``discover`` does, in shards that survive a kill, and write a run folder.

    Weights of 16 bits are computed with in float32. The same call goes on where a killed one was. Several processes,
    as ``torchrun`` starts them, share the shards.

    Args:
        model: timm Vision Transformer with an isotropic trunk, in eval mode.
        images: whose paths to find.
        output: run folder to write; the shards lie beside it until it is whole.
        source: what ``vitprune.load`` loads the model from, for those who use the run.
        checkpoint: likewise.
        batch_size: images decoded together.
        num_workers: processes that decode images.
        strict: refuse an undecodable image instead of leaving it out.
        shard_size: images per shard.
        memory_gib: as in ``discover``.
        overwrite: replace an output that exists, and shards of another request.
        processes: which of them this is.
        track: wraps (batches, description), for progress.
        note: receives lines about what is there already, left out or kept.
        asked: further arguments of ``discover``: method, top_k, tokens, quadrature, target (a class by name, too),
            quantity, precision, seed, nodes.

    Returns:
        The run and how it went; None in every process but the first.

    Raises:
        VitpruneError: if an argument is out of range, or the output is taken or cannot be written.

    >>> import tempfile, timm
    >>> from PIL import Image
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=2).eval()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     Image.new("RGB", (32, 32)).save(Path(folder) / "1.png")
    ...     images = ImageSet(Path(folder), ("1.png",), (0,), {0: "cat"})
    ...     run, progress = discover_run(model, images, Path(folder) / "run", source="tiny", method="activation")
    >>> run.found.neurons.shape, progress.num_searched
    (torch.Size([1, 1, 1]), 1)
    """
    refuse_existing(output, overwrite=overwrite, owned=RUN_FILES)
    for name, value in (("batch_size", batch_size), ("shard_size", shard_size)):
        if value < 1:
            raise VitpruneError(f"{name} must be at least 1, got {value}")
    if sum(map(len, images.files)) > MOST_NAME_BYTES:
        raise VitpruneError(f"{len(images)} images are too many to name in one run; take some `classes` at a time")
    processes = Processes() if processes is None else processes
    check_numbering(model, images)
    asked["target"] = _target_class(images, asked.get("target", "label"))
    weights = hash_weights(model)
    dtype = next(model.parameters()).dtype
    if dtype in (torch.float16, torch.bfloat16):
        note(f"the weights are {str(dtype).removeprefix('torch.')}; paths are computed in float32")
        model = copy.deepcopy(model).float()
    if asked.get("quantity") == COSINE:
        opened = ImageBatches(images, model, batch_size=batch_size, num_workers=num_workers, strict=strict)
        model = answer_by_class_means(model, track(opened, "class means") if processes.rank == 0 else opened)
    search = plan_search(model, **asked)
    if search.objective.quantity == "probability" and processes.rank == 0:
        told = describe_saturation(model, images, num_workers=num_workers)
        if told is not None:
            warnings.warn(told, VitpruneNote, stacklevel=2)
    budget_bytes(memory_gib, next(model.parameters()).device)
    output = Path(output).absolute()
    folder = output.with_name(f"{output.name}.shards")
    request = {**_describe_search(model, search, images, batch_size, shard_size), "weights": weights}
    shards = Shards(folder, request, images, batch_size, -(-shard_size // batch_size))
    with contextlib.ExitStack() as stack:
        if processes.rank == 0:
            stack.enter_context(held(folder.with_name(f"{folder.name}.lock"), what=folder))
            # Of the request before as well, which may have had more shards.
            owned = {path.name for path in folder.glob("shard-*.safetensors")}
            owned = frozenset(owned.union(shards.path(number).name for number in range(len(shards))))
            open_resumable(folder, request, owned=owned, overwrite=overwrite)
        processes.wait()
        missing = shards.missing(strict=strict)
        processes.wait()  # or another process might see fewer missing
        if len(missing) < len(shards) and processes.rank == 0:
            note(f"{len(shards) - len(missing)} of {len(shards)} shards are there already")
        started = time.perf_counter()
        with _keeping_what_is_finished(shards, processes, note):
            find_shards(
                model,
                search,
                shards,
                share(missing, processes),
                num_workers=num_workers,
                strict=strict,
                memory_gib=memory_gib,
                track=track if processes.rank == 0 else untracked,
            )
            processes.wait()
            if processes.rank > 0:
                return None
            absent = shards.missing(strict=strict)
            if absent:
                raise VitpruneError(
                    f"{len(absent)} of {len(shards)} shards are missing, or of other images or arguments than these "
                    "(were all processes started alike, and do they see the same files?)"
                )
        seconds = time.perf_counter() - started
        found, used, hashes, skipped = read_shards(search, shards)
        if skipped:
            note(f"skipped {len(skipped)} images that cannot be decoded (first: {skipped[0]})")
        run = Run(
            found=found,
            images=used,
            model=str(Path(source).resolve()) if Path(source).is_dir() else source,
            checkpoint=None if checkpoint is None else str(Path(checkpoint).resolve()),
            weights_sha256=request["weights"],
            images_sha256=digest_images(hashes),
            model_transform=request["transform"],
            opened=said_beside(model),
        )
        save_run(run, output)
        shards.remove()
    num_searched = sum(len(shards.places(number)) for number in missing)
    return run, Progress(tuple(skipped), num_searched, seconds)


def _target_class(images: ImageSet, target: str | int) -> str | int:
    """Return the class that is meant: by folder, index or English name, or the index of a class without images."""
    names = images.class_names
    if not isinstance(target, str) or target in TARGET_CLASSES:
        return target
    if target.isdecimal() and target not in names.values():
        return int(target)
    return find_class(images.root, names, target)


@contextlib.contextmanager
def _keeping_what_is_finished(shards: Shards, processes: Processes, note: Callable[[str], None]) -> Iterator[None]:
    """Say what an interruption leaves behind; nothing, if no shard is finished."""
    try:
        yield
    except BaseException:
        finished = len(shards) - len(shards.missing())
        if finished and processes.rank == 0:
            note(f"{finished} of {len(shards)} shards are kept in {shards.folder}; the same command goes on from there")
        elif not finished and processes.count == 1:
            shards.remove()
        raise


def _describe_search(
    model: nn.Module, search: Search, images: ImageSet, batch_size: int, shard_size: int
) -> Mapping[str, Any]:
    """Say what the shards of a search depend on; the files of each are looked at beside that."""
    from vitprune import __version__

    nodes = tuple(dict.fromkeys(layer.kind for layer in search.layers))
    listed = json.dumps([images.files, images.labels])
    return {
        "vitprune": __version__,
        "architecture": architecture(model),
        "transform": data_config(model),
        "data folder": str(images.root),
        "list of images": hashlib.sha256(listed.encode()).hexdigest()[:16],
        "method": search.method,
        "top_k": search.top_k,
        "tokens": search.tokens,
        "quadrature": search.rule.name,
        "target": search.objective.target,
        "quantity": search.objective.quantity,
        "precision": search.precision,
        **({} if nodes == DEFAULT_NODES else {"nodes": list(nodes)}),
        **({"seed": search.seed} if REGISTRY[search.method].draws else {}),
        "batch size": batch_size,
        "shard size": shard_size,
    }
