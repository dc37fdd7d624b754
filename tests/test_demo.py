"""The demo as a newcomer runs it: twice, the second time from the cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import vitprune

DETERMINISTIC = ("dense_top1", "pruned_top1", "curve", "mean_joint_score", "num_parameters")


def demo(folder, cache):
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "HOME": str(cache)}
    command = [sys.executable, "-m", "vitprune", "demo", "-o", str(folder), "--json"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(result.stdout), result.stderr


def test_demo_trains_once_and_repeats_its_numbers(tmp_path):
    first, first_log = demo(tmp_path / "demo", tmp_path / "cache")
    assert first["dense_top1"] >= 0.965
    assert first["num_parameters"] < first["num_parameters_dense"]
    assert first["top1_agreement"] == 1
    assert "training a small ViT" in first_log
    assert {path.name for path in (tmp_path / "demo").iterdir()} == {
        "bench",
        "card.json",
        "curve.png",
        "demo.json",
        "evaluation",
        "pruned",
        "pruned.onnx",
        "report.html",
        "run",
    }
    again, again_log = demo(tmp_path / "demo", tmp_path / "cache")
    assert "taken from" in again_log
    assert {key: first[key] for key in DETERMINISTIC} == {key: again[key] for key in DETERMINISTIC}
    run = vitprune.load_run(tmp_path / "demo" / "run")
    assert Path(run.model).is_dir()
    assert [sum(run.found.labels == digit) for digit in range(10)] == [20] * 10
