"""The demo as a newcomer runs it: twice, the second time from the cache."""

from __future__ import annotations

import shutil
from pathlib import Path

from conftest import run_demo

import vitprune
from vitprune.demo import DEMO_FILES

DETERMINISTIC = ("dense_top1", "pruned_top1", "curve", "mean_joint_score", "num_parameters")


def test_the_demo_trains_once_and_repeats_its_numbers(demo, kept_exports, tmp_path):
    assert demo.answer["dense_top1"] >= 0.965
    assert demo.answer["num_parameters"] < demo.answer["num_parameters_dense"]
    assert demo.answer["top1_agreement"] == 1
    assert "training a small ViT" in demo.log
    shutil.copytree(demo.folder, tmp_path / "demo")  # an earlier demo, which the second replaces
    again = run_demo(tmp_path / "demo", demo.cache, kept_exports)
    assert "taken from" in again.log
    assert {key: demo.answer[key] for key in DETERMINISTIC} == {key: again.answer[key] for key in DETERMINISTIC}


def test_the_demo_leaves_everything_behind(demo):
    assert {path.name for path in demo.folder.iterdir()} == DEMO_FILES | {"card.json"}
    run = vitprune.load_run(demo.folder / "run")
    assert Path(run.model).is_dir()
    assert [sum(run.found.labels == digit) for digit in range(10)] == [20] * 10
