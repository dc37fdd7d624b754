"""``vitprune report``: write one HTML file about runs, pruned models and what was measured of them."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import ArgumentParser

from vitprune.cli.terminal import print_table
from vitprune.errors import VitpruneError

SUMMARY = "write one HTML file about runs, pruned models and what was measured of them"


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "folders",
        type=str,
        nargs="+",
        help="what discover, prune, evaluate -o, curve, bench -o and analyze wrote, in any mixture; the first pruned "
        "model is what the summary is about",
    )
    parser.add_argument("-o", "--output", type=str, default="report.html", help="HTML file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")


def run(folders, output, overwrite):
    from vitprune.files import refuse_existing

    if Path(output).suffix not in (".html", ".htm"):
        raise VitpruneError(f"{output}: a report is an HTML file; end the output in .html")
    refuse_existing(output, overwrite=overwrite)
    for folder in folders:
        if not Path(folder).is_dir():
            raise VitpruneError(f"{folder}: no such folder")
    from vitprune.report.page import write_report

    written = write_report(folders, output)
    answer = {
        "output": output,
        "size_bytes": written.size_bytes,
        "artefacts": [{"kind": kind, "name": name, "folder": folder} for kind, name, folder in written.artefacts],
        "num_figures": written.num_figures,
        "num_thumbnails": written.num_thumbnails,
        "num_absent": written.num_absent,
    }

    def show() -> None:
        print_table(
            "report", ("name", "kind"), [(name, kind) for kind, name, _folder in written.artefacts], texts=("kind",)
        )
        if written.num_absent:
            print(f"{written.num_absent} images that it names are gone or cannot be decoded")
        print(
            f"wrote {output} ({written.size_bytes / 1e6:.1f} MB, {written.num_figures} figures, "
            f"{written.num_thumbnails} thumbnails)"
        )

    return answer, show
