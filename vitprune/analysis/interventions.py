"""Scale the neurons of each image's path and see what the model answers.

Letters: B images of a batch, I of all, N tokens, H nodes of a layer, L layers, K nodes per layer, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitprune.answers import ask, of_classes
from vitprune.data import Batches, on_device
from vitprune.errors import VitpruneError
from vitprune.intervals import Interval, mean_interval
from vitprune.models.path_layers import DEFAULT_NODES, find_path_layers
from vitprune.models.trunk import resolve_scope, scope_slice
from vitprune.models.units import Group, hook_hidden
from vitprune.sharing import gather_rows, own_rows


@dataclass(frozen=True)
class Reactions:
    """How a model reacts to I images, undisturbed or with neurons scaled; their order is that of the batches.

    Attributes:
        probability: float32 [I]; of the label's class, in [0, 1].
        prediction: int64 [I]; the class with the highest logit.
        label: int64 [I].
    """

    probability: Tensor
    prediction: Tensor
    label: Tensor


@dataclass(frozen=True)
class Deviation:
    """How far an intervention moves the answers away from the undisturbed model's.

    Attributes:
        probability_deviation: of the true class, mean over classes of (mean probability / clean mean - 1); -1 leaves
            nothing, 0 changes nothing.
        accuracy_deviation: top-1 / clean top-1 - 1; None where the clean model answers nothing rightly.
        probability: mean over images, in [0, 1].
        top1: in [0, 1].
        by_class: class index -> probability deviation of the class.
        num_images: intervened on.
    """

    probability_deviation: Interval
    accuracy_deviation: float | None
    probability: float
    top1: float
    by_class: Mapping[int, float]
    num_images: int


@torch.no_grad()
def measure_intervention(
    model: nn.Module,
    layers: Sequence[Group],
    images: Tensor,
    neurons_BLK: Tensor,
    *,
    factor: float,
    tokens: slice,
) -> Tensor:
    """Return class probabilities [B, C] with the path neurons multiplied by ``factor``; nothing else is held fixed.

    Args:
        model: timm Vision Transformer in eval mode.
        layers: that the path goes through.
        images: [B, 3, height, width], normalised by the model's own transform.
        neurons_BLK: int64; per image the nodes to scale in each layer.
        factor: 0 removes them, 2 doubles them.
        tokens: at which tokens.

    Source:
        The manipulation experiment of arXiv:2503.09046.
    """
    position_of = {layer.name: position for position, layer in enumerate(layers)}

    def scale(name: str, h_BNH: Tensor) -> Tensor:
        factors_B1H = torch.ones_like(h_BNH[:, :1])
        factors_B1H.scatter_(2, neurons_BLK[:, position_of[name]].unsqueeze(1), factor)
        h_BNH = h_BNH.clone()
        h_BNH[:, tokens] *= factors_B1H
        return h_BNH

    with hook_hidden(model, layers, scale):
        return of_classes(ask(model, images)).softmax(-1)


@torch.no_grad()
def measure_reactions(model: nn.Module, batches: Batches) -> Reactions:
    """Return the undisturbed model's answers.

    Args:
        model: timm Vision Transformer in eval mode.
        batches: pairs of images and labels; read once.

    Raises:
        VitpruneError: if there are no images.
    """
    return _join(
        _reactions(of_classes(ask(model, images)).softmax(-1), labels) for images, labels in on_device(model, batches)
    )


def measure_interventions(
    model: nn.Module,
    batches: Batches,
    neurons_ILK: Tensor,
    interventions: Sequence[tuple[float, str]] = ((0.0, "cls"), (2.0, "cls")),
    *,
    nodes: Sequence[str] = DEFAULT_NODES,
) -> dict[tuple[float, str], Reactions]:
    """Return the answers with each image's own path scaled, in one pass over the images.

    Args:
        model: timm Vision Transformer in eval mode.
        batches: pairs of images and labels; read once.
        neurons_ILK: int64; a path for each image, in the order of the batches.
        interventions: what the path neurons are multiplied by (0 removes them, 2 doubles them), and where: ``cls``,
            ``patch`` or ``all``.
        nodes: what the paths go through, as ``find_path_layers`` takes it.

    Returns:
        The answers under each.

    Raises:
        VitpruneError: if there are more or fewer images than paths, or the model has no such tokens.

    Source:
        The manipulation experiment of arXiv:2503.09046, which intervenes at the class token (patch tokens for MAE).
    """
    layers = find_path_layers(model, nodes)
    slices = {scope: scope_slice(model, resolve_scope(model, scope)) for _factor, scope in interventions}
    parts: dict[tuple[float, str], list[Reactions]] = {key: [] for key in interventions}
    start, own_ILK = 0, own_rows(neurons_ILK)
    for images, labels in on_device(model, batches):
        neurons_BLK = own_ILK[start : start + len(images)].to(images.device)
        start += len(images)
        if start > len(own_ILK):
            break
        for factor, scope in parts:
            probabilities_BC = measure_intervention(
                model, layers, images, neurons_BLK, factor=factor, tokens=slices[scope]
            )
            parts[factor, scope].append(_reactions(probabilities_BC, labels))
    if start != len(own_ILK):
        raise VitpruneError(f"{len(own_ILK)} paths are not for these images, of which there are {start} or more")
    return {key: _join(reactions) for key, reactions in parts.items()}


def _reactions(probabilities_BC: Tensor, labels: Tensor) -> Reactions:
    of_label = probabilities_BC.float().gather(1, labels.unsqueeze(1)).squeeze(1)
    return Reactions(of_label.cpu(), probabilities_BC.argmax(1).cpu(), labels.cpu())


def _join(parts) -> Reactions:
    parts = list(parts)
    if not parts:
        raise VitpruneError("no images to intervene on")
    columns = (torch.cat([getattr(part, name) for part in parts]) for name in Reactions.__annotations__)
    return Reactions(*map(gather_rows, columns))


def deviate(clean: Reactions, changed: Reactions) -> Deviation:
    """Compare the answers under an intervention with the undisturbed ones of the same images.

    Args:
        clean: of the undisturbed model.
        changed: under the intervention.

    Raises:
        VitpruneError: if they are not of the same images.

    Source:
        arXiv:2503.09046 divides likewise, class by class; the interval is ours.
    """
    by_class = deviations_by_class(clean, changed)
    top1_clean, top1 = ((each.prediction == each.label).double().mean().item() for each in (clean, changed))
    return Deviation(
        probability_deviation=mean_interval(list(by_class.values())),
        accuracy_deviation=top1 / top1_clean - 1 if top1_clean else None,
        probability=changed.probability.double().mean().item(),
        top1=top1,
        by_class=by_class,
        num_images=len(clean.label),
    )


def deviations_by_class(clean: Reactions, changed: Reactions) -> dict[int, float]:
    """Return class index -> mean probability of the class under an intervention / clean mean - 1.

    Raises:
        VitpruneError: if the answers are not of the same images.
    """
    if not torch.equal(clean.label, changed.label):
        raise VitpruneError(f"answers to {len(clean.label)} and {len(changed.label)} images are not of the same images")
    return {
        index: changed.probability[members].double().mean().item() / clean.probability[members].double().mean().item()
        - 1
        for index in clean.label.unique().tolist()
        for members in [clean.label == index]
    }
