"""Edges between the nodes of a path, against finite differences and cuts by hand."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import make_vit

import vitprune
from vitprune.analysis.edges import measure_edges
from vitprune.cli import main
from vitprune.discovery.discover import class_paths, discover

BOTH = ("ffn", "attention")
LABELS = torch.tensor([0, 3, 1])


def blocks_of(model, layer):
    block = model.blocks[int(layer.split(".")[1])]
    return block, (block.attn.proj if layer.endswith("attn") else block.mlp.fc2)


def answer(model, image, label, *, start, end, share, tokens):
    """Return F with the share of one edge that is cut, by hooks of the test's own and no gradient."""
    (from_layer, from_node), (to_layer, to_node) = start, end
    kept = {}
    to_block, to_reader = blocks_of(model, to_layer)
    from_block, from_reader = blocks_of(model, from_layer)
    is_attention = to_layer.endswith("attn")
    norm = to_block.norm1 if is_attention else to_block.norm2

    def hook(name):
        return lambda _module, inputs: kept.update({name: inputs[0].clone()})

    handles = [from_reader.register_forward_pre_hook(hook("from")), norm.register_forward_pre_hook(hook("stream"))]
    model(image)
    for handle in handles:
        handle.remove()
    scale = 1.0
    for name in ("ls1",) if from_layer.endswith("attn") else ("ls2",):
        scale = getattr(getattr(from_block, name, None), "gamma", 1.0)
    stream = kept["stream"]
    added = kept["from"][0, tokens, from_node].unsqueeze(1) * (scale * from_reader.weight[:, from_node])
    stream[0, tokens] -= share * added
    handle = to_reader.register_forward_pre_hook(hook("to"))
    # Its own answer goes nowhere: only what its output projection reads is kept.
    to_block.attn(to_block.norm1(stream)) if is_attention else to_block.mlp(to_block.norm2(stream))
    handle.remove()
    changed = kept["to"][0, tokens, to_node]

    def write(_module, inputs):
        h = inputs[0].clone()
        h[0, tokens, to_node] = changed
        return (h,)

    handle = to_reader.register_forward_pre_hook(write)
    value = model(image).softmax(-1)[0, label].item()
    handle.remove()
    return value


@pytest.mark.parametrize("nodes", [("ffn",), BOTH, ("attention",)], ids=["ffn", "both", "attention"])
@pytest.mark.parametrize(("scope", "tokens"), [("cls", slice(0, 1)), ("all", slice(None))])
@pytest.mark.parametrize("trunk", ["vit_tiny_patch16_224", "deit3_small_patch16_224"])
@torch.no_grad()
def test_an_edge_is_the_derivative_along_its_cut(nodes, scope, tokens, trunk, tiny_images):
    model = make_vit(trunk)
    found = discover(model, [(tiny_images, LABELS)], nodes=nodes, tokens=scope, top_k=2, method="activation")
    edges = measure_edges(model, [(tiny_images, LABELS)], found, num_exact=0)
    for image, label in enumerate(LABELS.tolist()):
        named, scores = edges.nodes[label], edges.scores[label]
        assert named == tuple(
            (name, int(node)) for name, of in zip(found.layers, class_paths(found)[label], strict=True) for node in of
        )
        for start in range(len(named)):
            for end in range(len(named)):
                if end // 2 <= start // 2:
                    assert scores[start, end] == 0
                    continue
                if (start + end + image) % 4:
                    continue  # a quarter of them is enough
                step = 1e-5
                low, high = (
                    answer(
                        model,
                        tiny_images[image : image + 1],
                        label,
                        start=named[start],
                        end=named[end],
                        share=share,
                        tokens=tokens,
                    )
                    for share in (step, -step)
                )
                assert scores[start, end].item() == pytest.approx((high - low) / (2 * step), rel=1e-4, abs=1e-9)


@torch.no_grad()
def test_what_is_cut_is_what_the_answer_loses(tiny_vit, tiny_images, monkeypatch):
    found = discover(tiny_vit, [(tiny_images, LABELS)], nodes=BOTH)
    drawn = [(0, 0, 3), (1, 2, 5), (2, 1, 2)]
    monkeypatch.setattr("vitprune.analysis.edges._draw", lambda *_args: drawn)
    seen = []

    def correlate(estimated, exact):
        seen.extend(exact)
        return type("Found", (), {"statistic": 0.5})

    monkeypatch.setattr("vitprune.analysis.edges.spearmanr", correlate)
    edges = measure_edges(tiny_vit, [(tiny_images, LABELS)], found)
    assert (edges.num_exact, edges.agreement) == (3, 0.5)
    for (image, start, end), exact in zip(drawn, seen, strict=True):
        label, one = int(LABELS[image]), tiny_images[image : image + 1]
        ends = {"start": edges.nodes[label][start], "end": edges.nodes[label][end], "tokens": slice(0, 1)}
        clean = tiny_vit(one).softmax(-1)[0, label].item()
        assert exact == pytest.approx(clean - answer(tiny_vit, one, label, share=1.0, **ends), rel=1e-6, abs=1e-12)


def test_estimates_agree_with_cuts(tiny_vit):
    images = torch.randn(12, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    labels = torch.arange(12) % 4
    batches = [(images, labels)]
    found = discover(tiny_vit, batches, nodes=BOTH)
    edges = measure_edges(tiny_vit, batches, found, num_exact=60)
    assert edges.agreement > 0.5
    again = measure_edges(tiny_vit, batches, found, num_exact=60)
    assert again.agreement == edges.agreement


def test_edges_of_a_class_are_means_over_its_images(tiny_vit, tiny_images):
    labels = torch.tensor([3, 1, 3])
    found = discover(tiny_vit, [(tiny_images, labels)])
    whole = measure_edges(tiny_vit, [(tiny_images[:2], labels[:2]), (tiny_images[2:], labels[2:])], found, num_exact=0)
    parts = [
        measure_edges(tiny_vit, [(tiny_images[i : i + 1], labels[i : i + 1])], found, num_exact=0).scores[3]
        for i in (0, 2)
    ]
    torch.testing.assert_close(whole.scores[3], (parts[0] + parts[1]) / 2)
    assert list(whole.scores) == [1, 3]


def test_refuses_what_has_no_path(tiny_vit, tiny_images):
    found = discover(tiny_vit, [(tiny_images[:1], LABELS[:1])])
    with pytest.raises(vitprune.VitpruneError, match="class 3 has images but no path"):
        measure_edges(tiny_vit, [(tiny_images, LABELS)], found)
    with pytest.raises(vitprune.VitpruneError, match="no images to measure edges on"):
        measure_edges(tiny_vit, [], found)


def test_from_the_command_line_to_the_page(saved_vit, image_folder, tmp_path, capsys):
    run, folder, page = tmp_path / "run", tmp_path / "analysis", tmp_path / "page.html"
    arguments = ["--data", str(image_folder), "--tokens", "cls", "--nodes", *BOTH, "-o", str(run)]
    assert main(["discover", str(saved_vit), *arguments]) == 0
    capsys.readouterr()
    assert main(["analyze", str(run), "--experiments", "edges", "-o", str(folder), "--json"]) == 0
    edges = json.loads(capsys.readouterr().out)["edges"]
    assert len(edges["layers"]) == len(edges["strength"]) == 6
    assert edges["num_exact"] > 0
    first = next(iter(edges["strongest"].values()))
    assert [abs(edge["score"]) for edge in first] == sorted((abs(edge["score"]) for edge in first), reverse=True)
    assert first[0]["score"] == pytest.approx(
        max((value for row in next(iter(edges["scores"].values())) for value in row), key=abs)
    )
    assert (folder / "figures" / "edges.svg").is_file()
    assert main(["report", str(folder), "-o", str(page)]) == 0
    assert "Which layers of a path feed which" in page.read_text()
