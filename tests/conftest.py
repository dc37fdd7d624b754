"""Shared inputs: real photos, real weights and golden values by path, and a small random Vision Transformer.

Several processes share the tests (pytest-xdist): what is expensive is made by the first of them that asks for it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from filelock import FileLock
from PIL import Image
from quick import fork_footprints, hurry, keep_exports, start_command

IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ
THREAD_LIMITS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
# Beside the checkout, or wherever VITPRUNE_SHARED says.
SHARED = Path(os.environ.get("VITPRUNE_SHARED", Path(__file__).resolve().parents[2] / "shared"))


def shared(relative: str) -> Path:
    """Return a path below the shared folder, or skip the test where it is absent."""
    path = SHARED / relative
    if not path.exists():
        pytest.skip(f"needs {relative} of the shared folder (VITPRUNE_SHARED)")
    return path


def pytest_addoption(parser, pluginmanager):
    """Without pytest-xdist (``-p no:xdist``) its options in pyproject.toml mean nothing."""
    if not pluginmanager.hasplugin("xdist"):
        parser.addoption("--numprocesses")
        parser.addoption("--dist")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes():
    """Each process has one core, and so has what it starts."""
    for name in THREAD_LIMITS:
        os.environ.setdefault(name, "1")


def pytest_collection_modifyitems(items):
    """What takes longest and must happen one after another comes first: the demo, the quick start, its pages."""
    first = ["test_demo.py", "test_docs.py"]
    items.sort(key=lambda item: first.index(item.path.name) if item.path.name in first else len(first))


def pytest_collection_finish():
    """All modules are there now."""
    if IS_WORKER:
        hurry()
        fork_footprints()


def pytest_terminal_summary(terminalreporter):
    """Say how many tests were skipped, one line for each reason."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(str(report.longrepr[2]).removeprefix("Skipped: ") for report in skipped)
    for reason, count in sorted(reasons.items()):
        terminalreporter.write_line(f"{count} skipped: {reason}", yellow=True)


def photos(root: Path, names, *, count: int = 1, seed: int = 0, size: int = 32) -> Path:
    """Write small random images, all different, below ``root``/NAME."""
    generator = torch.Generator().manual_seed(seed)
    for name in names:
        (root / name).mkdir(parents=True)
        for number in range(count):
            pixels = torch.randint(0, 256, (size, size, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(root / name / f"{number}.png")
    return root


def make_once(tmp_path_factory, name: str, make: Callable[[Path], Any]) -> Path:
    """Return a folder that all processes of this session share; the first one to ask has it filled by ``make``."""
    root = tmp_path_factory.getbasetemp()
    folder = (root.parent if IS_WORKER else root) / name
    made = folder.with_name(f"{name}.made")
    with FileLock(f"{folder}.lock"):
        if not made.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            made.touch()
    return folder


@pytest.fixture(scope="session")
def kept_exports(tmp_path_factory):
    """The folder of what torch exported in this session."""
    return make_once(tmp_path_factory, "exports", lambda _folder: None)


@pytest.fixture(scope="session", autouse=True)
def _exports_are_kept(kept_exports):
    if IS_WORKER:
        keep_exports(kept_exports)


TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "mlp_ratio": 2, "num_classes": 5}


def make_vit(name: str = "vit_tiny_patch16_224", *, seed: int = 0, **model_args):
    """Build a small random model in float64 whose weights are large enough to make every term matter."""
    torch.manual_seed(seed)
    model = timm.create_model(name, **{**TINY, **model_args}).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model


@pytest.fixture
def tiny_vit():
    return make_vit()


@pytest.fixture
def tiny_images():
    return torch.randn(3, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def deit_tiny():
    import vitprune

    return vitprune.load("deit_tiny_patch16_224", checkpoint=shared("weights/deit_tiny_patch16_224.safetensors"))


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """Five classes of four 40 x 36 images each, as PNG and JPEG files."""
    return make_once(tmp_path_factory, "images", write_images)


def write_images(root: Path) -> None:
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(0)
    for index in range(5):
        for number in range(4):
            pixels = generator.integers(0, 256, (36, 40, 3), dtype=np.uint8) // 2 + 25 * index
            (root / f"class{index}").mkdir(exist_ok=True)
            Image.fromarray(pixels).save(root / f"class{index}" / f"{number}.{'png' if number % 2 else 'jpg'}")


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory, image_folder):
    """Two other images of each class of ``image_folder``."""
    import numpy as np
    from PIL import Image

    root = tmp_path_factory.mktemp("others")
    generator = np.random.default_rng(1)
    for index in range(5):
        (root / f"class{index}").mkdir()
        for number in range(2):
            pixels = generator.integers(0, 256, (36, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / f"class{index}" / f"other{number}.png")
    return root


@pytest.fixture(scope="session")
def saved_vit(tmp_path_factory):
    """A folder with a small random float32 model."""
    import vitprune

    model = make_vit().float()
    model.model_args = TINY
    return make_once(tmp_path_factory, "models", lambda root: vitprune.save(model, root / "vit")) / "vit"


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """The folder of a small model of four classes that knows no names."""
    import vitprune

    model = make_vit(num_classes=4).float()
    model.model_args = {**TINY, "num_classes": 4}
    folder = tmp_path_factory.mktemp("models") / "dense"
    vitprune.save(model, folder)
    return folder


@pytest.fixture(scope="session")
def shown_folders(saved_vit, tmp_path_factory):
    """Folders of every kind that a report shows, by name, and the images they are of."""
    from report_folders import SHOWN, make_folders

    root = make_once(tmp_path_factory, "shown", lambda root: make_folders(saved_vit, root))
    return {name: root / name for name in SHOWN}


@dataclass(frozen=True)
class Demo:
    """One run of ``vitprune demo``: its cache, its folder, what it printed and what it logged."""

    cache: Path
    folder: Path
    answer: dict[str, Any]
    log: str


def run_demo(folder: Path, cache: Path, exports: Path) -> Demo:
    printed, log = (folder.with_name(f"{folder.name}.{stream}") for stream in ("stdout", "stderr"))
    places = {"XDG_CACHE_HOME": cache, "HOME": cache}
    process = start_command(["demo", "-o", folder, "--json"], stdout=printed, stderr=log, exports=exports, **places)
    process.join()
    assert process.exitcode == 0, log.read_text()
    return Demo(cache, folder, json.loads(printed.read_text()), log.read_text())


@pytest.fixture(scope="session")
def demo(kept_exports, tmp_path_factory):
    """The demo as a newcomer runs it, whose trained model others find in its cache."""

    def make(root: Path) -> None:
        made = run_demo(root / "demo", root / "cache", kept_exports)
        (root / "printed.json").write_text(json.dumps([made.answer, made.log]))

    root = make_once(tmp_path_factory, "first-demo", make)
    return Demo(root / "cache", root / "demo", *json.loads((root / "printed.json").read_text()))
