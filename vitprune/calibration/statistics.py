"""What criteria and compensation need to know of units, measured in one pass over the calibration images.

Letters: B images, N tokens, D embedding width, H units of a group (hidden neurons of an FFN).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitprune.answer_loss import answer_loss, at_least_float32
from vitprune.answers import ask, has_several, loss_of, run
from vitprune.calibration.moments import Moments
from vitprune.data import Batches, on_device
from vitprune.entry import entry
from vitprune.errors import VitpruneError
from vitprune.models.units import Group, capture, hook_hidden
from vitprune.sharing import sum_of_all

# What can be asked for; the last three need a backward pass, taylor with the given labels, the others without any.
MOMENTS, ABSOLUTE, TAYLOR, FISHER, GRADIENTS = "moments", "absolute", "taylor", "fisher", "gradients"


@dataclass(frozen=True)
class Statistics:
    r"""Statistics of one group's units h and of the loss gradient g at their reader's output; float64, on the CPU.

    What was not asked for is None.

    Attributes:
        num_images: images seen.
        num_tokens: tokens seen in all images.
        mean_H: mean over tokens; with ``moments``.
        covariance_HH: centred, divided by ``num_tokens``; with ``moments``.
        absolute_H: mean of \|h\| over tokens; with ``absolute``.
        taylor_H: mean over images of \|Σ_n h ∂L/∂h\|, L the cross-entropy with the given labels; with ``taylor``.
        fisher_H: mean over images of (Σ_n h ∂L/∂h)², in expectation over labels drawn from the model's answer; with
            ``fisher``.
        gradient_DD: E[g gᵀ], in the same expectation (of an encoder: for the curvature of its embedding's cosine
            distance), summed over tokens, mean over images; with ``gradients``.
        energy_N: E[gᵀ g] of each token; with ``gradients``.
    """

    num_images: int
    num_tokens: int
    mean_H: Tensor | None = None
    covariance_HH: Tensor | None = None
    absolute_H: Tensor | None = None
    taylor_H: Tensor | None = None
    fisher_H: Tensor | None = None
    gradient_DD: Tensor | None = None
    energy_N: Tensor | None = None


@entry
def measure_statistics(
    model: nn.Module, groups: Sequence[Group], batches: Batches, wanted: Collection[str], *, seed: int = 0
) -> dict[str, Statistics]:
    r"""Stream the calibration images once and return the statistics of every group.

    The Fisher information J^T (diag(p) - p p^T) J of the logits, or the Gauss-Newton matrix of an encoder's embedding,
    is estimated by one backward pass for each batch, along directions that ``answer_loss`` draws.

    Products are taken in the model's dtype (float32 for 16-bit models), second moments around the first batch's mean,
    and summed in float64.

    Args:
        model: timm Vision Transformer in eval mode.
        groups: of its units.
        batches: pairs of images [B, 3, height, width] (normalised by the model's own transform) and class labels [B]
            (int64), which only ``taylor`` uses. Read once.
        wanted: any of ``moments``, ``absolute``, ``taylor``, ``fisher``, ``gradients``.
        seed: of the random signs.

    Returns:
        Group name -> statistics.

    Raises:
        VitpruneError: if ``batches`` is empty.

    >>> import timm
    >>> from vitprune import find_feed_forwards
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32, num_classes=5).eval()
    >>> batches = [(torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 1, 4]))]
    >>> statistics = measure_statistics(model, find_feed_forwards(model), batches, {"moments", "gradients"})
    >>> of_ffn = statistics["blocks.1.mlp"]
    >>> of_ffn.covariance_HH.shape, of_ffn.energy_N.shape
    (torch.Size([768, 768]), torch.Size([5]))
    """
    wanted = frozenset(wanted)
    sums = {group.name: _Sums(model.get_submodule(group.read_by).weight.detach(), wanted) for group in groups}
    generator = torch.Generator().manual_seed(seed)
    num_images = 0
    for images, labels in on_device(model, batches):
        with hook_hidden(model, groups, lambda name, hidden: sums[name].add_hidden(hidden.detach())):
            if wanted & {TAYLOR, FISHER, GRADIENTS}:
                with capture(model, groups, outputs=True) as outputs:
                    logits = ask(model, images)
                _add_gradients(answer_loss(model), sums, outputs, logits, labels, wanted, generator)
            else:
                with torch.no_grad():
                    run(model, images)
        num_images += len(images)
    if num_images == 0:
        raise VitpruneError("no calibration images")
    (num_images,) = sum_of_all(num_images)
    return {name: sums.pop(name).of_all().finish(num_images) for name in list(sums)}


def _add_gradients(loss, sums, outputs, logits, labels, wanted, generator) -> None:
    points = list(outputs.values())
    if wanted & {FISHER, GRADIENTS}:
        directions = loss.draw_directions(logits, generator, has_several(labels))
        gradients = torch.autograd.grad(logits, points, grad_outputs=directions, retain_graph=TAYLOR in wanted)
        for name, gradient in zip(outputs, gradients, strict=True):
            sums[name].add_sampled(gradient, len(logits))
    if TAYLOR in wanted:
        with torch.enable_grad():
            of_labels = loss_of(logits, labels, "criterion taylor")
        for name, gradient in zip(outputs, torch.autograd.grad(of_labels, points), strict=True):
            sums[name].add_taylor(gradient, len(logits))


class _Sums:
    """Running sums of one group, in float64 on the model's device."""

    def __init__(self, weight_DH: Tensor, wanted: frozenset[str]) -> None:
        self.weight_DH, self.wanted = weight_DH, wanted
        self.num_tokens = 0
        self.hidden = None
        self.moments = Moments()
        self.sums: dict[str, Tensor] = {}

    def _add(self, name: str, value: Tensor) -> None:
        if name in self.sums:
            self.sums[name] += value
        else:
            self.sums[name] = value.double()

    def add_hidden(self, hidden: Tensor) -> None:
        hidden = at_least_float32(hidden)
        rows_NH = hidden.reshape(-1, hidden.shape[-1])
        self.num_tokens += len(rows_NH)
        if self.wanted & {TAYLOR, FISHER}:
            self.hidden = hidden
        if ABSOLUTE in self.wanted:
            self._add("absolute_H", rows_NH.abs().sum(0, dtype=torch.float64))
        if MOMENTS in self.wanted:
            self.moments.add(rows_NH)

    def _slopes(self, gradient: Tensor, num_images: int) -> Tensor:
        """Return the derivative of each image's loss along each neuron [B, H], tokens summed.

        Some FFNs run on parts of an image one by one, which then stand in the first dimension beside each other.
        """
        slopes = self.hidden * (at_least_float32(gradient) @ self.weight_DH.to(self.hidden.dtype))
        return slopes.reshape(num_images, -1, slopes.shape[-1]).sum(1)

    def add_sampled(self, gradient: Tensor, num_images: int) -> None:
        if FISHER in self.wanted:
            self._add("fisher_H", self._slopes(gradient, num_images).square().sum(0))
        if GRADIENTS in self.wanted:
            rows_ND = at_least_float32(gradient).reshape(-1, gradient.shape[-1])
            self._add("gradient_DD", rows_ND.T @ rows_ND)
            self._add("energy_N", rows_ND.square().sum(1).view(num_images, -1).sum(0))

    def add_taylor(self, gradient: Tensor, num_images: int) -> None:
        self._add("taylor_H", self._slopes(gradient, num_images).abs().sum(0))

    def of_all(self) -> _Sums:
        """Take in the sums of the other processes that share images."""
        self.num_tokens, *totals = sum_of_all(self.num_tokens, *self.sums.values())
        self.sums = dict(zip(self.sums, totals, strict=True))
        self.moments = self.moments.of_all()
        return self

    def finish(self, num_images: int) -> Statistics:
        sums, count = self.sums, self.num_tokens
        found = {
            name: (sums[name] / num_images).cpu()
            for name in ("fisher_H", "gradient_DD", "energy_N", "taylor_H")
            if name in sums
        }
        if ABSOLUTE in self.wanted:
            found["absolute_H"] = (sums["absolute_H"] / count).cpu()
        if MOMENTS in self.wanted:
            found["mean_H"], found["covariance_HH"] = self.moments.finish()
        return Statistics(num_images, count, **found)
