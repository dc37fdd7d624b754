"""Accuracy, comparison, latency and multiply-accumulates against numbers known on paper."""

from __future__ import annotations

import math
import time

import pytest
import scipy.stats
import timm
import torch
from conftest import make_vit
from families import half_plan
from sklearn.metrics import top_k_accuracy_score

import vitprune
from vitprune.evaluation.accuracy import compare, evaluate
from vitprune.models.macs import count_macs, ffn_share
from vitprune.speed.ffn_latency import ffn_shapes, measure_ffn_latency
from vitprune.timing import Latency, measure_latency, paired_speedup


def test_accuracy_agrees_with_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(200, 12, generator=generator), torch.randint(0, 12, (200,), generator=generator)
    batches = [(logits[:90], labels[:90]), (logits[90:], labels[90:])]
    measured = evaluate(lambda images: images, batches)
    for k, value in ((1, measured.top1), (5, measured.top5)):
        expected = top_k_accuracy_score(labels.numpy(), logits.numpy(), k=k, labels=range(12))
        assert value == pytest.approx(expected, abs=1e-12)
    assert sum(measured.images_by_class.values()) == measured.num_images == 200
    of_class = logits[labels == 3].argmax(1) == 3
    assert measured.top1_by_class[3] == pytest.approx(of_class.double().mean().item())


def test_the_interval_is_wilsons():
    labels = torch.tensor([0] * 8 + [1] * 2)
    measured = evaluate(lambda images: images, [(torch.eye(2)[[0] * 10], labels)])
    n, p, z = 10, 0.8, 1.959963984540054
    centre, half = (p + z * z / (2 * n)) / (1 + z * z / n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert measured.top1_interval == pytest.approx((centre - half / (1 + z * z / n), centre + half / (1 + z * z / n)))


def test_mcnemar_counts_only_the_images_that_changed():
    labels = torch.zeros(12, dtype=torch.long)
    right, wrong = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    before = evaluate(lambda images: images, [(torch.cat([right] * 9 + [wrong] * 3), labels)])
    after = evaluate(lambda images: images, [(torch.cat([wrong] * 6 + [right] * 4 + [wrong] * 2), labels)])
    result = compare(before, after)
    assert (result.gained, result.lost) == (1, 6)
    assert result.p_value == pytest.approx(2 * (1 + 7) / 2**7)
    assert compare(before, before).p_value == 1


def test_a_model_without_classifier_has_no_accuracy():
    with pytest.raises(vitprune.VitpruneError, match="no classifier"):
        evaluate(timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=1), [])
    with pytest.raises(vitprune.VitpruneError, match="no images"):
        evaluate(lambda images: images, [])


def test_latency_takes_turns_and_orders_fast_before_slow():
    order = []

    def fast():
        order.append("fast")

    def slow():
        order.append("slow")
        time.sleep(0.01)

    measured = measure_latency({"fast": fast, "slow": slow}, seconds=0.2)
    turns = [name for name, before in zip(order, [None, *order], strict=False) if name != before]
    assert turns == ["fast", "slow"] * 10
    assert measured["slow"].median_ms >= 10 > measured["fast"].median_ms
    assert measured["slow"].p95_ms >= measured["slow"].median_ms


def test_a_speedup_is_paired_round_by_round_and_its_interval_students():
    slow, fast = (Latency(1.0, 1.0, 30, rounds) for rounds in ((2.0, 40.0, 8.0), (1.0, 10.0, 4.0)))
    speedup = paired_speedup(slow, fast)
    logs = [math.log(2), math.log(4), math.log(2)]
    expected = scipy.stats.ttest_1samp(logs, 0).confidence_interval(0.95)
    assert speedup.ratio == pytest.approx(math.exp(sum(logs) / 3))
    assert (speedup.low, speedup.high) == pytest.approx((math.exp(expected.low), math.exp(expected.high)))


def test_macs_of_a_vision_transformer_on_paper():
    model = timm.create_model("deit_tiny_patch16_224")
    tokens, width, depth = 197, 192, 12
    block = tokens * (3 + 1 + 4 + 4) * width**2 + 2 * tokens**2 * width
    expected = depth * block + 196 * 768 * width + width * 1000
    assert count_macs(model) == expected
    assert ffn_share(model) == pytest.approx(depth * tokens * 8 * width**2 / expected)
    halved = vitprune.remove_neurons(model, half_plan(model))
    assert count_macs(halved) == expected - depth * tokens * 4 * width**2


@pytest.mark.parametrize("backend", ["torch-eager", "onnxruntime-cpu"])
def test_every_ffn_has_a_table_of_times_up_to_its_dense_width(backend):
    model = make_vit().float()
    total, tables = measure_ffn_latency(model, backend=backend, batch_size=2, seconds=0.5)
    assert total > 0
    assert list(tables) == [f"blocks.{index}.mlp" for index in range(3)]
    for table in tables.values():
        assert [width for width, _ms in table] == [6, 12, 18, 24, 30, 36, 42, 48]
        assert all(ms >= 0 for _width, ms in table)
    assert 0 <= sum(table[-1][1] for table in tables.values()) <= total * (1 + 1e-9)
    # FFNs of one shape cost the same; an exported file computes the last one for the class token alone.
    assert tables["blocks.0.mlp"] == tables["blocks.1.mlp"]
    last = [ms * (17 if backend == "onnxruntime-cpu" else 1) for _width, ms in tables["blocks.2.mlp"]]
    assert last == pytest.approx([ms for _width, ms in tables["blocks.0.mlp"]])


def test_ffn_shapes_are_those_of_the_forward_pass():
    shapes = ffn_shapes(timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1)))
    assert [(s.num_tokens, s.embed_dim, s.num_neurons) for s in shapes.values()] == [
        (3136, 96, 384), (784, 192, 768), (196, 384, 1536), (49, 768, 3072)
    ]  # fmt: skip
