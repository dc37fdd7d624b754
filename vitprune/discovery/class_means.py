"""Classes for an encoder that has none: how similar an embedding is to the mean of a class.

Letters: B images, C classes, E numbers of an embedding.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from vitprune.answers import ask
from vitprune.batches import NO_LABEL
from vitprune.data import Batches, on_device
from vitprune.errors import VitpruneError
from vitprune.views import has_classifier

COSINE = "cosine"


class CosineToMeans(nn.Module):
    """Answer embeddings [B, E] by their cosine to each class's mean [B, C].

    Args:
        means_CE: of any length; their directions count.

    >>> CosineToMeans(torch.eye(2))(torch.tensor([[3.0, 0.0]])).tolist()
    [[1.0, 0.0]]
    """

    def __init__(self, means_CE: Tensor) -> None:
        super().__init__()
        self.register_buffer("means_CE", nn.functional.normalize(means_CE, dim=-1))

    def forward(self, x_BE: Tensor) -> Tensor:
        """Return cosines [B, C]."""
        return nn.functional.normalize(x_BE, dim=-1) @ self.means_CE.T


@torch.no_grad()
def answer_by_class_means(model: nn.Module, batches: Batches) -> nn.Module:
    """Return a copy of an encoder that answers how similar an image is to the mean of each class.

    The mean is of the directions of the embeddings of the class's images.

    Args:
        model: without classes, in eval mode; pooled embeddings [B, E].
        batches: images and the labels of their classes. Read once.

    Raises:
        VitpruneError: if the model has classes, or answers tokens; if images have no label, or a class no image.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=0, img_size=32).eval()
    >>> of_classes = answer_by_class_means(model, [(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 1, 2]))])
    >>> of_classes(torch.randn(2, 3, 32, 32)).shape
    torch.Size([2, 3])
    """
    if has_classifier(model):
        raise VitpruneError(
            f"`quantity` {COSINE} is the similarity of embeddings to the mean of a class, and this model has "
            f"{model.num_classes} classes; use probability or logit"
        )
    sums: dict[int, Tensor] = {}
    for images, labels in on_device(model, batches):
        embedded = ask(model, images)
        if embedded.ndim != 2:
            raise VitpruneError(
                f"{type(model).__name__} answers several tokens or a feature map, which have no mean of a class; "
                "build it with a pooling (global_pool)"
            )
        if labels.ndim != 1 or bool((labels == NO_LABEL).any()):
            raise VitpruneError("the mean of a class needs one label for each image, and some have none or several")
        for label, unit_E in zip(labels.tolist(), nn.functional.normalize(embedded, dim=-1), strict=True):
            sums[label] = sums.get(label, 0) + unit_E.double()
    missing = sorted(set(range(max(sums, default=0) + 1)) - set(sums))
    if len(sums) < 2 or missing:
        raise VitpruneError(
            f"{len(sums)} classes have images"
            + (f" and class {missing[0]} has none" if missing else "")
            + "; similarity to a class needs at least two, numbered without gaps"
        )
    result, parameter = copy.deepcopy(model), next(model.parameters())
    head = CosineToMeans(torch.stack([sums[label] for label in sorted(sums)]).to(parameter))
    own = getattr(model, "head", nn.Identity())
    result.head = head if isinstance(own, nn.Identity) else nn.Sequential(own, head)
    result.num_classes = len(sums)
    return result.eval()
