"""Real weights and real photos: accuracy, parity, and what half of the FFN neurons cost."""

from __future__ import annotations

import pytest
import torch
from conftest import make_once, shared

import vitprune


@pytest.fixture(scope="module")
def photos(deit_tiny):
    """All 1,000 evaluation photos as batches in memory."""
    images = vitprune.find_images(shared("data/nips17-1000"), 1000)
    return list(vitprune.ImageBatches(images, deit_tiny, batch_size=50))


@pytest.fixture(scope="module")
def dense_right(deit_tiny, photos, tmp_path_factory):
    """Which of the photos DeiT-Tiny answers rightly [batches, photos of a batch]."""

    def make(folder):
        torch.save(torch.tensor(vitprune.evaluate(deit_tiny, photos).correct), folder / "right.pt")

    right = torch.load(make_once(tmp_path_factory, "dense-right", make) / "right.pt", weights_only=True)
    return right.view(len(photos), -1).double()


def test_dense_accuracy_is_the_published_one(dense_right):
    assert dense_right.mean().item() == pytest.approx(0.865, abs=0.003)


def test_half_of_the_neurons_removed(deit_tiny, photos, dense_right, tmp_path):
    """Compensation must pay; removal shrinks the file by 30 %; ONNX Runtime agrees with torch."""
    calibration = vitprune.find_images(shared("data/imagenet-train-1000"), 1000).head(100)
    batches = list(vitprune.ImageBatches(calibration, deit_tiny, batch_size=25))
    evaluation = photos[::4]
    plain, _ = vitprune.prune(deit_tiny, batches, compensation="none")
    pruned, plan = vitprune.prune(deit_tiny, batches)
    assert plan.pruning_ratio == pytest.approx(0.5, abs=1e-3)
    plain_top1, pruned_top1 = (vitprune.evaluate(model, evaluation).top1 for model in (plain, pruned))
    assert dense_right[::4].mean() > pruned_top1 > plain_top1 + 0.03
    reports = [
        vitprune.export_onnx(model, tmp_path / f"{name}.onnx", evaluation[:2])
        for name, model in (("dense", deit_tiny), ("pruned", pruned))
    ]
    assert reports[1].size_bytes < 0.7 * reports[0].size_bytes
    for report in reports:
        assert report.max_abs_diff < 1e-4
        assert report.top1_agreement == 1


def test_paths_of_photos_score_above_activation_paths(deit_tiny):
    images = vitprune.find_images(shared("data/imagenette/train"), 1000, images_per_class=1)
    batches = list(vitprune.ImageBatches(images.head(4), deit_tiny, batch_size=4))
    jas, activation = (
        vitprune.discover(deit_tiny, batches, method=method).joint_scores for method in ("jas", "activation")
    )
    assert jas.mean() > activation.mean()
    assert torch.isfinite(jas).all()
