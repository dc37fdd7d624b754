"""``vitprune demo``: everything on a small ViT and scanned digits, no downloads."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import ArgumentParser

from vitprune.cli.terminal import note, print_table, track

SUMMARY = "everything on a small ViT and scanned digits, no downloads"


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("-o", "--output", type=str, default="vitprune-demo", help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of every random choice")


def run(output, seed):
    from vitprune.demo import run_demo

    result = run_demo(output, seed=seed, command=f"vitprune demo --seed {seed}", track=track, note=note)

    def show() -> None:
        for title, columns, rows in result.tables:
            print_table(title, columns, rows)
        print(f"wrote {result.output}: " + ", ".join(result.files))
        print(f"look at {Path(result.output) / 'report.html'} in a browser")
        print(f"try next: vitprune discover {result.model} --data {result.data} -o RUN")

    return result.answer, show
