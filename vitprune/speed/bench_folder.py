"""The folder of a bench: its rows as JSON and CSV, and a picture of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from vitprune.figures.bench_figure import draw_bench
from vitprune.figures.style import save_figure
from vitprune.files import FORMAT_VERSION, atomic_folder, read_json, write_json, write_table
from vitprune.seal import parsing
from vitprune.speed.bench import BenchRow

BENCH_FILE = "bench.json"
BENCH_FILES = frozenset({BENCH_FILE, "bench.csv", "bench.png", "bench.svg"})


@dataclass(frozen=True)
class BenchRecord:
    """What a bench folder holds.

    Attributes:
        rows: as they were timed.
        hardware: what they were timed on, as ``describe_hardware`` gives it.
    """

    rows: tuple[BenchRow, ...]
    hardware: Mapping[str, str]


def save_bench(bench: BenchRecord, folder: str | Path) -> None:
    """Write a bench folder, all or nothing: ``bench.json``, ``bench.csv``, ``bench.png`` and ``bench.svg``.

    Args:
        bench: what to write.
        folder: replaced if it exists.
    """
    with atomic_folder(folder) as temporary:
        content = {"rows": list(map(asdict, bench.rows)), "hardware": dict(bench.hardware)}
        write_json(temporary / BENCH_FILE, {"kind": "bench", "version": FORMAT_VERSION, **content})
        write_table(temporary / "bench.csv", bench.rows, BenchRow)
        for suffix in ("png", "svg"):
            save_figure(draw_bench(bench.rows, title=bench.hardware["processor"]), temporary / f"bench.{suffix}")


def load_bench(folder: str | Path) -> BenchRecord:
    """Read a bench folder.

    Raises:
        VitpruneError: if it is none.
    """
    content = read_json(Path(folder) / BENCH_FILE, kind="bench")
    with parsing(Path(folder) / BENCH_FILE):
        return BenchRecord(tuple(BenchRow(**row) for row in content["rows"]), content["hardware"])
