"""``vitprune curve --speedups``: what every speed costs, beside what is to be had without a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from vitprune.cli.terminal import print_table, track
from vitprune.errors import VitpruneError
from vitprune.options import DENSE, LEVERS


def measure(
    network: Any,
    calibration: Any,
    evaluation: Any,
    *,
    speedups: Sequence[str],
    backends: Sequence[str],
    allow: Sequence[str],
    parts: Sequence[str] | None,
    batch_sizes: Sequence[int],
    seed: int,
    output: str,
    overwrite: bool,
):
    """Measure, and return the answer and what shows it."""
    from vitprune.evaluation.curve import parse_numbers
    from vitprune.evaluation.front import measure_front
    from vitprune.speed.fit_latency import list_formats
    from vitprune.speed.latency_target import default_backend
    from vitprune.speed.speed_reach import DEFAULT_PARTS

    front = measure_front(
        network,
        calibration,
        evaluation,
        parse_numbers("speedups", speedups),
        output,
        formats=list_formats(backends or [default_backend(network)], allow),
        parts=parts or DEFAULT_PARTS,
        batch_sizes=batch_sizes,
        seed=seed,
        overwrite=overwrite,
        track=track,
    )
    rows = [asdict(row) for row in front.rows]
    answer = {
        "output": output,
        "rows": rows,
        "unreached": dict(front.unreached),
        "left_out": dict(front.left_out),
        "batch_sizes": list(front.batch_sizes),
        "num_images": front.num_images,
    }
    return answer, lambda: _show(front, output)


def check_alone(**others: Any) -> None:
    """Refuse what goes with ratios, or with speeds, beside the other."""
    given = [f"--{name.replace('_', '-')}" for name, value in others.items() if value is not None]
    if given:
        raise VitpruneError(f"--speedups decides by itself how to get there; leave {', '.join(given)} out")


def _show(front: Any, output: str) -> None:
    several = len({row.backend for row in front.rows}) > 1
    cells = [
        (
            LEVERS[row.lever] if row.lever == DENSE else f"{LEVERS[row.lever].partition(',')[0]}: {row.name}",
            f"{row.backend} {row.precision}" if several else row.precision,
            f"{row.speedup:.2f}",
            f"{row.macs_share:.2f}",
            f"{row.top1:.4f}",
            f"{row.drop:+.4f}",
            f"{row.drop_bound:+.4f}",
            row.place,
        )
        for row in front.rows
    ]
    sizes = " and ".join(map(str, front.batch_sizes))
    print_table(
        f"accuracy against speed on {front.num_images} images, batch size {sizes}",
        ("model", "format", "speed-up", "MACs", "top-1", "drop", "at most", "front"),
        cells,
        texts=("format", "front"),
    )
    print("at most: 95 % upper bound of the drop, paired with the dense model")
    print("front: above: everything on it that is as fast is less accurate; beyond: nothing on it is as fast")
    for what, reason in {**front.unreached, **front.left_out}.items():
        print(f"{what}: not measured ({reason})")
    print(f"wrote {output}: front.csv, front.json, front.png, front.svg, models/")
