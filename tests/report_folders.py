"""Folders of every kind that a report shows, of a small random model and classes whose names attack the page."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from vitprune.cli import main

CLASSES = ("<img src=x onerror=document.title='broken'>", "<script>document.title='broken'", 'a & "b"', "d'e", "plain")
NUM_PER_CLASS = 6
SHOWN = ("run", "pruned", "evaluation", "curve", "bench", "alone", "analysis", "train", "val")
EXPERIMENTS = ("scores", "manipulation", "similarity", "top-images")


def make_images(root: Path, *, seed: int) -> Path:
    generator = np.random.default_rng(seed)
    for name in CLASSES:
        (root / name).mkdir(parents=True)
        for number in range(NUM_PER_CLASS):
            pixels = generator.integers(0, 256, (36, 120 if number else 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number} é.png")
    return root


def make_folders(saved_vit: Path, root: Path) -> None:
    """Run every command that writes a folder for reports: ``SHOWN`` are their names, and those of the images."""
    made = {name: root / name for name in SHOWN}
    train, val = make_images(made["train"], seed=0), make_images(made["val"], seed=1)
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
