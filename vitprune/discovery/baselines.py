"""Paths by simpler rules than the joint attribution score, with the same result.

Letters: B images, T scoped tokens, H nodes of a layer, L layers of the path, K selected nodes per layer.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from vitprune.discovery.best import best_neurons
from vitprune.discovery.engine import CHUNK_ROWS, PathBatch, score_alone, score_paths
from vitprune.discovery.search import Search
from vitprune.models.trunk import record_clean, scope_slice
from vitprune.models.units import capture

INFLUENCE_STEPS = 20


def activation_paths(
    model: nn.Module, search: Search, images: Tensor, labels: Tensor, *, chunk_rows: int = CHUNK_ROWS
) -> PathBatch:
    """Select the neurons with the highest clean activation at the scoped tokens (mean over tokens).

    Arguments and result as in ``search_paths``; ``scores`` are the activations.

    Source:
        The "Activation" baseline of arXiv:2503.09046.
    """
    clean = record_clean(model, search.layers, images, tokens=scope_slice(model, search.tokens))
    scores = tuple(hidden_BTH.mean(1) for hidden_BTH in clean.hidden_BTH)
    return _as_paths(model, search, images, labels, scores, clean.logits_BC, chunk_rows=chunk_rows)


def influence_pattern_paths(
    model: nn.Module, search: Search, images: Tensor, labels: Tensor, *, chunk_rows: int = CHUNK_ROWS
) -> PathBatch:
    """Select the neurons with the highest mean gradient of the class probability along the scaled input.

    The normalised image is multiplied by α = 0, .05 .. .95 and nothing is clamped. Arguments and result as in
    ``search_paths``; ``scores`` are the mean gradients.

    Source:
        Lu et al., "Influence Patterns for Explaining Information Flow in BERT", NeurIPS 2021 (arXiv:2011.00740), as the
        baseline of arXiv:2503.09046 computes it.
    """
    tokens = scope_slice(model, search.tokens)
    logits = record_clean(model, search.layers, images, tokens=tokens).logits_BC
    classes_B = search.objective.classes(labels, logits)
    sums: list[Tensor] = []
    for step in range(INFLUENCE_STEPS):
        with capture(model, search.layers) as hidden:
            value = search.objective.value(model(images * (step / INFLUENCE_STEPS)), classes_B)
            gradients = torch.autograd.grad(value.sum(), list(hidden.values()))
        means = [gradient[:, tokens].mean(1) / INFLUENCE_STEPS for gradient in gradients]
        sums = means if not sums else [total + mean for total, mean in zip(sums, means, strict=True)]
    return _as_paths(model, search, images, labels, tuple(sums), logits, chunk_rows=chunk_rows)


def knowledge_neuron_paths(
    model: nn.Module, search: Search, images: Tensor, labels: Tensor, *, chunk_rows: int = CHUNK_ROWS
) -> PathBatch:
    r"""Select the neurons with the highest integrated gradients, each layer by itself.

    .. math:: s_i = \sum_t \bar w_{ti} \int_0^1 \frac{\partial F(\alpha \bar w_l)}{\partial w_{ti}} d\alpha

    Scores of a layer sum to the change of F as its scoped hidden vector grows from 0. Arguments and result as in
    ``search_paths``.

    Source:
        Dai et al., "Knowledge Neurons in Pretrained Transformers", ACL 2022 (arXiv:2104.08696); here the whole hidden
        vector grows, as in Sundararajan et al., ICML 2017 (arXiv:1703.01365); their formula grows one neuron at a time.
    """
    scores, logits = score_alone(model, search, images, labels, chunk_rows=chunk_rows)
    return _as_paths(model, search, images, labels, scores, logits, chunk_rows=chunk_rows)


def random_paths(
    model: nn.Module, search: Search, images: Tensor, labels: Tensor, *, chunk_rows: int = CHUNK_ROWS
) -> PathBatch:
    """Select neurons at random, each image by itself: what any better rule has to beat.

    What is drawn depends on the search's seed and the image's content alone, not on the images beside it. Arguments and
    result otherwise as in ``search_paths``; ``scores`` are uniform in [0, 1).
    """
    clean = record_clean(model, search.layers, images, tokens=scope_slice(model, search.tokens))
    drawn = []
    for image in images:
        content = hashlib.sha256(image.cpu().numpy().tobytes() + search.seed.to_bytes(8, "little")).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(content[:8], "little") >> 1)
        drawn.append([torch.rand(layer.num_units, generator=generator) for layer in search.layers])
    scores = tuple(torch.stack(of_layer).to(images.device) for of_layer in zip(*drawn, strict=True))
    return _as_paths(model, search, images, labels, scores, clean.logits_BC, chunk_rows=chunk_rows)


def _as_paths(model, search: Search, images, labels, scores, logits, *, chunk_rows: int) -> PathBatch:
    neurons_BLK = torch.stack([best_neurons(score_BH, search.top_k) for score_BH in scores], dim=1)
    joint_B = score_paths(model, search, images, labels, neurons_BLK, chunk_rows=chunk_rows)
    return PathBatch(neurons_BLK, joint_B, None, scores, logits)
