"""Result files of the paper's authors as a run: their paths, the images they are of, and what a model says of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from vitprune.data import ImageBatches, ImageSet, digest_images, hash_images
from vitprune.discovery.run import Run
from vitprune.errors import VitpruneError
from vitprune.interop.adopt import (
    LEAST_AGREEMENT,
    Agreement,
    adopt,
    assign_images,
    authors_transform,
    describe_search,
)
from vitprune.interop.authors import AuthorsPaths
from vitprune.models.identity import hash_weights, said_beside
from vitprune.progress import Track, untracked
from vitprune.views import data_config

# What their model_type is called by timm.
_TIMM_NAMES = {
    "ViT-B_16": "vit_base_patch16_224",
    "ViT-B_32": "vit_base_patch32_224",
    "ViT-L_32": "vit_large_patch32_224",
}


@dataclass(frozen=True)
class Converted:
    """A run that was made of another program's files.

    Attributes:
        run: ready to be saved. Its class scores are unknown: [0, H].
        agreement: of the model with the files.
        scores_computed: whether the joint scores were computed, because the files have none.
        transform: how the images were prepared, in the words of ``data_config``.
        differs: keys of ``transform`` in which it is not the model's own.
        without_paths: folder names of the classes of the images that the files have no paths of; they are left out.
    """

    run: Run
    agreement: Agreement
    scores_computed: bool
    transform: Mapping[str, Any]
    differs: tuple[str, ...]
    without_paths: tuple[str, ...]


def name_model(args: Mapping[str, Any]) -> str | None:
    """Return the timm name of the model that paths were found on, as far as their ``args.json`` tells.

    >>> name_model({"model_type": "ViT-B_16"}), name_model({"model_type": "ViT-X"})
    ('vit_base_patch16_224', None)
    """
    name = args.get("model_type")
    return _TIMM_NAMES.get(name, name if "vitprune" in args else None)


def read_as_run(
    paths: AuthorsPaths,
    model: nn.Module,
    images: ImageSet,
    *,
    name: str,
    checkpoint: str | Path | None = None,
    least_agreement: float = LEAST_AGREEMENT,
    batch_size: int = 32,
    num_workers: int = 0,
    note: Callable[[str], None] | None = None,
    track: Track = untracked,
) -> Converted:
    """Make a run of paths that the authors' program found.

    Images are prepared as their program does; where the files say which images they are of, only those are taken. One
    pass over them gives what their files lack, as in ``adopt``.

    Args:
        paths: as ``read_authors`` returns them.
        model: that they were found on: timm Vision Transformer in eval mode; images [B, channels, height, width] ->
            logits [B, C].
        images: of the paths. A class without paths is left out, and so are paths of a class without images.
        name: what the model was loaded by, for the run: timm name, or folder of a saved model.
        checkpoint: file of its weights, for the run; None where the hub or the folder has them.
        least_agreement: share of the activation neurons (or scores) in the files that the model must have as well, in
            [0, 1].
        batch_size: B, images at once.
        num_workers: processes that decode images; 0: this one.
        note: receives one line for people where something is computed or left out.
        track: wraps (items, description), for progress.

    Raises:
        VitpruneError: if the paths are not of this model or these images, or it agrees with less of the files.

    Source:
        arXiv:2503.09046, its released program.
    """
    note = note or (lambda _line: None)
    _check_reading(batch_size, num_workers)
    search = describe_search(paths, model)
    transform = authors_transform(paths.args, model)
    searched = paths.args.get("vitprune", {}).get("images")
    if searched is not None:  # a sample of the folder perhaps
        images = images.only(searched)
    assigned = assign_images(paths, images)
    if assigned.joint_scores is None:
        note("the files have no joint scores of whole paths; they are computed")
    batches = ImageBatches(
        assigned.images, model, batch_size=batch_size, num_workers=num_workers, strict=True, transform=transform
    )
    found, agreement = adopt(model, search, assigned, track(batches, "convert"), least_agreement=least_agreement)
    own = data_config(model)
    differs = tuple(sorted(key for key, value in own.items() if transform[key] != value))
    without = sorted(set(images.labels) - set(paths.neurons))
    without_paths = tuple(images.class_names[index] for index in without)
    if without_paths:
        note(f"left out {len(without_paths)} classes of {images.root} that have no paths (first: {without_paths[0]})")
    run = Run(
        found=found,
        images=assigned.images,
        model=str(Path(name).resolve()) if Path(name).is_dir() else name,
        checkpoint=None if checkpoint is None else str(Path(checkpoint).resolve()),
        weights_sha256=hash_weights(model),
        transform=transform if differs else None,
        images_sha256=digest_images(hash_images(assigned.images)),
        model_transform=own,
        opened=said_beside(model),
    )
    return Converted(run, agreement, assigned.joint_scores is None, transform, differs, without_paths)


def _check_reading(batch_size: int, num_workers: int) -> None:
    if batch_size < 1:
        raise VitpruneError(f"batch_size must be at least 1, got {batch_size}")
    if num_workers < 0:
        raise VitpruneError(f"workers must not be negative, got {num_workers}")
