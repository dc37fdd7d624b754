"""Cards of neurons on their way into a page: top images as strips, bright where the neuron is active."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from vitprune.analysis.analysis_folder import Analysis
from vitprune.data import describe_class
from vitprune.models.path_layers import ATTENTION, kind_of_layer
from vitprune.report.page_blocks import NeuronGallery, NeuronShot
from vitprune.report.text import MINUS, number, percent
from vitprune.report.thumbnails import Thumbnail, embed

# How much of a picture's light stays where the neuron is least active.
DARK, GAP, QUALITY = 0.35, 2, 72
NOTE = (
    "Pictures: the images of the run that excite the neuron most, brighter where its activation at the patch is "
    "higher. Chance: that an image of this class excites it more than one of another class. Moves up and down: the "
    "classes that its output points to and away from through the final norm and the classifier, in standard deviations "
    "over all classes. Bars: images by activation, blue those of the class that excites it most, each to its own "
    "scale. Last: what the model answers to the first picture with the neuron multiplied by that much."
)


def show_cards(analysis: Analysis, *, id: str) -> NeuronGallery:
    """Make a gallery of an analysis's neuron cards, in groups by layer."""
    rows = analysis.results["cards"]["cards"]
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    groups = {layer: _describe(layer) for layer in layers}
    shots = tuple(
        _shot(row, draw_strip(pictures, maps), analysis.class_names)
        for row, pictures, maps in zip(rows, analysis.pictures["pictures"], analysis.pictures["maps"], strict=True)
    )
    return NeuronGallery(id, "Cards of neurons on the class paths", groups, shots, NOTE)


def _describe(layer: str) -> str:
    kind = "Attention" if kind_of_layer(layer) == ATTENTION else "FFN"
    return f"{kind} of block {'.'.join(re.findall(r'[0-9]+', layer))}"


def draw_strip(pictures_IHWC: Tensor, maps_IRC: Tensor) -> Thumbnail:
    """Return pictures side by side, darkened where a node is not active; one scale for all of them.

    Args:
        pictures_IHWC: uint8 [n, height, width, 3].
        maps_IRC: float [n, rows, columns]; the node's activation at every patch.
    """
    maps = maps_IRC.float().numpy()
    low, high = float(maps.min()), float(maps.max())
    tiles = []
    for picture, heat in zip(pictures_IHWC.numpy(), maps, strict=True):
        light = (heat - low) / (high - low) if high > low else np.ones_like(heat)
        size = (picture.shape[1], picture.shape[0])
        smooth = np.asarray(Image.fromarray(light.astype(np.float32)).resize(size, Image.Resampling.BILINEAR))
        tiles.append((picture * (DARK + (1 - DARK) * smooth[..., None])).round().astype(np.uint8))
        tiles.append(np.zeros((picture.shape[0], GAP, 3), dtype=np.uint8))
    strip = Image.fromarray(np.concatenate(tiles[:-1], axis=1))
    stream = io.BytesIO()
    strip.save(stream, "JPEG", quality=QUALITY, optimize=True)
    return Thumbnail(embed(stream.getvalue(), "image/jpeg"), *strip.size)


def _shot(row: Mapping[str, Any], strip: Thumbnail, class_names: Mapping[int, str]) -> NeuronShot:
    peak = row["peak"]
    facts = [("on the paths of", ", ".join(describe_class(class_names[index]) for index in row["paths"]))]
    if peak is not None:
        facts.append(("excited most by", f"{describe_class(peak['name'])}, chance {percent(peak['value'], 0)}"))
    if row.get("concepts"):
        facts.append(("words", ", ".join(f"{name} {score:.1f}" for name, score in row["concepts"][:3])))
    for term, key in (("moves up", "towards"), ("moves down", "away")):
        if row[key]:
            said = (f"{describe_class(each['name'])} {each['value']:+.1f}".replace("-", MINUS) for each in row[key][:3])
            facts.append((term, ", ".join(said)))
    heights = [[count / max(1, *row[key]) for count in row[key]] for key in ("all_counts", "peak_counts")]
    steering = tuple(
        (
            f"× {each['factor']:g}",
            ", ".join(f"{describe_class(one['name'])} {percent(one['value'], 0)}" for one in each["answers"][:3]),
        )
        for each in row["steering"]
    )
    return NeuronShot(
        group=row["layer"],
        title=f"{row['layer']} · {row['name']}",
        peak="" if peak is None else describe_class(peak["name"]),
        strip=strip,
        facts=tuple(facts),
        bars=tuple(zip(*heights, strict=True)),
        span=(number(row["bins"][0]), number(row["bins"][-1])),
        steering=steering,
    )
