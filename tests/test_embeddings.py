"""Encoders: what their embeddings are worth, how they are compared, and that everything else works for them too."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import timm
import torch
from conftest import TINY, make_vit, photos
from torch import nn

import vitprune
from vitprune import VitpruneError
from vitprune.answer_loss import EMBEDDINGS, answer_loss, cosine_distance, draw_embedding_directions
from vitprune.answers import ask, shape_embeddings
from vitprune.cli import main
from vitprune.discovery.class_means import answer_by_class_means
from vitprune.evaluation.embeddings import NeighbourClassifier, compare_embedded
from vitprune.evaluation.embeddings_folder import load_embeddings
from vitprune.evaluation.evaluation_folder import load_evaluation


def make_batches(count: int = 12, size: int = 32):
    images = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [(each, torch.arange(len(each)) % 3) for each in images.split(4)]


class Signs:
    """Every pattern of signs in turn, in place of random ones."""

    def __init__(self, monkeypatch, shape):
        self.patterns = itertools.product((-1.0, 1.0), repeat=int(np.prod(shape)))
        monkeypatch.setattr("vitprune.answer_loss._draw_signs", self.draw)
        self.shape = shape

    def draw(self, like, _generator):
        return torch.tensor(next(self.patterns), dtype=like.dtype).view(self.shape)


@pytest.mark.parametrize("shape", [(1, 4), (1, 2, 3)], ids=["pooled", "tokens"])
def test_directions_have_the_curvature_of_the_cosine_distance(shape, monkeypatch):
    embedding = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    signs = Signs(monkeypatch, shape)
    drawn = torch.stack([draw_embedding_directions(embedding, signs).flatten() for _ in range(2 ** embedding.numel())])
    second_moment = drawn.T @ drawn / len(drawn)

    def distance(moved):
        return (1 - torch.cosine_similarity(embedding, moved, dim=-1)).mean()

    curvature = torch.autograd.functional.hessian(distance, embedding)
    torch.testing.assert_close(second_moment, curvature.reshape_as(second_moment), rtol=1e-9, atol=1e-9)


def test_a_neuron_that_writes_nothing_goes_first_and_one_that_writes_most_last():
    model = make_vit(num_classes=0)
    down = model.blocks[1].mlp.fc2.weight
    with torch.no_grad():
        down[:, 3] = 0
        down[:, 5] *= 50
    scores = vitprune.score_neurons(model, "obs", batches=make_batches())["blocks.1.mlp"]
    assert int(scores.argmin()) == 3
    assert int(scores.argmax()) == 5


def test_criteria_of_labels_are_refused_for_encoders():
    for criterion in ("taylor", "integrated-gradients"):
        with pytest.raises(VitpruneError, match="needs a classifier.* obs and fisher go by its embeddings"):
            vitprune.score_neurons(make_vit(num_classes=0), criterion, batches=make_batches())


def nearer(model, batches, **options):
    """Return cosine distances to the dense model, of the default and of random neurons without compensation."""
    images = torch.cat([images for images, _labels in batches])
    dense = ask(model, images)
    chosen, _plan = vitprune.prune(model, batches, ratio=0.5, **options)
    random, _plan = vitprune.prune(model, batches, ratio=0.5, criterion="random", compensate="none")
    return [float(cosine_distance(dense, ask(each, images)).mean()) for each in (chosen, random)]


@pytest.mark.parametrize("global_pool", ["token", "avg", ""])
@torch.no_grad()
def test_embeddings_stay_nearer_than_by_chance(global_pool):
    model = make_vit(num_classes=0, global_pool=global_pool)
    ours, by_chance = nearer(model, make_batches())
    assert ours < 0.7 * by_chance


@torch.no_grad()
def test_gradient_descent_brings_embeddings_nearer():
    model, batches = make_vit(num_classes=0), make_batches()
    images = torch.cat([images for images, _labels in batches])
    dense, near = ask(model, images), {}
    for compensate in ("ridge", "distill"):
        pruned, _plan = vitprune.prune(model, batches, ratio=0.5, compensate=compensate)
        near[compensate] = float(cosine_distance(dense, ask(pruned, images)).mean())
    assert near["distill"] < near["ridge"]


@pytest.mark.parametrize(
    ("name", "arguments", "size"),
    [
        ("samvit_base_patch16", {"depth": 2, "embed_dim": 48, "num_heads": 2, "img_size": 64, "global_pool": ""}, 64),
        (
            "swin_tiny_patch4_window7_224",
            {"depths": (1, 1), "embed_dim": 16, "num_heads": (1, 2), "img_size": 56, "global_pool": ""},
            56,
        ),
    ],
    ids=["samvit", "swin"],
)
def test_feature_maps_are_pruned_and_exported(name, arguments, size, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0, **arguments).eval()
    model.model_args = {"num_classes": 0, **arguments}
    batches = [(images.float(), labels) for images, labels in make_batches(size=size)]
    with torch.no_grad():
        answer = model(batches[0][0])
        assert answer.ndim == 4
        assert ask(model, batches[0][0]).shape[-1] == model.num_features
    pruned, _plan = vitprune.prune(model, batches, ratio=0.5, step=1)
    assert sum(group.num_neurons for group in vitprune.find_feed_forwards(pruned)) < 0.51 * sum(
        group.num_neurons for group in vitprune.find_feed_forwards(model)
    )
    parity = vitprune.export_onnx(pruned, tmp_path / "map.onnx", batches[:1])
    assert parity.max_abs_diff < 1e-3
    assert parity.top1_agreement is None
    assert parity.mean_cosine > 0.999999
    assert "cosine" in str(parity)


@pytest.mark.parametrize(
    ("name", "arguments", "size"),
    [
        ("vit_tiny_patch16_224", {"img_size": 32}, 32),
        (
            "swin_tiny_patch4_window7_224",
            {"depths": (1, 1), "embed_dim": 16, "num_heads": (1, 2), "img_size": 56, "out_indices": (0, 1)},
            56,
        ),
    ],
    ids=["vit", "swin"],
)
def test_trunks_of_features_only_are_pruned_saved_and_written(name, arguments, size, tmp_path):
    arguments = {**arguments, "features_only": True}
    torch.manual_seed(0)
    model = timm.create_model(name, **arguments).eval()
    model.model_args = arguments
    batches = [(images.float(), labels) for images, labels in make_batches(size=size)]
    pruned, plan = vitprune.prune(model, batches, ratio=0.5, step=1)
    vitprune.save(pruned, tmp_path / "half", plan=plan)
    loaded = vitprune.load(tmp_path / "half")
    with torch.no_grad():
        for ours, again, dense in zip(pruned(batches[0][0]), loaded(batches[0][0]), model(batches[0][0]), strict=True):
            assert torch.equal(ours, again)
            assert ours.shape == dense.shape
    assert vitprune.export_program(pruned, tmp_path / "half.pt2", batches).mean_cosine > 0.99999
    with pytest.raises(VitpruneError, match=r"feature maps, and such a file has one output here.*out_indices"):
        vitprune.export_onnx(pruned, tmp_path / "half.onnx", batches)
    one = timm.create_model(name, **{**arguments, "out_indices": (1,)}).eval()
    assert vitprune.export_onnx(one, tmp_path / "one.onnx", batches[:1]).mean_cosine > 0.99999


def test_places_of_several_maps_stand_side_by_side():
    answers = [torch.randn(2, 8, 3, 3), torch.randn(2, 5, 4), torch.randn(2, 6)]
    shaped = shape_embeddings(answers)
    assert shaped.shape == (2, 9 + 5 + 1, 8)
    torch.testing.assert_close(shaped[1, 4, :8], answers[0][1, :, 1, 1])
    torch.testing.assert_close(shaped[0, 9, :4], answers[1][0, 0])
    with pytest.raises(VitpruneError, match="neither embeddings"):
        shape_embeddings(torch.zeros(2))
    with pytest.raises(VitpruneError, match="answers a dict"):
        shape_embeddings({"features": torch.zeros(2, 3)})


def test_fidelity_is_what_loops_say():
    first, second = (
        torch.nn.functional.normalize(torch.randn(9, 4, generator=torch.Generator().manual_seed(seed)), dim=1)
        for seed in (0, 1)
    )
    fidelity = compare_embedded(first, second, num_neighbours=3)
    shared = 0
    for image in range(9):
        nearest = []
        for embedded in (first, second):
            others = [other for other in range(9) if other != image]
            others.sort(key=lambda other, embedded=embedded: -float(embedded[image] @ embedded[other]))
            nearest.append(set(others[:3]))
        shared += len(nearest[0] & nearest[1])
    assert fidelity.agreement == pytest.approx(shared / 27)
    assert fidelity.cosines == pytest.approx([float(first[image] @ second[image]) for image in range(9)], abs=1e-6)
    assert fidelity.least_cosine == min(fidelity.cosines)


def test_neighbours_vote_by_their_nearness():
    """The share of a class is the sum of exp(cosine / 0.07) over those of the nearest that are of it."""
    known = [(torch.randn(30, 1, 1, 6, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 4)]
    asked = torch.randn(5, 1, 1, 6, generator=torch.Generator().manual_seed(1))
    classifier = NeighbourClassifier(lambda images: images.flatten(1), known, num_neighbours=7)
    got = classifier(asked)
    unit = nn.functional.normalize(known[0][0].flatten(1), dim=1).double()
    for image, of_image in enumerate(got):
        cosines = unit @ nn.functional.normalize(asked[image].flatten(), dim=0).double()
        votes = torch.zeros(4, dtype=torch.float64)
        for place in cosines.argsort(descending=True)[:7].tolist():
            votes[place % 4] += torch.exp(cosines[place] / 0.07)
        torch.testing.assert_close(of_image.double(), votes / votes.sum(), rtol=1e-4, atol=1e-6)


def test_neighbours_that_cannot_vote_are_refused():
    flatten = lambda images: images.flatten(1)  # noqa: E731
    images = torch.randn(3, 1, 1, 6)
    for labels in (torch.tensor([0, -1, 1]), torch.zeros(3, 2)):
        with pytest.raises(VitpruneError, match="none or several"):
            NeighbourClassifier(flatten, [(images, labels)])
    with pytest.raises(VitpruneError, match="no images of known classes"):
        NeighbourClassifier(flatten, [])
    with pytest.raises(VitpruneError, match="at least 1"):
        NeighbourClassifier(flatten, [(images, torch.zeros(3, dtype=torch.int64))], num_neighbours=0)


@pytest.fixture(scope="module")
def encoder_folders(tmp_path_factory):
    """A dense encoder, its half by other images, and class folders of three colours to know and to ask about."""
    folder = tmp_path_factory.mktemp("encoders")
    model = make_vit(num_classes=0).float()
    model.model_args = {**TINY, "num_classes": 0}
    for name, seed in (("calibration", 0), ("known", 1), ("asked", 2)):
        photos(folder / name, ("amber", "blue", "coral"), count=6, seed=seed)
    vitprune.save(model, folder / "dense")
    return folder


def run(*argv, code=0, capsys):
    assert main([*map(str, argv)]) == code
    told = capsys.readouterr()
    return told.err.strip().splitlines()[-1] if code else json.loads(told.out)


def test_an_encoder_from_the_command_line(encoder_folders, capsys):
    at = encoder_folders
    run("prune", at / "dense", "--data", at / "calibration", "-o", at / "half", "--overwrite", "--json", capsys=capsys)
    asked = ("--data", at / "asked", "--json")
    output = ("-o", at / "near", "--overwrite")
    near = run("evaluate", at / "half", "--against", at / "dense", *asked, *output, capsys=capsys)
    assert near["num_images"] == 18
    assert near["least_cosine"] <= near["tenth_cosine"] <= 1
    assert load_embeddings(at / "near").fidelity.mean_cosine == pytest.approx(near["mean_cosine"])
    run("report", at / "half", at / "near", "-o", at / "report.html", "--overwrite", "--json", capsys=capsys)
    page = (at / "report.html").read_text()
    assert "half against dense: embeddings" in page
    assert f"{near['mean_cosine']:.3f} to those of the other model in the mean" in page
    assert "Images that moved most" in page
    both = ("--against", at / "dense", "--knn", at / "known", "-o", at / "knn", "--overwrite")
    knn = run("evaluate", at / "half", *both, *asked, capsys=capsys)
    assert knn["num_classes"] == 3
    assert knn["embeddings"]["mean_cosine"] == pytest.approx(near["mean_cosine"], abs=1e-6)
    assert set(knn["per_class"]) == {"amber", "blue", "coral"}
    loaded = load_evaluation(at / "knn")
    assert loaded.fidelity.agreement == knn["embeddings"]["agreement"]
    run("export", at / "half", at / "half.onnx", "--data", at / "asked", "--json", capsys=capsys)
    file = run("evaluate", at / "half.onnx", "--against", at / "half", *asked, capsys=capsys)
    assert file["mean_cosine"] > 0.99999


def test_paths_of_an_encoder_explain_the_similarity_to_a_class(encoder_folders, tmp_path, capsys):
    """The joint score of a path through all neurons is the whole of what neurons add to the cosine."""
    model, batches = make_vit(num_classes=0), make_batches()
    found = vitprune.discover(model, batches, quantity="cosine", top_k=2)
    assert found.neurons.shape == (12, 3, 2)
    assert set(found.classes) == {0, 1, 2}
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    unit = nn.functional.normalize(model(images), dim=1)
    means = torch.stack([unit[labels == label].mean(0) for label in range(3)])
    nearest = (unit @ nn.functional.normalize(means, dim=1).T).argmax(1)
    assert torch.equal(found.predictions, nearest)
    slow = answer_by_class_means(model, batches)
    torch.testing.assert_close(slow(images), unit @ nn.functional.normalize(means, dim=1).T)
    chosen = ("--quantity", "cosine", "--batch-size", 4, "-o", tmp_path / "run", "--json")
    told = run("discover", encoder_folders / "dense", "--data", encoder_folders / "known", *chosen, capsys=capsys)
    assert set(told["class_paths"]) == {"amber", "blue", "coral"}
    loaded = vitprune.load_run(tmp_path / "run")
    assert loaded.found.quantity == "cosine"
    pruned, _plan = vitprune.prune(
        loaded.load(), None, found=loaded.found, criterion="jas", compensate="none", ratio=0.5
    )
    assert pruned.num_classes == 0


def test_similarity_to_a_class_is_refused_where_it_means_nothing():
    with pytest.raises(VitpruneError, match="`quantity` cosine attributes"):
        vitprune.discover(make_vit(num_classes=0), make_batches())
    with pytest.raises(VitpruneError, match="this model has 5 classes; use probability or logit"):
        vitprune.discover(make_vit(), make_batches(), quantity="cosine")
    with pytest.raises(VitpruneError, match="tokens or a feature map"):
        vitprune.discover(make_vit(num_classes=0, global_pool=""), make_batches(), quantity="cosine")
    one = [(images, torch.zeros_like(labels)) for images, labels in make_batches()]
    with pytest.raises(VitpruneError, match="at least two"):
        vitprune.discover(make_vit(num_classes=0), one, quantity="cosine")


def test_what_encoders_cannot_do_is_said(encoder_folders, saved_vit, capsys):
    at = encoder_folders
    asked = ("--data", at / "asked")
    assert "--knn" in run("evaluate", at / "dense", *asked, code=2, capsys=capsys)
    line = run("evaluate", at / "dense", "--knn", at / "asked", *asked, code=2, capsys=capsys)
    assert "18 of 18 evaluation images" in line
    line = run("evaluate", saved_vit, "--knn", at / "known", *asked, code=2, capsys=capsys)
    assert "for models without classes" in line
    assert "--knn DIR" in run("evaluate", at / "dense", *asked, "--num-neighbours", 3, code=2, capsys=capsys)
    assert "no such" in run("evaluate", at / "dense", *asked, "--knn", at / "nowhere", code=2, capsys=capsys)


def test_the_answers_of_a_model_say_how_they_are_compared():
    assert answer_loss(make_vit(num_classes=0)) is EMBEDDINGS
    assert answer_loss(make_vit()).unit == "nats"
