"""How many neurons of each FFN ever lie on a path."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.stats import entropy

from vitprune.discovery.discover import Discovery


@dataclass(frozen=True)
class Utilisation:
    """Visits of the neurons of one FFN.

    Attributes:
        ffn: its name; an attention's where paths go through attention.
        num_neurons: H.
        num_visits: images times K.
        num_visited: neurons on at least one path.
        visited_share: ``num_visited`` of ``num_neurons``, in (0, 1].
        entropy_bits: of the distribution of the visits over the neurons, from 0 (always the same neuron) to log2 H.
        effective_neurons: 2 to the power of the entropy: as many neurons, visited equally often, would have it.
    """

    ffn: str
    num_neurons: int
    num_visits: int
    num_visited: int
    visited_share: float
    entropy_bits: float
    effective_neurons: float


def measure_utilisation(found: Discovery) -> tuple[Utilisation, ...]:
    """Count the neurons that lie on a path of any image, and how evenly the paths use them.

    Few visits find few neurons: compare runs with the same ``num_visits``.

    Returns:
        One for each FFN, in block order.

    Source:
        The utilisation of arXiv:2503.09046; entropy and effective number (Hill, Ecology 1973) are ours.
    """
    rows = []
    for position, name in enumerate(found.layers):
        visits_H = torch.bincount(found.neurons[:, position].flatten(), minlength=found.class_scores[name].shape[1])
        bits = float(entropy(visits_H.numpy(), base=2))
        num_visited = int((visits_H > 0).sum())
        rows.append(
            Utilisation(
                ffn=name,
                num_neurons=len(visits_H),
                num_visits=int(visits_H.sum()),
                num_visited=num_visited,
                visited_share=num_visited / len(visits_H),
                entropy_bits=bits,
                effective_neurons=2**bits,
            )
        )
    return tuple(rows)
