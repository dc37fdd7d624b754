"""Images in class folders, their labels, and batches under the model's own transform."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import timm.data
import torch
from PIL import Image
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from vitprune.errors import VitpruneError
from vitprune.files import hash_file
from vitprune.views import data_config

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm"})
# Images [B, channels, height, width] and class labels [B].
Batches = Iterable[tuple[Tensor, Tensor]]

_WNID = re.compile(r"^n\d{8}$")
_SPLITS = frozenset({"train", "val", "valid", "validation", "test"})


@dataclass(frozen=True)
class ImageSet:
    """Which images, and which model output each belongs to.

    Attributes:
        root: the data folder, absolute.
        files: image files relative to ``root``, sorted.
        labels: per file, the index of its class among the model's outputs.
        class_names: class index -> folder name, for the classes present.
        left_out: names of folders below ``root`` that are none of the model's classes.
    """

    root: Path
    files: tuple[str, ...]
    labels: tuple[int, ...]
    class_names: Mapping[int, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.files)

    def head(self, count: int) -> ImageSet:
        """Return ``count`` images spread evenly over the set (all of them if there are fewer)."""
        if count >= len(self):
            return self
        picked = [index * len(self) // count for index in range(count)]
        return self.at(picked)

    def only(self, files: Sequence[str]) -> ImageSet:
        """Return the images named in ``files``, in this set's order."""
        wanted = set(files)
        return self.at([index for index, name in enumerate(self.files) if name in wanted])

    def only_classes(self, classes: Sequence[int]) -> ImageSet:
        """Return the images of some classes, renumbered: ``classes[i]`` becomes i."""
        position = {index: place for place, index in enumerate(classes)}
        picked = [index for index, label in enumerate(self.labels) if label in position]
        labels = tuple(position[self.labels[index]] for index in picked)
        names = {position[index]: name for index, name in self.class_names.items() if index in position}
        return replace(self, files=tuple(self.files[i] for i in picked), labels=labels, class_names=names)

    def at(self, picked: Sequence[int]) -> ImageSet:
        """Return the images at these places, in the order given."""
        labels = tuple(self.labels[index] for index in picked)
        present = set(labels)
        names = {label: name for label, name in self.class_names.items() if label in present}
        return replace(self, files=tuple(self.files[i] for i in picked), labels=labels, class_names=names)


@dataclass(frozen=True)
class ImageChoice:
    """Which images of a folder are meant, whatever model numbers their classes; arguments of ``find_images``.

    Attributes:
        root: folder of class folders.
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
            labels_matter: whether a model without classifier is refused.

        Raises:
            VitpruneError: as ``find_images`` does.
        """
        return find_images(
            self.root,
            model.num_classes if labels_matter else model.num_classes or None,
            class_map=self.class_map,
            label_names=getattr(model, "label_names", None),
            classes=self.classes,
            images_per_class=self.images_per_class,
            seed=self.seed,
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
) -> ImageSet:
    """Find the images below ``root``/CLASS/ and number their classes as the model does.

    Folders named by WordNet id are looked up among ImageNet's classes, whichever are present; other names need a
    ``class_map``, or must be as many as the model's outputs (sorted order).

    Args:
        root: folder of class folders.
        num_classes: outputs of the model; None where labels will not be used: folders are then numbered as sorted.
        class_map: a text file with one folder name per line (line number = class index), or a JSON object
            {folder name: class index}.
        label_names: folder names of the model's classes, in order, where it knows them (``model.label_names``); other
            folders are left out.
        classes: keep only these, by folder name, class index, or the English name of a WordNet id (``tench``).
        images_per_class: keep a random sample of this size of each class (all, where a class has fewer).
        seed: of that sample.

    Raises:
        VitpruneError: if there are no images, or a folder is no class of the model.

    >>> import tempfile
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
    if not root.is_dir():
        raise VitpruneError(f"{root}: no such data folder")
    if num_classes is not None and num_classes < 1:
        raise VitpruneError("the model has no classifier (num_classes=0), so its classes cannot be named")
    folders = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not folders:
        raise VitpruneError(f"{root}: holds no class folders; expected {root}/CLASS/IMAGE")
    if set(folders) <= _SPLITS:
        raise VitpruneError(
            f"{root} holds the splits {', '.join(folders)}; name one of them, such as {root / folders[0]}"
        )
    left_out: tuple[str, ...] = ()
    if label_names is not None and class_map is None:
        left_out = tuple(folder for folder in folders if folder not in label_names)
        folders = [folder for folder in folders if folder in label_names]
        if not folders:
            raise VitpruneError(f"{root} has none of the model's {len(label_names)} classes ({label_names[0]}, ...)")
        index_of = {folder: label_names.index(folder) for folder in folders}
    else:
        index_of = _number_classes(root, folders, num_classes, class_map)
    if classes:
        folders = _pick_classes(root, folders, index_of, classes)
    files, labels = [], []
    for folder in folders:
        found = sorted(
            path.relative_to(root).as_posix()
            for path in (root / folder).rglob("*")
            if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
        )
        if images_per_class is not None and len(found) > images_per_class:
            found = sorted(random.Random(f"{seed} {folder}").sample(found, images_per_class))
        files += found
        labels += [index_of[folder]] * len(found)
    if not files:
        raise VitpruneError(
            f"{root}: no images ({', '.join(sorted(IMAGE_SUFFIXES))}) in its {len(folders)} class folders"
        )
    present = set(labels)
    names = {index_of[folder]: folder for folder in folders if index_of[folder] in present}
    return ImageSet(root.absolute(), tuple(files), tuple(labels), names, left_out)


def _number_classes(
    root: Path, folders: list[str], num_classes: int | None, class_map: str | Path | None
) -> dict[str, int]:
    if num_classes is None:
        return {folder: index for index, folder in enumerate(folders)}
    if class_map is not None:
        numbered, source = _read_class_map(Path(class_map)), str(class_map)
    elif all(_WNID.match(folder) for folder in folders) and infer_imagenet_subset({"num_classes": num_classes}):
        subset = infer_imagenet_subset({"num_classes": num_classes})
        numbered = {name: index for index, name in enumerate(ImageNetInfo(subset).label_names())}
        source = f"{subset}'s {num_classes} classes"
    elif len(folders) == num_classes:
        return {folder: index for index, folder in enumerate(folders)}
    else:
        raise VitpruneError(
            f"{root} has {len(folders)} class folders ({folders[0]}, ...) but the model has {num_classes} outputs; "
            "say which is which with `class_map`"
        )
    unknown = [folder for folder in folders if folder not in numbered]
    if unknown:
        raise VitpruneError(f"{root}: '{unknown[0]}' ({len(unknown)} of {len(folders)} folders) is not in {source}")
    beyond = [folder for folder in folders if not 0 <= numbered[folder] < num_classes]
    if beyond:
        raise VitpruneError(
            f"{source}: class {numbered[beyond[0]]} of '{beyond[0]}' is beyond the {num_classes} outputs"
        )
    return {folder: numbered[folder] for folder in folders}


def _read_class_map(path: Path) -> dict[str, int]:
    if not path.is_file():
        raise VitpruneError(f"class map {path}: no such file")
    try:
        text = path.read_text()
    except UnicodeDecodeError as error:
        raise VitpruneError(f"class map {path}: not a text file") from error
    if path.suffix != ".json":
        return {line.strip(): index for index, line in enumerate(text.splitlines()) if line.strip()}
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise VitpruneError(f"class map {path}: not a JSON file ({error})") from error
    if not isinstance(content, dict) or not all(type(index) is int for index in content.values()):
        raise VitpruneError(f"class map {path}: expected an object {{folder name: class index}}")
    return content


def _pick_classes(root: Path, folders: list[str], index_of: Mapping[str, int], classes: Sequence[str]) -> list[str]:
    class_names = {index_of[folder]: folder for folder in folders}
    named = {name for name in classes if name in folders}  # a class map may give several folders one class
    wanted = {find_class(root, class_names, name) for name in classes if name not in named}
    return [folder for folder in folders if folder in named or index_of[folder] in wanted]


def find_class(root: str | Path, class_names: Mapping[int, str], name: str) -> int:
    """Return the class index that a user means by a folder name, a class index or an English name.

    Args:
        root: the data folder, for the message.
        class_names: class index -> folder name, of the classes to choose from.
        name: as the user wrote it; English names (of WordNet ids) in any case.

    Raises:
        VitpruneError: if no class has this name, or several have.

    >>> find_class("photos", {0: "n01440764", 217: "n02102040"}, "English springer")
    217
    """
    for index, folder in class_names.items():
        if name == folder:
            return index
    if name in map(str, class_names):
        return int(name)
    named = [index for index, folder in class_names.items() if name.lower() in map(str.lower, _english_names(folder))]
    if not named:
        raise VitpruneError(
            f"class '{name}' is neither a folder of {root} nor the index or English name of one: "
            f"there are no images of class '{name}'"
        )
    if len(named) > 1:
        raise VitpruneError(f"class '{name}' may be {' or '.join(class_names[index] for index in named)}; name one")
    return named[0]


def describe_class(name: str) -> str:
    """Return a class name that people can read: the first lemma of a WordNet id, any other name as it is."""
    return next(iter(_english_names(name)), name)


def class_names(model: Any) -> tuple[str, ...]:
    """Return what a model's classes are called: its own names, or ImageNet's, where it has as many as a subset of that.

    Empty where nobody knows.
    """
    own = getattr(model, "label_names", None)
    if own:
        return tuple(describe_class(name) for name in own)
    subset = infer_imagenet_subset(model) if getattr(model, "num_classes", 0) else None
    return tuple(ImageNetInfo(subset).label_descriptions()) if subset else ()


def _english_names(folder: str) -> list[str]:
    info, known = _wordnet()
    return info.label_name_to_description(folder).split(", ") if folder in known else []


@cache
def _wordnet() -> tuple[ImageNetInfo, frozenset[str]]:
    info = ImageNetInfo("imagenet-22k")
    return info, frozenset(info.label_names())


def hash_images(images: ImageSet) -> tuple[str, ...]:
    """Return a content hash of each image file (16 hexadecimal digits; empty for one that cannot be read)."""

    def hash_or_nothing(path: Path) -> str:
        try:
            return hash_file(path)
        except OSError:  # such an image is skipped, or refused, when it is decoded
            return ""

    return tuple(hash_or_nothing(images.root / name) for name in images.files)


def digest_images(hashes: Iterable[str]) -> str:
    """Return one hash (64 hexadecimal digits) for a collection of images, whatever their names and their order.

    Args:
        hashes: of their contents, as ``hash_images`` gives them.

    >>> digest_images(["b", "a", ""]) == digest_images(["a", "b"])
    True
    """
    return hashlib.sha256("".join(sorted(set(hashes) - {""})).encode()).hexdigest()


def on_device(model: nn.Module, batches: Batches) -> Batches:
    """Move batches to a model's device, and their images to its dtype."""
    parameter = next(model.parameters(), torch.zeros(0))
    for images, labels in batches:
        yield images.to(parameter.device, parameter.dtype), labels.to(parameter.device)


def take_evenly(batches: Batches, num_images: int, *, batch_size: int = 32) -> list[tuple[Tensor, Tensor]]:
    """Return at most this many images with their labels, evenly spread; all, where there are fewer. Kept in memory.

    Args:
        batches: pairs of images [B, channels, height, width] and labels [B]. Read once.
        num_images: at most.
        batch_size: of what is returned.

    >>> batches = [(torch.zeros(4, 3, 2, 2), torch.arange(4)), (torch.zeros(2, 3, 2, 2), torch.arange(4, 6))]
    >>> [labels.tolist() for _images, labels in take_evenly(batches, 3, batch_size=2)]
    [[0, 2], [4]]
    """
    kept: list[tuple[Tensor, Tensor]] = []
    every, passed = 1, 0
    for images, labels in batches:
        for pair in zip(images, labels, strict=True):
            if passed % every == 0:
                kept.append(pair)
            passed += 1
            if len(kept) == 2 * num_images:
                kept, every = kept[::2], 2 * every
    if len(kept) > num_images:
        kept = [kept[place * len(kept) // num_images] for place in range(num_images)]
    starts = range(0, len(kept), batch_size)
    parts = [zip(*kept[start : start + batch_size], strict=True) for start in starts]
    return [(torch.stack(images), torch.stack(labels)) for images, labels in parts]


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


class ImageBatches:
    """Batches of an image set under the model's own transform; may be read any number of times.

    Iterating yields images (float32 [B, channels, height, width], normalised) and labels (int64 [B]). Images that
    cannot be decoded are left out; ``skipped`` then names them with the reason, ``files_read`` names the others in
    order, both as of the last complete pass.

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
        self._loader = DataLoader(
            _Decoded(images, data_config(model) if transform is None else transform),
            batch_size=batch_size,
            num_workers=num_workers,
            collate_fn=list,
            pin_memory=False,
        )

    def __len__(self) -> int:
        return len(self._loader)

    def read(self) -> Iterator[ReadBatch]:
        """Read all batches, those without a single good image among them, and say which files they are of."""
        for decoded in self._loader:
            good = [(index, image) for index, image, _reason in decoded if image is not None]
            skipped = [(self.images.files[index], reason) for index, image, reason in decoded if image is None]
            if skipped and self.strict:
                name, reason = skipped[0]
                raise VitpruneError(f"{self.images.root / name}: cannot be decoded ({reason})")
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
        if not self.files_read:
            name, reason = self.skipped[0]
            raise VitpruneError(f"{self.images.root}: no image could be decoded (first: {name}, {reason})")


class _Decoded(Dataset):
    def __init__(self, images: ImageSet, config: Mapping[str, Any]) -> None:
        self.images = images
        self.mode = "L" if config["input_size"][0] == 1 else "RGB"
        self.transform = timm.data.create_transform(**config, is_training=False)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[int, Tensor | None, str]:
        try:
            with Image.open(self.images.root / self.images.files[index]) as image:
                return index, self.transform(image.convert(self.mode)), ""
        except Exception as error:  # decoders raise whatever a damaged file makes them stumble over
            return index, None, str(error).splitlines()[0] if str(error) else type(error).__name__
