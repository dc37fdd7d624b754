"""Moments of the hidden neurons over the calibration images, shared by criteria and compensation.

Letters: N tokens, H hidden neurons.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitprune.data import Batches, on_device
from vitprune.errors import VitpruneError
from vitprune.feed_forward import FeedForward, hook_hidden


@dataclass(frozen=True)
class Moments:
    """First and second moments of an FFN's hidden neurons over all tokens of the calibration images.

    Attributes:
        count: tokens seen.
        mean_H: float64.
        covariance_HH: float64, centred, divided by ``count``.
    """

    count: int
    mean_H: Tensor
    covariance_HH: Tensor


@torch.no_grad()
def measure_moments(model: nn.Module, ffns: Sequence[FeedForward], batches: Batches) -> dict[str, Moments]:
    """Stream the calibration images once and return the moments of every FFN's hidden neurons.

    Products are taken in the model's dtype around the first batch's mean and summed in float64.

    Args:
        model: timm Vision Transformer in eval mode.
        ffns: its FFNs.
        batches: pairs of images [B, 3, height, width] (normalised by the model's own transform) and labels, which are
            not used. Read once.

    Returns:
        FFN name -> moments, on the CPU.

    Raises:
        VitpruneError: if ``batches`` is empty.
    """
    shifts: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    sums: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}

    def add(name: str, hidden: Tensor) -> None:
        rows_NH = hidden.reshape(-1, hidden.shape[-1])
        if rows_NH.dtype in (torch.float16, torch.bfloat16):
            rows_NH = rows_NH.float()
        if name not in shifts:
            shifts[name] = rows_NH.mean(0)
            counts[name] = 0
            sums[name] = torch.zeros(rows_NH.shape[1], dtype=torch.float64, device=rows_NH.device)
            squares[name] = torch.zeros(rows_NH.shape[1], rows_NH.shape[1], dtype=torch.float64, device=rows_NH.device)
        rows_NH = rows_NH - shifts[name]
        counts[name] += len(rows_NH)
        sums[name] += rows_NH.sum(0)
        squares[name] += rows_NH.T @ rows_NH

    with hook_hidden(model, ffns, add):
        for images, _labels in on_device(model, batches):
            model(images)
    if not counts:
        raise VitpruneError("no calibration images")
    moments = {}
    for name, count in counts.items():
        offset_H = sums[name] / count
        covariance_HH = squares.pop(name).div_(count).sub_(torch.outer(offset_H, offset_H))
        moments[name] = Moments(count, (shifts[name].double() + offset_H).cpu(), covariance_HH.cpu())
    return moments
