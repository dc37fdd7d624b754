"""How long all of it will take: loops are told beforehand, in their order, and what is told of the whole is true."""

from __future__ import annotations

import re

import pytest
import torch
from conftest import make_vit

import vitprune
from vitprune import progress
from vitprune.models.attention import split_attention
from vitprune.progress import IMAGES, Journey, expect_work, forget_work, log_lines
from vitprune.pruning.target import target_macs


def make_batches(num_batches=2):
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(8, 3, 32, 32, dtype=torch.float64, generator=generator), torch.arange(8) % 5)] * num_batches


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_what_is_left_is_told_by_what_was_done():
    clock = Clock()
    journey = Journey([(IMAGES, 1.0), ("rank", 1.0), (IMAGES, 1.0), ("compensate", 7.0)], clock)
    left = journey.enter("calibrate")
    assert left(0.01) is None  # too little to tell
    clock.now = 5.0
    assert left(0.5) == pytest.approx(95)
    clock.now = 10.0
    assert left(1.0) == pytest.approx(90)
    journey.enter("rank neurons (step 1 of 2)")
    clock.now = 30.0
    assert journey.enter("prune (pass 2)")(1.0) == pytest.approx(70)
    assert journey.enter("something else")(0.5) is None  # no more images are to come
    clock.now = 90.0
    assert journey.enter("compensate")(1.0) == pytest.approx(0)


def test_a_loop_that_is_left_out_counts_as_done():
    clock = Clock()
    journey = Journey([(IMAGES, 1.0), ("layers", 4.0), ("compensate", 5.0)], clock)
    clock.now = 50.0
    assert journey.enter("compensate")(0.0) == pytest.approx(50)


def test_lines_say_it_and_without_stages_they_do_not(capsys):
    expect_work([("decode", 1.0), ("encode", 3.0)])
    expect_work([("decode", 1.0)])  # a part of it does not begin anew
    try:
        list(log_lines([1, 2, 3], "decode", 3, every=0))
        list(log_lines([1, 2], "encode", 2, every=0))
    finally:
        forget_work()
    *lines, last = capsys.readouterr().err.splitlines()
    told = [line for line in lines[1:] if "left" in line]
    assert len(told) >= 3
    assert all("; in all about 0:00:00 left" in line for line in told)
    assert "in all" not in last  # nothing is left
    list(log_lines([1, 2], "decode", 2, every=0))
    assert "in all" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "of_parts"),
    [
        ({"ratio": 0.5}, False),
        ({"ratio": 0.5, "step": 1}, False),
        ({"ratio": 0.3, "compensate": "ridge"}, False),
        ({"ratio": 0.2, "compensate": "distill"}, False),
        ({"ratio": 0.3, "parts": ("ffn", "qk", "vo")}, True),
        ({"parts": ("ffn", "qk", "vo", "layers")}, True),
    ],
)
def test_a_pruning_runs_the_loops_that_it_told_of(options, of_parts, monkeypatch):
    """In their order; of parts, some are left out where there is nothing to decide."""
    model, entered = make_vit(), []

    class Watched(Journey):
        def enter(self, description):
            before = self.begun
            left = super().enter(description)
            entered.append((description, before, self.begun, len(self.stages)))
            return left

    monkeypatch.setattr(progress, "Journey", Watched)
    if "layers" in options.get("parts", ()):
        split, limit = split_attention(model), vitprune.count_macs(model) * 0.7
        options = {**options, "target": target_macs(split, limit, kinds=["ffn", "qk", "vo"])}
    vitprune.prune(model, make_batches(), progress=True, **options)
    unknown = [what for what, before, begun, _count in entered if begun == before]
    assert not unknown
    assert entered[-1][2] == entered[-1][3]  # the last loop is the last of the list
    if not of_parts:
        assert all(begun == before + 1 for _what, before, begun, _count in entered)


@pytest.mark.parametrize("parts", [("ffn",), ("ffn", "qk")])
def test_several_models_in_one_file_are_all_told_of(parts, capsys, monkeypatch):
    monkeypatch.setattr(log_lines, "__defaults__", (0, 0))
    vitprune.make_elastic(make_vit(), make_batches(), ratios=[0.3, 0.5], parts=parts, progress=True)
    ends = [line for line in capsys.readouterr().err.splitlines() if re.match(r"compensate at \S+ 3/3", line)]
    assert ["in all" in line for line in ends] == [True, False]


def test_what_a_pruning_tells_of_the_whole(capsys, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0)
    monkeypatch.setattr(log_lines, "__defaults__", (0, 0))
    vitprune.prune(make_vit(), make_batches(), ratio=0.5, progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert sum(bool(re.search(r"; in all about \d:\d\d:\d\d left$", line)) for line in lines) > 10
    assert "in all" not in lines[-1]
    assert progress._JOURNEY.get() is None
