"""What the benchmarks share: images in memory, where they ran, and folders that belong to one request."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import timm
import torch

import vitprune
from vitprune.data import hash_images
from vitprune.files import open_resumable
from vitprune.models.identity import hash_weights
from vitprune.seen_images import check_unseen

RESULTS = Path(__file__).resolve().parent / "results"
STARTED = time.perf_counter()


def read_batches(images: vitprune.ImageSet, model: torch.nn.Module) -> list:
    """Return all images as batches of 50 in memory."""
    return list(vitprune.ImageBatches(images, model, batch_size=50))


def refuse_overlap(*sets: vitprune.ImageSet) -> None:
    """Refuse sets of images that share a file; the last is what is evaluated on."""
    *used, evaluated = sets
    check_unseen(evaluated, {digest for images in used for digest in hash_images(images)})


def open_points(folder: str, model: torch.nn.Module, *sets: vitprune.ImageSet) -> Path:
    """Return where finished points are kept: a folder of these weights, images and this state of the program alone."""
    revision = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=RESULTS.parent, capture_output=True, text=True, check=False
    ).stdout.strip()
    images = [sorted(zip(hash_images(images), images.labels, strict=True)) for images in sets]
    request = {"revision": revision, "weights": hash_weights(model), "images": images}
    return open_resumable(folder, request, owned=frozenset({"points", "default"}), overwrite=False)


def describe_machine() -> dict[str, Any]:
    """Return hardware, versions, date and the command, with files and folders by their last name."""
    words = [Path(word).name if word.startswith(("/", "..")) else word for word in sys.argv]
    return {
        "date": str(date.today()),
        "hardware": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "timm": timm.__version__,
            "vitprune": vitprune.__version__,
        },
        "command": shlex.join(["python", *words]),
        "seconds": round(time.perf_counter() - STARTED),
    }


def track(items, description: str):
    """Tell the time, the step and its name (criterion, allocation, ratio) on stderr."""
    for position, item in enumerate(items, 1):
        parts = item if isinstance(item, tuple) and isinstance(item[0], str) else ()
        names = [
            f"{part.share:.2f}" if isinstance(part, vitprune.Target) else str(part)
            for part in parts
            if isinstance(part, str | int | float | vitprune.Target)
        ]
        log(" ".join([description, f"{position}/{len(items)}", *names]))
        yield item


def log(text: str) -> None:
    """Print a line with the seconds since the start."""
    print(f"{time.perf_counter() - STARTED:6.0f} s  {text}", file=sys.stderr, flush=True)
