"""Of a front: what every speed costs, beside what is to be had without a budget."""

from __future__ import annotations

from collections.abc import Sequence

from vitprune.evaluation.front import ABOVE, BELOW, BEYOND, ON, Front, FrontRow
from vitprune.options import BUDGET, DENSE, LEVERS
from vitprune.report.page_blocks import Cell, Column, Grid, Row, Section
from vitprune.report.pictures import read_svg
from vitprune.report.shown_folder import Artefact, card_id, part_name
from vitprune.report.text import percent, plural, points, times

# Words of the table for where a row lies.
PLACES = {ON: "", ABOVE: "above the front", BELOW: "below it", BEYOND: "faster than it goes"}


def front_section(artefact: Artefact, artefacts: Sequence[Artefact]) -> Section:
    """Tell at which speed what pays."""
    front: Front = artefact.content
    dense = front.rows[0]
    sizes = " and ".join(map(str, front.batch_sizes))
    lead = [
        f"Top-1 on {plural(front.num_images, 'image')} that had no say; the dense model answers {percent(dense.top1)} "
        f"rightly. Speed is that of the file, at batch size {sizes}, over the dense float32 model.",
        *(say_what_pays(front.rows, speedup) for speedup in front.request["speedups"]),
    ]
    if front.above:
        named = ", ".join(f"{name_of(row)} ({times(row.speedup)})" for row in front.above)
        lead.append(f"Above the front: {named}.")
    else:
        lead.append("No alternative lies above the front.")
    for what, reason in {**front.unreached, **front.left_out}.items():
        lead.append(f"{what}: not measured ({reason}).")
    picture = read_svg(
        artefact.folder / "front.svg",
        id=f"{artefact.key}-picture",
        caption="Top-1 accuracy against speed; lines: models pruned for a speed, marks: what is to be had without.",
    )
    title = f"{artefact.name}: what speed costs"
    name = part_name(artefact, artefacts, "Speeds")
    blocks = (picture, _front_grid(artefact, front.rows))
    return Section(artefact.key, name, "front", title, tuple(lead), blocks, card_id(artefact))


def name_of(row: FrontRow) -> str:
    """Return what a row is called in a sentence."""
    lever = LEVERS[row.lever].partition(",")[0]
    return f"{lever}, {row.precision}" if row.lever == DENSE else f"{lever} ({row.name}), {row.precision}"


def say_what_pays(rows: Sequence[FrontRow], speedup: float) -> str:
    """Say what a speed costs by the budget, and what the best of all others costs that is as fast.

    >>> of_row = {"speedup_low": 1, "speedup_high": 3, "predicted_speedup": None, "macs_share": 1, "top1_low": 0}
    >>> of_row |= {"top1_high": 1, "drop_bound": 0.1, "backend": "onnxruntime-cpu", "precision": "float32"}
    >>> budget = FrontRow(lever="budget", name="2x", speedup=2.1, top1=0.8, drop=0.02, place="on", **of_row)
    >>> merging = FrontRow(lever="merging", name="3 x 39", speedup=2.0, top1=0.77, drop=0.05, place="below", **of_row)
    >>> print(say_what_pays([budget, merging], 2).partition("; ")[2])
    without a budget, at best 5.0 points less (tokens merged in equal steps (3 x 39), float32).
    """
    reached = [row for row in rows if row.speedup >= 0.98 * speedup]
    ours = max((row for row in reached if row.lever == BUDGET), key=lambda row: row.top1, default=None)
    other = max((row for row in reached if row.lever != BUDGET), key=lambda row: row.top1, default=None)
    by_budget = "nothing was pruned for it"
    if ours is not None:
        by_budget = f"{LEVERS[BUDGET].partition(',')[0]}, {_lost(ours)} ({ours.precision})"
    without = "nothing is as fast" if other is None else f"at best {_lost(other)} ({name_of(other)})"
    return f"At {times(speedup)}: {by_budget}; without a budget, {without}."


def _lost(row: FrontRow) -> str:
    return f"{abs(100 * row.drop):.1f} points {'less' if row.drop >= 0 else 'more'}"


def _front_grid(artefact: Artefact, rows: Sequence[FrontRow]) -> Grid:
    several = len({row.backend for row in rows}) > 1

    def cells_of(row: FrontRow) -> tuple[Cell, ...]:
        words = [LEVERS[row.lever].partition(",")[0], "" if row.lever == DENSE else row.name]
        words.append(f"{row.backend} {row.precision}" if several else row.precision)
        predicted = row.predicted_speedup
        return (
            *(Cell(word, word) for word in words),
            Cell(times(row.speedup), row.speedup),
            Cell(f"{row.speedup_low:.2f} to {row.speedup_high:.2f}", row.speedup_low),
            Cell("" if predicted is None else times(predicted), predicted),
            Cell(percent(row.macs_share, 0), row.macs_share),
            Cell(percent(row.top1), row.top1),
            Cell(f"{100 * row.top1_low:.1f} to {100 * row.top1_high:.1f}", row.top1_low),
            Cell("" if row is rows[0] else points(-row.drop), -row.drop),
            Cell("" if row is rows[0] else points(-row.drop_bound), -row.drop_bound),
            Cell(PLACES[row.place], row.place),
        )

    columns = (
        *(Column(name, numeric=False) for name in ("what", "which", "format")),
        *map(
            Column,
            ("speed", "95 %", "predicted", "MACs", "top-1", "95 % interval", "change", "at worst"),
        ),
        Column("front", numeric=False),
    )
    note = (
        "At worst: 95 % bound of the change, paired with the dense model. Above the front: everything on it that is as "
        "fast is less accurate."
    )
    return Grid(f"{artefact.key}-rows", "All models", columns, tuple(Row(cells_of(row)) for row in rows), note)
