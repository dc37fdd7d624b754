"""What embeddings are worth: how near one model's are to another's, and what their neighbours say of classes.

Letters: I images, B images of a batch, E numbers of an embedding, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitprune.answers import ask
from vitprune.data import Batches, on_device
from vitprune.entry import entry
from vitprune.errors import VitpruneError
from vitprune.images.class_map import names_in_order
from vitprune.images.resized_batches import follow_size
from vitprune.seen_images import UnseenBatches, check_labels, files_of, seen_by, watch
from vitprune.sharing import gather_rows
from vitprune.views import data_config

# Caron et al., ICCV 2021 (arXiv:2104.14294): votes of the 20 nearest, by exp(cosine / 0.07).
NUM_NEIGHBOURS, TEMPERATURE = 20, 0.07
# Whose neighbours two models are asked for.
NUM_COMPARED = 10


@dataclass(frozen=True)
class Fidelity:
    """How near embeddings are to those of another model, for the same images.

    Attributes:
        cosines: of each image, in the order read, in [-1, 1]; of several tokens or cells the mean.
        agreement: share of an image's nearest others that are the same for both models, in [0, 1].
        num_neighbours: how many of them were asked for.
    """

    cosines: tuple[float, ...]
    agreement: float
    num_neighbours: int

    @property
    def mean_cosine(self) -> float:
        """The mean over images."""
        return float(np.mean(self.cosines))

    @property
    def least_cosine(self) -> float:
        """Of the image that has moved most."""
        return min(self.cosines)

    @property
    def tenth_cosine(self) -> float:
        """What nine of ten images have at least."""
        return float(np.quantile(self.cosines, 0.1))

    def __str__(self) -> str:
        return (
            f"cosine {self.mean_cosine:.4f} in the mean of {len(self.cosines)} images, {self.tenth_cosine:.4f} or more "
            f"for nine of ten, {self.least_cosine:.4f} at least\n{self.agreement:.1%} of the {self.num_neighbours} "
            "nearest others of an image are the same"
        )

    def __repr__(self) -> str:
        return str(self)


@entry(any_module=True)
def embed(model: Callable[[Tensor], Tensor], batches: Batches) -> Tensor:
    """Return embeddings of unit length [I, E]; float32, on the CPU.

    The places of token outputs and feature maps stand behind each other, each of unit length over the root of their
    number, so that the product of two embeddings is the mean cosine over places.

    Args:
        model: timm model without classes, an ONNX file opened with ``vitprune.open_onnx``, or anything that maps images
            to embeddings.
        batches: pairs of images [B, 3, height, width] (normalised by the model's own transform) and labels, which are
            not used. Read once.

    Raises:
        VitpruneError: if there are no images, or the model answers no embeddings.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=0, img_size=32)
    >>> embed(model, [(torch.randn(2, 3, 32, 32), torch.zeros(2))]).shape
    torch.Size([2, 192])
    """
    parts = [_embed(model, images) for images, _labels in _on_device(model, batches)]
    if not parts:
        raise VitpruneError("no images to embed")
    return gather_rows(torch.cat(parts))


@entry(any_module=True)
def compare_embeddings(
    model: Callable[[Tensor], Tensor],
    dense: Callable[[Tensor], Tensor],
    batches: Batches,
    *,
    num_neighbours: int = NUM_COMPARED,
    allow_overlap: bool = False,
) -> Fidelity:
    """Measure how near a model's embeddings are to another's, image by image and among themselves.

    Args:
        model: as for ``embed``.
        dense: the one to compare with, such as the model that ``model`` was pruned from. Where it reads images of
            another size, it gets them so.
        batches: pairs of images [B, 3, height, width] (normalised by ``model``'s transform) and labels, which are not
            used; readable more than once.
        num_neighbours: how many nearest others of an image to compare; fewer where there are no more images.
        allow_overlap: compare on images that had a say in a model as well.

    Raises:
        VitpruneError: if there are fewer than two images, embeddings differ in width, or an image had a say in a model.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=0, img_size=32)
    >>> fidelity = compare_embeddings(model, model, [(torch.randn(3, 3, 32, 32), torch.zeros(3))])
    >>> round(fidelity.least_cosine, 4), fidelity.agreement
    (1.0, 1.0)
    """
    of_dense = follow_size(batches, dense, model)
    seen = seen_by(model) | seen_by(dense)
    embedded = [
        embed(each, UnseenBatches(read, seen, allow_overlap=allow_overlap))
        for each, read in ((model, batches), (dense, of_dense))
    ]
    return compare_embedded(*embedded, num_neighbours=num_neighbours)


def compare_embedded(embedded_IE: Tensor, dense_IE: Tensor, *, num_neighbours: int = NUM_COMPARED) -> Fidelity:
    """Compare what ``embed`` gave for the same images.

    Raises:
        VitpruneError: as ``compare_embeddings`` does.

    >>> compare_embedded(torch.eye(3), torch.eye(3)).cosines
    (1.0, 1.0, 1.0)
    """
    if embedded_IE.shape != dense_IE.shape:
        raise VitpruneError(
            f"embeddings are {list(embedded_IE.shape)} and {list(dense_IE.shape)} (images, numbers): they cannot be "
            "compared"
        )
    if len(embedded_IE) < 2:
        raise VitpruneError("one image has no neighbours; compare at least two")
    num_neighbours = min(num_neighbours, len(embedded_IE) - 1)
    cosines = (embedded_IE.double() * dense_IE.double()).sum(1)
    first, second = (_nearest(each, num_neighbours) for each in (embedded_IE, dense_IE))
    shared = (first[:, :, None] == second[:, None, :]).any(2).double().mean()
    return Fidelity(tuple(cosines.tolist()), float(shared), num_neighbours)


def describe_fidelity(fidelity: Fidelity) -> dict[str, Any]:
    """Return what was measured of all images together, as JSON values.

    >>> describe_fidelity(Fidelity((1.0, 0.5), 0.25, 1))["mean_cosine"]
    0.75
    """
    return {
        "mean_cosine": fidelity.mean_cosine,
        "tenth_cosine": fidelity.tenth_cosine,
        "least_cosine": fidelity.least_cosine,
        "agreement": fidelity.agreement,
        "num_neighbours": fidelity.num_neighbours,
        "num_images": len(fidelity.cosines),
    }


def read_fidelity(content: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Fidelity:
    """Return what ``describe_fidelity`` said, with the ``cosine`` of each image's row."""
    return Fidelity(tuple(row["cosine"] for row in rows), content["agreement"], content["num_neighbours"])


class NeighbourClassifier:
    """An encoder that answers classes: those of the nearest among images whose classes are known.

    Call it like a torch model: images [B, 3, height, width] -> probabilities [B, C].

    Args:
        encoder: as for ``embed``.
        batches: images of known classes, and their labels.
        label_names: what the classes are called, in order; None: as the folders are that ``batches`` are read from.
        num_neighbours: how many vote, each by exp(cosine / 0.07).

    Attributes:
        num_classes: C.
        label_names: their names; None where nobody knows.
        data_config: the transform that its images need.
        calibration: hashes of the images that had a say in the encoder, and of those of known classes.

    Raises:
        VitpruneError: if there are no images, or they have no labels.

    Source:
        Caron et al., ICCV 2021 (arXiv:2104.14294), section 4.1.

    >>> known = [(torch.eye(3).view(3, 1, 1, 3), torch.tensor([0, 1, 2]))]
    >>> classifier = NeighbourClassifier(lambda images: images.flatten(1), known, num_neighbours=1)
    >>> classifier(torch.tensor([[[[0.1, 0.9, 0.2]]]])).tolist()
    [[0.0, 1.0, 0.0]]
    """

    @entry(any_module=True)
    def __init__(
        self,
        model: Callable[[Tensor], Tensor],
        batches: Batches,
        *,
        label_names: Sequence[str] | None = None,
        num_neighbours: int = NUM_NEIGHBOURS,
    ) -> None:
        from sklearn.neighbors import KNeighborsClassifier

        if num_neighbours < 1:
            raise VitpruneError(f"`num_neighbours` must be at least 1, got {num_neighbours}")
        check_labels(None, batches)
        watched, parts, labels = watch(batches), [], []
        for images, of_images in _on_device(model, watched):
            parts.append(_embed(model, images))
            labels.append(of_images.cpu())
        if not parts:
            raise VitpruneError("no images of known classes")
        known_I, embedded_IE = gather_rows(torch.cat(labels)), gather_rows(torch.cat(parts))
        if known_I.ndim != 1 or bool((known_I < 0).any()):
            raise VitpruneError("neighbours vote for one class each, and some of these images have none or several")
        self.encoder = model
        self.label_names = tuple(label_names or _names_of(batches)) or None
        self.num_classes = len(self.label_names or ()) or int(known_I.max()) + 1
        self.calibration = seen_by(model) | watched.seen.sha256
        self.num_neighbours = min(num_neighbours, len(known_I))
        self._votes = KNeighborsClassifier(self.num_neighbours, weights=_weigh, metric="cosine", algorithm="brute")
        self._votes.fit(embedded_IE.numpy(), known_I.numpy())

    @property
    def data_config(self) -> dict[str, Any]:
        """The transform that its images need, as timm describes it."""
        return data_config(self.encoder)

    def __call__(self, images: Tensor) -> Tensor:
        """Return probabilities [B, C] of images [B, 3, height, width]; float32, on the CPU."""
        ((images, _labels),) = _on_device(self.encoder, [(images, torch.zeros(len(images)))])
        found = self._votes.predict_proba(_embed(self.encoder, images).numpy())
        shares_BC = torch.zeros(len(images), self.num_classes)
        shares_BC[:, torch.from_numpy(self._votes.classes_)] = torch.from_numpy(found).float()
        return shares_BC


def _names_of(batches: Batches) -> tuple[str, ...]:
    images = files_of(batches)
    numbered = {} if images is None else {name: index for index, name in images.class_names.items()}
    return names_in_order(numbered, len(numbered))


def _weigh(distances: np.ndarray) -> np.ndarray:
    """Return a vote for each cosine distance; the nearest has one, so that none overflows."""
    return np.exp((distances.min(1, keepdims=True) - distances) / TEMPERATURE)


def _on_device(model: Callable[[Tensor], Tensor], batches: Batches) -> Batches:
    return on_device(model, batches) if isinstance(model, nn.Module) else batches


@torch.inference_mode()
def _embed(model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    places = nn.functional.normalize(ask(model, images).float(), dim=-1)
    places = places.unsqueeze(1) if places.ndim == 2 else places
    return (places / places.shape[1] ** 0.5).flatten(1).cpu()


def _nearest(embedded_IE: Tensor, count: int) -> Tensor:
    from sklearn.neighbors import NearestNeighbors

    found = NearestNeighbors(n_neighbors=count, metric="cosine", algorithm="brute").fit(embedded_IE.numpy())
    return torch.from_numpy(found.kneighbors(return_distance=False))
