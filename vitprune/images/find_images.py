"""Find images and number their classes as a model does."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitprune.batches import NO_LABEL
from vitprune.errors import VitpruneError
from vitprune.images.class_names import find_class, label_names_of
from vitprune.images.image_list import Listing, list_images
from vitprune.images.image_set import ImageSet
from vitprune.images.number_classes import Numbering, number_classes
from vitprune.images.text_rows import as_name

_SPLITS = frozenset({"train", "val", "valid", "validation", "test"})


@dataclass(frozen=True)
class ImageChoice:
    """Which images are meant, whatever model numbers their classes; arguments of ``find_images``.

    Attributes:
        root: folder of class folders, list of images, or .tar.
        class_map: file that numbers the classes.
        classes: only these.
        images_per_class: a random sample of each class.
        seed: of that sample.
    """

    root: str | Path
    class_map: str | Path | None = None
    classes: Sequence[str] | None = None
    images_per_class: int | None = None
    seed: int = 0

    def find(self, model: Any, *, labels_matter: bool = True) -> ImageSet:
        """Find the images, numbered as a model numbers its classes.

        Args:
            model: a timm model, or an opened ONNX file.
            labels_matter: whether a model without classifier is refused, and images whose classes cannot be told.

        Raises:
            VitpruneError: as ``find_images`` does.
        """
        return find_images(
            self.root,
            model.num_classes if labels_matter else model.num_classes or None,
            class_map=self.class_map,
            label_names=label_names_of(model) or None,
            classes=self.classes,
            images_per_class=self.images_per_class,
            seed=self.seed,
            labels_matter=labels_matter,
        )


def find_images(
    root: str | Path,
    num_classes: int | None,
    *,
    class_map: str | Path | None = None,
    label_names: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
    images_per_class: int | None = None,
    seed: int = 0,
    labels_matter: bool = True,
) -> ImageSet:
    """Find the images below ``root``/CLASS/, or where a list says, and number their classes as the model does.

    What numbers them is the first of: ``class_map``; ``label_names``; WordNet ids, where the model has as many outputs
    as a subset of ImageNet; names that are whole numbers, which are indices; sorted order, where there are as many
    classes as outputs and nobody would sort them in another way. Everything that Pillow can decode is an image; hidden
    files, and what operating systems leave behind, are none.

    Args:
        root: folder of class folders, whose images may lie deeper; a text or CSV file that lists images, relative to
            its own folder, with labels or without; or an uncompressed .tar with class folders, or with labels in
            webdataset's manner (``1.jpg``, ``1.cls``).
        num_classes: outputs of the model, where a single one stands for two classes; None where labels will not be
            used: folders are then numbered as sorted.
        class_map: a text file with one class name per line (line number = class index), a table of names and indices,
            or JSON: {class name: index}, {index: class name}, or a list of names.
        label_names: names of the model's classes, in order, where it knows them (``label_names_of``); other folders are
            left out.
        classes: keep only these, by folder name, class index, or the English name of a WordNet id (``tench``).
        images_per_class: keep a random sample of this size of each class (all, where a class has fewer).
        seed: of that sample.
        labels_matter: refuse images whose classes cannot be told; otherwise all of them are found, at any depth, with
            -1 for labels.

    Raises:
        VitpruneError: if there are no images, or nothing tells for sure which class of the model a folder is.

    >>> import tempfile
    >>> from PIL import Image
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for name in ("cat", "dog"):
    ...         (Path(folder) / name).mkdir()
    ...         Image.new("RGB", (8, 8)).save(Path(folder) / name / "1.png")
    ...     images = find_images(folder, 2)
    >>> images.files, images.labels, images.class_names
    (('cat/1.png', 'dog/1.png'), (0, 1), {0: 'cat', 1: 'dog'})
    """
    root = Path(root)
    if images_per_class is not None and images_per_class < 1:
        raise VitpruneError(f"images_per_class must be at least 1, got {images_per_class}")
    if num_classes is not None and num_classes < 1 and root.exists():
        raise VitpruneError("the model has no classifier (num_classes=0), so its classes cannot be named")
    listing = list_images(root)
    if listing.what == "class folders" and {name.lower() for name in listing.classes} & _SPLITS:
        _refuse_splits(root, listing.classes)
    in_classes = any(name is not None for name in listing.names)
    if listing.files and not in_classes and not (labels_matter or class_map or classes or images_per_class):
        return _without_labels(listing, "they are in no class folders")
    _check_classes(root, listing)
    try:
        numbering = _number(root, listing, num_classes, class_map, label_names)
    except VitpruneError as error:
        if labels_matter or class_map is not None or classes:
            raise
        return _without_labels(listing, str(error), images_per_class, seed)
    return _with_labels(root, listing, numbering, classes, images_per_class, seed)


def _refuse_splits(root: Path, folders: Sequence[str]) -> None:
    if {name.lower() for name in folders} <= _SPLITS:
        raise VitpruneError(
            f"{root} holds the splits {', '.join(folders)}; name one of them, such as {root / folders[0]}"
        )


def _check_classes(root: Path, listing: Listing) -> None:
    if listing.classes:
        if not listing.files or len(listing.strays) == len(listing.files):
            raise VitpruneError(f"{root}: no images in its {len(listing.classes)} class folders")
    elif listing.files:
        raise VitpruneError(
            f"{root}: nothing tells the classes of its {len(listing.files)} images, and labels are needed here; "
            + (
                f"expected {root}/CLASS/IMAGE, or a list of images with labels"
                if root.is_dir()
                else "add a label to each"
            )
        )
    else:
        raise VitpruneError(f"{root}: holds no class folders; expected {root}/CLASS/IMAGE")


def _number(
    root: Path,
    listing: Listing,
    num_classes: int | None,
    class_map: str | Path | None,
    label_names: Sequence[str] | None,
) -> Numbering:
    if num_classes is None:
        return Numbering({name: index for index, name in enumerate(listing.classes)}, "")
    if num_classes == 1 and len(listing.classes) > 1:  # one sigmoid, two classes
        num_classes = 2
    return number_classes(
        root, listing.classes, num_classes, class_map=class_map, label_names=label_names, what=listing.what
    )


def _with_labels(
    root: Path,
    listing: Listing,
    numbering: Numbering,
    classes: Sequence[str] | None,
    images_per_class: int | None,
    seed: int,
) -> ImageSet:
    index_of = numbering.index_of
    chosen = [name for name in listing.classes if name in index_of]
    if classes:
        chosen = _pick_classes(root, chosen, index_of, classes)
    files, labels = [], []
    for name, found in _sample(listing, images_per_class, seed).items():
        if name in chosen:
            files += found
            labels += [index_of[name]] * len(found)
    if not files:
        raise VitpruneError(f"{root}: no images in its {len(chosen)} {listing.what} {', '.join(chosen[:3])}")
    present = set(labels)
    return ImageSet(
        listing.root,
        tuple(files),
        tuple(labels),
        {index_of[name]: as_name(name) for name in chosen if index_of[name] in present},
        numbering.left_out,
        (*listing.passed_over, *listing.strays),
        numbering.described,
        numbering.label_names,
    )


def _without_labels(listing: Listing, reason: str, images_per_class: int | None = None, seed: int = 0) -> ImageSet:
    files = [file for found in _sample(listing, images_per_class, seed).values() for file in found]
    return ImageSet(
        listing.root,
        tuple(files),
        (NO_LABEL,) * len(files),
        passed_over=listing.passed_over,
        numbering=f"without labels: {reason}",
    )


def _sample(listing: Listing, images_per_class: int | None, seed: int) -> dict[str | None, list[str]]:
    """Return class name -> its files, at most so many of each, drawn at random."""
    files_of: dict[str | None, list[str]] = {}
    for file, name in zip(listing.files, listing.names, strict=True):
        files_of.setdefault(name, []).append(file)
    if images_per_class is None:
        return files_of
    return {
        name: sorted(random.Random(f"{seed} {name}").sample(files, images_per_class))
        if len(files) > images_per_class
        else files
        for name, files in files_of.items()
    }


def _pick_classes(root: Path, folders: list[str], index_of: Mapping[str, int], classes: Sequence[str]) -> list[str]:
    class_names = {index_of[folder]: folder for folder in folders}
    named = {name for name in classes if name in folders}  # a class map may give several folders one class
    wanted = {find_class(root, class_names, name) for name in classes if name not in named}
    return [folder for folder in folders if folder in named or index_of[folder] in wanted]
