"""Picture: images per second and speed-up of models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from vitprune.errors import VitpruneError
from vitprune.figures.style import COLOURS, GREY, HATCHES, PAGE, new_figure, shorten, styled


@styled
def draw_bench(rows: Sequence[Any], *, title: str = "") -> Figure:
    """Draw images per second, and the speed-up with its interval below its ceiling.

    Args:
        rows: ``BenchRow`` of one bench.
        title: above the picture.

    Raises:
        VitpruneError: if there are none.
    """
    if not rows:
        raise VitpruneError("bench: nothing to draw")
    settings = list(dict.fromkeys((row.backend, row.batch_size, row.num_threads) for row in rows))
    bars = list(dict.fromkeys((row.model, row.precision) for row in rows))
    several = len({row.precision for row in rows}) > 1
    figure = new_figure(PAGE, 1.6 + 0.2 * len(settings) * (len(bars) + 1), title=title)
    speed, ratio = figure.subplots(1, 2, sharey=True)
    thickness = 0.8 / len(bars)
    fastest = max(row.images_per_second for row in rows)
    for number, (model, precision) in enumerate(bars):
        own = [row for row in rows if (row.model, row.precision) == (model, precision)]
        places = [
            settings.index((row.backend, row.batch_size, row.num_threads)) + (number + 0.5) * thickness - 0.4
            for row in own
        ]
        # The first model is what the others are compared with.
        look = {
            "color": GREY if number == 0 else COLOURS[(number - 1) % len(COLOURS)],
            "hatch": HATCHES[number % len(HATCHES)],
            "edgecolor": "white",
            "label": f"{Path(model).name}, {precision}" if several else Path(model).name,
        }
        speed.barh(places, [row.images_per_second for row in own], thickness, **look)
        values = [row.speedup for row in own]
        low = [row.speedup - row.speedup_low for row in own]
        high = [row.speedup_high - row.speedup for row in own]
        ratio.barh(places, values, thickness, xerr=(low, high), error_kw={"linewidth": 1}, **look)
        for place, row in zip(places, own, strict=True):
            speed.text(row.images_per_second, place, f" {row.images_per_second:.0f}", va="center", fontsize=7)
            if row.ceiling_share is not None and row.speedup_ceiling != 1:
                half = thickness / 2
                ratio.plot([row.speedup_ceiling] * 2, [place - half, place + half], color="black", linestyle=":")
    speed.set_xlim(0, 1.15 * fastest)
    speed.set_xlabel("images per second")
    ratio.set_xlabel(f"speed-up over {shorten(Path(rows[0].model).name)} (×)\n95 % interval; dotted: ceiling (Amdahl)")
    ratio.axvline(1, color="black", linewidth=0.8)
    names = [
        f"{backend}\nbatch {batch}, {threads} thread{'s' if threads > 1 else ''}"
        for backend, batch, threads in settings
    ]
    speed.set_yticks(range(len(settings)), names)
    speed.invert_yaxis()
    figure.legend(*speed.get_legend_handles_labels(), loc="outside lower center", ncols=min(4, len(bars)))
    return figure
