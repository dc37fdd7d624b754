"""The verb: what a model consists of, what of it can go, and how fast that could make it; by its structure alone."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import nn

from vitprune.entry import entry
from vitprune.errors import VitpruneError
from vitprune.models.attention import HEADS, QK, VO, split_attention
from vitprune.models.identity import architecture
from vitprune.models.image_size import set_image_size, smaller_sizes
from vitprune.models.left_out import describe_left_out
from vitprune.models.macs import amdahl_ceiling, count_macs, count_parameters
from vitprune.models.merging import describe_merging, set_merging
from vitprune.models.trunk import check_trunk
from vitprune.models.units import FFN, LAYERS, find_feed_forwards, find_groups, find_layers
from vitprune.options import PARTS
from vitprune.pruning.decide import PIXELS, TOKENS, check_parts
from vitprune.pruning.target import target_macs
from vitprune.table import align
from vitprune.views import data_config, num_patches, num_prefix_tokens


@dataclass(frozen=True)
class PartInfo:
    """What one part is to a model.

    Attributes:
        part: key of ``PARTS``.
        reason: why it cannot go; None where it can.
        num_units: how many units there are of it; None where it has none, or cannot go.
        macs_share: multiply-accumulates that go with all of it, as a share of the model's, in [0, 1]; None where it
            cannot go.
        ceiling: how many times as fast the model is without it at most (Amdahl); None likewise.
    """

    part: str
    reason: str | None
    num_units: int | None = None
    macs_share: float | None = None
    ceiling: float | None = None


@dataclass(frozen=True)
class ModelInfo:
    """What a model consists of.

    Attributes:
        architecture: timm name.
        num_classes: length of its answer; 0 for an encoder.
        data_config: how its images are prepared, as timm describes it.
        num_blocks: of its trunk; None where it has no such list.
        num_tokens: of an image, class token and registers among them; None where it does not say.
        num_parameters: of all layers.
        macs: multiply-accumulates of one image.
        rest_share: of these, what belongs to no part: patch embedding, head and the like.
        parts: each of ``PARTS``.
        no_paths: why the path search cannot follow it; None where it can.
        merge: tokens that disappear in each block; None where none do.
        left_out: attention or FFN that is gone -> what stands there.
    """

    architecture: str
    num_classes: int
    data_config: dict
    num_blocks: int | None
    num_tokens: int | None
    num_parameters: int
    macs: int
    rest_share: float
    parts: tuple[PartInfo, ...]
    no_paths: str | None
    merge: tuple[int, ...] | None
    left_out: dict[str, str]

    def __str__(self) -> str:
        rows = [
            (
                each.part,
                PARTS[each.part],
                "" if each.num_units is None else str(each.num_units),
                "" if each.macs_share is None else f"{each.macs_share:.0%}",
                "" if each.ceiling is None else f"{each.ceiling:.2f}",
            )
            for each in self.parts
        ]
        return align(("part", "what", "units", "share", "ceiling"), rows)

    def __repr__(self) -> str:
        return str(self)


@entry
@torch.no_grad()
def info(model: nn.Module) -> ModelInfo:
    """Say what a model consists of, what of it can go, and how fast that could make it at most.

    Weights play no part in it, and no images are read.

    Args:
        model: timm Vision Transformer in eval mode.

    Raises:
        VitpruneError: if the model does not read images of the size that it says.

    >>> import timm
    >>> found = info(timm.create_model("vit_tiny_patch16_224", depth=2).eval())
    >>> [each.part for each in found.parts if each.reason is None]
    ['ffn', 'qk', 'vo', 'heads', 'layers', 'tokens', 'pixels']
    >>> ffn = found.parts[0]
    >>> round(ffn.macs_share, 2), round(ffn.ceiling, 2)
    (0.5, 1.99)
    """
    macs = count_macs(model)
    reasons = {part: _why_not(model, part) for part in PARTS}
    shares, units = _shares(model, macs, reasons)
    parts = []
    for part, reason in reasons.items():
        share = None if reason else shares.get(part)
        ceiling = None if share is None else amdahl_ceiling(macs, macs * (1 - share)) if share < 1 else None
        parts.append(PartInfo(part, reason, None if reason else units.get(part), share, ceiling))
    patches = num_patches(model)
    merge = describe_merging(model)
    blocks = getattr(model, "blocks", None)
    return ModelInfo(
        architecture(model),
        getattr(model, "num_classes", 0),
        data_config(model),
        len(blocks) if isinstance(blocks, nn.Sequential | nn.ModuleList) else None,
        None if patches is None else num_prefix_tokens(model) + patches,
        count_parameters(model),
        macs,
        1 - sum(shares.get(kind, 0.0) for kind in (FFN, QK, VO)),
        tuple(parts),
        _why_no_paths(model),
        None if merge is None else tuple(merge),
        describe_left_out(model),
    )


def _why_not(model: nn.Module, part: str) -> str | None:
    try:
        check_parts(model, [part])
        if part == FFN:
            find_groups(model)
    except VitpruneError as error:
        return re.sub(r"^(part \w+: )+", "", str(error))
    return None


def _why_no_paths(model: nn.Module) -> str | None:
    try:
        ffns = find_feed_forwards(model)
        parameter = next(model.parameters())
        size = data_config(model)["input_size"]
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(1, *size, generator=generator).to(parameter)
        check_trunk(model, ffns, images)
    except VitpruneError as error:
        return str(error)
    return None


def _shares(model: nn.Module, macs: int, reasons: dict[str, str | None]) -> tuple[dict[str, float], dict[str, int]]:
    """Return which share of the multiply-accumulates goes with each part, and how many units it has."""
    if reasons[FFN]:
        return {}, {}
    splits = not (reasons[QK] or reasons[VO])
    network, kinds = (split_attention(model), [FFN, QK, VO]) if splits else (model, [FFN])
    costs = target_macs(network, macs, total=macs, kinds=kinds).costs
    shares, units = dict.fromkeys(kinds, 0.0), dict.fromkeys(kinds, 0)
    for group in find_groups(network, kinds):
        shares[group.kind] += float(costs[group.name][-1]) / macs
        units[group.kind] += group.num_units
    if not reasons[HEADS]:
        shares[HEADS] = shares[QK] + shares[VO]
        units[HEADS] = sum(group.num_units for group in find_groups(network, [HEADS]))
    if not reasons[LAYERS]:
        shares[LAYERS] = sum(shares[kind] for kind in kinds)
        units[LAYERS] = len(find_layers(network))
    if not reasons[TOKENS]:
        shares[TOKENS] = 1 - count_macs(set_merging(model, _as_many_as_can(model))) / macs
        units[TOKENS] = num_patches(model)
    if not reasons[PIXELS]:
        smallest = [set_image_size(model, size) for size in smaller_sizes(model)[-1:]]
        shares[PIXELS] = 1 - count_macs(smallest[0]) / macs if smallest else 0.0
    return shares, units


def _as_many_as_can(model: nn.Module) -> list[int]:
    schedule, left = [], num_patches(model)
    for block in model.blocks:
        r = left // 2 if hasattr(block.attn, "num_heads") else 0
        schedule.append(r)
        left -= r
    return schedule
