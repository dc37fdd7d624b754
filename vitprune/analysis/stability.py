"""Which neurons of a class path are sure to lie on it, and which another draw of the class's images would exchange.

Letters: S draws, I images of a class, U neurons of a layer that one of them visits, K neurons per layer, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vitprune.discovery.discover import Discovery, class_paths, has_class_scores
from vitprune.errors import VitpruneError
from vitprune.intervals import CONFIDENCE

NUM_DRAWS = 1000


@dataclass(frozen=True)
class Stability:
    """How often the nodes of a class's path are on it when the class's images are drawn anew.

    Attributes:
        membership: class index -> float [L, K]; the share of the draws, in [0, 1], in the order of ``class_paths``.
        num_draws: S.
    """

    membership: dict[int, Tensor]
    num_draws: int

    def sure(self, index: int) -> Tensor:
        """Return which nodes of a class's path are on it in at least 95 % of the draws: bool [L, K]."""
        return self.membership[index] >= CONFIDENCE


def measure_stability(
    found: Discovery, *, classes: Sequence[int] | None = None, num_draws: int = NUM_DRAWS, seed: int = 0
) -> Stability:
    """Draw the images of every class anew, with replacement, and count how often its path keeps its nodes.

    A node is on a class's path as ``class_paths`` says: visits first, then the mean score over all images of the class,
    then the lower index. Of a class with one image nothing can be said: its nodes are on the path in no draw.

    Args:
        found: by any method.
        classes: indices of those to look at; None: all.
        num_draws: S, at least 1.
        seed: of the draws.

    Raises:
        VitpruneError: if ``num_draws`` is less than 1.

    Source:
        The bootstrap of Efron, Annals of Statistics 1979.

    >>> import timm
    >>> from vitprune import discover
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=5).eval()
    >>> batches = [(torch.randn(1, 3, 32, 32).expand(4, -1, -1, -1), torch.tensor([2, 2, 2, 2]))]
    >>> measure_stability(discover(model, batches)).sure(2)
    tensor([[True]])
    """
    if num_draws < 1:
        raise VitpruneError(f"num_draws must be at least 1, got {num_draws}")
    paths, top_k = class_paths(found), found.neurons.shape[-1]
    membership = {}
    for row, index in enumerate(found.classes):
        if classes is not None and index not in classes:
            continue
        places = (found.labels == index).nonzero().flatten()
        count = len(places)
        if count == 1:
            membership[index] = torch.zeros(len(found.layers), top_k)
            continue
        # Of its own for each class: another class more or less changes nothing.
        generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
        drawn_SI = torch.randint(count, (num_draws, count), generator=generator)
        times_SI = torch.zeros(num_draws, count).scatter_add_(1, drawn_SI, torch.ones(num_draws, count))
        layers = []
        for layer, name in enumerate(found.layers):
            nodes_IK = found.neurons[places, layer]
            scores = found.class_scores[name]
            known_H = scores[row] if has_class_scores(found) else torch.zeros(scores.shape[1])
            # Nodes off all of these paths lie on none of any draw, but where fewer than K are visited.
            seen_U = nodes_IK.unique()
            order = known_H[seen_U].sort(descending=True, stable=True).indices
            seen_U = seen_U[order]
            visits_IU = (nodes_IK.unsqueeze(2) == seen_U).any(1).float()
            ranked_SU = (times_SI @ visits_IU).sort(dim=1, descending=True, stable=True)
            best_SK = seen_U[ranked_SU.indices[:, :top_k]]
            visited_SK = ranked_SU.values[:, :top_k] > 0
            on_path = (best_SK.unsqueeze(2) == paths[index][layer]) & visited_SK.unsqueeze(2)
            layers.append(on_path.any(1).float().mean(0))
        membership[index] = torch.stack(layers)
    return Stability(membership, num_draws)
