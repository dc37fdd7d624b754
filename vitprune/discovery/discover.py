"""The verb: find the paths of many images and the mean score of every neuron per class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from vitprune.data import Batches, on_device
from vitprune.discovery.baselines import activation_paths, influence_pattern_paths
from vitprune.discovery.engine import PathBatch, search_paths
from vitprune.discovery.quadrature import parse_quadrature
from vitprune.discovery.trunk import check_trunk, resolve_scope
from vitprune.errors import VitpruneError
from vitprune.feed_forward import find_feed_forwards
from vitprune.options import DEFAULT_QUADRATURE, METHODS, check_choice

# Images x nodes that go through the trunk together; bounds the memory whatever the batch size and the quadrature.
MAX_ROWS = 64

_FIND_PATHS: Mapping[str, Callable[..., PathBatch]] = {
    "jas": search_paths,
    "jas-complete": partial(search_paths, complete=True),
    "activation": activation_paths,
    "influence-pattern": influence_pattern_paths,
}


@dataclass(frozen=True)
class Discovery:
    """Paths of I images and scores per class.

    Attributes:
        ffns: FFN names, in block order.
        neurons: int64 [I, L, K]; per image the selected neurons of each FFN, best first.
        joint_scores: float32 [I]; score of the path.
        labels: int64 [I]; class index of each image.
        predictions: int64 [I]; the class that the model answers.
        completeness_errors: float32 [I] for ``jas-complete``, else None.
        classes: the class indices present, ascending; rows of ``class_scores``.
        class_scores: FFN name -> float32 [C, H]; mean score of every neuron over the images of a class.
        method: key of ``METHODS``.
        tokens: ``cls``, ``patch`` or ``all``.
        quadrature: as in ``parse_quadrature``.
    """

    ffns: tuple[str, ...]
    neurons: Tensor
    joint_scores: Tensor
    labels: Tensor
    predictions: Tensor
    completeness_errors: Tensor | None
    classes: tuple[int, ...]
    class_scores: Mapping[str, Tensor]
    method: str
    tokens: str
    quadrature: str


def discover(
    model: nn.Module,
    batches: Batches,
    *,
    method: str = "jas",
    top_k: int = 1,
    tokens: str | None = None,
    quadrature: str = DEFAULT_QUADRATURE,
) -> Discovery:
    """Find the influential neuron path of each image, and the mean score of every neuron per class.

    Args:
        model: timm Vision Transformer with an isotropic trunk, in eval mode.
        batches: pairs of images [B, 3, height, width] (normalised by the model's own transform) and class labels [B]
            (int64). Read once; a batch may mix classes.
        method: key of ``METHODS``.
        top_k: K, neurons per FFN; 1 .. the narrowest FFN.
        tokens: whose hidden vectors count: ``cls`` (class token), ``patch`` or ``all``; None takes the class token
            where the head reads it, else the patches.
        quadrature: ``gauss-legendre:NODES`` or ``riemann:STEPS``.

    Returns:
        See ``Discovery``; on the CPU.

    Raises:
        VitpruneError: if the model has no isotropic trunk, an argument is out of range, or ``batches`` is empty.

    Source:
        arXiv:2503.09046.
    """
    ffns = find_feed_forwards(model)
    rule = parse_quadrature(quadrature)
    scope = resolve_scope(model, tokens)
    check_choice("method", method, METHODS)
    narrowest = min(ffns, key=lambda ffn: ffn.num_neurons)
    if not 1 <= top_k <= narrowest.num_neurons:
        raise VitpruneError(
            f"top_k must be in [1, {narrowest.num_neurons}] ({narrowest.name} has that many neurons), got {top_k}"
        )
    dtype = next(model.parameters()).dtype
    if dtype not in (torch.float32, torch.float64):
        raise VitpruneError(
            f"the path search needs float32 or float64 weights, the model has {dtype}; use model.float()"
        )
    parts: dict[str, list[Tensor]] = {name: [] for name in ("neurons", "scores", "errors", "labels", "predictions")}
    sums: dict[str, dict[int, Tensor]] = {ffn.name: {} for ffn in ffns}
    at_once = max(1, MAX_ROWS // len(rule.nodes))
    for batch_images, batch_labels in on_device(model, batches):
        if not parts["labels"]:
            check_trunk(model, ffns, batch_images)
        for images, labels in zip(batch_images.split(at_once), batch_labels.split(at_once), strict=True):
            paths = _FIND_PATHS[method](model, ffns, images, labels, top_k=top_k, quadrature=rule, scope=scope)
            for ffn, score_BH in zip(ffns, paths.scores, strict=True):
                _add_by_class(sums[ffn.name], score_BH, labels)
            parts["neurons"].append(paths.neurons_BLK.cpu())
            parts["scores"].append(paths.joint_scores_B.float().cpu())
            parts["labels"].append(labels.cpu())
            parts["predictions"].append(paths.logits_BC.argmax(-1).cpu())
            if paths.completeness_errors_B is not None:
                parts["errors"].append(paths.completeness_errors_B.float().cpu())
    if not parts["labels"]:
        raise VitpruneError("no images to discover paths on")
    labels = torch.cat(parts["labels"])
    counts = Counter(labels.tolist())
    classes = tuple(sorted(counts))
    return Discovery(
        ffns=tuple(ffn.name for ffn in ffns),
        neurons=torch.cat(parts["neurons"]),
        joint_scores=torch.cat(parts["scores"]),
        labels=labels,
        predictions=torch.cat(parts["predictions"]),
        completeness_errors=torch.cat(parts["errors"]) if parts["errors"] else None,
        classes=classes,
        class_scores={
            name: torch.stack([by_class[index] / counts[index] for index in classes]).float()
            for name, by_class in sums.items()
        },
        method=method,
        tokens=scope,
        quadrature=quadrature,
    )


def _add_by_class(sums: dict[int, Tensor], score_BH: Tensor, labels: Tensor) -> None:
    score_BH = score_BH.detach().double().cpu()
    for index in labels.unique().tolist():
        total = score_BH[(labels == index).cpu()].sum(0)
        sums[index] = sums[index] + total if index in sums else total


def class_paths(found: Discovery) -> dict[int, Tensor]:
    """Return each class's path: per FFN the K neurons most often on the paths of its images.

    Ties go to the higher mean score, then to the lower index.

    Returns:
        class index -> int64 [L, K].
    """
    top_k = found.neurons.shape[-1]
    paths = {}
    for row, index in enumerate(found.classes):
        of_class = found.neurons[found.labels == index]
        layers = []
        for position, name in enumerate(found.ffns):
            score_H = found.class_scores[name][row]
            visits = torch.bincount(of_class[:, position].flatten(), minlength=len(score_H))
            by_score = score_H.sort(descending=True, stable=True).indices
            layers.append(by_score[visits[by_score].sort(descending=True, stable=True).indices][:top_k])
        paths[index] = torch.stack(layers)
    return paths


def only_classes(found: Discovery, classes: Sequence[int]) -> Discovery:
    """Return what was found on the images of some classes, renumbered: ``classes[i]`` becomes i.

    Predictions keep the numbers of all classes.

    Raises:
        VitpruneError: if a class has no image in the discovery.
    """
    absent = [index for index in classes if index not in found.classes]
    if absent:
        raise VitpruneError(f"class {absent[0]} has no image in the run; discover its images as well")
    position = {index: place for place, index in enumerate(classes)}
    of_class = torch.tensor([int(label) in position for label in found.labels])
    rows = [found.classes.index(index) for index in classes]
    errors = found.completeness_errors
    return replace(
        found,
        neurons=found.neurons[of_class],
        joint_scores=found.joint_scores[of_class],
        labels=torch.tensor([position[int(label)] for label in found.labels[of_class]]),
        predictions=found.predictions[of_class],
        completeness_errors=None if errors is None else errors[of_class],
        classes=tuple(range(len(classes))),
        class_scores={name: scores[rows] for name, scores in found.class_scores.items()},
    )
