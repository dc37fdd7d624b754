"""What a path search is asked for, handed on whole from the verb to the method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from vitprune.discovery.objective import DEFAULT_OBJECTIVE, Objective
from vitprune.discovery.quadrature import Quadrature
from vitprune.models.units import Group


@dataclass(frozen=True)
class Search:
    """A request for paths.

    Attributes:
        layers: that the path goes through, from ``find_path_layers``.
        method: key of ``METHODS``.
        top_k: K, nodes per layer; 1 .. the narrowest layer.
        tokens: ``cls``, ``patch`` or ``all``.
        rule: for the integral over α; the joint score of a path (not of ``jas-complete``) takes its first nodes.
        objective: what F is.
        precision: of the matrix products behind the layer under test at the first nodes, key of ``PRECISIONS``; what it
            leaves in doubt is scored again in the model's own. Other than ``float32`` only with an adaptive rule.
        seed: of the random paths; the other methods draw nothing.
        heads: attention among the layers -> its heads.
    """

    layers: tuple[Group, ...]
    method: str
    top_k: int
    tokens: str
    rule: Quadrature
    objective: Objective = DEFAULT_OBJECTIVE
    precision: str = "float32"
    seed: int = 0
    heads: Mapping[str, int] = field(default_factory=dict)
