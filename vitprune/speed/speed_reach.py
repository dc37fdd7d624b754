"""How fast a model could get at most, so that more is refused before any image is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from vitprune.models.image_size import check_image_size, smaller_sizes
from vitprune.pruning.decide import OUTER, PIXELS, TOKENS
from vitprune.pruning.latency_model import AttentionShape, LatencyModel, Shape, shape_of
from vitprune.speed.fit_latency import Fitted, Format
from vitprune.speed.speed_candidates import OutOfReachError
from vitprune.views import data_config

# What goes for speed, where nothing is said.
DEFAULT_PARTS = ("ffn", "qk", "vo", "layers", *OUTER)


def check_reach(
    model: nn.Module, speedup: float, parts: Sequence[str], fitted: Fitted, formats: Sequence[Format], floor: float
) -> None:
    """Refuse what would not be reached by taking all that may go, before anything is measured on images."""
    most = {
        wanted: _times_faster(fitted.dense_ms, latency.of_shape(_least(model, latency, parts, floor)))
        for wanted, latency in ((each, fitted.models[each]) for each in formats)
    }
    best = max(most, key=lambda wanted: most[wanted])
    if speedup > most[best]:
        others = [part for part in DEFAULT_PARTS if part not in parts]
        more = f"let {', '.join(others)} go as well, or ask for less" if others else "ask for less"
        raise OutOfReachError(
            f"{speedup:.4g} times as fast is out of reach: with next to nothing left of {', '.join(parts)} the model "
            f"would be about {most[best]:.3g} times as fast ({best}); {more}"
        )


def _times_faster(dense_ms: float, ms: float) -> float:
    """Return a speed-up; infinite where the fit gives nothing for what is left."""
    return dense_ms / ms if ms > 0 else float("inf")


def _least(model: nn.Module, latency: LatencyModel, parts: Sequence[str], floor: float) -> Shape:
    """Return the shape of a model that lost all it could."""
    shape = shape_of(model, reads_last_block=latency.reads_last_block)
    blocks = []
    for block in shape.blocks:
        attention = block.attention
        if isinstance(attention, AttentionShape):
            qk, vo = (
                max(1, round(floor * width)) if part in parts else width
                for part, width in (("qk", attention.qk), ("vo", attention.vo))
            )
            attention = replace(attention, qk=qk, vo=vo)
        if "layers" in parts:
            attention = None
        ffn = 0.0 if "layers" in parts else block.ffn * floor if "ffn" in parts else block.ffn
        blocks.append(replace(block, attention=attention, ffn=ffn))
    shape = replace(shape, blocks=tuple(blocks))
    if PIXELS in parts:
        height, width = smaller_sizes(model)[-1] if smaller_sizes(model) else data_config(model)["input_size"][1:]
        patch_size = check_image_size(model)
        patches = (height // patch_size[0]) * (width // patch_size[1])
        shape = replace(shape, num_tokens=shape.num_prefix + patches)
    if TOKENS not in parts:
        return shape
    schedule, left = [], shape.num_tokens - shape.num_prefix
    for _block in blocks:
        schedule.append(left // 2)
        left -= left // 2
    return shape.with_merging(schedule)
