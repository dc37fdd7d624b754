"""The folder of a curve: its points as JSON and CSV, and a picture of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from vitprune.data import ImageBatches, ImageSet, hash_images
from vitprune.discovery.discover import Discovery
from vitprune.discovery.run import RUN_FILES
from vitprune.entry import entry
from vitprune.evaluation.curve import Curve, CurvePoint, find_largest_ratio, measure_curve
from vitprune.figures.curve_figure import draw_curve
from vitprune.figures.style import save_figure
from vitprune.files import FORMAT_VERSION, REQUEST_FILE, hash_file, open_resumable, read_json, write_json, write_table
from vitprune.models.identity import architecture, hash_weights
from vitprune.progress import Track, untracked
from vitprune.seal import parsing
from vitprune.seen_images import check_unseen, seen_by
from vitprune.table import align
from vitprune.views import data_config

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

    def __str__(self) -> str:
        names = ("criterion", "allocation", "compensation", "removed", "params", "top-1", "drop", "at most")
        dense, *pruned = self.points
        rows = [(dense.criterion, "", "", "", f"{dense.num_parameters / 1e6:.2f} M", f"{dense.top1:.4f}", "", "")]
        rows += [
            (
                *(point.criterion, point.allocation, point.compensation),
                *(f"{point.pruning_ratio:.2f}", f"{point.num_parameters / 1e6:.2f} M", f"{point.top1:.4f}"),
                *(f"{point.drop:+.4f}", f"{point.drop_bound:+.4f}"),
            )
            for point in pruned
        ]
        table = align(names, rows)
        if self.largest_ratio is None:
            return table
        return f"{table}\nlargest ratio that costs at most {self.max_drop:g} top-1: {self.largest_ratio:.2f}"

    def __repr__(self) -> str:
        return str(self)


@entry
def record_curve(
    model: nn.Module,
    calibration: ImageBatches,
    evaluation: ImageBatches,
    curve: Curve,
    folder: str | Path,
    *,
    ratios: Sequence[float] = (),
    max_drop: float | None = None,
    found: Discovery | None = None,
    source: str | Path | None = None,
    overwrite: bool = False,
    track: Track = untracked,
) -> CurveRecord:
    """Measure a curve into a folder; the same call goes on where a killed one was.

    Args:
        model: timm Vision Transformer in eval mode.
        calibration: images that scores and compensation come from.
        evaluation: other images.
        curve: how to prune; its folder is chosen here.
        folder: to write.
        ratios: as in ``measure_curve``; or
        max_drop: as in ``find_largest_ratio``.
        found: a discovery on this model, for criterion ``jas``.
        source: folder of the run that ``found`` is of.
        overwrite: replace an output of other arguments.
        track: wraps (points, description), for progress.

    Raises:
        VitpruneError: if an argument is out of range, images of both kinds overlap, or the folder is of another
            request.

    >>> import tempfile, timm
    >>> from PIL import Image
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=2).eval()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     sets = []
    ...     for number in range(2):
    ...         Image.new("RGB", (32, 32), (number, 0, 0)).save(Path(folder) / f"{number}.png")
    ...         images = ImageSet(Path(folder), (f"{number}.png",), (0,), {0: "cat"})
    ...         sets.append(ImageBatches(images, model))
    ...     curve = Curve(["magnitude"], ["uniform"], ["none"])
    ...     record = record_curve(model, *sets, curve, Path(folder) / "curve", ratios=[0.5])
    >>> [point.pruning_ratio for point in record.points]
    [0.0, 0.5]
    """
    check_unseen(evaluation.images, {*hash_images(calibration.images), *seen_by(model), *_seen_in(found)})
    request = {
        **describe_request(model, calibration.images, evaluation.images),
        "run": None if source is None else {name: hash_file(Path(source) / name) for name in sorted(RUN_FILES)},
        "step": curve.step,
        "seed": curve.seed,
    }
    folder = open_resumable(folder, request, owned=CURVE_FILES, overwrite=overwrite)
    curve = replace(curve, folder=folder / POINTS_FOLDER)
    largest = None
    if max_drop is None:
        points = measure_curve(model, calibration, evaluation, curve, ratios=ratios, found=found, track=track)
    else:
        largest, points = find_largest_ratio(
            model, calibration, evaluation, curve, max_drop=max_drop, found=found, track=track
        )
    skipped = [name for batches in (calibration, evaluation) for name, _reason in batches.skipped]
    images = evaluation.images
    record = CurveRecord(tuple(points), max_drop, largest, str(images.root), images.files, skipped, request)
    save_curve(record, folder)
    return record


def _seen_in(found: Discovery | None) -> frozenset[str]:
    return frozenset() if found is None else found.seen.sha256


def describe_request(model: nn.Module, images: ImageSet, others: ImageSet) -> dict[str, Any]:
    """Say what every point depends on that is calibrated on images and judged on others; JSON values."""
    from vitprune import __version__

    return {
        "vitprune": __version__,
        "architecture": architecture(model),
        "transform": data_config(model),
        "weights": hash_weights(model),
        "calibration images": sorted(zip(hash_images(images), images.labels, strict=True)),
        "evaluation images": sorted(zip(hash_images(others), others.labels, strict=True)),
    }


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
    with parsing(folder / CURVE_FILE):
        return CurveRecord(
            points=tuple(CurvePoint(**point) for point in content["points"]),
            max_drop=content["max_drop"],
            largest_ratio=content["largest_ratio"],
            data=content["evaluation_data"],
            files=tuple(content["evaluation_files"]),
            skipped=tuple(content["skipped"]),
            request=read_json(folder / REQUEST_FILE, kind="request")["request"],
        )
