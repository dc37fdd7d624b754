"""The verb: what every speed costs, beside what is to be had without a budget.

Models are pruned for each speed in each format, alternatives are made, all are judged on the same images, and all are
timed in turns at the end.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitprune.data import ImageBatches, hash_images
from vitprune.entry import entry
from vitprune.errors import VitpruneError
from vitprune.evaluation.accuracy import Accuracy, compare, drop_bound
from vitprune.evaluation.alternatives import list_alternatives
from vitprune.evaluation.curve_folder import describe_request
from vitprune.evaluation.judged_models import (
    JudgedModel,
    Workshop,
    judge_alternatives,
    judge_dense,
    prune_for_speeds,
)
from vitprune.figures.speeds_figure import draw_speeds
from vitprune.figures.style import save_figure
from vitprune.files import FORMAT_VERSION, REQUEST_FILE, open_resumable, read_json, write_json, write_table
from vitprune.intervals import CONFIDENCE
from vitprune.options import BUDGET, DEFAULT_RIDGE, DENSE, LEVERS
from vitprune.progress import Track, untracked
from vitprune.pruning.decide import check_parts
from vitprune.seal import parsing
from vitprune.seen_images import check_unseen, seen_by
from vitprune.speed.fit_latency import SECONDS_EACH, Format, Writer, time_sources
from vitprune.speed.speed_reach import DEFAULT_PARTS
from vitprune.table import align
from vitprune.timing import Latency, Speedup, paired_speedup

FRONT_FILE, MODELS_FOLDER, POINTS_FOLDER = "front.json", "models", "points"
FRONT_FILES = frozenset({FRONT_FILE, MODELS_FOLDER, POINTS_FOLDER, "front.csv", "front.png", "front.svg"})
# Where a row lies.
ON, ABOVE, BELOW, BEYOND = "on", "above", "below", "beyond"


@dataclass(frozen=True)
class FrontRow:
    """One model in one format.

    Attributes:
        lever: key of ``LEVERS``.
        name: which one of it.
        backend: that it is run on.
        precision: of its products with weights there.
        speedup: how many times faster than the dense float32 model on the first backend, the least over batch sizes.
        speedup_low: lower end of its 95 % interval.
        speedup_high: upper end.
        predicted_speedup: by the fitted model; None where nothing was predicted.
        macs_share: multiply-accumulates, as a share of the dense model's.
        top1: in [0, 1]; of the file, where its numbers are narrower than the torch model's.
        top1_low: lower end of its 95 % Wilson interval.
        top1_high: upper end.
        drop: of top-1 from the dense model in float32.
        drop_bound: 95 % upper bound of it, paired.
        place: ``on`` for what makes up the front: the dense model in float32 and what was pruned for a speed. Of an
            alternative ``above`` where everything on the front that is as fast is less accurate, ``beyond`` where
            nothing on the front is as fast, else ``below``; both judged at 95 % confidence, in pairs.
    """

    lever: str
    name: str
    backend: str
    precision: str
    speedup: float
    speedup_low: float
    speedup_high: float
    predicted_speedup: float | None
    macs_share: float
    top1: float
    top1_low: float
    top1_high: float
    drop: float
    drop_bound: float
    place: str


@dataclass(frozen=True)
class Front:
    """What every speed costs.

    Attributes:
        rows: the dense model in float32 first, then by lever, format and speed.
        unreached: "speed, format" -> why there is no such model.
        left_out: alternative -> why there is no such model.
        batch_sizes: images per run; a speed-up is the least over them.
        num_images: that accuracy was measured on.
        request: everything that it depends on; JSON values.
    """

    rows: tuple[FrontRow, ...]
    unreached: Mapping[str, str]
    left_out: Mapping[str, str]
    batch_sizes: tuple[int, ...]
    num_images: int
    request: Mapping[str, Any]

    def __str__(self) -> str:
        columns = ("model", "format", "speed-up", "MACs", "top-1", "drop", "place")
        rows = [
            (
                f"{row.lever}: {row.name}" if row.lever != DENSE else DENSE,
                f"{row.backend} {row.precision}",
                f"{row.speedup:.2f} x",
                f"{row.macs_share:.2f}",
                f"{row.top1:.4f}",
                f"{row.drop:+.4f}",
                row.place,
            )
            for row in self.rows
        ]
        return align(columns, rows)

    def __repr__(self) -> str:
        return str(self)

    @property
    def above(self) -> tuple[FrontRow, ...]:
        """Alternatives that lie above the front."""
        return tuple(row for row in self.rows if row.place == ABOVE)


@entry
def measure_front(
    model: nn.Module,
    calibration: ImageBatches,
    evaluation: ImageBatches,
    speedups: Sequence[float],
    folder: str | Path,
    *,
    formats: Sequence[Format] = (Format("onnxruntime-cpu"),),
    parts: Sequence[str] = DEFAULT_PARTS,
    batch_sizes: Sequence[int] = (1,),
    num_threads: int | None = None,
    ridge: float = DEFAULT_RIDGE,
    seed: int = 0,
    overwrite: bool = False,
    seconds_each: float = SECONDS_EACH,
    track: Track = untracked,
) -> Front:
    """Prune for several speeds, and measure what each costs beside what is to be had without; into a folder.

    The models that were pruned for a speed stay in the folder, each with its candidates. The same call goes on where a
    killed one was.

    Args:
        model: timm Vision Transformer in eval mode, whose tokens can merge.
        calibration: images to weigh and to fit on; labels are not used.
        evaluation: other images, with labels.
        speedups: over the dense float32 model on the first backend, each above 1.
        folder: to write.
        formats: what models are run as; each speed is looked for in each of them.
        parts: keys of ``PARTS``: what may go.
        batch_sizes: images per run; a speed-up is the least over them.
        num_threads: of the operators; None takes torch's.
        ridge: λ of what stands in.
        seed: of everything drawn at random.
        overwrite: replace an output of other arguments.
        seconds_each: to spend on timing each model at each batch size in the end, all in turns; more makes the
            intervals of the speed-ups narrower.
        track: wraps (items, description) of long loops, for progress.

    Raises:
        VitpruneError: if an argument is out of range, images of both kinds overlap, or the folder is of another
            request.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=1).eval()
    >>> measure_front(model, [], [], [0.5], "front")
    Traceback (most recent call last):
        ...
    vitprune.errors.VitpruneError: speedups must be above 1, got 0.5
    """
    bad = [speedup for speedup in speedups if not 1 < speedup < float("inf")]
    if bad or not speedups:
        raise VitpruneError(f"speedups must be above 1, got {', '.join(f'{each:g}' for each in bad) or 'none'}")
    parts = check_parts(model, parts)
    check_unseen(evaluation.images, {*hash_images(calibration.images), *seen_by(model)})
    options = {
        "batch_sizes": tuple(batch_sizes),
        "num_threads": num_threads or torch.get_num_threads(),
        "ridge": ridge,
        "seed": seed,
    }
    request = {
        **describe_request(model, calibration.images, evaluation.images),
        **options,
        "speedups": sorted(set(speedups)),
        "formats": [asdict(each) for each in formats],
        "parts": parts,
    }
    folder = open_resumable(folder, request, owned=FRONT_FILES, overwrite=overwrite)
    if (folder / FRONT_FILE).is_file():
        return load_front(folder)
    points = folder / POINTS_FOLDER
    points.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as files:
        shop = Workshop(
            model=model,
            calibration=calibration,
            evaluation=evaluation,
            models=folder / MODELS_FOLDER,
            points=points,
            writer=Writer(Path(files), calibration),
            formats=tuple(formats),
            parts=tuple(parts),
            options=options,
            track=track,
        )
        made = judge_dense(shop)
        pruned, unreached = prune_for_speeds(shop, request["speedups"])
        alternatives = list_alternatives(model, calibration, ridge=ridge, seed=seed, track=track)
        others, left_out = judge_alternatives(shop, alternatives)
        made += [*pruned, *others]
        sources = {(each.wanted, number): each.source for number, each in enumerate(made)}
        latencies = [
            list(time_sources(sources, batch_size, options["num_threads"], seconds_each=seconds_each).values())
            for batch_size in track(list(batch_sizes), f"time {len(made)} models in turns")
        ]
    rows = _compare(made, latencies)
    count = made[0].accuracy.num_images
    front = Front(tuple(rows), unreached, left_out, options["batch_sizes"], count, request)
    save_front(front, folder)
    shutil.rmtree(points)
    return load_front(folder)


def place_of(accuracy: Accuracy, front: Sequence[tuple[Accuracy, bool]], *, confidence: float = CONFIDENCE) -> str:
    """Say where an alternative lies.

    Args:
        accuracy: of the alternative.
        front: accuracy of each model on the front, on the same images, and whether it is as fast as the alternative.
        confidence: of the paired test of accuracy.

    Returns:
        ``above``, ``below`` or ``beyond``, as in ``FrontRow``.
    """
    as_fast = [other for other, is_as_fast in front if is_as_fast]
    if not as_fast:
        return BEYOND
    beaten = [compare(other, accuracy).p_value < 1 - confidence and other.top1 < accuracy.top1 for other in as_fast]
    return ABOVE if all(beaten) else BELOW


def _compare(made: Sequence[JudgedModel], latencies: Sequence[Sequence[Latency]]) -> list[FrontRow]:
    """Return a row for each model; the first is what all speed-ups refer to."""
    dense, whole = made[0].accuracy, made[0].macs
    on_front = [number for number, each in enumerate(made) if number == 0 or each.lever == BUDGET]
    rows = []
    for number, each in enumerate(made):
        speedup = _least_speedup(0, number, latencies)
        place = ON
        if number not in on_front:
            # As fast: not slower at 95 % confidence.
            front = [(made[other].accuracy, _least_speedup(number, other, latencies).high >= 1) for other in on_front]
            place = place_of(each.accuracy, front)
        rows.append(
            FrontRow(
                each.lever,
                each.name,
                each.wanted.backend,
                each.wanted.precision,
                speedup.ratio,
                speedup.low,
                speedup.high,
                each.predicted_speedup,
                each.macs / whole,
                each.accuracy.top1,
                *each.accuracy.top1_interval,
                dense.top1 - each.accuracy.top1,
                drop_bound(dense, each.accuracy),
                place,
            )
        )
    order = list(LEVERS)
    return [
        rows[0],
        *sorted(rows[1:], key=lambda row: (order.index(row.lever), row.backend, row.precision, row.speedup)),
    ]


def _least_speedup(first: int, second: int, latencies: Sequence[Sequence[Latency]]) -> Speedup:
    """Return how many times faster the second model is than the first, at the batch size where it is least."""
    return min((paired_speedup(of[first], of[second]) for of in latencies), key=lambda speedup: speedup.ratio)


def save_front(front: Front, folder: str | Path) -> None:
    """Write what ``load_front`` reads, and a table and pictures beside it, into a folder that knows its request."""
    folder = Path(folder)
    content = {name: value for name, value in asdict(front).items() if name != "request"}
    title = f"{front.request['architecture']}, {front.num_images} images, no retraining"
    for suffix in ("png", "svg"):
        save_figure(draw_speeds(front.rows, title=title), folder / f"front.{suffix}")
    write_table(folder / "front.csv", front.rows, FrontRow)
    write_json(folder / FRONT_FILE, {"kind": "front", "version": FORMAT_VERSION, **content})


def load_front(folder: str | Path) -> Front:
    """Read the folder of a front.

    Raises:
        VitpruneError: if it is none.

    >>> load_front("nowhere")
    Traceback (most recent call last):
        ...
    vitprune.errors.VitpruneError: nowhere holds no front.json
    """
    folder = Path(folder)
    if not (folder / FRONT_FILE).is_file():
        raise VitpruneError(f"{folder} holds no {FRONT_FILE}")
    content = read_json(folder / FRONT_FILE, kind="front")
    with parsing(folder / FRONT_FILE):
        return Front(
            rows=tuple(FrontRow(**row) for row in content["rows"]),
            unreached=content["unreached"],
            left_out=content["left_out"],
            batch_sizes=tuple(content["batch_sizes"]),
            num_images=content["num_images"],
            request=read_json(folder / REQUEST_FILE, kind="request")["request"],
        )
