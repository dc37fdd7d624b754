"""Find the images that excite neurons most.

Letters: B images, T scoped tokens, H hidden neurons, P neurons asked for in an FFN, n images kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitprune.answers import run
from vitprune.data import Batches, on_device
from vitprune.entry import entry
from vitprune.errors import VitpruneError
from vitprune.models.path_layers import ATTENTION, DEFAULT_NODES, find_path_layers, kind_of_layer
from vitprune.models.trunk import resolve_scope, scope_slice
from vitprune.models.units import Group, hook_hidden
from vitprune.sharing import join_rows, places, sharing


@dataclass(frozen=True)
class TopImages:
    """The images that excite one neuron most, on the CPU.

    Attributes:
        positions: int64 [n]; where the images stood in the order read, highest activation first.
        activations: [n], in the model's dtype; descending.
    """

    positions: Tensor
    activations: Tensor


@entry
@torch.no_grad()
def find_top_images(
    model: nn.Module,
    batches: Batches,
    neurons: Mapping[str, Sequence[int]],
    *,
    tokens: str | None = None,
    num_images: int = 12,
) -> dict[tuple[str, int], TopImages]:
    """Find the images with the highest hidden activation of each neuron (mean over the scoped tokens), in one pass.

    Args:
        model: timm Vision Transformer in eval mode.
        batches: pairs of images [B, 3, height, width] (normalised by the model's own transform) and labels. Read once;
            ``ImageBatches.files_read`` then names the files by position.
        neurons: name of an FFN or attention -> indices of its neurons or dimensions.
        tokens: ``cls``, ``patch`` or ``all``; None takes the class token where the head reads it, else the patches.
        num_images: n, kept per neuron; all, where there are fewer.

    Returns:
        (name, neuron) -> images; equal activations in the order read.

    Raises:
        VitpruneError: if a neuron or FFN is not the model's, ``num_images`` is less than 1, or there are no images.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=1).eval()
    >>> alike = [(torch.zeros(3, 3, 224, 224), torch.tensor([0, 0, 1]))]
    >>> found = find_top_images(model, alike, {"blocks.0.mlp": [7]}, num_images=2)
    >>> found["blocks.0.mlp", 7].positions
    tensor([0, 1])
    """
    watched = _check_neurons(model, neurons)
    if num_images < 1:
        raise VitpruneError(f"num_images must be at least 1, got {num_images}")
    scope = scope_slice(model, resolve_scope(model, tokens))
    best: dict[str, tuple[Tensor, Tensor]] = {}
    count = 0

    def keep_best(name: str, h_BNH: Tensor) -> None:
        own = torch.tensor(neurons[name], dtype=torch.int64, device=h_BNH.device)
        values_PB = h_BNH[:, scope].flatten(1, -2)[..., own].mean(1).T
        positions_PB = places(len(h_BNH), count).to(h_BNH.device).expand_as(values_PB)
        if name in best:
            values_PB, positions_PB = (
                torch.cat(pair, dim=1) for pair in zip(best[name], (values_PB, positions_PB), strict=True)
            )
        # Stable, and earlier images stand first: ties go to them.
        values_PB, order_PB = values_PB.sort(dim=1, descending=True, stable=True)
        best[name] = values_PB[:, :num_images], positions_PB.gather(1, order_PB)[:, :num_images]

    with hook_hidden(model, watched, keep_best):
        for images, _labels in on_device(model, batches):
            run(model, images)
            count += len(images)
    if count == 0:
        raise VitpruneError("no images to look at")
    best = {name: _best_of_all(*of_ffn, num_images) for name, of_ffn in best.items()}
    return {
        (name, int(neuron)): TopImages(positions.cpu(), values.cpu())
        for name in neurons
        for neuron, values, positions in zip(neurons[name], *best[name], strict=True)
    }


def _best_of_all(values_PB: Tensor, positions_PB: Tensor, num_images: int) -> tuple[Tensor, Tensor]:
    """Return the best of what the processes that share images found."""
    if sharing().count == 1:
        return values_PB, positions_PB
    values_PB, positions_PB = (join_rows(each.T.contiguous()).T for each in (values_PB, positions_PB))
    first_PB = positions_PB.argsort(dim=1)
    values_PB, positions_PB = values_PB.gather(1, first_PB), positions_PB.gather(1, first_PB)
    values_PB, order_PB = values_PB.sort(dim=1, descending=True, stable=True)
    return values_PB[:, :num_images], positions_PB.gather(1, order_PB)[:, :num_images]


def _check_neurons(model: nn.Module, neurons: Mapping[str, Sequence[int]]) -> list[Group]:
    kinds = {kind_of_layer(name) for name in neurons} or DEFAULT_NODES
    ffns = {layer.name: layer for layer in find_path_layers(model, tuple(kinds))}
    if not any(map(len, neurons.values())):
        raise VitpruneError("no neurons to find images of")
    for name, own in neurons.items():
        if name not in ffns:
            kind = "attention" if kind_of_layer(name) == ATTENTION else "FFN"
            raise VitpruneError(f"{name} is no {kind} of this model; it has {', '.join(ffns)}")
        beyond = [neuron for neuron in own if not 0 <= neuron < ffns[name].num_neurons]
        if beyond:
            raise VitpruneError(f"{name} has neurons 0 to {ffns[name].num_neurons - 1}, not {beyond[0]}")
    return [ffns[name] for name in neurons]
