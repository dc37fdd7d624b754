"""Draw tables that ``benchmarks/quality.py`` wrote in several runs as one picture.

    python benchmarks/draw_quality.py --tables '[results/A.csv, results/B.csv]' --picture docs/accuracy_curve.png \
        --criteria '[obs, variance]' --compensations '[ridge, sequential]'

Of points that stand in several tables, the last table's is drawn.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import get_type_hints

from jsonargparse import auto_cli

from vitprune.evaluation.curve import CurvePoint
from vitprune.figures.curve_figure import draw_curve
from vitprune.figures.style import save_figure


def main(
    tables: list[str],
    picture: str,
    criteria: list[str] | None = None,
    compensations: list[str] | None = None,
    model: str = "deit_tiny_patch16_224",
):
    """Draw them.

    Args:
        tables: CSV files of runs on the same evaluation images.
        picture: PNG or SVG file to write.
        criteria: leave out the others.
        compensations: leave out the others.
        model: named in the title.
    """
    points: dict[tuple, CurvePoint] = {}
    dense: list[CurvePoint] = []
    for table in tables:
        for point in read_points(table):
            dense += [point] if point.criterion == "dense" else []
            ratio = round(point.pruning_ratio, 3)
            points[point.criterion, point.allocation, point.compensation, point.step, ratio] = point
    if len({(point.top1, point.num_images) for point in dense}) != 1:
        raise SystemExit("the tables are not of one model and one set of images")
    shown = [
        point
        for point in points.values()
        if point.criterion == "dense"
        or (
            (criteria is None or point.criterion in criteria)
            and (compensations is None or point.compensation in compensations)
        )
    ]
    save_figure(draw_curve(shown, title=f"{model}, {dense[0].num_images} photos, no retraining"), picture)


def read_points(path: str | Path) -> list[CurvePoint]:
    """Read a table as ``write_table`` wrote it."""
    types = get_type_hints(CurvePoint)
    with Path(path).open(newline="") as stream:
        return [CurvePoint(**{name: types[name](text) for name, text in row.items()}) for row in csv.DictReader(stream)]


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
