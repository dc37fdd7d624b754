"""Picture: how a training went, epoch by epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vitprune.errors import VitpruneError
from vitprune.figures.style import COLOURS, PAGE, new_figure, styled


@styled
def draw_recovery(rows: Sequence[Any], *, before: tuple[float | None, float | None] = (None, None)) -> Figure:
    """Draw the losses of each epoch, and beside them what held-back images say.

    Args:
        rows: ``EpochRow`` of each epoch, at least one.
        before: what held-back images cost before training, and their accuracy; drawn at epoch 0.

    Raises:
        VitpruneError: if there are no rows.
    """
    if not rows:
        raise VitpruneError("training: no epoch to draw")
    epochs = [row.epoch for row in rows]
    names = list(rows[0].losses)
    figure = new_figure(PAGE, 2.6)
    trained, judged = figure.subplots(1, 2)
    for place, name in enumerate(names):
        trained.plot(epochs, [row.losses[name] for row in rows], marker="o", color=COLOURS[place], label=name)
    trained.set_yscale("log")
    trained.set_ylabel("training loss")
    trained.legend()
    held_back = [(0, before[0]), *((row.epoch, row.held_back) for row in rows)]
    held_back = [pair for pair in held_back if pair[1] is not None]
    judged.plot(*zip(*held_back, strict=True) if held_back else ((), ()), marker="s", color=COLOURS[0], label="loss")
    judged.set_ylabel("held-back images: loss")
    accuracies = [(0, before[1]), *((row.epoch, row.accuracy) for row in rows)]
    accuracies = [(epoch, 100 * value) for epoch, value in accuracies if value is not None]
    if accuracies:
        beside = judged.twinx()
        beside.plot(*zip(*accuracies, strict=True), marker="^", color=COLOURS[1])
        beside.set_ylabel("accuracy (%)", color=COLOURS[1])
        beside.spines["right"].set_visible(True)
    for axes in (trained, judged):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(True)
    return figure
