"""Nodes and weights for integrals over [0, 1]."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vitprune.errors import VitpruneError


@dataclass(frozen=True)
class Quadrature:
    """Nodes in [0, 1] and weights that sum to 1.

    Attributes:
        name: what it was parsed from, such as ``"gauss-legendre:4"``.
        nodes: ascending values of α.
        weights: as many as nodes.
    """

    name: str
    nodes: tuple[float, ...]
    weights: tuple[float, ...]


def parse_quadrature(name: str) -> Quadrature:
    """Read ``"gauss-legendre:NODES"`` or ``"riemann:STEPS"``.

    ``riemann:20`` is the left Riemann sum of arXiv:2503.09046, α = 0, .05 .. .95. Gauss-Legendre with n nodes
    integrates polynomials of degree 2n - 1 exactly.

    Raises:
        VitpruneError: if the rule is unknown or the count is not a positive integer.

    >>> parse_quadrature("riemann:4")
    Quadrature(name='riemann:4', nodes=(0.0, 0.25, 0.5, 0.75), weights=(0.25, 0.25, 0.25, 0.25))
    """
    rule, _, count_text = name.partition(":")
    if rule not in ("gauss-legendre", "riemann") or not count_text.isdecimal() or int(count_text) == 0:
        raise VitpruneError(f"quadrature must be gauss-legendre:NODES or riemann:STEPS, got '{name}'")
    count = int(count_text)
    if rule == "riemann":
        return Quadrature(name, tuple(step / count for step in range(count)), (1 / count,) * count)
    nodes, weights = np.polynomial.legendre.leggauss(count)
    return Quadrature(name, tuple((nodes / 2 + 0.5).tolist()), tuple((weights / 2).tolist()))
