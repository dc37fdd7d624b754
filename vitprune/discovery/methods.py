"""Methods: the ways to find paths, behind one protocol."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from vitprune.discovery.baselines import (
    activation_paths,
    influence_pattern_paths,
    knowledge_neuron_paths,
    random_paths,
)
from vitprune.discovery.engine import PathBatch, first_rule, search_paths
from vitprune.discovery.objective import make_objective
from vitprune.discovery.quadrature import parse_fixed_quadrature, parse_quadrature
from vitprune.discovery.search import Search
from vitprune.errors import VitpruneError
from vitprune.models.path_layers import DEFAULT_NODES, count_heads, find_path_layers
from vitprune.models.trunk import resolve_scope
from vitprune.models.units import FFN
from vitprune.options import DEFAULT_FIXED_QUADRATURE, DEFAULT_QUADRATURE, METHODS, PRECISIONS, check_choice
from vitprune.views import has_classifier


class FindPaths(Protocol):
    """Find the paths of a batch of images."""

    def __call__(
        self, model: nn.Module, search: Search, images: Tensor, labels: Tensor, *, chunk_rows: int
    ) -> PathBatch:
        """Return the paths of images [B, 3, height, width] with labels [B].

        Args:
            model: in eval mode; its parameters ask for no gradients.
            search: what is asked for.
            images: normalised by the model's own transform.
            labels: int64.
            chunk_rows: images x nodes in one autograd graph; changes memory, not results.
        """


@dataclass(frozen=True)
class Method:
    """One way to find paths.

    Attributes:
        find: the function.
        by_layer: whether each layer is decided on those before it: then an adaptive rule and a lower precision have
            something to decide again.
        extra_nodes: that the joint score takes beside those of the rule.
        draws: whether it depends on the seed.
    """

    find: FindPaths
    by_layer: bool = False
    extra_nodes: int = 0
    draws: bool = False

    def count_nodes(self, search: Search, *, one_token: bool) -> int:
        """Return how many nodes of an image go through the prefix at once."""
        if self.extra_nodes:
            return len(first_rule(search.rule, one_token=False).nodes) + self.extra_nodes
        return len(first_rule(search.rule, one_token=one_token).nodes)


REGISTRY: Mapping[str, Method] = {
    "jas": Method(search_paths, by_layer=True),
    # F(0) and F(1), which completeness is about.
    "jas-complete": Method(partial(search_paths, complete=True), by_layer=True, extra_nodes=2),
    "activation": Method(activation_paths),
    "influence-pattern": Method(influence_pattern_paths),
    "knowledge-neurons": Method(knowledge_neuron_paths),
    "random": Method(random_paths, draws=True),
}


def plan_search(
    model: nn.Module,
    *,
    method: str = "jas",
    top_k: int = 1,
    tokens: str | None = None,
    quadrature: str | None = None,
    target: str | int = "label",
    quantity: str = "probability",
    precision: str = "float32",
    seed: int = 0,
    nodes: Sequence[str] = DEFAULT_NODES,
) -> Search:
    """Check the arguments of ``discover`` against a model, before any image is read.

    Raises:
        VitpruneError: if an argument is out of range, the weights are of 16 bits, or a lower precision is asked for
            where nothing would be decided again.
    """
    layers = find_path_layers(model, nodes)
    check_choice("method", method, METHODS)
    layerwise = REGISTRY[method].by_layer
    read = parse_quadrature if layerwise else parse_fixed_quadrature
    default = DEFAULT_QUADRATURE if layerwise else DEFAULT_FIXED_QUADRATURE
    rule = read(default if quadrature is None else quadrature)
    scope = resolve_scope(model, tokens)
    if not has_classifier(model):
        raise VitpruneError(
            "the model has no classifier (num_classes=0), so no class's answer can be attributed; `quantity` cosine "
            "attributes the similarity of its embedding to the mean of a class"
        )
    objective = make_objective(target, quantity, num_classes=model.num_classes)
    narrowest = min(layers, key=lambda layer: layer.num_units)
    if not 1 <= top_k <= narrowest.num_units:
        called = "neurons" if narrowest.kind == FFN else "dimensions"
        raise VitpruneError(
            f"top_k must be in [1, {narrowest.num_units}] ({narrowest.name} has that many {called}), got {top_k}"
        )
    dtype = next(model.parameters()).dtype
    if dtype not in (torch.float32, torch.float64):
        raise VitpruneError(
            f"the path search needs float32 or float64 weights, the model has {dtype}; use model.float()"
        )
    check_choice("precision", precision, PRECISIONS)
    if precision != "float32" and rule.finer is None:
        raise VitpruneError(
            f"precision {precision} needs quadrature adaptive (methods jas and jas-complete), which decides again what "
            f"its noise could change; got {rule.name}"
        )
    if precision != "float32" and dtype != torch.float32:
        raise VitpruneError(f"precision {precision} is for float32 weights, the model has {dtype}; use model.float()")
    if precision == "tf32" and next(model.parameters()).device.type != "cuda":
        raise VitpruneError("precision tf32 needs an NVIDIA GPU; use `device` cuda")
    return Search(tuple(layers), method, top_k, scope, rule, objective, precision, seed, count_heads(model, layers))
