"""The discovery verb and its run folder."""

from __future__ import annotations

import json
import sys
import warnings

import pytest
import torch
from conftest import make_vit, photos
from families import build, example

import vitprune
from vitprune.data import digest_images, hash_images
from vitprune.discovery.discover import (
    Discovery,
    class_paths,
    count_correct,
    count_visits,
    discover,
    set_pace,
)
from vitprune.discovery.discover_run import discover_run
from vitprune.discovery.memory import budget_bytes, measure_row_bytes
from vitprune.discovery.methods import REGISTRY, plan_search
from vitprune.discovery.run import Run, load_run, save_run
from vitprune.options import METHODS

LABELS = torch.tensor([3, 1, 3])


def test_the_methods_and_the_help_name_the_same_things():
    assert list(REGISTRY) == list(METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_batches_are_joined_in_order(method, tiny_vit, tiny_images):
    whole = discover(tiny_vit, [(tiny_images, LABELS)], method=method, top_k=2)
    parts = discover(tiny_vit, [(tiny_images[:1], LABELS[:1]), (tiny_images[1:], LABELS[1:])], method=method, top_k=2)
    assert whole.neurons.shape == (3, 3, 2)
    assert torch.equal(whole.neurons, parts.neurons)
    assert torch.equal(whole.labels, LABELS)
    assert whole.classes == parts.classes == (1, 3)
    for name, scores in whole.class_scores.items():
        assert scores.shape == (2, 48)
        torch.testing.assert_close(scores, parts.class_scores[name])


def test_class_scores_are_means_over_the_images_of_a_class(tiny_vit, tiny_images):
    both = discover(tiny_vit, [(tiny_images, LABELS)])
    first, third = (discover(tiny_vit, [(tiny_images[i : i + 1], LABELS[i : i + 1])]) for i in (0, 2))
    expected = (first.class_scores["blocks.1.mlp"][0] + third.class_scores["blocks.1.mlp"][0]) / 2
    torch.testing.assert_close(both.class_scores["blocks.1.mlp"][1], expected)


def two_classes():
    return Discovery(
        layers=("a",),
        neurons=torch.tensor([[[0, 1]], [[1, 2]], [[4, 3]]]),
        joint_scores=torch.zeros(3),
        labels=torch.tensor([7, 7, 9]),
        predictions=torch.tensor([7, 9, 9]),
        completeness_errors=None,
        classes=(7, 9),
        class_scores={"a": torch.tensor([[0.1, 0.0, 0.5, 9.0, 9.0], [0.0, 0.0, 0.0, 1.0, 1.0]])},
        method="jas",
        tokens="cls",
        quadrature="riemann:20",
    )


def test_class_path_counts_visits_then_scores_then_index():
    paths = class_paths(two_classes())
    assert paths[7].tolist() == [[1, 2]]  # 1 twice; 2 and 0 once each, 2 scores higher
    assert paths[9].tolist() == [[3, 4]]  # once each, equal scores, lower index first


def test_visits_and_right_answers_are_counted_by_class():
    assert count_visits(two_classes())["a"].tolist() == [[1, 2, 1, 0, 0], [0, 0, 0, 1, 1]]
    correct, images = count_correct(two_classes())
    assert (correct.tolist(), images.tolist()) == ([1, 1], [2, 1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"top_k": 49}, r"top_k must be in \[1, 48\] .* got 49"),
        ({"top_k": 0}, "top_k must be in"),
        ({"method": "saliency"}, "method must be one of jas"),
        ({"tokens": "word"}, "tokens must be one of cls, patch, all"),
        ({"quadrature": "simpson:3"}, "quadrature must be"),
        ({"method": "activation", "quadrature": "adaptive"}, "only the methods jas and jas-complete ask for"),
        ({"precision": "int8"}, "precision must be one of float32, tf32, bf16"),
        ({"precision": "bf16", "quadrature": "riemann:20"}, "bf16 needs quadrature adaptive .* got riemann:20"),
        ({"precision": "bf16"}, r"is for float32 weights, the model has torch\.float64"),
        ({"quadrature": ""}, "quadrature must be"),
    ],
)
def test_refuses(arguments, message, tiny_vit, tiny_images):
    with pytest.raises(vitprune.VitpruneError, match=message):
        discover(tiny_vit, [(tiny_images, LABELS)], **arguments)


def test_tf32_is_refused_without_a_gpu(tiny_vit, tiny_images):
    with pytest.raises(vitprune.VitpruneError, match="tf32 needs an NVIDIA GPU"):
        discover(tiny_vit.float(), [(tiny_images, LABELS)], precision="tf32")


def test_half_precision_is_refused_with_the_reason(tiny_vit, tiny_images):
    with pytest.raises(
        vitprune.VitpruneError, match=r"needs float32 or float64 weights, the model has torch\.bfloat16"
    ):
        discover(tiny_vit.bfloat16(), [(tiny_images, LABELS)])


@pytest.mark.parametrize("tokens", ["cls", "all"])
@pytest.mark.parametrize("memory_gib", [1e-9, 0.001, 10])
def test_any_memory_gives_the_same_paths(tokens, memory_gib, tiny_vit, tiny_images):
    whole = discover(tiny_vit, [(tiny_images, LABELS)], tokens=tokens)
    parts = discover(tiny_vit, [(tiny_images, LABELS)], tokens=tokens, memory_gib=memory_gib)
    assert torch.equal(whole.neurons, parts.neurons)
    torch.testing.assert_close(whole.joint_scores, parts.joint_scores, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("method", ["jas", "jas-complete", "influence-pattern"])
@pytest.mark.parametrize("tokens", ["cls", "all"])
def test_less_memory_is_a_smaller_pace(method, tokens, tiny_vit, tiny_images):
    search = plan_search(tiny_vit, method=method, tokens=tokens)
    paces = [set_pace(tiny_vit, search, tiny_images, memory_gib=gib) for gib in (1e-9, 0.003, 0.01, 1)]
    images, rows = [pace.images for pace in paces], [pace.chunk_rows for pace in paces]
    assert images == sorted(images)
    assert rows == sorted(rows)
    assert (images[0], rows[0]) == (1, 1)
    assert images[-1] > 1


def test_out_of_memory_halves_what_goes_at_once(tiny_vit, tiny_images, monkeypatch):
    module = sys.modules["vitprune.discovery.discover"]
    whole, search = discover(tiny_vit, [(tiny_images, LABELS)]), module._search
    tried = []

    def search_with_little(model, request, images, labels, pace):
        tried.append((len(images), pace.chunk_rows))
        if len(images) > 1 or pace.chunk_rows > 4:
            raise torch.OutOfMemoryError("no memory left")
        return search(model, request, images, labels, pace)

    monkeypatch.setattr(module, "_search", search_with_little)
    found = discover(tiny_vit, [(tiny_images, LABELS)])
    assert torch.equal(found.neurons, whole.neurons)
    assert tried == [(3, 32), (3, 16), (3, 8), (3, 4), (2, 2), (1, 1), (1, 1), (1, 1)]
    monkeypatch.setattr(module, "_search", lambda *_args: (_ for _ in ()).throw(torch.OutOfMemoryError("none")))
    with pytest.raises(torch.OutOfMemoryError):
        discover(tiny_vit, [(tiny_images, LABELS)])


def test_what_autograd_keeps_is_counted(tiny_vit, tiny_images):
    """Deeper is more, by the same again for each block; weights do not count."""
    measured = [measure_row_bytes(make_vit(depth=depth).requires_grad_(False), tiny_images) for depth in (1, 2, 3)]
    assert measured[2] - measured[1] == measured[1] - measured[0] > 0
    with pytest.raises(vitprune.VitpruneError, match="memory must be positive, got 0"):
        budget_bytes(0, torch.device("cpu"))


def test_no_images_are_refused(tiny_vit):
    with pytest.raises(vitprune.VitpruneError, match="no images to discover"):
        discover(tiny_vit, [])


def test_a_class_token_that_is_not_there_is_refused(tiny_images):
    model = make_vit("vit_base_patch16_siglip_224")
    with pytest.raises(vitprune.VitpruneError, match="has no class token; use `tokens` patch"):
        discover(model, [(tiny_images, LABELS)], tokens="cls")
    assert discover(model, [(tiny_images, LABELS)]).tokens == "patch"


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "cait_xxs24_224", "xcit_nano_12_p16_224"])
def test_models_without_an_isotropic_trunk_are_refused(name):
    model = build(name)
    with pytest.raises(vitprune.VitpruneError, match="has no isotropic trunk"):
        discover(model, [(example(model, 1), LABELS[:1])])


def test_a_run_folder_reads_back_as_it_was_written(tiny_vit, image_folder, tmp_path):
    images = vitprune.find_images(image_folder, 5)
    batches = vitprune.ImageBatches(images, tiny_vit, batch_size=7)
    found = discover(tiny_vit, batches, method="jas-complete", top_k=2)
    run = Run(
        found, images, "somewhere", "/weights.pth", "abc", None, digest_images(hash_images(images)), {"mean": [0.5]}
    )
    save_run(run, tmp_path / "run")
    again = load_run(tmp_path / "run")
    for name in ("neurons", "joint_scores", "labels", "predictions", "completeness_errors"):
        assert torch.equal(getattr(again.found, name), getattr(found, name))
    assert all(torch.equal(again.found.class_scores[name], found.class_scores[name]) for name in found.layers)
    assert (again.images, again.model, again.checkpoint) == (images, "somewhere", "/weights.pth")
    assert (again.images_sha256, again.model_transform) == (run.images_sha256, {"mean": [0.5]})
    save_run(again, tmp_path / "again")
    for file in sorted((tmp_path / "run").iterdir()):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_a_run_of_an_earlier_version_still_loads(tiny_vit, image_folder, tmp_path):
    images = vitprune.find_images(image_folder, 5)
    found = discover(tiny_vit, vitprune.ImageBatches(images, tiny_vit, batch_size=7))
    save_run(Run(found, images, "somewhere", None, "abc", None, "def", {}), tmp_path / "run")
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    del facts["images_sha256"], facts["model_transform"], facts["content_sha256"]
    (tmp_path / "run" / "run.json").write_text(json.dumps(facts))
    again = load_run(tmp_path / "run")
    assert (again.images_sha256, again.model_transform) == (None, None)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(vitprune.VitpruneError, match="is no run of a discovery: it has no run.json"):
        load_run(tmp_path)


@pytest.mark.parametrize(
    ("factor", "quantity", "told"), [(1, "probability", 0), (1e3, "probability", 1), (1e3, "logit", 0)]
)
def test_a_model_that_is_sure_of_itself_gets_a_hint(factor, quantity, told, tmp_path):
    model = make_vit()
    with torch.no_grad():
        model.head.weight.mul_(factor)
    images = vitprune.find_images(photos(tmp_path / "photos", ["a", "b"], count=3), None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        discover_run(model, images, tmp_path / "run", source="x", method="activation", quantity=quantity)
    hints = [str(each.message) for each in caught if "`quantity` logit" in str(each.message)]
    assert len(hints) == told
    assert all(hint.startswith("6 of 6 images") for hint in hints)
