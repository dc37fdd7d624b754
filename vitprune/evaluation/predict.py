"""The verb: what a model answers to some images, by name.

Letters: B images, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitprune.answers import ask, give_shares, log_shares
from vitprune.data import Batches, ImageBatches, ImageSet, class_names, on_device
from vitprune.entry import entry
from vitprune.errors import VitpruneError
from vitprune.images.image_list import list_images
from vitprune.views import has_classifier


@dataclass(frozen=True)
class Prediction:
    """What a model answers to one image.

    Attributes:
        file: path of the image.
        classes: indices of the likeliest classes, first to last.
        names: what they are called; empty where nobody knows.
        probabilities: of these, in [0, 1].
    """

    file: str
    classes: tuple[int, ...]
    names: tuple[str, ...]
    probabilities: tuple[float, ...]

    def __str__(self) -> str:
        named = self.names or tuple(map(str, self.classes))
        told = ", ".join(f"{p:.4f} {name}" for p, name in zip(self.probabilities, named, strict=True))
        return f"{self.file}: {told}"


@entry
@torch.inference_mode()
def predict(
    model: Callable[[Tensor], Tensor], images: Sequence[str | Path], *, top_k: int = 5, batch_size: int = 16
) -> list[Prediction]:
    """Ask a model what is on some images.

    Args:
        model: timm model, or an opened ONNX file; images go through its own transform.
        images: files, or folders, lists and archives of some.
        top_k: classes named for each, at most.
        batch_size: images at once.

    Raises:
        VitpruneError: if an image is not there or cannot be decoded, or the model has no classes.

    >>> import tempfile, timm
    >>> from PIL import Image
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=2)
    >>> model.label_names = ("cat", "dog")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     Image.new("RGB", (40, 40)).save(Path(folder) / "1.png")
    ...     found = predict(model, [Path(folder) / "1.png"], top_k=2)
    >>> sorted(found[0].names), round(sum(found[0].probabilities), 5)
    (['cat', 'dog'], 1.0)
    """
    if isinstance(model, nn.Module) and not has_classifier(model):
        raise VitpruneError("the model has no classifier (num_classes=0), so it has no classes to answer with")
    if top_k < 1:
        raise VitpruneError(f"`top_k` must be at least 1, got {top_k}")
    if not images:
        raise VitpruneError("name at least one image")
    names = class_names(model)
    predictions = []
    for chosen in map(_find, images):
        batches = ImageBatches(chosen, model, batch_size=batch_size, strict=True)
        shares_IC = torch.cat([_shares(model, batch) for batch in _on(model, batches)])
        for file, shares_C in zip(chosen.files, shares_IC, strict=True):
            best = shares_C.topk(min(top_k, len(shares_C)))
            classes = tuple(best.indices.tolist())
            named = tuple(names[index] for index in classes) if len(names) == len(shares_C) else ()
            predictions.append(Prediction(str(chosen.root / file), classes, named, tuple(best.values.tolist())))
    return predictions


def _on(model: Any, batches: Batches) -> Batches:
    return (images for images, _labels in (on_device(model, batches) if isinstance(model, nn.Module) else batches))


def _shares(model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    answers = ask(model, images).cpu().double()
    return answers if give_shares(answers) else log_shares(answers).exp()


def _find(path: str | Path) -> ImageSet:
    """Return the images that a path stands for: one file, or all in a folder, a list or an archive."""
    path = Path(path)
    if path.is_file() and path.suffix.lower() not in (".txt", ".csv", ".tsv", ".tar"):
        return ImageSet(path.absolute().parent, (path.name,), (-1,))
    if not path.exists():
        raise VitpruneError(f"{path}: no such image or folder")
    found = list_images(path)
    if not found.files:
        raise VitpruneError(f"{path}: no images")
    root = path.absolute() if path.is_dir() or path.suffix == ".tar" else path.absolute().parent
    return ImageSet(root, tuple(found.files), (-1,) * len(found.files))
