"""One file, every ratio: at a stop bit for bit what was pruned, between stops by the rule, nested throughout."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import timm
import torch
from conftest import TINY, make_vit
from safetensors import safe_open
from safetensors.torch import save_file

import vitprune
from vitprune import VitpruneError
from vitprune.models.identity import hash_weights
from vitprune.models.merging import describe_merging
from vitprune.pruning.compensate import compensate
from vitprune.pruning.decide_parts import NUM_IMAGES, keep_back
from vitprune.pruning.prune import prune_as_planned
from vitprune.pruning.turn import turn_attention
from vitprune.seen_images import SeenImages

IMAGES = torch.randn(24, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
BATCHES = [(IMAGES[:12], torch.arange(12) % 5), (IMAGES[12:], torch.arange(12) % 5)]
SWIN = {"img_size": 32, "patch_size": 2, "embed_dim": 12, "depths": (2, 1), "num_heads": (2, 2), "window_size": 4}
RATIOS = (0.2, 0.35, 0.6)
EVERY = [number / 100 for number in range(61)]


def make_family(kind):
    """Small random models with nothing about them that a file could not tell."""
    names = {"vit": "vit_tiny_patch16_224", "packed": "vit_giant_patch14_dinov2", "swiglu": "eva02_tiny_patch14_224"}
    if kind == "swin":
        torch.manual_seed(0)
        model_args = {**SWIN, "num_classes": 5}
        model = timm.create_model("swin_tiny_patch4_window7_224", **model_args).double().eval()
    else:
        model_args = TINY
        model = make_vit(names[kind], **TINY)
    model.model_args = model_args
    return model


def make(model, tmp_path, **options):
    elastic = vitprune.make_elastic(model, BATCHES, **{"ratios": RATIOS, "step": 0.2, **options})
    vitprune.save_elastic(model, elastic, tmp_path / "e.safetensors")
    return elastic, tmp_path / "e.safetensors"


def same(got, expected):
    return got.keys() == expected.keys() and all(torch.equal(got[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    ("kind", "compensation"),
    [
        *itertools.product(["vit", "packed", "swin"], ["none", "bias", "ridge", "sequential"]),
        ("swiglu", "ridge"),
        ("vit", "distill"),
    ],
)
def test_a_stop_is_bit_for_bit_what_prune_gives(kind, compensation, tmp_path):
    model = make_family(kind)
    elastic, path = make(model, tmp_path, compensation=compensation)
    for ratio in RATIOS:
        pruned, plan = vitprune.prune(model, BATCHES, pruning_ratio=ratio, compensation=compensation, step=0.2)
        assert same(elastic.ranking.keep(ratio), plan.keep)
        assert same(vitprune.load(path, ratio=ratio).state_dict(), pruned.state_dict())
        assert same(vitprune.read_elastic_plan(path, ratio).keep, plan.keep)


@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_every_ratio_keeps_the_neurons_of_prune(kind, allocation):
    model = make_family(kind)
    options = {"allocation": allocation, "compensation": "none", "step": 0.2, "floor": 0.1}
    elastic = vitprune.make_elastic(model, BATCHES, ratios=[0.6], **options)
    for ratio in (0.03, 0.2, 0.27, 0.41, 0.55, 0.6):
        _pruned, plan = vitprune.prune(model, BATCHES, pruning_ratio=ratio, **options)
        assert same(elastic.ranking.keep(ratio), plan.keep)


@pytest.mark.parametrize("criterion", ["magnitude", "random", "variance"])
@pytest.mark.parametrize(("allocation", "floor"), [("uniform", 0.02), ("global", 0.0), ("global", 0.5)])
@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_ratios_are_nested_and_never_remove_less(kind, allocation, floor, criterion):
    model = make_family(kind)
    options = {"criterion": criterion, "allocation": allocation, "floor": floor, "compensation": "none"}
    ranking = vitprune.make_elastic(model, BATCHES, ratios=[0.9], step=0.3, **options).ranking
    before = ranking.widths(0)
    assert sum(before.values()) == ranking.num_neurons_dense
    for name, order_H in ranking.order.items():
        assert torch.equal(order_H.sort().values, torch.arange(len(order_H)))
        assert bool((ranking.budgets[name].diff() >= 0).all())
    for ratio in [number / 200 for number in range(181)]:
        widths = ranking.widths(ratio)
        assert all(0 < widths[name] <= before[name] for name in before)
        assert sum(widths.values()) <= ranking.num_neurons_dense * (1 - ratio) * (1 + 1e-12)
        before = widths


@torch.no_grad()
@pytest.mark.parametrize("kind", ["vit", "packed", "swiglu", "swin"])
def test_without_compensation_every_ratio_is_removal(kind, tmp_path):
    model = make_family(kind)
    _elastic, path = make(model, tmp_path, compensation="none")
    with safe_open(path, framework="pt") as stream:
        assert not [key for key in stream.keys() if key.startswith(("stops/", "means/"))]  # noqa: SIM118
    for ratio in EVERY[::6]:
        expected = vitprune.remove_neurons(model, vitprune.read_elastic_plan(path, ratio))
        loaded = vitprune.load(path, ratio=ratio)
        assert same(loaded.state_dict(), expected.state_dict())
        with vitprune.masked(model, vitprune.read_elastic_plan(path, ratio)):
            torch.testing.assert_close(loaded(IMAGES), model(IMAGES), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_with_bias_every_ratio_is_what_bias_compensation_gives(kind, tmp_path):
    model = make_family(kind)
    _elastic, path = make(model, tmp_path, compensation="bias")
    for ratio in EVERY[::9]:
        plan = vitprune.read_elastic_plan(path, ratio)
        expected = vitprune.apply_plan(model, plan, compensation="bias", batches=BATCHES).state_dict()
        # The same sum in another order; float64.
        torch.testing.assert_close(vitprune.load(path, ratio=ratio).state_dict(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["vit", "packed", "swin"])
@pytest.mark.parametrize("compensation", ["ridge", "sequential"])
@pytest.mark.parametrize(("ratio", "low", "high"), [(0.13, 0.0, 0.2), (0.31, 0.2, 0.35), (0.5, 0.35, 0.6)])
def test_between_stops_by_the_rule(kind, compensation, ratio, low, high, tmp_path):
    """Widened to the dense shape: (1 - a) x (stop before, masked, with the mean in its bias) + a x stop after."""
    model = make_family(kind)
    _elastic, path = make(model, tmp_path, compensation=compensation)
    ffns = vitprune.find_feed_forwards(model)
    statistics = vitprune.measure_statistics(model, ffns, BATCHES, {"moments"})
    plan = vitprune.read_elastic_plan(path, ratio)
    plans = [vitprune.read_elastic_plan(path, end) for end in (low, high)]
    ends = [vitprune.load(path, ratio=end).state_dict() for end in (low, high)]
    expected = vitprune.remove_neurons(model, plan).state_dict()
    counts = [each.num_neurons for each in (plans[0], plan, plans[1])]
    share = (counts[0] - counts[1]) / (counts[0] - counts[2])
    assert 0 < share < 1
    for ffn in ffns:
        keep, weight, bias = plan.keep[ffn.name], f"{ffn.down_proj}.weight", f"{ffn.down_proj}.bias"
        for end, of_end in zip(ends, plans, strict=True):
            wide = torch.zeros(len(end[weight]), len(keep), dtype=torch.float64)
            wide[:, of_end.keep[ffn.name]] = end[weight]
            if of_end is plans[0]:
                end[bias] = end[bias] + wide[:, ~keep] @ statistics[ffn.name].mean_H[~keep]
            end[weight] = wide[:, keep]
    ups = {f"{up}.{what}" for ffn in ffns for up in ffn.up_projs for what in ("weight", "bias")}
    for key, value in expected.items():
        if key not in ups and value.is_floating_point():
            expected[key] = (1 - share) * ends[0][key] + share * ends[1][key]
    torch.testing.assert_close(vitprune.load(path, ratio=ratio).state_dict(), expected, rtol=1e-10, atol=1e-12)


def test_an_output_projection_without_bias_gets_one(tmp_path):
    model = make_family("vit")
    for block in model.blocks:
        block.mlp.fc2.bias = None
    vitprune.save(model, tmp_path / "m")
    model = vitprune.load(tmp_path / "m")
    _elastic, path = make(model, tmp_path, compensation="ridge", ratios=[0.4])
    assert vitprune.load(path).blocks[0].mlp.fc2.bias is None
    assert bool(vitprune.load(path, ratio=0.2).blocks[0].mlp.fc2.bias.abs().sum())
    pruned, _plan = vitprune.prune(model, BATCHES, pruning_ratio=0.4, compensation="ridge", step=0.2)
    assert same(vitprune.load(path, ratio=0.4).state_dict(), pruned.state_dict())


def test_without_a_ratio_it_is_the_dense_model(tmp_path):
    model = make_family("vit").float()
    model.label_names = ("a", "b", "c", "d", "e")
    batches = [(images.float(), labels) for images, labels in BATCHES]
    elastic = vitprune.make_elastic(model, batches, ratios=[0.3], criterion="variance", compensation="ridge")
    vitprune.save_elastic(model, elastic, tmp_path / "e.safetensors")
    loaded = vitprune.load(tmp_path / "e.safetensors")
    assert hash_weights(loaded) == hash_weights(model) == elastic.facts.weights_sha256
    assert loaded.label_names == model.label_names
    assert not loaded.training
    assert vitprune.read_elastic_plan(tmp_path / "e.safetensors").pruning_ratio == 0


def test_the_loaded_model_is_like_any_other(tmp_path):
    _elastic, path = make(make_family("vit"), tmp_path, compensation="ridge")
    loaded, plan = vitprune.load(path, ratio=0.25), vitprune.read_elastic_plan(path, 0.25)
    vitprune.save(loaded, tmp_path / "m", plan=plan)
    assert same(vitprune.load(tmp_path / "m").state_dict(), loaded.state_dict())
    assert vitprune.read_plan(tmp_path / "m").widths == plan.widths
    assert {ffn.name: ffn.num_neurons for ffn in vitprune.find_feed_forwards(loaded)} == plan.widths
    assert vitprune.evaluate(loaded, BATCHES, allow_overlap=True).num_images == 24


def test_calibration_images_travel_with_the_plan(tmp_path):
    model = make_family("vit")
    elastic, path = make(model, tmp_path, compensation="none")
    facts = dataclasses.replace(elastic.facts, calibration=SeenImages(frozenset({"abc"})))
    vitprune.save_elastic(model, dataclasses.replace(elastic, facts=facts), path)
    plan = vitprune.read_elastic_plan(path, 0.3)
    assert plan.calibration == {"abc"}
    assert plan.facts.weights_sha256 == hash_weights(model)
    assert plan.facts.pruning_ratio_asked == 0.3


def test_the_same_seed_gives_the_same_bytes_and_the_model_stays(tmp_path):
    model = make_family("vit")
    before = hash_weights(model)
    content = [make(model, tmp_path, compensation="sequential", seed=3)[1].read_bytes() for _ in range(2)]
    assert content[0] == content[1]
    assert hash_weights(model) == before


def test_shared_tensors_are_there_once(tmp_path):
    model = make_family("vit")
    _elastic, path = make(model, tmp_path, compensation="sequential")
    with safe_open(path, framework="pt") as stream:
        keys = set(stream.keys())
        dense = sum(stream.get_tensor(key).numel() for key in keys if key.startswith("dense/"))
    assert dense == sum(value.numel() for value in model.state_dict().values())
    stops = {key.split("/", 2)[2] for key in keys if key.startswith("stops/")}
    projs = [f"blocks.{index}.{proj}" for index in range(3) for proj in ("mlp.fc2", "attn.proj")]
    assert stops <= {f"{proj}.{what}" for proj in projs for what in ("weight", "bias")}


def test_ratios_out_of_range_are_refused(tmp_path):
    model = make_family("vit")
    _elastic, path = make(model, tmp_path, compensation="none")
    for ratio in (-0.1, 1.0, float("nan")):
        with pytest.raises(VitpruneError, match=r"ratio must be in \[0, 1\)"):
            vitprune.load(path, ratio=ratio)
    with pytest.raises(VitpruneError, match=r"ratio 0.7 is beyond the largest of this elastic model, 0.6"):
        vitprune.load(path, ratio=0.7)
    with pytest.raises(VitpruneError, match=r"beyond the largest of this elastic model, 0.6"):
        vitprune.read_elastic_plan(path, 0.61)
    for ratios in ([], [0.0, 0.5], [0.5, 1.0]):
        with pytest.raises(VitpruneError, match=r"ratios must be in \(0, 1\)"):
            vitprune.make_elastic(model, BATCHES, ratios=ratios)
    with pytest.raises(VitpruneError, match=r"leaves blocks\.\d\.mlp .* empty"):
        vitprune.make_elastic(model, BATCHES, ratios=[0.99])
    with pytest.raises(VitpruneError, match="needs calibration images"):
        vitprune.make_elastic(model, criterion="magnitude")


def test_a_ratio_needs_an_elastic_file(saved_vit, tmp_path):
    for model in (str(saved_vit), "vit_tiny_patch16_224"):
        with pytest.raises(VitpruneError, match="has one width only: ratio is for an elastic file"):
            vitprune.load(model, ratio=0.4)
    save_file({"a": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(VitpruneError, match="holds weights without their model; pass a timm name"):
        vitprune.load(tmp_path / "w.safetensors")
    vitprune.Plan({"a": torch.ones(2).bool()}).write(tmp_path / "p.safetensors")
    with pytest.raises(VitpruneError, match="no model but a vitprune file of kind 'plan'"):
        vitprune.load(tmp_path / "p.safetensors", ratio=0.4)
    with pytest.raises(VitpruneError, match="no such file"):
        vitprune.load(tmp_path / "absent.safetensors", ratio=0.4)
    (tmp_path / "w.pth").touch()
    with pytest.raises(VitpruneError, match="is a file; pass a timm name as the model"):
        vitprune.load(tmp_path / "w.pth")
    with pytest.raises(VitpruneError, match="leave `checkpoint` out"):
        vitprune.load(tmp_path / "p.safetensors", checkpoint=tmp_path / "w.safetensors")


def test_what_would_not_load_is_not_written(tmp_path):
    model, path = make_family("vit"), tmp_path / "e.safetensors"
    elastic = vitprune.make_elastic(model, ratios=[0.3], criterion="magnitude", compensation="none")
    with pytest.raises(VitpruneError, match="made of other weights"):
        vitprune.save_elastic(make_vit(seed=1), elastic, path)
    with pytest.raises(VitpruneError, match="is called .safetensors"):
        vitprune.save_elastic(model, elastic, tmp_path / "e")
    model.register_parameter("another", torch.nn.Parameter(torch.zeros(1)))
    elastic = vitprune.make_elastic(model, ratios=[0.3], criterion="magnitude", compensation="none")
    with pytest.raises(VitpruneError, match="would not load again.*the model lacks another"):
        vitprune.save_elastic(model, elastic, path)
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_is_killed_leaves_nothing(tmp_path, monkeypatch):
    def die(*_args, **_kwargs):
        raise KeyboardInterrupt

    model = make_family("vit")
    elastic = vitprune.make_elastic(model, BATCHES, ratios=[0.3], criterion="magnitude", compensation="none")
    monkeypatch.setattr("vitprune.files._finish", die)
    with pytest.raises(KeyboardInterrupt):
        vitprune.save_elastic(model, elastic, tmp_path / "e.safetensors")
    assert list(tmp_path.iterdir()) == []


# More than one batch, so that what is tried is kept back from what is fitted.
MANY = [
    (torch.randn(32, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(n)), torch.arange(32) % 5)
    for n in range(4)
]
PARTS = ["ffn", "qk", "vo", "heads", "layers"]


def make_parts(parts, tmp_path, **options):
    model = make_vit(depth=3)
    model.model_args = {**TINY, "depth": 3}
    options = {"ratios": (0.35, 0.5), "step": 0.35, "criterion": "variance", **options}
    elastic = vitprune.make_elastic(model, MANY, parts=parts, **options)
    vitprune.save_elastic(model, elastic, tmp_path / "e.safetensors")
    return model, elastic, tmp_path / "e.safetensors"


@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize(
    ("parts", "compensation"),
    [
        (["qk"], "none"),
        (["vo"], "bias"),
        (["ffn", "vo"], "ridge"),
        (["ffn", "heads"], "sequential"),
        (["layers"], "sequential"),
        (PARTS, "sequential"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) else value,
)
def test_a_stop_of_parts_is_bit_for_bit_what_its_plan_gives(parts, compensation, allocation, tmp_path):
    model, _elastic, path = make_parts(parts, tmp_path, compensation=compensation, allocation=allocation)
    for ratio in (0.35, 0.5):
        plan = vitprune.read_elastic_plan(path, ratio)
        assert plan.parts == tuple(parts)
        for part in parts:
            keep = torch.cat(list(plan.only(part).keep.values()))
            assert keep.sum() <= len(keep) * (1 - ratio) or part == "layers"
        pruned, _plan = prune_as_planned(model, plan, MANY, compensation=compensation)
        loaded = vitprune.load(path, ratio=ratio)
        assert same(loaded.state_dict(), pruned.state_dict())
        with torch.no_grad():
            assert torch.equal(loaded(IMAGES), pruned(IMAGES))
        vitprune.save(loaded, tmp_path / f"{ratio}", plan=plan)
        assert same(vitprune.load(tmp_path / f"{ratio}").state_dict(), loaded.state_dict())


@torch.no_grad()
@pytest.mark.parametrize("compensation", ["none", "bias", "ridge"])
def test_between_stops_parts_are_nested_and_what_is_gone_leaves_its_mean(compensation, tmp_path):
    model, elastic, path = make_parts(PARTS, tmp_path, compensation=compensation)
    before = elastic.ranking.keep(0)
    dense = vitprune.load(path, ratio=0)
    turned = turn_attention(model, keep_back(MANY, NUM_IMAGES)[0], PARTS)
    torch.testing.assert_close(dense(IMAGES), model(IMAGES), rtol=1e-9, atol=1e-10)
    for ratio in EVERY[:51:5]:
        keep = elastic.ranking.keep(ratio)
        assert all(bool((before[name] | ~keep[name]).all()) for name in keep)
        before = keep
        loaded, plan = vitprune.load(path, ratio=ratio), vitprune.read_elastic_plan(path, ratio)
        widths = {
            group.name: group.num_units for group in vitprune.find_groups(loaded, PARTS) if group.kind != "layers"
        }
        assert widths == {name: width for name, width in plan.widths.items() if width and plan.kind(name) != "layers"}
        if compensation == "none" and not plan.left_out:
            expected = vitprune.remove_neurons(elastic.turned, plan)
            assert same(loaded.state_dict(), expected.state_dict())
        elif compensation == "bias" and ratio < 0.35:
            expected = vitprune.remove_neurons(
                compensate(turned.model, plan, turned.statistics, compensation="bias"), plan
            )
            torch.testing.assert_close(loaded(IMAGES), expected(IMAGES), rtol=1e-9, atol=1e-9)


def test_tokens_merge_at_any_ratio_when_a_file_is_loaded(tmp_path):
    _model, _elastic, path = make_parts(["ffn", "vo"], tmp_path, compensation="ridge")
    loaded = vitprune.load(path, ratio=0.4, merge="0,4,0")
    assert describe_merging(loaded) == [0, 4, 0]
    expected = vitprune.set_merging(vitprune.load(path, ratio=0.4), (0, 4, 0))
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES), expected(IMAGES))
    with pytest.raises(VitpruneError, match="there is no block 7"):
        vitprune.load(path, merge="7:2")


def test_elastic_refuses_what_it_cannot_rank(tmp_path):
    with pytest.raises(VitpruneError, match="part tokens: which tokens merge is chosen when"):
        vitprune.make_elastic(make_vit(), BATCHES, parts=["ffn", "tokens"])
    with pytest.raises(VitpruneError, match=r"parts ffn, qk are ranked by images; pass `batches`"):
        vitprune.make_elastic(make_vit(), parts=["ffn", "qk"], criterion="magnitude", compensation="none")
    with pytest.raises(VitpruneError, match="leaves blocks.0.attn.heads"):
        vitprune.make_elastic(make_vit(), BATCHES, parts=["heads"], ratios=[0.9])
