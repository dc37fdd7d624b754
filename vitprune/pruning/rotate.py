r"""Turn the dimensions of attention so that they stand in the order of what they are worth.

A head sees queries and keys only through their products, and values only through the projection that reads them: both
may be turned into another basis without changing an answer. With second moments R of queries and of keys centred within
the image, covariance C of what the head mixes and G = E[g gᵀ] of the loss gradient g at the attention's output,

.. math::
    R_q^{1/2} R_k^{1/2} = U S V^T, \quad q' = q R_q^{-1/2} U S^{1/2}, \quad k' = k R_k^{-1/2} V S^{1/2}

    C^{1/2} W_o G^{1/2} = U S V^T, \quad v' = v C^{-1/2} U, \quad W_o' = U^T C^{1/2} W_o

leave the first r dimensions the best r: of queries and keys in squared error of the logits, of values in loss.

Letters: D embedding width, h heads, q width of a head's queries and keys, v of its values.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from vitprune.calibration.attention_moments import QueryKeyMoments
from vitprune.calibration.statistics import Statistics
from vitprune.models.attention import VO
from vitprune.models.units import find_groups
from vitprune.options import DEFAULT_RIDGE

# Of the largest eigenvalue: what is smaller is measured badly, and its inverse would be noise.
LEAST = 1e-6


@torch.no_grad()
def rotate_queries_keys(model: nn.Module, moments: Mapping[str, QueryKeyMoments]) -> nn.Module:
    """Return a copy whose queries and keys are turned, head by head; its answers stay but for rounding.

    Args:
        model: timm Vision Transformer with ``SplitAttention``.
        moments: by name of the attention.

    Source:
        The best approximation of the logits at a rank, as in CORP (arXiv:2602.05243); here keys are centred within the
        image, because the softmax is.

    >>> import timm
    >>> from vitprune.models.attention import split_attention
    >>> model = split_attention(timm.create_model("vit_tiny_patch16_224", depth=1)).eval()
    >>> eye_hqq = torch.eye(64, dtype=torch.float64).expand(3, 64, 64)
    >>> turned = rotate_queries_keys(model, {"blocks.0.attn": QueryKeyMoments(eye_hqq, eye_hqq)})
    >>> turned.blocks[0].attn.q.weight.shape
    torch.Size([192, 192])
    """
    result = copy.deepcopy(model)
    for name, of_attention in moments.items():
        attention = result.get_submodule(name)
        query_root, query_inverse = _roots(of_attention.query_hqq)
        key_root, key_inverse = _roots(of_attention.key_hqq)
        left_hqq, values_hq, right_hqq = torch.linalg.svd(query_root @ key_root)
        stretch_hq = values_hq.sqrt().unsqueeze(1)
        _turn_rows(attention.q, query_inverse @ left_hqq * stretch_hq)
        _turn_rows(attention.k, key_inverse @ right_hqq.transpose(1, 2) * stretch_hq)
    return result


@torch.no_grad()
def rotate_values(
    model: nn.Module, statistics: Mapping[str, Statistics]
) -> tuple[nn.Module, dict[str, Statistics], dict[str, Tensor]]:
    """Return a copy whose values are turned, the same statistics in the new basis, and what each dimension is worth.

    Args:
        model: timm Vision Transformer with ``SplitAttention``.
        statistics: of what each attention's projection reads, by name of the attention, with ``moments`` and
            ``gradients``.

    Returns:
        The model; its answers stay but for rounding. The statistics. Name of the attention -> loss [v] that a dimension
        costs in all heads once its mean has moved into the bias: ½ S², summed over heads; float64, nats per image.

    >>> import timm
    >>> from vitprune.calibration.statistics import measure_statistics
    >>> from vitprune.models.attention import split_attention
    >>> from vitprune.models.units import find_groups
    >>> model = split_attention(timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=5)).eval()
    >>> batches = [(torch.randn(2, 3, 32, 32), torch.zeros(2, dtype=torch.int64))]
    >>> measured = measure_statistics(model, find_groups(model, ["vo"]), batches, {"moments", "gradients"})
    >>> turned, _statistics, losses = rotate_values(model, {"blocks.0.attn": measured["blocks.0.attn.vo"]})
    >>> losses["blocks.0.attn"].shape
    torch.Size([64])
    """
    result = copy.deepcopy(model)
    turned, losses = {}, {}
    for name, of_attention in statistics.items():
        attention = result.get_submodule(name)
        heads = attention.num_heads
        gradient_root = _roots(of_attention.gradient_DD)[0]
        blocks_hvv = torch.stack(_diagonal_blocks(of_attention.covariance_HH, heads))
        root_hvv, inverse_hvv = _roots(blocks_hvv)
        weight_hDv = attention.proj.weight.double().cpu().unflatten(1, (heads, -1)).transpose(0, 1)
        left_hvv, values_hv, _right = torch.linalg.svd(
            root_hvv @ weight_hDv.transpose(1, 2) @ gradient_root, full_matrices=False
        )
        if left_hvv.shape[-1] < left_hvv.shape[-2]:  # heads wider than the stream: the rest is worth nothing
            left_hvv, values_hv = _complete(left_hvv, values_hv)
        into_hvv = inverse_hvv @ left_hvv
        _turn_rows(attention.v, into_hvv)
        out_hDv = weight_hDv @ root_hvv @ left_hvv
        attention.proj.weight.copy_(out_hDv.transpose(0, 1).flatten(1))
        whole_HH = torch.block_diag(*into_hvv)
        turned[name] = replace(
            of_attention,
            mean_H=of_attention.mean_H @ whole_HH,
            covariance_HH=whole_HH.T @ of_attention.covariance_HH @ whole_HH,
        )
        losses[name] = values_hv.square().sum(0) / 2
    return result, turned, losses


@torch.no_grad()
def sort_heads(
    model: nn.Module,
    statistics: Mapping[str, Statistics],
    moments: Mapping[str, QueryKeyMoments],
    *,
    ridge: float = DEFAULT_RIDGE,
) -> tuple[nn.Module, dict[str, Statistics], dict[str, QueryKeyMoments], dict[str, Tensor]]:
    r"""Return a copy whose heads stand in the order of what they are worth, and what was measured in the same order.

    With covariance C of what the projection reads and A = G^{1/2} W_o, the loss that head h costs once the others were
    refitted is

    .. math:: c_h = \tfrac12 \, \mathrm{tr} \left( A_h \, \big( [(C + \lambda I)^{-1}]_{hh} \big)^{-1} A_h^T \right)

    Heads go one after another, each time the one that costs least beside those that are left.

    Args:
        model: timm Vision Transformer with ``SplitAttention``.
        statistics: by group name; of the groups of values with ``moments`` and ``gradients``.
        moments: by name of the attention; may be empty.
        ridge: λ relative to the mean variance.

    Returns:
        The model, whose answers stay but for rounding; statistics; moments; name of the attention -> losses [h],
        falling; float64, nats per image.

    Source:
        Criterion ``obs``, for several features at once.

    >>> import timm
    >>> from vitprune.calibration.statistics import measure_statistics
    >>> from vitprune.models.attention import split_attention
    >>> from vitprune.models.units import find_groups
    >>> model = split_attention(timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=5)).eval()
    >>> batches = [(torch.randn(2, 3, 32, 32), torch.zeros(2, dtype=torch.int64))]
    >>> measured = measure_statistics(model, find_groups(model, ["vo"]), batches, {"moments", "gradients"})
    >>> len(sort_heads(model, measured, {})[3]["blocks.0.attn"])
    3
    """
    result, sorted_moments, losses = copy.deepcopy(model), dict(moments), {}
    sorted_statistics = dict(statistics)
    for group in find_groups(model, [VO]):
        attention, of_group = result.get_submodule(group.module), statistics[group.name]
        heads = attention.num_heads
        a_DH = _roots(of_group.gradient_DD)[0] @ attention.proj.weight.double().cpu()
        order, losses[group.module] = _eliminate_heads(a_DH, of_group.covariance_HH, heads, ridge)
        for linear in (attention.q, attention.k, attention.v):
            for tensor in (linear.weight, linear.bias):
                if tensor is not None:
                    tensor.copy_(tensor.unflatten(0, (heads, -1))[order].flatten(0, 1))
        attention.proj.weight.copy_(attention.proj.weight.unflatten(1, (heads, -1))[:, order].flatten(1))
        places_H = torch.arange(len(of_group.mean_H)).unflatten(0, (heads, -1))[order].flatten()
        sorted_statistics[group.name] = replace(
            of_group,
            mean_H=of_group.mean_H[places_H],
            covariance_HH=of_group.covariance_HH[places_H][:, places_H],
        )
        if group.module in moments:
            of_keys = moments[group.module]
            sorted_moments[group.module] = QueryKeyMoments(of_keys.query_hqq[order], of_keys.key_hqq[order])
    return result, sorted_statistics, sorted_moments, losses


def _eliminate_heads(a_DH: Tensor, covariance_HH: Tensor, heads: int, ridge: float) -> tuple[Tensor, Tensor]:
    """Return heads, the most important first, and the loss of each beside those before it; falling."""
    width = len(covariance_HH) // heads
    damped_HH = covariance_HH.clone()
    damped_HH.diagonal().add_(max(ridge * float(covariance_HH.diagonal().mean()), torch.finfo(torch.float64).tiny))
    left, gone, costs = list(range(heads)), [], []
    while left:
        places_S = torch.cat([torch.arange(head * width, (head + 1) * width) for head in left])
        inverse_SS = torch.linalg.inv(damped_HH[places_S][:, places_S])
        # What the others cannot stand in for counts with the weights as refitted so far.
        cost = []
        for number, head in enumerate(left):
            own = slice(number * width, (number + 1) * width)
            rest_vv = torch.linalg.inv(inverse_SS[own, own])
            weight_Dv = a_DH[:, head * width : (head + 1) * width]
            cost.append(0.5 * float((weight_Dv @ rest_vv * weight_Dv).sum()))
        least = min(range(len(left)), key=cost.__getitem__)
        head, own = left[least], slice(least * width, (least + 1) * width)
        refit_Sv = inverse_SS[:, own] @ torch.linalg.inv(inverse_SS[own, own])
        a_DH = a_DH.clone()
        a_DH[:, places_S] -= a_DH[:, head * width : (head + 1) * width] @ refit_Sv.T
        costs.append(max([cost[least], *costs]))
        gone.append(left.pop(least))
    return torch.tensor(gone[::-1]), torch.tensor(costs[::-1], dtype=torch.float64)


def _complete(left_hvr: Tensor, values_hr: Tensor) -> tuple[Tensor, Tensor]:
    full_hvv = torch.linalg.svd(left_hvr, full_matrices=True)[0]
    rest_hvx = full_hvv[..., left_hvr.shape[-1] :]
    zeros_hx = values_hr.new_zeros(len(values_hr), rest_hvx.shape[-1])
    return torch.cat([left_hvr, rest_hvx], -1), torch.cat([values_hr, zeros_hx], -1)


def _diagonal_blocks(matrix_HH: Tensor, count: int) -> list[Tensor]:
    width = len(matrix_HH) // count
    return [matrix_HH[start : start + width, start : start + width] for start in range(0, len(matrix_HH), width)]


def _roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Return the symmetric square root of each positive semi-definite matrix [..., x, x], and its inverse."""
    values, vectors = torch.linalg.eigh(moment)
    least = values[..., -1:].clamp_min(torch.finfo(values.dtype).tiny) * LEAST
    root = values.maximum(least).sqrt().unsqueeze(-2)
    return vectors * root @ vectors.transpose(-2, -1), vectors / root @ vectors.transpose(-2, -1)


def _turn_rows(linear: nn.Linear, turn_hxy: Tensor) -> None:
    """Turn what a layer computes head by head, in place: its outputs become x @ turn."""
    heads = len(turn_hxy)
    weight_hxD = linear.weight.double().cpu().unflatten(0, (heads, -1))
    linear.weight.copy_((turn_hxy.transpose(1, 2) @ weight_hxD).flatten(0, 1))
    if linear.bias is not None:
        bias_h1x = linear.bias.double().cpu().unflatten(0, (heads, -1)).unsqueeze(1)
        linear.bias.copy_((bias_h1x @ turn_hxy).flatten())
