"""Whatever the scores, a plan never removes less than asked, and rounding is part of the decision."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vitprune
from vitprune.options import ALLOCATIONS
from vitprune.pruning.allocate import allocate
from vitprune.pruning.plan import plan_from_widths
from vitprune.pruning.target import Target, target_neurons

WIDTHS = st.lists(st.integers(16, 120), min_size=1, max_size=5)


def half_of(scores, ratio=0.5):
    costs = {name: torch.arange(len(score) + 1, dtype=torch.float64) for name, score in scores.items()}
    return Target("neurons", sum(map(len, scores.values())) * (1 - ratio), 0.0, costs)


def draw_scores(widths, seed):
    generator = torch.Generator().manual_seed(seed)
    return {f"ffn{i}": torch.randn(width, generator=generator) * 10**i for i, width in enumerate(widths)}


@given(
    widths=WIDTHS,
    ratio=st.floats(0, 0.9),
    allocation=st.sampled_from(list(ALLOCATIONS)),
    across=st.booleans(),
    round_to=st.sampled_from([1, 2, 8, 16]),
    seed=st.integers(0, 9),
)
def test_targets_floors_and_rounding_hold(widths, ratio, allocation, across, round_to, seed):
    scores = draw_scores(widths, seed)
    try:
        kept = allocate(scores, half_of(scores, ratio), allocation=allocation, across_ffns=across, round_to=round_to)
    except vitprune.VitpruneError as error:
        assert "empty" in str(error)  # noqa: PT017 (a refusal is one of the right answers)
        assert min(widths) * (1 - ratio) < round_to
        return
    assert sum(kept.values()) <= sum(widths) * (1 - ratio) + 1e-6
    assert sum(kept.values()) > sum(widths) * (1 - ratio) - round_to * len(widths) - 1
    for width, (name, count) in zip(widths, kept.items(), strict=True):
        assert 1 <= count <= width, name
        assert sum(kept.values()) == sum(widths) or count % round_to == 0


@given(widths=WIDTHS, seed=st.integers(0, 9))
def test_global_keeps_the_best_neurons_of_all_ffns(widths, seed):
    scores = {name: score.abs() for name, score in draw_scores(widths, seed).items()}
    kept = allocate(scores, half_of(scores), allocation="global", across_ffns=True, floor=0.0)
    plan = plan_from_widths(scores, kept)
    inside = torch.cat([scores[name][keep] for name, keep in plan.keep.items()])
    # The first neuron of each FFN is granted whatever its score, so it may stay below the bar.
    outside = torch.cat([scores[name][~keep] for name, keep in plan.keep.items()])
    assert int((inside < outside.max()).sum()) <= len(widths)


def test_uniform_keeps_exact_products_exact():
    scores = {"a": torch.rand(768)}
    for tenths in range(1, 10):
        expected = math.floor(768 * (10 - tenths) / 10)
        target = half_of(scores, tenths / 10)
        assert allocate(scores, target, allocation="uniform", across_ffns=False)["a"] == expected


@settings(max_examples=60)
@given(widths=WIDTHS, share=st.floats(0.2, 1), round_to=st.sampled_from([1, 4]), seed=st.integers(0, 9))
def test_no_plan_costs_more_than_its_target_whatever_the_costs(widths, share, round_to, seed):
    scores = {name: score.abs() for name, score in draw_scores(widths, seed).items()}
    generator = torch.Generator().manual_seed(seed)
    costs = {}
    for name, score in scores.items():
        steps = torch.rand(len(score), generator=generator, dtype=torch.float64) * (torch.arange(len(score)) % 3 > 0)
        costs[name] = torch.cat([torch.zeros(1, dtype=torch.float64), steps.cumsum(0)])
    target = Target("latency", 5.0 + share * sum(float(cost[-1]) for cost in costs.values()), 5.0, costs)
    for allocation in ALLOCATIONS:
        try:
            kept = allocate(scores, target, allocation=allocation, across_ffns=True, round_to=round_to)
        except vitprune.VitpruneError as error:
            assert "empty" in str(error)  # noqa: PT017 (a refusal is one of the right answers)
        else:
            assert target.predict(kept) <= target.limit * (1 + 1e-9)


def test_neurons_of_dear_ffns_must_be_worth_more():
    scores = {"cheap": torch.full((10,), 1.0), "dear": torch.full((10,), 1.5)}
    costs = {"cheap": torch.arange(11.0).double(), "dear": 2 * torch.arange(11.0).double()}
    kept = allocate(scores, Target("macs", 14.0, 0.0, costs), allocation="global", across_ffns=True, floor=0.1)
    assert kept == {"cheap": 10, "dear": 2}


@pytest.mark.parametrize("ratio", [1.2, -0.1, float("nan")])
def test_a_ratio_out_of_range_is_refused(ratio, tiny_vit):
    with pytest.raises(vitprune.VitpruneError, match=r"pruning_ratio must be in \[0, 1\), got"):
        target_neurons(tiny_vit, ratio)


@pytest.mark.parametrize(
    ("ratio", "arguments", "message"),
    [
        (0.99, {}, "leaves a .* empty"),
        (0.5, {"round_to": 64}, "in steps of 64 leaves a .* empty"),
        (0.5, {"round_to": 0}, "round_to must be at least 1"),
        (0.5, {"floor": 2}, "floor must be in"),
        (0.5, {"allocation": "local"}, "allocation must be one of uniform, global"),
    ],
)
def test_refuses(ratio, arguments, message):
    given_arguments = {"allocation": "uniform", "across_ffns": True, **arguments}
    scores = {"a": torch.rand(64)}
    with pytest.raises(vitprune.VitpruneError, match=message):
        allocate(scores, half_of(scores, ratio), **given_arguments)


def test_ties_go_to_the_lower_index():
    plan = plan_from_widths({"a": torch.tensor([1.0, 2.0, 1.0, 1.0])}, {"a": 2})
    assert plan.kept("a").tolist() == [0, 1]
    assert plan.removed("a").tolist() == [2, 3]
