"""Pictures and tables of latency."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

from vitprune.export.bench import BenchRow
from vitprune.files import atomic_file

BENCH_FILES = frozenset({"bench.csv", "bench.json", "bench.png", "bench.svg"})
# Okabe-Ito, safe for colour-blind readers.
COLOURS = ("#999999", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def write_bench(rows: Sequence[BenchRow], path: str | Path) -> None:
    """Write the rows to a CSV file, in the order given."""
    with atomic_file(path) as temporary, temporary.open("w", newline="") as stream:
        table = csv.DictWriter(stream, [field.name for field in fields(BenchRow)], lineterminator="\n")
        table.writeheader()
        table.writerows(map(asdict, rows))


def render_bench(rows: Sequence[BenchRow], path: str | Path, *, title: str) -> None:
    """Draw images per second, and the speed-up with its interval below its ceiling, and write it as PNG or SVG.

    Args:
        rows: of one bench.
        path: file to write.
        title: above the picture.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    settings = list(dict.fromkeys((row.backend, row.batch_size, row.num_threads) for row in rows))
    bars = list(dict.fromkeys((row.model, row.precision) for row in rows))
    several = len({row.precision for row in rows}) > 1
    with rc_context({"svg.hashsalt": "vitprune", "font.size": 9}):
        figure = Figure(figsize=(9.5, 1.6 + 0.24 * len(settings) * (len(bars) + 1)), layout="constrained")
        speed, ratio = figure.subplots(1, 2, sharey=True)
        thickness = 0.8 / len(bars)
        for number, (model, precision) in enumerate(bars):
            own = [row for row in rows if (row.model, row.precision) == (model, precision)]
            places = [
                settings.index((row.backend, row.batch_size, row.num_threads)) + (number + 0.5) * thickness - 0.4
                for row in own
            ]
            label = f"{Path(model).name}, {precision}" if several else Path(model).name
            colour = COLOURS[number % len(COLOURS)]
            speed.barh(places, [row.images_per_second for row in own], thickness, color=colour, label=label)
            values = [row.speedup for row in own]
            low = [row.speedup - row.speedup_low for row in own]
            high = [row.speedup_high - row.speedup for row in own]
            ratio.barh(places, values, thickness, color=colour, xerr=(low, high), error_kw={"linewidth": 1})
            for place, row in zip(places, own, strict=True):
                text = f"{row.images_per_second:.0f} "
                speed.text(row.images_per_second, place, text, va="center", ha="right", fontsize=7, color="white")
                if row.ceiling_share is not None and row.speedup_ceiling != 1:
                    half = thickness / 2
                    ratio.plot([row.speedup_ceiling] * 2, [place - half, place + half], color="black", linestyle=":")
        speed.set_xlabel("images per second")
        ratio.set_xlabel(f"speed-up over {Path(rows[0].model).name}, 95 % interval; dotted: ceiling (Amdahl)")
        ratio.axvline(1, color="black", linewidth=0.8)
        names = [
            f"{backend}\nbatch {batch}, {threads} thread{'s' if threads > 1 else ''}"
            for backend, batch, threads in settings
        ]
        speed.set_yticks(range(len(settings)), names)
        speed.invert_yaxis()
        figure.suptitle(title)
        figure.legend(*speed.get_legend_handles_labels(), loc="outside lower center", ncols=min(4, len(bars)))
        with atomic_file(path) as temporary:
            figure.savefig(temporary, dpi=150, metadata={"Date": None} if temporary.suffix == ".svg" else None)
