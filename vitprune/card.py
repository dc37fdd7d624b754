"""Cards: by which command, in how long, with which versions and on which machine a folder was made.

A card is read by people. It is the only file that differs between two equal runs, and decides nothing.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vitprune.files import CARD_FILE, FORMAT_VERSION, read_json, write_json
from vitprune.processes import peak_memory_bytes
from vitprune.seal import parsing

# Those that can change a number. ONNX Runtime goes by another name for other devices.
PACKAGES = (
    "vitprune",
    "torch",
    "timm",
    "torch-pruning",
    "numpy",
    "scipy",
    "scikit-learn",
    "pillow",
    "safetensors",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-openvino",
)


@dataclass(frozen=True)
class Card:
    """Where a folder comes from.

    Attributes:
        command: as one would type it, with what differs from the defaults.
        arguments: all of them; JSON values.
        seconds: from start to end, all reading and writing included; of the last start, where a killed one went on.
        peak_memory_bytes: the most that the process had held by then.
        finished: when, UTC, ISO 8601.
        versions: package -> version, and ``python``.
        hardware: ``processor``, ``cores`` (of the machine), ``usable_cores`` (by the process), ``threads`` (of torch's
            operators; None where the command needed no torch), ``gpus`` (names, as torch sees them), ``memory_bytes``,
            ``system``.
    """

    command: str
    arguments: Mapping[str, Any]
    seconds: float
    peak_memory_bytes: int
    finished: str
    versions: Mapping[str, str]
    hardware: Mapping[str, Any]


def make_card(command: str, arguments: Mapping[str, Any], *, seconds: float) -> Card:
    """Describe the command that has just run in this process."""
    return Card(
        command=command,
        arguments=dict(arguments),
        seconds=round(seconds, 3),
        peak_memory_bytes=peak_memory_bytes(),
        finished=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        versions=find_versions(),
        hardware=describe_machine(),
    )


def write_card(card: Card, folder: str | Path) -> None:
    """Write ``card.json`` into a folder that is there."""
    write_json(Path(folder) / CARD_FILE, {"kind": "card", "version": FORMAT_VERSION, **asdict(card)})


def read_card(folder: str | Path) -> Card | None:
    """Read the card of a folder; None where it has none, as when a program made it and not the command line.

    Raises:
        VitpruneError: if ``card.json`` is no card, or of a newer version.
    """
    path = Path(folder) / CARD_FILE
    if not path.is_file():
        return None
    content = read_json(path, kind="card")
    with parsing(path):
        return Card(**{name: content[name] for name in Card.__dataclass_fields__})


def find_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that are installed, without importing them."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def describe_machine() -> dict[str, Any]:
    """Return what this process runs on; see ``Card.hardware``."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    # A command that went without torch shall not load it for its card.
    torch = sys.modules.get("torch")
    cuda = torch is not None and torch.cuda.is_available()
    return {
        "processor": name_processor(),
        "cores": os.cpu_count(),
        "usable_cores": usable,
        "threads": None if torch is None else torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] if cuda else [],
        "memory_bytes": _memory_bytes(),
        "system": platform.platform(),
    }


def name_processor() -> str:
    """Return the processor's name as the system gives it."""
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text().splitlines() if listed.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _memory_bytes() -> int | None:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
