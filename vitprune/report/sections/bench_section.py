"""Of a bench: latency and speed-up of models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vitprune.report.page_blocks import Cell, Column, Grid, Row, Section, without_empty
from vitprune.report.pictures import read_svg
from vitprune.report.shown_folder import Artefact, card_id, part_name
from vitprune.report.text import scaled, times
from vitprune.speed.bench import BenchRow
from vitprune.speed.bench_folder import BenchRecord

_TITLES = {"backend": "backend", "precision": "precision", "batch_size": "batch", "num_threads": "threads"}


def bench_section(artefact: Artefact, artefacts: Sequence[Artefact]) -> Section:
    """Tell how fast models run."""
    bench: BenchRecord = artefact.content
    first = bench.rows[0].model
    others = [row for row in bench.rows if row.speedup != 1]
    lead = []
    if others:
        slow, fast = min(others, key=lambda row: row.speedup), max(others, key=lambda row: row.speedup)
        lead.append(
            f"{Path(fast.model).name} runs {times(slow.speedup)} to {times(fast.speedup)} as fast as "
            f"{Path(first).name}, depending on backend and batch size."
            if len(others) > 1
            else f"{Path(fast.model).name} runs {times(fast.speedup)} as fast as {Path(first).name}."
        )
    lead.append(f"Measured on {bench.hardware['processor']}, models in turn; intervals are paired round by round.")
    picture = read_svg(
        artefact.folder / "bench.svg",
        id=f"{artefact.key}-picture",
        caption=f"Images per second, and speed-up over {Path(first).name} with 95 % intervals; dotted: the ceiling "
        "that fewer multiply-accumulates allow (Amdahl).",
    )
    grid = _bench_grid(artefact, bench.rows)
    title = f"{artefact.name}: speed"
    name = part_name(artefact, artefacts, "Speed")
    return Section(artefact.key, name, "bench", title, tuple(lead), (picture, grid), card_id(artefact))


def _bench_grid(artefact: Artefact, rows: Sequence[BenchRow]) -> Grid:
    # What is the same in every row goes into the note.
    words, numbers = ("backend", "precision"), ("batch_size", "num_threads")
    varied = [name for name in (*words, *numbers) if len({getattr(row, name) for row in rows}) > 1]
    same = [f"{_TITLES[name]} {getattr(rows[0], name)}" for name in (*words, *numbers) if name not in varied]

    def cells_of(row: BenchRow) -> tuple[Cell, ...]:
        name = Path(row.model).name
        interval = "" if row.speedup == 1 else f"{row.speedup_low:.2f} to {row.speedup_high:.2f}"
        return (
            Cell(name, name),
            *(Cell(str(getattr(row, name)), getattr(row, name)) for name in varied),
            Cell(f"{row.median_ms:.2f}", row.median_ms),
            Cell(f"{row.p95_ms:.2f}", row.p95_ms),
            Cell(f"{row.images_per_second:.1f}", row.images_per_second),
            Cell(f"{row.speedup:.2f}", row.speedup),
            Cell(interval, row.speedup_low),
            Cell("" if row.speedup_ceiling is None else f"{row.speedup_ceiling:.2f}", row.speedup_ceiling),
            Cell("" if row.peak_bytes is None else scaled(row.peak_bytes, "B"), row.peak_bytes),
        )

    columns = (
        Column("model", numeric=False),
        *(Column(_TITLES[name], numeric=name in numbers) for name in varied),
        *map(Column, ("median ms", "p95 ms", "images/s", "speed-up", "95 % interval", "ceiling", "peak memory")),
    )
    note = "p95: 95th percentile. Ceiling: what fewer multiply-accumulates allow at most (Amdahl)."
    note += f" All: {', '.join(same)}." if same else ""
    grid = Grid(f"{artefact.key}-rows", "All timings", columns, tuple(Row(cells_of(row)) for row in rows), note)
    return without_empty(grid)
