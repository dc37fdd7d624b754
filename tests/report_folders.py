"""Folders of every kind that a report shows, of a small random model and classes whose names attack the page."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from vitprune.cli import main

CLASSES = ("<img src=x onerror=document.title='broken'>", "<script>document.title='broken'", 'a & "b"', "d'e", "plain")
NUM_PER_CLASS = 6
EXPERIMENTS = ("scores", "manipulation", "similarity", "top-images")


def make_images(root: Path, *, seed: int) -> Path:
    generator = np.random.default_rng(seed)
    for name in CLASSES:
        (root / name).mkdir(parents=True)
        for number in range(NUM_PER_CLASS):
            pixels = generator.integers(0, 256, (36, 120 if number else 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number} é.png")
    return root


def make_folders(saved_vit: Path, root: Path) -> dict[str, Path]:
    """Run every command that writes a folder for reports."""
    train, val = make_images(root / "train", seed=0), make_images(root / "val", seed=1)
    made = {name: root / name for name in ("run", "pruned", "evaluation", "curve", "bench", "alone", "analysis")}
    ways = ["--criteria", "magnitude", "variance", "--compensations", "none", "--step", "1"]
    commands = (
        ["discover", saved_vit, "--data", train, "-o", made["run"]],
        ["prune", made["run"], "--ratio", "0.6", "--step", "1", "--compensate", "none", "-o", made["pruned"]],
        ["evaluate", made["pruned"], "--against", saved_vit, "--data", val, "-o", made["evaluation"]],
        ["evaluate", saved_vit, "--data", val, "-o", made["alone"]],
        ["curve", made["run"], "--eval-data", val, "--ratios", "0.25", "0.5", *ways, "-o", made["curve"]],
        ["bench", made["pruned"], "--backend", "onnxruntime-cpu", "--seconds", "0.05", "-o", made["bench"]],
        ["discover", saved_vit, "--data", train, "--method", "activation", "-o", root / "activation"],
        ["analyze", made["run"], root / "activation", "--experiments", *EXPERIMENTS, "-o", made["analysis"]],
    )
    for command in commands:
        assert main([str(word) for word in command]) == 0
    return {**made, "train": train, "val": val}
