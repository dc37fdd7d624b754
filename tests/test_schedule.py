"""Plans made in steps, and targets other than a ratio."""

from __future__ import annotations

import itertools

import pytest
import timm
import torch
from conftest import make_vit
from timm.layers import SwiGLU, SwiGLUPacked

import vitprune
from vitprune.calibration.criteria import REGISTRY
from vitprune.models.macs import count_macs, count_parameters
from vitprune.pruning.schedule import Schedule, finish, list_stops, walk
from vitprune.pruning.session import Session
from vitprune.pruning.target import target_latency, target_macs, target_neurons, target_parameters

IMAGES = torch.randn(24, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
BATCHES = [(IMAGES[:12], torch.arange(12) % 5), (IMAGES[12:], torch.arange(12) % 5)]
SCHEDULE = Schedule("obs", "global", "ridge")


def plan_of(model, ratio, schedule=SCHEDULE, *, step):
    session = Session(model, BATCHES, wanted=REGISTRY[schedule.criterion].statistics | {"moments"})
    target = target_neurons(model, ratio)
    *_earlier, stage = walk(session, target, schedule, step=step)
    return finish(session, stage, target, schedule)


def test_stops_end_at_the_target():
    assert list_stops(0.3, 0.1) == [0.1, 0.2, 0.3]
    assert list_stops(0.5, 1.0) == [0.5]
    assert list_stops(0.0, 0.1) == [0.0]
    with pytest.raises(vitprune.VitpruneError, match=r"step must be in \(0, 1\]"):
        list_stops(0.5, 0.0)


def test_one_step_is_the_plan_of_the_dense_scores(tiny_vit):
    scores = vitprune.score_neurons(tiny_vit, "obs", batches=BATCHES)
    expected = vitprune.plan_pruning(tiny_vit, scores, pruning_ratio=0.4, criterion="obs")
    got = plan_of(tiny_vit, 0.4, step=1.0)
    assert all(torch.equal(expected.keep[name], got.keep[name]) for name in expected.keep)


def test_a_longer_walk_keeps_a_subset(tiny_vit):
    plans = [plan_of(tiny_vit, ratio, step=0.2) for ratio in (0.2, 0.4, 0.6)]
    for wider, narrower in itertools.pairwise(plans):
        assert all(bool((wider.keep[name] | ~narrower.keep[name]).all()) for name in wider.keep)
    assert plans[-1].num_neurons == 144 - 87  # 0.6 of 144 is 86.4: never less than asked


@torch.no_grad()
def test_the_second_step_scores_the_model_that_the_first_left(tiny_vit):
    first = plan_of(tiny_vit, 0.3, step=0.3)
    statistics = vitprune.measure_statistics(tiny_vit, vitprune.find_feed_forwards(tiny_vit), BATCHES, {"moments"})
    smaller = vitprune.apply_plan(tiny_vit, first, compensation="ridge", statistics=statistics)
    scores = vitprune.score_neurons(smaller, "obs", batches=BATCHES, seed=1)
    both = plan_of(tiny_vit, 0.6, step=0.3)
    for name, keep in both.keep.items():
        kept = first.kept(name)
        cut = scores[name].sort(descending=True).indices[: int(keep.sum())]
        assert keep.nonzero().squeeze(1).tolist() == kept[cut].sort().values.tolist()


def test_the_model_given_stays_as_it_is(tiny_vit):
    before = {key: value.clone() for key, value in tiny_vit.state_dict().items()}
    plan_of(tiny_vit, 0.6, step=0.2)
    assert all(torch.equal(before[key], value) for key, value in tiny_vit.state_dict().items())


SWIN = {"img_size": 32, "patch_size": 2, "embed_dim": 12, "depths": (2, 1), "num_heads": (2, 2), "window_size": 4}


def make_family(kind):
    if kind == "swin":
        return timm.create_model("swin_tiny_patch4_window7_224", num_classes=5, **SWIN).double().eval()
    layers = {"mlp": {}, "swiglu": {"mlp_layer": SwiGLU}, "packed": {"mlp_layer": SwiGLUPacked}}
    return make_vit(**layers[kind])


@pytest.mark.parametrize("kind", ["mlp", "swiglu", "packed", "swin"])
@pytest.mark.parametrize("what", ["parameters", "macs"])
def test_the_prediction_is_what_the_pruned_model_has(kind, what):
    model = make_family(kind)
    count = count_parameters if what == "parameters" else count_macs
    total = count(model)
    limit = round(0.8 * total)
    target = target_parameters(model, limit) if what == "parameters" else target_macs(model, limit, total=total)
    assert target.dense == pytest.approx(total)
    pruned, plan = vitprune.prune(model, target=target, criterion="magnitude", compensation="none")
    assert count(pruned) == pytest.approx(plan.facts.target.predicted)
    one_more = max(float(cost_H[1]) for cost_H in target.costs.values())
    assert limit - one_more < count(pruned) <= limit


def test_a_latency_target_reads_its_tables(tiny_vit):
    tables = {f"blocks.{index}.mlp": [(48, 4.0), (24, 2.5), (12, 2.6), (6, 1.0)] for index in range(3)}
    target = target_latency(tiny_vit, 10.0, total=14.0, tables=tables)
    assert target.fixed == pytest.approx(2.0)
    assert target.predict(dict.fromkeys(tables, 24)) == pytest.approx(2 + 3 * 2.5)
    assert target.predict(dict.fromkeys(tables, 18)) == pytest.approx(2 + 3 * 2.5)  # 2.6 ms lowered to 2.5
    _pruned, plan = vitprune.prune(tiny_vit, target=target, criterion="magnitude", compensation="none")
    assert plan.facts.target.predicted <= 10.0


@pytest.mark.parametrize(("limit", "message"), [(1e9, "has .* already"), (10, "in each FFN the model still has")])
def test_impossible_targets_are_refused(limit, message, tiny_vit):
    with pytest.raises(vitprune.VitpruneError, match=message):
        target_parameters(tiny_vit, limit)


def test_ratio_and_target_together_are_refused(tiny_vit):
    with pytest.raises(vitprune.VitpruneError, match="either pruning_ratio or target"):
        vitprune.prune(tiny_vit, BATCHES, pruning_ratio=0.5, target=target_neurons(tiny_vit, 0.5))
