"""How far a model's answers are from the dense model's, and how that changes with them: of classes, of embeddings.

Classes are compared by KL divergence, in nats; embeddings by cosine distance, 1 - cosine. Either has a second
derivative at the dense model's own answers, the Fisher information and the Gauss-Newton matrix, from which pruning
estimates what a unit is worth.

Letters: B images, C classes, P places of an answer (tokens, cells of a feature map), E width of an embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitprune.answers import ask, log_shares
from vitprune.sharing import mean_of_all, own_rows, sharing
from vitprune.views import has_classifier


@dataclass(frozen=True)
class AnswerLoss:
    """A way to compare answers.

    Attributes:
        unit: of ``diverge``, for one image.
        refer: answers of the dense model -> what others are compared with.
        diverge: (reference, answers) -> [B], float64, non-negative, 0 where they are the same.
        draw_directions: (answers, generator, several) -> a random direction for each image, of the answers' shape,
            whose second moment is the second derivative of ``diverge`` at answers equal to the dense model's.
    """

    unit: str
    refer: Callable[[Tensor], Tensor]
    diverge: Callable[[Tensor, Tensor], Tensor]
    draw_directions: Callable[..., Tensor]


def measure_divergence(dense_BC: Tensor, logits_BC: Tensor) -> Tensor:
    """Return KL(dense ‖ other) of each image [B] in nats, in float64.

    Args:
        dense_BC: log-probabilities of the dense model.
        logits_BC: logits of the other one.

    >>> measure_divergence(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[1.0, 1.0]])).tolist()
    [0.0]
    """
    dense_BC, other_BC = dense_BC.double(), log_shares(logits_BC.double())
    return (dense_BC.exp() * (dense_BC - other_BC)).sum(-1).clamp_min(0)


def draw_class_directions(logits_BC: Tensor, generator: torch.Generator, several: bool = False) -> Tensor:
    """Draw a direction of the logits for each image whose second moment is the Fisher information of its answer.

    That is diag(p) - p p^T of a softmax, and diag(p (1 - p)) of sigmoids: of one output, or of ``several`` classes
    for one image. With random signs s it is √p ⊙ s - p (√p · s). A label drawn from p would be right on average as
    well, but on an image that the model is sure of it says nothing at all but for rare surprises.

    Returns:
        [B, C], of the dtype and on the device of the logits.
    """
    wide_BC = at_least_float32(logits_BC.detach())
    sigmoids = several or logits_BC.shape[-1] == 1
    share_BC = wide_BC.sigmoid() if sigmoids else wide_BC.softmax(-1)
    signs_BC = _draw_signs(share_BC, generator)
    if sigmoids:
        return ((share_BC * (1 - share_BC)).sqrt() * signs_BC).to(logits_BC.dtype)
    root_BC = share_BC.sqrt() * signs_BC
    return (root_BC - share_BC * root_BC.sum(-1, keepdim=True)).to(logits_BC.dtype)


def cosine_distance(dense: Tensor, embeddings: Tensor) -> Tensor:
    """Return 1 - cosine to the dense model's embedding of each image [B], in float64; the mean over its places.

    Args:
        dense: embeddings of the dense model, [B, E] or [B, P, E].
        embeddings: of the other model, likewise.

    >>> cosine_distance(torch.tensor([[3.0, 0.0]]), torch.tensor([[1.0, 0.0]])).tolist()
    [0.0]
    """
    cosine = nn.functional.cosine_similarity(dense.double(), embeddings.double(), dim=-1)
    return (1 - cosine).clamp_min(0).reshape(len(dense), -1).mean(-1)


def draw_embedding_directions(embeddings: Tensor, generator: torch.Generator, several: bool = False) -> Tensor:
    """Draw a direction of each image's embedding whose second moment is the curvature of its cosine distance.

    At an embedding e of length ‖e‖ and direction ê that is (I - ê êᵀ) / ‖e‖²: the Gauss-Newton matrix of half the
    squared distance between directions. With random signs s it is (s - ê (ê · s)) / ‖e‖, over √P for P places.

    Args:
        embeddings: [B, E] or [B, P, E].
        generator: of the signs.
        several: of no meaning here.

    Returns:
        Of the shape and dtype of the embeddings, on their device.
    """
    wide = at_least_float32(embeddings.detach())
    length = wide.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    unit, signs = wide / length, _draw_signs(wide, generator)
    across = signs - unit * (unit * signs).sum(-1, keepdim=True)
    num_places = wide[0, ..., 0].numel()
    return (across / (length * num_places**0.5)).to(embeddings.dtype)


CLASSES = AnswerLoss("nats", log_shares, measure_divergence, draw_class_directions)
EMBEDDINGS = AnswerLoss("cosine distance", Tensor.detach, cosine_distance, draw_embedding_directions)


def answer_loss(model: nn.Module) -> AnswerLoss:
    """Return how answers of a model are compared: by their classes, or as embeddings where it has none.

    >>> import timm
    >>> answer_loss(timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=0)).unit
    'cosine distance'
    """
    return CLASSES if has_classifier(model) else EMBEDDINGS


@torch.no_grad()
def mean_divergence(dense: nn.Module, other: nn.Module, images: Sequence[Tensor]) -> float:
    """Return the mean over images of how far another model's answers are from the dense model's.

    Args:
        dense: model whose answers are the reference.
        other: model that answers the same.
        images: batches [B, 3, height, width], on the device of both.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=5).eval()
    >>> mean_divergence(model, model, [torch.randn(2, 3, 32, 32)]) < 1e-6
    True
    """
    loss = answer_loss(dense)
    losses = [loss.diverge(loss.refer(ask(dense, each)), ask(other, each)) for each in images]
    return mean_of_all(torch.cat(losses))


def _draw_signs(like: Tensor, generator: torch.Generator) -> Tensor:
    # Where processes share images, each draws the signs of all and takes those of its own.
    of_all = (len(like) * sharing().count, *like.shape[1:])
    return own_rows(torch.randint(0, 2, of_all, generator=generator)).to(like) * 2 - 1


def at_least_float32(tensor: Tensor) -> Tensor:
    """Widen 16-bit numbers, which cannot hold sums over many tokens."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
