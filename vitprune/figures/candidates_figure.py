"""Picture: the ways to a speed that were looked at, and what each of them loses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from vitprune.errors import VitpruneError
from vitprune.figures.style import COLOURS, PAGE, new_figure, styled


@styled
def draw_candidates(candidates: Sequence[Any], *, asked: float) -> Figure:
    """Draw the loss of each candidate as a bar; the one that was taken is coloured.

    Args:
        candidates: ``Candidate`` values, at least one.
        asked: how many times as fast the result was to be.

    Raises:
        VitpruneError: if there are no candidates.
    """
    if not candidates:
        raise VitpruneError("speed: no candidates to draw")
    figure = new_figure(PAGE, 0.9 + 0.3 * len(candidates))
    axes = figure.subplots()
    places = range(len(candidates))
    colours = [COLOURS[0] if each.chosen else "0.75" for each in candidates]
    axes.barh(places, [each.loss for each in candidates], color=colours)
    axes.set_yticks(places, [describe_candidate(each) for each in candidates])
    axes.invert_yaxis()
    axes.set_xlabel(f"loss per image at {asked:.3g} x: KL to the dense model, nats (encoders: cosine distance)")
    axes.grid(True, axis="x")
    return figure


def describe_candidate(candidate: Any) -> str:
    """Say in a few words what a candidate takes.

    >>> from types import SimpleNamespace
    >>> way = {"backend": "onnxruntime-cpu", "precision": "int8", "image_size": None, "merge": (0, 60, 0, 36)}
    >>> describe_candidate(SimpleNamespace(**way))
    'onnxruntime-cpu int8, merging 60 in block 1, 36 in 3'
    """
    said = [f"{candidate.backend} {candidate.precision}"]
    if candidate.image_size is not None:
        said.append("{} x {} px".format(*candidate.image_size))
    merged = [(block, r) for block, r in enumerate(candidate.merge or ()) if r]
    if merged:
        first, *others = merged
        said.append(f"merging {first[1]} in block {first[0]}")
        said += [f"{r} in {block}" for block, r in others]
    elif candidate.image_size is None:
        said.append("units alone")
    return ", ".join(said)
