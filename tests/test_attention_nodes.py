"""Paths through attention as well as through FFNs, from the verb to the page; the engine is tested in test_engine."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from conftest import make_vit

import vitprune
from vitprune.analysis.interventions import measure_intervention
from vitprune.cli import main
from vitprune.discovery.discover import class_paths, discover, only_ffns
from vitprune.discovery.heads import class_heads, head_scores, node_names
from vitprune.discovery.run import load_run
from vitprune.models.path_layers import find_path_layers
from vitprune.models.trunk import check_trunk

LABELS = torch.tensor([3, 1, 3])
BOTH = ("ffn", "attention")


@pytest.fixture
def found(tiny_vit, tiny_images):
    return discover(tiny_vit, [(tiny_images, LABELS)], top_k=2, nodes=BOTH)


def test_a_path_has_two_stations_in_every_block(found, tiny_vit):
    assert found.layers[:4] == ("blocks.0.attn", "blocks.0.mlp", "blocks.1.attn", "blocks.1.mlp")
    assert found.neurons.shape == (3, 6, 2)
    assert found.nodes == BOTH
    num_heads, width = tiny_vit.blocks[0].attn.num_heads, tiny_vit.embed_dim
    assert found.heads == {f"blocks.{block}.attn": num_heads for block in range(3)}
    assert {name: scores.shape[1] for name, scores in found.class_scores.items()} == {
        f"blocks.{block}.{kind}": size for block in range(3) for kind, size in (("attn", width), ("mlp", 48))
    }


def test_the_order_of_the_kinds_asked_for_does_not_matter(found, tiny_vit, tiny_images):
    again = discover(tiny_vit, [(tiny_images, LABELS)], top_k=2, nodes=BOTH[::-1])
    assert torch.equal(again.neurons, found.neurons)


@pytest.mark.parametrize("method", ["activation", "influence-pattern", "knowledge-neurons", "random", "jas-complete"])
def test_every_method_knows_both_kinds(method, tiny_vit, tiny_images):
    both = discover(tiny_vit, [(tiny_images, LABELS)], method=method, nodes=BOTH)
    assert both.neurons.shape == (3, 6, 1)
    if method in ("activation", "influence-pattern", "knowledge-neurons"):  # which look at each layer by itself
        alone = discover(tiny_vit, [(tiny_images, LABELS)], method=method)
        assert torch.equal(only_ffns(both).neurons, alone.neurons)


def test_batches_are_joined_in_order(found, tiny_vit, tiny_images):
    batches = [(tiny_images[:1], LABELS[:1]), (tiny_images[1:], LABELS[1:])]
    parts = discover(tiny_vit, batches, top_k=2, nodes=BOTH)
    assert torch.equal(parts.neurons, found.neurons)
    for name, scores in found.class_scores.items():
        torch.testing.assert_close(parts.class_scores[name], scores)


def test_a_head_has_the_sum_of_the_scores_of_its_dimensions(found):
    scores = head_scores(found)
    for name, heads in found.heads.items():
        of_dimensions = found.class_scores[name]
        width = of_dimensions.shape[1] // heads
        for head in range(heads):
            own = of_dimensions[:, head * width : (head + 1) * width]
            torch.testing.assert_close(scores[name][:, head], own.sum(1))
    best, least = class_heads(found), class_heads(found, highest=False)
    for row, index in enumerate(found.classes):
        for place, name in enumerate(found.heads):
            width = found.class_scores[name].shape[1] // found.heads[name]
            assert best[index][place].tolist() == [
                int(scores[name][row].argmax()) * width + each for each in range(width)
            ]
            assert least[index][place][0] == int(scores[name][row].argmin()) * width


def test_a_head_is_removed_and_doubled_as_its_columns_are(tiny_vit, tiny_images):
    layers = find_path_layers(tiny_vit, ["attention"])
    width = tiny_vit.embed_dim // tiny_vit.blocks[0].attn.num_heads
    nodes_LK = torch.stack([torch.arange(width, 2 * width)] * len(layers))
    for factor in (0.0, 2.0):
        scaled = copy.deepcopy(tiny_vit)
        with torch.no_grad():
            for block in scaled.blocks:
                block.attn.proj.weight[:, width : 2 * width] *= factor
        got = measure_intervention(
            tiny_vit, layers, tiny_images, nodes_LK.expand(3, -1, -1), factor=factor, tokens=slice(None)
        )
        torch.testing.assert_close(got, scaled(tiny_images).softmax(-1))


def test_nodes_are_written_by_head(found):
    written = node_names(found)
    width = found.class_scores["blocks.0.attn"].shape[1] // found.heads["blocks.0.attn"]
    assert written("blocks.0.attn", width + 1) == "h1.1"
    assert written("blocks.0.mlp", 7) == "7"


def test_pruning_sees_the_neurons_alone(found, tiny_vit, tiny_images):
    _model, plan = vitprune.prune(tiny_vit, criterion="jas", found=found, compensate="none", ratio=0.5)
    _model, of_ffns = vitprune.prune(tiny_vit, criterion="jas", found=only_ffns(found), compensate="none", ratio=0.5)
    assert set(plan.keep) == {f"blocks.{block}.mlp" for block in range(3)}
    assert all(torch.equal(plan.keep[name], of_ffns.keep[name]) for name in plan.keep)
    kept = vitprune.plan_paths(tiny_vit, found, 3).keep
    expected = {int(neuron) for path in class_paths(found, 3).values() for neuron in path[1]}
    assert kept["blocks.0.mlp"].nonzero().flatten().tolist() == sorted(expected)
    attention = discover(tiny_vit, [(tiny_images, LABELS)], nodes=["attention"])
    for refused in (
        lambda: vitprune.prune(tiny_vit, criterion="jas", found=attention, compensate="none"),
        lambda: vitprune.plan_paths(tiny_vit, attention, 3),
    ):
        with pytest.raises(vitprune.VitpruneError, match="go through attention alone"):
            refused()


@pytest.mark.parametrize(
    ("nodes", "message"),
    [((), "`nodes` must be some of ffn, attention"), (("head",), "nodes must be one of ffn, attention, got 'head'")],
)
def test_refuses_unknown_kinds(nodes, message, tiny_vit, tiny_images):
    with pytest.raises(vitprune.VitpruneError, match=message):
        discover(tiny_vit, [(tiny_images, LABELS)], nodes=nodes)


def test_refuses_more_nodes_than_a_layer_has(tiny_vit, tiny_images):
    width = tiny_vit.embed_dim
    with pytest.raises(vitprune.VitpruneError, match=rf"in \[1, {width}\] \(blocks.0.attn has that many dimensions\)"):
        discover(tiny_vit, [(tiny_images, LABELS)], nodes=BOTH, top_k=width + 1)


def test_refuses_attention_that_was_taken_out(tiny_vit, tiny_images):
    batches = [(tiny_images, LABELS)]
    layers = [group.name for group in vitprune.find_groups(tiny_vit, ["layers"])]
    keep = {name: torch.tensor([name != "blocks.1.attn.layers"]) for name in layers}
    left = vitprune.remove_neurons(tiny_vit, vitprune.Plan(keep, kinds=dict.fromkeys(layers, "layers")))
    with pytest.raises(vitprune.VitpruneError, match=r"blocks\.1\.attn was taken out"):
        discover(left, batches, nodes=BOTH)


def test_refuses_attention_that_goes_on_behind_its_projection(tiny_images):
    model = make_vit(global_pool="avg")
    model.blocks[1].attn.proj_drop = torch.nn.Tanh()
    check_trunk(model, find_path_layers(model), tiny_images)
    with pytest.raises(vitprune.VitpruneError, match="Attention does not end with its output projection"):
        check_trunk(model, find_path_layers(model, BOTH), tiny_images)


def test_heads_of_a_run_without_attention_are_refused(tiny_vit, tiny_images):
    with pytest.raises(vitprune.VitpruneError, match="go through no attention; discover with `nodes`"):
        head_scores(discover(tiny_vit, [(tiny_images, LABELS)]))


def test_from_the_command_line_to_the_page(saved_vit, image_folder, tmp_path, capsys):
    run, plain = tmp_path / "both", tmp_path / "plain"
    arguments = ["discover", str(saved_vit), "--data", str(image_folder), "--tokens", "cls"]
    assert main([*arguments, "--nodes", "ffn", "attention", "-o", str(run)]) == 0
    assert "node by layer (attention: head.dimension)" in capsys.readouterr().out
    assert main([*arguments, "-o", str(plain), "--json"]) == 0
    assert "class_heads" not in json.loads(capsys.readouterr().out)
    loaded = load_run(run).found
    assert (loaded.nodes, len(loaded.layers), len(loaded.heads)) == (BOTH, 6, 3)
    analysis = tmp_path / "analysis"
    assert main(["analyze", str(run), str(plain), "-o", str(analysis), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    rows = {(row["paths"], row["factor"]): row for row in answer["heads"]}
    assert set(rows) == {(whose, factor) for whose in ("best heads", "least heads") for factor in (0.0, 2.0)}
    assert {row["method"] for row in answer["manipulation"]} == {"both", "plain"}
    assert (analysis / "figures" / "deviations_best_heads.png").is_file()
    pruned = tmp_path / "pruned"
    assert main(["prune", str(run), "--criterion", "jas", "-o", str(pruned)]) == 0
    page = tmp_path / "page.html"
    assert main(["report", str(run), str(analysis), str(pruned), "-o", str(page)]) == 0
    text = page.read_text()
    assert "3 attentions and 3 FFNs" in text
    assert "the head of its attention and the dimension in it" in text
    assert main(["convert", str(run), "-o", str(tmp_path / "authors")]) == 2
    assert "no place for attention" in capsys.readouterr().err
    assert main(["analyze", str(plain), "--experiments", "heads"]) == 2
    assert "go through no attention" in capsys.readouterr().err


def test_a_killed_search_of_other_nodes_is_not_taken_over(saved_vit, image_folder, tmp_path):
    model = vitprune.load(saved_vit)
    images = vitprune.find_images(image_folder, model.num_classes)
    request = {"source": str(saved_vit), "method": "activation", "tokens": "cls"}
    seen: list[str] = []

    def stop(items, description):
        for number, item in enumerate(items):
            if number == 3:
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt):
        vitprune.discover_run(
            model, images, tmp_path / "run", nodes=BOTH, shard_size=4, batch_size=4, track=stop, **request
        )
    with pytest.raises(vitprune.VitpruneError, match="another request|other"):
        vitprune.discover_run(model, images, tmp_path / "run", shard_size=4, batch_size=4, **request)
    run, progress = vitprune.discover_run(
        model, images, tmp_path / "run", nodes=BOTH, shard_size=4, batch_size=4, note=seen.append, **request
    )
    assert run.found.nodes == BOTH
    assert 0 < progress.num_searched < len(images)
    whole = vitprune.discover(
        model, vitprune.ImageBatches(images, model, batch_size=4), method="activation", tokens="cls", nodes=BOTH
    )
    assert torch.equal(run.found.neurons, whole.neurons)
    assert replace(run.found, seen=whole.seen).heads == whole.heads
