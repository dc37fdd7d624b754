"""What a model loses when an attention or an FFN goes as a whole: measured, not estimated.

Letters: B images, N tokens, C classes, D embedding width.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitprune.answer_loss import answer_loss, at_least_float32
from vitprune.answers import ask, check_one_class, run
from vitprune.calibration.moments import Moments
from vitprune.data import Batches, on_device
from vitprune.errors import VitpruneError
from vitprune.models.left_out import BIAS, MAP, Bias, TokenMap
from vitprune.models.trunk import head
from vitprune.models.units import Group
from vitprune.options import DEFAULT_RIDGE
from vitprune.progress import Track, untracked
from vitprune.sharing import mean_of_all
from vitprune.views import block_of


@dataclass(frozen=True)
class StandIn:
    """What may stand where a layer was.

    Attributes:
        layer: name of the attention or FFN.
        kind: ``bias`` or ``map``.
        module: ``Bias`` or ``TokenMap``, fitted to what the layer answers.
        loss: how far answers with it are from the dense model's, in the unit of ``answer_loss``.
    """

    layer: str
    kind: str
    module: nn.Module
    loss: float


@torch.no_grad()
def fit_stand_ins(
    model: nn.Module, layers: Sequence[Group], batches: Batches, *, ridge: float = DEFAULT_RIDGE
) -> dict[str, tuple[Bias, TokenMap]]:
    """Fit to each layer the constant and the linear map of single tokens that come nearest to its answers.

    Args:
        model: timm Vision Transformer in eval mode.
        layers: from ``find_layers``.
        batches: pairs of images [B, 3, height, width] (normalised by the model's own transform) and labels, which are
            not used. Read once.
        ridge: λ of the map, relative to the mean variance of what the layer reads.

    Returns:
        Name of the attention or FFN -> both.

    Raises:
        VitpruneError: if ``batches`` is empty.

    >>> import timm
    >>> from vitprune.models.units import find_layers
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=5).eval()
    >>> batches = [(torch.randn(2, 3, 32, 32), torch.zeros(2, dtype=torch.int64))]
    >>> sorted(fit_stand_ins(model, find_layers(model), batches))
    ['blocks.0.attn', 'blocks.0.mlp']
    """
    names = [group.module for group in layers]
    moments = {name: Moments() for name in names}

    def add(name: str):
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            both = torch.cat([inputs[0], output], -1)
            moments[name].add(at_least_float32(both).reshape(-1, both.shape[-1]))

        return hook

    with ExitStack() as stack:
        for name in names:
            stack.callback(model.get_submodule(name).register_forward_hook(add(name)).remove)
        for images, _labels in on_device(model, batches):
            run(model, images)
    if any(of_layer.sum_H is None for of_layer in moments.values()):
        raise VitpruneError("no calibration images")
    return {name: _fit(of_layer.of_all(), next(model.parameters()), ridge) for name, of_layer in moments.items()}


def _fit(moments: Moments, like: Tensor, ridge: float) -> tuple[Bias, TokenMap]:
    mean_X, covariance_XX = moments.finish()
    width = len(mean_X) // 2
    reads_DD, cross_DD = covariance_XX[:width, :width].clone(), covariance_XX[:width, width:]
    damping = max(ridge * float(reads_DD.diagonal().mean()), torch.finfo(torch.float64).tiny)
    reads_DD.diagonal().add_(damping)
    weight_DD = torch.linalg.solve(reads_DD, cross_DD).T
    bias_D = mean_X[width:] - weight_DD @ mean_X[:width]
    return Bias(mean_X[width:].to(like)), TokenMap(weight_DD.to(like), bias_D.to(like))


@torch.no_grad()
def measure_stand_ins(
    model: nn.Module,
    fitted: Mapping[str, tuple[Bias, TokenMap]],
    batches: Batches,
    *,
    track: Track = untracked,
) -> list[StandIn]:
    """Measure what each layer's stand-ins cost, one layer at a time.

    Args:
        model: timm Vision Transformer in eval mode.
        fitted: from ``fit_stand_ins`` on this model.
        batches: images other than those that were fitted to, if the losses shall be believed; readable more than once.
        track: wraps (layers, description), for progress.

    Raises:
        VitpruneError: if ``batches`` is empty.

    >>> import timm
    >>> from vitprune.models.units import find_layers
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=5).eval()
    >>> batches = [(torch.randn(2, 3, 32, 32), torch.zeros(2, dtype=torch.int64))]
    >>> fitted = fit_stand_ins(model, find_layers(model), batches)
    >>> [(each.layer, each.kind) for each in measure_stand_ins(model, fitted, batches)][:2]
    [('blocks.0.attn', 'bias'), ('blocks.0.attn', 'map')]
    """
    losses = measure_replaced(model, fitted, batches, track=track)
    return [
        StandIn(name, kind, module, loss)
        for name, modules in fitted.items()
        for kind, module, loss in zip((BIAS, MAP), modules, losses[name], strict=True)
    ]


@torch.no_grad()
def measure_replaced(
    model: nn.Module,
    replacements: Mapping[str, Sequence[nn.Module]],
    batches: Batches,
    *,
    track: Track = untracked,
) -> dict[str, list[float]]:
    """Measure how far answers are from the dense ones with another module in a layer's place, one layer at a time.

    Blocks before the layer are run once for all.

    Args:
        model: timm Vision Transformer in eval mode; stays as it is.
        replacements: name of an attention or FFN -> what to try in its place.
        batches: pairs of images [B, 3, height, width] (normalised by the model's own transform) and labels, which are
            not used. Read once.
        track: wraps (layers, description), for progress.

    Returns:
        Name -> a loss for each that was tried, per image; in the unit of ``answer_loss``.

    Raises:
        VitpruneError: if ``batches`` is empty.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=5).eval()
    >>> batches = [(torch.randn(2, 3, 32, 32), torch.zeros(2, dtype=torch.int64))]
    >>> losses = measure_replaced(model, {"blocks.0.attn": [model.blocks[0].attn]}, batches)
    >>> round(losses["blocks.0.attn"][0], 6)
    0.0
    """
    work = copy.deepcopy(model)
    images = []
    for images_B, labels in on_device(model, batches):
        check_one_class(labels, "the choice among parts of a model")
        images.append(images_B)
    if not images:
        raise VitpruneError("no calibration images")
    starts: dict[str, list[tuple[Any, ...]]] = {name: [] for name in dict.fromkeys(map(block_of, replacements))}
    loss = answer_loss(model)
    with ExitStack() as stack:
        for name, seen in starts.items():
            hook = lambda _module, args, seen=seen: seen.append(args)  # noqa: E731
            stack.callback(model.get_submodule(name).register_forward_pre_hook(hook).remove)
        dense = [loss.refer(ask(model, each)) for each in images]
    resumes = _resumes(model, starts, dense[0])
    found: dict[str, list[float]] = {}
    for name in track(list(replacements), "layers"):
        layer, block = work.get_submodule(name), block_of(name)
        found[name] = []
        for module in replacements[name]:
            work.set_submodule(name, module)
            losses = [
                loss.diverge(reference, _resume(work, block, start) if resumes else ask(work, each))
                for reference, each, start in zip(dense, images, starts[block], strict=True)
            ]
            found[name].append(mean_of_all(torch.cat(losses)))
        work.set_submodule(name, layer)
    return found


def _resumes(model: nn.Module, starts: Mapping[str, list[tuple[Any, ...]]], reference: Tensor) -> bool:
    """Tell whether a model's answers come out where only its blocks from some one on are run."""
    first = next(iter(starts))
    try:
        resumed = answer_loss(model).refer(_resume(model, first, starts[first][0]))
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return False
    return resumed.shape == reference.shape and torch.allclose(resumed, reference, rtol=1e-4, atol=1e-4)


def _resume(model: nn.Module, block: str, args: tuple[Any, ...]) -> Tensor:
    """Return the answers from what a block is handed on."""
    prefix, _dot, index = block.rpartition(".")
    for each in list(model.get_submodule(prefix))[int(index) :]:
        output = each(*args)
        args = output[:2] if isinstance(output, tuple) else (output,)
    return head(model, args[0])
