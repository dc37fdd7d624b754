"""Every verb on a second device that this machine does not have (``pretend_device``): nothing is left on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import make_once
from pretend_verbs import VERBS
from torch.utils import backend_registration

HERE = Path(__file__).parent
TRAINED = ("recover", "finetune")
pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch has no backends that are written in Python",
)


def run_script(*arguments: object) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """What came of each verb; torch with another device is another torch, so this is a process of its own."""

    def make(root: Path) -> None:
        (root / "work").mkdir()
        (root / "lines").write_text(run_script(HERE / "pretend_verbs.py", root / "work"))

    lines = (make_once(tmp_path_factory, "pretended", make) / "lines").read_text().splitlines()
    return {row["verb"]: row for row in map(json.loads, lines)}


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_does_on_another_device_what_it_does_on_the_cpu(measured, verb):
    row = measured[verb]
    assert "failed" not in row, row["failed"]
    # 500 operations: the model ran there, and not a copy of it on the CPU.
    assert row["operations"] > 500
    assert row["difference"] < (1e-3 if any(word in verb for word in TRAINED) else 1e-4)


def test_what_two_devices_keep_apart_is_kept_apart():
    program = """
import pretend_device, torch
pretend_device.add_device()
here, there = torch.ones(2, 2), torch.ones(2, 2, device="pretend")
generator = torch.Generator().manual_seed(0)
tries = {
    "add": lambda: here + there,
    "matmul": lambda: there @ here,
    "mask": lambda: torch.where(here > 0, there, there),
    "put": lambda: there.add_(here),
    "layer": lambda: torch.nn.Linear(2, 2)(there),
    "numpy": lambda: there.numpy(),
    "draw": lambda: torch.rand(2, device="pretend", generator=generator),
}
for name, attempt in tries.items():
    try:
        attempt()
    except (RuntimeError, TypeError):
        continue
    raise SystemExit(f"{name} was let pass")
assert (there * 2.0).device.type == (there + torch.tensor(1.0)).device.type == "pretend"
assert (there.cpu() + here).device.type == "cpu"
"""
    run_script("-c", program)


def test_the_page_names_every_verb():
    page = (HERE.parent / "docs" / "trust.md").read_text()
    listed = "; ".join(f"`{name}`" for name in VERBS) + "."
    assert " ".join(listed.split()) in " ".join(page.split())
