"""How long a model takes by what it is made of, so that any candidate can be timed without being run.

A model's time is a sum over what its blocks do, each in proportion to its size: products with weights, products of
attention, steps over all tokens, and a fixed price for every layer that runs at all. The rates are fitted to measured
times of whole models (``fit_latency``). Merged tokens, narrower layers and layers that are gone change the
sizes; cost is not additive over them, for with fewer tokens every width costs less.

Letters: D embedding width, N tokens that attention reads, Q tokens that ask, M tokens of the FFN, h heads, P rates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor, nn

from vitprune.errors import VitpruneError
from vitprune.models.attention import QK, VO, SplitAttention, split_attention
from vitprune.models.left_out import TokenMap
from vitprune.models.merging import check_merging, describe_merging
from vitprune.models.units import FFN, Group, find_groups, find_left
from vitprune.pruning.meters import Meter
from vitprune.pruning.target import Target, check_target, macs_per_unit
from vitprune.views import num_patches, num_prefix_tokens, num_tokens_read

# What a block's time is made of: a price for every layer and merge, and rates for what grows with sizes.
RATES = ("model", "layers", "merges", "steps", "projections", "attention", "softmax", "ffn", "matching")


@dataclass(frozen=True)
class AttentionShape:
    """Sizes of one attention.

    Attributes:
        num_heads: h.
        qk: width of a head's queries and keys.
        vo: width of a head's values.
    """

    num_heads: int
    qk: int
    vo: int


@dataclass(frozen=True)
class BlockShape:
    """Sizes of one block.

    Attributes:
        attention: its sizes; None where a bias stands there, "map" where a map of each token does.
        ffn: weights of the FFN; 0 where a bias stands there, D * D where a map does.
        merge: tokens that disappear behind the attention.
    """

    attention: AttentionShape | str | None
    ffn: float
    merge: int = 0


@dataclass(frozen=True)
class Shape:
    """Sizes of a model of blocks.

    Attributes:
        dim: D.
        num_tokens: of an image, before any merge.
        num_prefix: of these, at the front, that never merge.
        num_read: leading tokens that the head reads, where a backend computes the last block for them alone; None
            where it computes every token.
        blocks: in order.
    """

    dim: int
    num_tokens: int
    num_prefix: int
    num_read: int | None
    blocks: tuple[BlockShape, ...]

    def with_merging(self, schedule: Sequence[int]) -> Shape:
        """Return the shape of the model with another schedule."""
        merged = tuple(replace(block, merge=r) for block, r in zip(self.blocks, schedule, strict=True))
        return replace(self, blocks=merged)

    def tokens(self) -> list[tuple[int, int, int]]:
        """Return N, Q and M of each block."""
        result, left = [], self.num_tokens
        for number, block in enumerate(self.blocks):
            is_last = number == len(self.blocks) - 1 and self.num_read is not None
            after = left - block.merge
            result.append((left, self.num_read, self.num_read) if is_last else (left, left, after))
            left = after
        return result

    def amounts(self) -> np.ndarray:
        """Return how much there is of what each of ``RATES`` is paid for [P] (float64)."""
        total = dict.fromkeys(RATES, 0.0)
        total["model"] = 1.0
        for block, (n, q, m) in zip(self.blocks, self.tokens(), strict=True):
            for of_layer in (_of_attention(block, self.dim, n, q), _of_ffn(block.ffn, self.dim, m)):
                for rate, amount in of_layer.items():
                    total[rate] += amount
        return np.array([total[rate] for rate in RATES])


def _of_attention(block: BlockShape, dim: int, n: int, q: int) -> dict[str, float]:
    if block.attention is None:
        return {}
    if block.attention == "map":
        return {"layers": 1.0, "steps": float(dim * q), "projections": float(dim * dim * q)}
    heads, qk, vo = block.attention.num_heads, block.attention.qk, block.attention.vo
    result = {
        "layers": 1.0,
        "steps": float(dim * q),
        "projections": float(dim * heads * (qk + vo) * (n + q)),
        "attention": float(heads * (qk + vo) * n * q),
        "softmax": float(heads * n * q),
    }
    if block.merge:
        result["merges"] = 1.0
        result["matching"] = heads * qk * n * n / 4 + float((n - block.merge) * n * dim)
    return result


def _of_ffn(weights: float, dim: int, m: int) -> dict[str, float]:
    return {"layers": 1.0, "steps": float(dim * m), "ffn": weights * m} if weights else {}


def shape_of(model: nn.Module, *, reads_last_block: bool) -> Shape:
    """Return the sizes of a model of blocks.

    Args:
        model: timm Vision Transformer whose tokens could merge: isotropic, with global attention.
        reads_last_block: whether every token of the last block is computed, as torch does; exported files compute
            those alone that the head reads.

    Raises:
        VitpruneError: if it is another kind of model.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=2).eval()
    >>> shape = shape_of(model, reads_last_block=False)
    >>> shape.num_tokens, shape.tokens()
    (197, [(197, 197, 197), (197, 1, 1)])
    """
    check_merging(model)
    per_unit = {group.module: group for group in find_left(model)}
    schedule = describe_merging(model) or [0] * len(model.blocks)
    dim, blocks = model.embed_dim, []
    for number, (block, r) in enumerate(zip(model.blocks, schedule, strict=True)):
        name = f"blocks.{number}.mlp"
        if name in per_unit:
            group = per_unit[name]
            weights = float(macs_per_unit(model, group, num_tokens=0) * group.num_units)
        else:
            weights = float(dim * dim) if type(block.mlp) is TokenMap else 0.0
        blocks.append(BlockShape(_attention_of(block.attn), weights, r))
    prefix = num_prefix_tokens(model)
    read = None if reads_last_block else num_tokens_read(model)
    return Shape(dim, prefix + num_patches(model), prefix, read, tuple(blocks))


def _attention_of(attention: nn.Module) -> AttentionShape | str | None:
    if type(attention) is SplitAttention:
        return AttentionShape(attention.num_heads, attention.qk_width, attention.v_width)
    if hasattr(attention, "qkv"):
        width = attention.qkv.out_features // 3 // attention.num_heads
        return AttentionShape(attention.num_heads, width, width)
    return "map" if type(attention) is TokenMap else None


@dataclass(frozen=True)
class LatencyModel:
    """Milliseconds of a run by the sizes of a model.

    Attributes:
        backend: key of ``BACKENDS`` that was measured.
        precision: of the products with weights.
        rates: ms for one of what each of ``RATES`` is paid for [P], non-negative; float64.
        reads_last_block: as ``shape_of`` takes it.
        error: largest relative difference between predicted and measured times of the models it was fitted to.
        scale: what predictions are multiplied with, once a model near the one that is wanted was timed itself.
    """

    backend: str
    precision: str
    rates: tuple[float, ...]
    reads_last_block: bool
    error: float = 0.0
    scale: float = 1.0

    def of_shape(self, shape: Shape) -> float:
        """Return ms of a run of a model of these sizes."""
        return self.scale * float(shape.amounts() @ np.array(self.rates))

    def predict(self, model: nn.Module) -> float:
        """Return ms of a run of a model."""
        return self.of_shape(shape_of(model, reads_last_block=self.reads_last_block))

    def scaled(self, factor: float) -> LatencyModel:
        """Return a model that predicts ``factor`` times as much."""
        return replace(self, scale=self.scale * factor)

    def meter(self) -> Meter:
        """Return the measure that targets of it are told in."""
        return Meter("latency", self.predict, partial(target_time, latency=self), self._share_of)

    def _share_of(self, dense: nn.Module):
        shape = shape_of(dense, reads_last_block=self.reads_last_block)
        whole = self.of_shape(shape)
        return lambda schedule: self.of_shape(shape.with_merging(schedule)) / whole


def fit_rates(shapes: Sequence[Shape], times_ms: Sequence[float]) -> tuple[tuple[float, ...], float]:
    """Fit non-negative rates to measured times, in least squares of the relative error.

    Args:
        shapes: of the models that were timed.
        times_ms: what each took.

    Returns:
        Rates [P], and the largest relative error.

    Raises:
        VitpruneError: if nothing was timed.

    >>> attention = AttentionShape(num_heads=3, qk=64, vo=64)
    >>> shapes = [Shape(192, n, 1, None, (BlockShape(attention, ffn=294912.0),) * 2) for n in (50, 100, 197)]
    >>> rates, error = fit_rates(shapes, [3.0, 6.0, 11.82])
    >>> error < 1e-6
    True
    """
    if not shapes:
        raise VitpruneError("no models were timed")
    amounts = np.stack([shape.amounts() for shape in shapes])
    times = np.asarray(times_ms, dtype=np.float64)
    size = np.maximum(amounts.max(0), 1.0)
    found, _residual = nnls(amounts / size / times[:, None], np.ones(len(times)))
    rates = found / size
    error = float(np.abs(amounts @ rates / times - 1).max())
    return tuple(map(float, rates)), error


def target_time(model: nn.Module, limit: float, *, latency: LatencyModel, kinds: Sequence[str] = (FFN,)) -> Target:
    """Ask for milliseconds, by a fitted model of a backend's times.

    A layer that runs at all costs something, however narrow it is; that falls away where it goes as a whole.

    Args:
        model: timm Vision Transformer in eval mode, which may be narrow and may merge tokens.
        limit: ms of one run.
        latency: the fitted model.
        kinds: of units that may go: ``ffn``, ``qk`` and ``vo``.

    Raises:
        VitpruneError: if the model cannot be that fast, or is faster already.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=1).eval()
    >>> latency = LatencyModel("torch-eager", "float32", (0.0, 1.0, 0, 0, 0, 0, 0, 1e-8, 0), reads_last_block=True)
    >>> target = target_time(model, 2.2, latency=latency)
    >>> abs(target.dense - latency.predict(model)) < 1e-9
    True
    """
    rate = {name: latency.scale * value for name, value in zip(RATES, latency.rates, strict=True)}
    split = split_attention(model)
    shape = shape_of(split, reads_last_block=latency.reads_last_block)
    tokens = dict(enumerate(shape.tokens()))
    costs: dict[str, Tensor] = {}
    for group in find_groups(split, kinds):
        number = int(group.name.split(".")[1])
        costs[group.name] = _cost_of(split, group, shape.blocks[number], shape.dim, tokens[number], rate)
    maps = {}
    for number, (n, q, m) in tokens.items():
        maps[f"blocks.{number}.attn"] = _priced(_of_attention(BlockShape("map", 0), shape.dim, n, q), rate)
        maps[f"blocks.{number}.mlp"] = _priced(_of_ffn(float(shape.dim**2), shape.dim, m), rate)
    fixed = latency.of_shape(shape) - sum(float(cost_H[-1]) for cost_H in costs.values())
    return check_target(Target("latency", limit, max(fixed, 0.0), costs, maps))


def _cost_of(
    model: nn.Module,
    group: Group,
    block: BlockShape,
    dim: int,
    tokens: tuple[int, int, int],
    rate: Mapping[str, float],
) -> Tensor:
    """Return ms at 0, 1 .. H units [H + 1]; what a layer costs at any width is with its values or neurons."""
    n, q, m = tokens
    if group.kind == FFN:
        weights = float(macs_per_unit(model, group, num_tokens=0))
        per_unit = _priced({"ffn": weights * m}, rate)
        always = _priced({"layers": 1.0, "steps": float(dim * m)}, rate)
    else:
        whole = _of_attention(block, dim, n, q)
        heads = block.attention.num_heads
        per_unit = _priced({"projections": dim * heads * (n + q), "attention": heads * n * q}, rate)
        always = 0.0
        if group.kind == VO:
            always = _priced({name: whole[name] for name in ("layers", "steps", "softmax")}, rate)
        elif group.kind == QK and block.merge:
            per_unit += _priced({"matching": heads * n * n / 4}, rate)
    cost_H = per_unit * torch.arange(group.num_units + 1, dtype=torch.float64) + always
    cost_H[0] = 0.0
    return cost_H


def _priced(amounts: Mapping[str, float], rate: Mapping[str, float]) -> float:
    return sum(rate[name] * amount for name, amount in amounts.items())
