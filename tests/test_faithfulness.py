"""Curves of what the best nodes carry, against models with edited weights and hooks of the test's own."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from conftest import make_vit

import vitprune
from vitprune.analysis.ablation import measure_means
from vitprune.analysis.faithfulness import (
    SHARES,
    measure_faithfulness,
    rank_alike,
    rank_by_class,
    rank_by_image,
)
from vitprune.cli import main
from vitprune.discovery.discover import discover
from vitprune.models.path_layers import find_path_layers, record_hidden
from vitprune.options import ABLATIONS

LABELS = torch.tensor([0, 3, 1])
BOTH = ("ffn", "attention")


@pytest.fixture
def batches(tiny_images):
    return [(tiny_images[:2], LABELS[:2]), (tiny_images[2:], LABELS[2:])]


def ranks(model, nodes=("ffn",), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {layer.name: torch.randn(layer.num_units, generator=generator) for layer in find_path_layers(model, nodes)}


def best(score_H, share):
    return sorted(range(len(score_H)), key=lambda node: -float(score_H[node]))[: max(1, round(share * len(score_H)))]


def with_columns(model, nodes, scores, share, factor, *, of_best):
    """Return a copy whose output projections read some of the nodes times a factor."""
    edited = copy.deepcopy(model)
    with torch.no_grad():
        for layer in find_path_layers(model, nodes):
            weight = edited.get_submodule(layer.read_by).weight
            chosen = best(scores[layer.name], share)
            others = [node for node in range(layer.num_units) if node not in chosen]
            weight[:, chosen if of_best else others] *= factor
    return edited


@pytest.mark.parametrize("nodes", [("ffn",), BOTH], ids=["ffn", "both"])
@pytest.mark.parametrize(("ablation", "factor"), [("zero", 0.0), ("double", 2.0)])
def test_at_all_tokens_it_is_what_edited_weights_answer(nodes, ablation, factor, tiny_vit, tiny_images, batches):
    scores = ranks(tiny_vit, nodes)
    (row,) = measure_faithfulness(
        tiny_vit,
        batches,
        {("drawn", "all"): rank_alike(scores)},
        nodes=nodes,
        tokens=["all"],
        ablations=[ablation],
        shares=[0.1, 0.5],
    )
    assert row.shares == (0.0, 0.1, 0.5, 1.0)
    for place, share in ((1, 0.1), (2, 0.5)):
        for curve, of_best in ((row.kept, False), (row.removed, True)):
            edited = with_columns(tiny_vit, nodes, scores, share, factor, of_best=of_best)
            expected = edited(tiny_images).softmax(-1).gather(1, LABELS.unsqueeze(1)).mean().item()
            assert curve[place] == pytest.approx(expected, rel=1e-5)
    clean = tiny_vit(tiny_images).softmax(-1).gather(1, LABELS.unsqueeze(1)).mean().item()
    assert row.kept[-1] == row.removed[0] == pytest.approx(clean, rel=1e-5)
    assert row.kept[0] == row.removed[-1]


@pytest.mark.parametrize("scope", ["cls", "patch", "all"])
def test_what_is_ablated_to_its_own_value_changes_nothing(scope, tiny_vit, tiny_images):
    """All kinds that take other images' values, where the other image is the same one."""
    one = [(tiny_images[:1], LABELS[:1])]
    rows = measure_faithfulness(
        tiny_vit,
        one,
        {("drawn", "all"): rank_alike(ranks(tiny_vit, BOTH))},
        nodes=BOTH,
        tokens=[scope],
        ablations=["mean", "class-mean", "resample"],
        shares=[0.2],
        classes=[0],
        reference=one,
        donors=one,
    )
    clean = tiny_vit(tiny_images[:1]).softmax(-1)[0, 0].item()
    assert [row.ablation for row in rows] == ["mean", "class-mean", "resample"]
    for row in rows:
        assert row.kept == pytest.approx([clean] * 3, rel=1e-5)
        assert row.removed == pytest.approx([clean] * 3, rel=1e-5)
        assert row.faithfulness.mean == pytest.approx(1, rel=1e-5)
        assert row.completeness.mean == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("ablation", ["mean", "class-mean", "resample"])
def test_values_of_other_images_are_those_of_hooks(ablation, tiny_vit, tiny_images, batches):
    """By hand: hidden vectors of a clean pass, averaged or handed on in loops, written in at the class token."""
    others = torch.randn(4, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    other_labels = torch.tensor([0, 1, 3, 0])
    donated = others[torch.tensor([2, 0, 3])]
    scores, share = ranks(tiny_vit), 0.25
    (row,) = measure_faithfulness(
        tiny_vit,
        batches,
        {("drawn", "all"): rank_alike(scores)},
        ablations=[ablation],
        shares=[share],
        classes=[0, 1, 3],
        reference=[(others[:3], other_labels[:3]), (others[3:], other_labels[3:])],
        donors=[(donated[:2], LABELS[:2]), (donated[2:], LABELS[2:])],
    )
    clean = {}
    for number in range(4):
        handles = [
            block.mlp.fc2.register_forward_pre_hook(
                lambda _module, inputs, key=(number, place): clean.update({key: inputs[0][0, 0]})
            )
            for place, block in enumerate(tiny_vit.blocks)
        ]
        tiny_vit(others[number : number + 1])
        for handle in handles:
            handle.remove()
    kept = []
    for image in range(3):
        from_images = {
            "mean": [0, 1, 2, 3],
            "class-mean": [n for n in range(4) if other_labels[n] == LABELS[image]],
            "resample": [[2], [0], [3]][image],
        }[ablation]
        handles = []
        for place, block in enumerate(tiny_vit.blocks):
            value_H = torch.stack([clean[number, place] for number in from_images]).mean(0)
            chosen = best(scores[f"blocks.{place}.mlp"], share)

            def write(_module, inputs, value_H=value_H, chosen=chosen):
                h_1NH = inputs[0].clone()
                own = h_1NH[0, 0, chosen].clone()
                h_1NH[0, 0] = value_H
                h_1NH[0, 0, chosen] = own
                return (h_1NH,)

            handles.append(block.mlp.fc2.register_forward_pre_hook(write))
        kept.append(tiny_vit(tiny_images[image : image + 1]).softmax(-1)[0, LABELS[image]].item())
        for handle in handles:
            handle.remove()
    assert row.kept[1] == pytest.approx(sum(kept) / 3, rel=1e-5)


def test_areas_are_those_of_trapezoids_by_class(tiny_vit, tiny_images, batches):
    rankings = {("a", "class"): rank_alike(ranks(tiny_vit)), ("b", "class"): rank_alike(ranks(tiny_vit, seed=1))}
    first, second = measure_faithfulness(tiny_vit, batches, rankings, shares=[0.5])
    areas = []
    for row, ranking in ((first, rankings["a", "class"]), (second, rankings["b", "class"])):
        of_class = []
        for image in range(3):
            one = [(tiny_images[image : image + 1], LABELS[image : image + 1])]
            (alone,) = measure_faithfulness(tiny_vit, one, {("a", "class"): ranking}, shares=[0.5])
            of_class.append(0.25 * (alone.kept[0] + alone.kept[1]) + 0.25 * (alone.kept[1] + alone.kept[2]))
        areas.append([area / row.kept[-1] for area in of_class])
        assert row.faithfulness.mean == pytest.approx(sum(areas[-1]) / 3, rel=1e-5)
    assert first.faithfulness_advantage is None
    differences = [a - b for a, b in zip(*areas, strict=True)]
    assert second.faithfulness_advantage.mean == pytest.approx(sum(differences) / 3, rel=1e-4)
    assert second.faithfulness_advantage.low < second.faithfulness_advantage.mean < second.faithfulness_advantage.high


def test_batches_do_not_matter(tiny_vit, tiny_images, batches):
    asked = {"ablations": ["mean"], "reference": batches, "shares": [0.1, 0.3]}
    rankings = {("drawn", "all"): rank_alike(ranks(tiny_vit))}
    (one,) = measure_faithfulness(tiny_vit, batches, rankings, **asked)
    (other,) = measure_faithfulness(tiny_vit, [(tiny_images, LABELS)], rankings, **asked)
    assert one.kept == pytest.approx(other.kept, rel=1e-5)
    assert one.removed == pytest.approx(other.removed, rel=1e-5)


@pytest.mark.parametrize("nodes", [("ffn",), BOTH], ids=["ffn", "both"])
def test_an_image_alone_in_its_class_is_ranked_alike_by_both(nodes, tiny_vit, batches):
    found = discover(tiny_vit, batches, nodes=nodes)
    rankings = {("jas", "class"): rank_by_class(found), ("jas", "image"): rank_by_image(tiny_vit, found)}
    by_class, by_image = measure_faithfulness(tiny_vit, batches, rankings, nodes=nodes, shares=SHARES)
    assert by_class.kept == pytest.approx(by_image.kept, rel=1e-5)
    assert by_class.faithfulness_advantage is None
    assert by_image.faithfulness_advantage is None


def test_one_ranking_for_all_is_compared_with_the_first(tiny_vit, batches):
    found = discover(tiny_vit, batches)
    rankings = {("jas", "class"): rank_by_class(found), ("drawn", "all"): rank_alike(ranks(tiny_vit))}
    _first, second = measure_faithfulness(tiny_vit, batches, rankings, shares=[0.1])
    assert second.faithfulness_advantage is not None


def test_the_best_neurons_of_a_model_that_has_two_are_found(batches):
    """All that is not zero is in two neurons of each FFN: keeping these keeps the answer, and nothing else does."""
    model = make_vit()
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.fc2.weight[:, 2:] = 0
    scores = {f"blocks.{block}.mlp": torch.arange(48, 0, -1.0) for block in range(3)}
    rankings = {("right", "all"): rank_alike(scores)}
    (row,) = measure_faithfulness(model, batches, rankings, tokens=["all"], shares=[0.02, 0.04, 0.5])
    assert row.kept[2] == pytest.approx(row.kept[-1], rel=1e-6)  # 2 of 48
    assert row.removed[2] == pytest.approx(row.removed[-1], rel=1e-6)
    assert row.kept[1] != pytest.approx(row.kept[-1], rel=1e-6)  # 1 of 48


def test_means_are_those_of_images(tiny_vit, tiny_images):
    layers = find_path_layers(tiny_vit, BOTH)
    labels = torch.tensor([3, 1, 3])
    split = [(tiny_images[:1], labels[:1]), (tiny_images[1:], labels[1:])]
    means = measure_means(tiny_vit, layers, split, tokens=slice(1, None), classes=[1, 3])
    hidden = record_hidden(tiny_vit, layers, tiny_images, tokens=slice(1, None))
    for layer in layers:
        torch.testing.assert_close(means.of_all[layer.name], hidden[layer.name].mean(0))
        torch.testing.assert_close(means.of_class[layer.name][1], hidden[layer.name][[0, 2]].mean(0))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"ablations": ["noise"]}, f"ablation must be one of {', '.join(ABLATIONS)}, got 'noise'"),
        ({"ablations": ["mean"]}, "ablation mean needs the means of images; pass `reference`"),
        ({"ablations": ["resample"]}, "ablation resample needs other images; pass `donors`"),
        ({"shares": [0.5, 0.1]}, r"shares must be in \(0, 1\) and ascending"),
        ({"shares": [1.0]}, r"shares must be in \(0, 1\) and ascending"),
        ({"rankings": {}}, "no rankings to compare"),
        ({"batches": []}, "no images to ablate nodes on"),
        ({"tokens": ["word"]}, "tokens must be one of"),
    ],
)
def test_refuses(changed, message, tiny_vit, batches):
    asked = {"batches": batches, "rankings": {("drawn", "all"): rank_alike(ranks(tiny_vit))}, **changed}
    with pytest.raises(vitprune.VitpruneError, match=message):
        measure_faithfulness(tiny_vit, **asked)


def test_refuses_donors_that_are_not_one_for_each(tiny_vit, batches):
    with pytest.raises(vitprune.VitpruneError, match="as many images in each batch"):
        measure_faithfulness(
            tiny_vit,
            batches,
            {("drawn", "all"): rank_alike(ranks(tiny_vit))},
            ablations=["resample"],
            donors=batches[:1],
        )


def test_refuses_images_of_classes_without_scores(tiny_vit, tiny_images, batches):
    found = discover(tiny_vit, [(tiny_images[:1], LABELS[:1])])
    with pytest.raises(vitprune.VitpruneError, match="class 3 has images but no scores in the run"):
        measure_faithfulness(tiny_vit, batches, {("jas", "class"): rank_by_class(found)})
    with pytest.raises(vitprune.VitpruneError, match="class 3 has no image to average"):
        measure_means(tiny_vit, find_path_layers(tiny_vit), batches[1:], tokens=slice(None), classes=[1, 3])


def test_finished_passes_are_taken_over(tiny_vit, batches, tmp_path):
    rankings = {("drawn", "all"): rank_alike(ranks(tiny_vit))}
    first = measure_faithfulness(tiny_vit, batches, rankings, shares=[0.1], folder=tmp_path)

    def broken(_images, _labels):
        raise AssertionError("ranked again")

    again = measure_faithfulness(tiny_vit, batches, {("drawn", "all"): broken}, shares=[0.1], folder=tmp_path)
    assert again == first


def test_from_the_command_line_to_the_page(saved_vit, image_folder, other_folder, tmp_path, capsys):
    runs = []
    for method in ("jas", "activation"):
        runs.append(str(tmp_path / method))
        arguments = ["--data", str(image_folder), "--tokens", "cls", "--method", method, "-o", runs[-1]]
        assert main(["discover", str(saved_vit), *arguments]) == 0
    folder = tmp_path / "analysis"
    asked = ["--experiments", "faithfulness", "--data", str(other_folder), "--rank-by", "class", "image"]
    asked += ["--ablations", "zero", "resample", "--criteria", "variance", "-o", str(folder)]
    capsys.readouterr()
    assert main(["analyze", *runs, *asked, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["faithfulness"]
    named = [(row["tokens"], row["ablation"], row["method"], row["ranked"]) for row in rows]
    rankings = [("jas", "class"), ("activation", "class"), ("jas", "image"), ("activation", "image")]
    rankings.append(("variance", "all"))
    assert named == [
        (tokens, ablation, *each) for tokens in ("cls", "all") for ablation in ("zero", "resample") for each in rankings
    ]
    assert (folder / "figures" / "faithfulness.svg").is_file()
    passes = {path: path.stat().st_mtime_ns for path in (folder / "passes").iterdir()}
    assert len(passes) == 2 * 2 * (len(rankings) + 1)
    assert main(["analyze", *runs, *asked]) == 0
    assert "faithfulness, ablated at all, resample" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (folder / "passes").iterdir()} == passes
    page = tmp_path / "page.html"
    assert main(["report", str(folder), "-o", str(page)]) == 0
    assert "Only the best neurons kept" in page.read_text()
    for arguments, message in (
        (["--experiments", "faithfulness"], "tests on images other than the run's"),
        (["--ablations", "mean"], "for the experiment faithfulness"),
    ):
        assert main(["analyze", *runs, *arguments]) == 2
        assert message in capsys.readouterr().err
