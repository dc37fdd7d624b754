"""Shared inputs: real photos, real weights and golden values by path, and a small random Vision Transformer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

# Beside the checkout, or wherever VITPRUNE_SHARED says.
SHARED = Path(os.environ.get("VITPRUNE_SHARED", Path(__file__).resolve().parents[2] / "shared"))


def shared(relative: str) -> Path:
    """Return a path below the shared folder, or skip the test where it is absent."""
    path = SHARED / relative
    if not path.exists():
        pytest.skip(f"needs {relative} of the shared folder (VITPRUNE_SHARED)")
    return path


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
    import numpy as np
    from PIL import Image

    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for index in range(5):
        for number in range(4):
            pixels = generator.integers(0, 256, (36, 40, 3), dtype=np.uint8) // 2 + 25 * index
            (root / f"class{index}").mkdir(exist_ok=True)
            Image.fromarray(pixels).save(root / f"class{index}" / f"{number}.{'png' if number % 2 else 'jpg'}")
    return root


@pytest.fixture(scope="session")
def saved_vit(tmp_path_factory):
    """A folder with a small random float32 model."""
    import vitprune

    model = make_vit().float()
    model.model_args = TINY
    folder = tmp_path_factory.mktemp("models") / "vit"
    vitprune.save(model, folder)
    return folder


@pytest.fixture(scope="session")
def shown_folders(saved_vit, tmp_path_factory):
    """Folders of every kind that a report shows, by name, and the images they are of."""
    from report_folders import make_folders

    return make_folders(saved_vit, tmp_path_factory.mktemp("shown"))


@dataclass(frozen=True)
class Demo:
    """One run of ``vitprune demo``: its cache, its folder, what it printed and what it logged."""

    cache: Path
    folder: Path
    answer: dict[str, Any]
    log: str


def run_demo(folder: Path, cache: Path) -> Demo:
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "HOME": str(cache)}
    command = [sys.executable, "-m", "vitprune", "demo", "-o", str(folder), "--json"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return Demo(cache, folder, json.loads(result.stdout), result.stderr)


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """The demo as a newcomer runs it, whose trained model others find in its cache."""
    folder = tmp_path_factory.mktemp("demo")
    return run_demo(folder / "demo", folder / "cache")
