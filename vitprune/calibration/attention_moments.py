"""Second moments of queries and keys, measured in one pass over the calibration images.

Letters: B images, N tokens, h heads, q width of a head's queries and keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitprune.answer_loss import answer_loss, at_least_float32
from vitprune.answers import ask, has_several
from vitprune.data import Batches, on_device
from vitprune.entry import entry
from vitprune.errors import VitpruneError
from vitprune.models.attention import QK
from vitprune.models.units import capture, find_groups
from vitprune.sharing import sum_of_all


@dataclass(frozen=True)
class QueryKeyMoments:
    """Second moments of one attention's queries and keys; float64, on the CPU.

    Attributes:
        query_hqq: E[q qᵀ] over all tokens, by head.
        key_hqq: covariance of the keys within an image, mean over images: the softmax ignores what all keys of a query
            share.
    """

    query_hqq: Tensor
    key_hqq: Tensor


class QueryKeySums:
    """Running sums for ``QueryKeyMoments`` of some attentions; fed by ``watching``."""

    def __init__(self) -> None:
        self.sums: dict[str, list[Tensor]] = {}
        self.counts: dict[str, int] = {}

    @contextmanager
    def watching(self, model: nn.Module, names: Sequence[str]) -> Iterator[None]:
        """Add up what the attentions of these names compute while the model runs."""

        def watch(name: str, linear: str, centred: bool):
            attention = model.get_submodule(name)

            def add(_module: nn.Module, _inputs: object, output: Tensor) -> None:
                rows_BhNq = attention.split(at_least_float32(output.detach()))
                if centred:
                    rows_BhNq = rows_BhNq - rows_BhNq.mean(2, keepdim=True)
                rows_hMq = rows_BhNq.transpose(0, 1).flatten(1, 2)
                product_hqq = (rows_hMq.transpose(1, 2) @ rows_hMq).double()
                key = f"{name}.{linear}"
                self.sums[key] = self.sums.get(key, 0.0) + product_hqq
                self.counts[key] = self.counts.get(key, 0) + rows_hMq.shape[1]

            return attention.get_submodule(linear).register_forward_hook(add)

        with ExitStack() as stack:
            for name in names:
                stack.callback(watch(name, "q", centred=False).remove)
                stack.callback(watch(name, "k", centred=True).remove)
            yield

    def finish(self) -> dict[str, QueryKeyMoments]:
        """Return the moments by name of the attention."""
        mean = {}
        for key, local in self.sums.items():
            total, count = sum_of_all(local, self.counts[key])
            mean[key] = (total / count).cpu()
        names = [key.removesuffix(".q") for key in mean if key.endswith(".q")]
        return {name: QueryKeyMoments(mean[f"{name}.q"], mean[f"{name}.k"]) for name in names}


@entry
def measure_query_key_losses(
    model: nn.Module, names: Sequence[str], batches: Batches, *, seed: int = 0
) -> dict[str, Tensor]:
    r"""Estimate to second order how much the loss rises when the last dimensions of queries and keys go, in all heads.

    .. math:: T_j = \frac{1}{2B} \sum_b \Big( \sum_{i \ge j} \sum_{h,n} q_{bhni}
        \frac{\partial L_b}{\partial q_{bhni}} \Big)^2

    In expectation over labels drawn from the model's own answer, as in criterion ``fisher``. Dimensions that go
    together are seen together: what they cost is not the sum of what each costs by itself.

    Args:
        model: timm Vision Transformer in eval mode, with ``SplitAttention``.
        names: of attentions.
        batches: pairs of images [B, 3, height, width] (normalised by the model's own transform) and labels, which are
            not used. Read once.
        seed: of the directions drawn.

    Returns:
        Name -> losses T [q]; float64, nats per image, non-negative.

    Raises:
        VitpruneError: if ``batches`` is empty.

    Source:
        The diagonal of the Fisher information, as Theis et al. (arXiv:1801.05787) use it for channels.

    >>> import timm
    >>> from vitprune.models.attention import split_attention
    >>> model = split_attention(timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=5)).eval()
    >>> batches = [(torch.randn(2, 3, 32, 32), torch.zeros(2, dtype=torch.int64))]
    >>> measure_query_key_losses(model, ["blocks.0.attn"], batches)["blocks.0.attn"].shape
    torch.Size([64])
    """
    groups = [group for group in find_groups(model, [QK]) if group.module in names]
    sums: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(seed)
    num_images = 0
    for images, labels in on_device(model, batches):
        with capture(model, groups, outputs=True) as seen:
            logits = ask(model, images)
        directions = answer_loss(model).draw_directions(logits, generator, has_several(labels))
        gradients = torch.autograd.grad(logits, list(seen.values()), grad_outputs=directions)
        for group, gradient in zip(groups, gradients, strict=True):
            along = at_least_float32(seen[group.name].detach()) * at_least_float32(gradient)
            along_Bq = along.reshape(len(images), -1, group.num_units).sum(1)
            tails_Bq = along_Bq.double().flip(1).cumsum(1).flip(1)
            sums[group.module] = sums.get(group.module, 0.0) + tails_Bq.square().sum(0)
        num_images += len(images)
    if num_images == 0:
        raise VitpruneError("no calibration images")
    num_images, *totals = sum_of_all(num_images, *sums.values())
    return {name: total.cpu() / (2 * num_images) for name, total in zip(sums, totals, strict=True)}
