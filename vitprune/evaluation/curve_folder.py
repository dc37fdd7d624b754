"""The folder of a curve: its points as JSON and CSV, and a picture of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vitprune.evaluation.curve import CurvePoint
from vitprune.figures.curve_figure import draw_curve
from vitprune.figures.style import save_figure
from vitprune.files import FORMAT_VERSION, REQUEST_FILE, read_json, write_json, write_table

CURVE_FILE, POINTS_FOLDER = "curve.json", "points"
CURVE_FILES = frozenset({CURVE_FILE, POINTS_FOLDER, "curve.csv", "curve.png", "curve.svg"})


@dataclass(frozen=True)
class CurveRecord:
    """What a curve folder holds.

    Attributes:
        points: the dense model's first.
        max_drop: budget of top-1 that the largest ratio was looked for with, or None.
        largest_ratio: what was found, or None.
        data: folder of the evaluation images.
        files: evaluation images, relative to ``data``.
        skipped: images that could not be decoded.
        request: everything that the points depend on; JSON values.
    """

    points: tuple[CurvePoint, ...]
    max_drop: float | None
    largest_ratio: float | None
    data: str
    files: Sequence[str]
    skipped: Sequence[str]
    request: Mapping[str, Any]


def save_curve(curve: CurveRecord, folder: str | Path) -> None:
    """Write ``curve.json``, ``curve.csv``, ``curve.png`` and ``curve.svg`` into a folder that holds the request."""
    folder = Path(folder)
    content = {
        "points": [asdict(point) for point in curve.points],
        "max_drop": curve.max_drop,
        "largest_ratio": curve.largest_ratio,
        "skipped": list(curve.skipped),
        "evaluation_data": curve.data,
        "evaluation_files": list(curve.files),
    }
    write_json(folder / CURVE_FILE, {"kind": "curve", "version": FORMAT_VERSION, **content})
    write_table(folder / "curve.csv", curve.points, CurvePoint)
    # Not the folder's name: the picture travels without it.
    title = f"{curve.request['architecture']}, {curve.points[0].num_images} images, no retraining"
    for suffix in ("png", "svg"):
        save_figure(draw_curve(curve.points, title=title, max_drop=curve.max_drop), folder / f"curve.{suffix}")


def load_curve(folder: str | Path) -> CurveRecord:
    """Read a curve folder.

    Raises:
        VitpruneError: if it is none.
    """
    folder = Path(folder)
    content = read_json(folder / CURVE_FILE, kind="curve")
    return CurveRecord(
        points=tuple(CurvePoint(**point) for point in content["points"]),
        max_drop=content["max_drop"],
        largest_ratio=content["largest_ratio"],
        data=content["evaluation_data"],
        files=tuple(content["evaluation_files"]),
        skipped=tuple(content["skipped"]),
        request=read_json(folder / REQUEST_FILE, kind="request")["request"],
    )
