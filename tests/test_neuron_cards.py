"""What single nodes do: every number on a card against the same by hand, and cards from the verb to the page."""

from __future__ import annotations

import copy
import io
import json
import urllib.request

import numpy as np
import pytest
import torch
from conftest import make_vit
from PIL import Image
from sklearn.metrics import roc_auc_score

import vitprune
from vitprune.analysis.neuron_cards import FACTORS, choose_nodes, make_cards
from vitprune.cli import main
from vitprune.discovery.discover import class_paths, discover
from vitprune.report.neuron_shots import DARK, GAP, draw_strip
from vitprune.views import data_config

LABELS = torch.tensor([0, 3, 3, 1, 0, 3])
BOTH = ("ffn", "attention")


@pytest.fixture
def images():
    return torch.randn(6, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def batches(images):
    return [(images[:4], LABELS[:4]), (images[4:], LABELS[4:])]


@pytest.fixture
def found(tiny_vit, batches):
    return discover(tiny_vit, batches, nodes=BOTH)


@pytest.fixture
def made(tiny_vit, batches, found):
    return make_cards(tiny_vit, batches, found, num_images=2, class_names={3: "tench"})


def reader_of(model, layer):
    _blocks, block, kind = layer.split(".")
    return model.blocks[int(block)].attn.proj if kind == "attn" else model.blocks[int(block)].mlp.fc2


def hidden_of(model, images, layer):
    """Return what the output projection of a layer reads, [I, N, H], by a hook of the test's own."""
    kept = []
    handle = reader_of(model, layer).register_forward_pre_hook(lambda _module, inputs: kept.append(inputs[0]))
    with torch.no_grad():
        model(images)
    handle.remove()
    return kept[0]


def test_there_is_a_card_for_every_node_on_a_class_path(made, found):
    expected = {
        (name, int(node))
        for path in class_paths(found).values()
        for name, (node,) in zip(found.layers, path, strict=True)
    }
    assert {(card.layer, card.node) for card in made.cards} == expected
    for card in made.cards:
        layer = found.layers.index(card.layer)
        assert card.paths == tuple(
            index for index, path in class_paths(found).items() if path[layer].tolist() == [card.node]
        )


def test_of_too_many_the_nodes_of_most_classes_are_chosen(found):
    counts = {}
    for path in class_paths(found).values():
        for name, (node,) in zip(found.layers, path, strict=True):
            counts[name, int(node)] = counts.get((name, int(node)), 0) + 1
    chosen = [(name, node) for name, nodes in choose_nodes(found, 4).items() for node in nodes]
    assert len(chosen) == 4
    assert min(counts[place] for place in chosen) >= max(
        count for place, count in counts.items() if place not in chosen
    )


def test_activations_and_maps_are_those_of_a_hook(made, tiny_vit, images):
    for place, card in enumerate(made.cards):
        h_INH = hidden_of(tiny_vit, images, card.layer)[..., card.node]
        order = sorted(range(6), key=lambda image: (-float(h_INH[image, 0]), image))[:2]
        assert card.images == tuple(order)
        assert card.activations == pytest.approx([float(h_INH[image, 0]) for image in order], rel=1e-5)
        for rank, image in enumerate(order):
            map_ = made.maps[place, rank]
            torch.testing.assert_close(map_.flatten(), h_INH[image, 1:].float())
            assert map_.shape[0] * map_.shape[1] == h_INH.shape[1] - 1


def test_the_pictures_are_the_images_as_the_model_saw_them(made, tiny_vit, images):
    config = data_config(tiny_vit)
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    card = made.cards[0]
    image = images[card.images[0]].float() * std + mean
    side = made.pictures.shape[2]
    expected = torch.nn.functional.interpolate(image.unsqueeze(0), (side, side), mode="area")[0].clamp(0, 1)
    assert (made.pictures[0, 0].permute(2, 0, 1).float() / 255 - expected).abs().max() < 0.01


def test_selectivity_is_the_area_under_scikit_learns_curve(made, tiny_vit, images):
    for card in made.cards:
        values = hidden_of(tiny_vit, images, card.layer)[:, 0, card.node].numpy()
        means = {index: values[LABELS.numpy() == index].mean() for index in (0, 1, 3)}
        assert card.peak.index == max(means, key=means.get)
        assert card.peak.value == pytest.approx(roc_auc_score(LABELS.numpy() == card.peak.index, values))
        assert card.peak.name == {3: "tench"}.get(card.peak.index, str(card.peak.index))
        assert sum(card.all_counts) == 6
        assert sum(card.peak_counts) == int((card.peak.index == LABELS).sum())
        assert card.bins[0] == pytest.approx(values.min(), rel=1e-5)


def test_a_neuron_points_where_the_logits_go(made, tiny_vit, images):
    """Adding some of its column to the last stream moves the logits along the lens."""
    gamma_D, head_CD = tiny_vit.norm.weight.detach(), tiny_vit.head.weight.detach()
    stream_D = torch.randn(len(gamma_D), dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    for card in made.cards:
        column_D = reader_of(tiny_vit, card.layer).weight[:, card.node].detach()
        # The norm's spread is held fixed, which is what makes a direction of a column.
        spread = stream_D.std(correction=0)

        def normalise(x_D, spread=spread):
            return (x_D - x_D.mean()) / spread * gamma_D

        moved = head_CD @ (normalise(stream_D + 0.1 * column_D) - normalise(stream_D))
        z = (moved - moved.mean()) / moved.std()
        order = z.argsort(descending=True)
        assert [each.index for each in card.towards] == order[:5].tolist()
        assert [each.value for each in card.towards] == pytest.approx(z[order[:5]].tolist(), rel=1e-4)
        assert [each.index for each in card.away] == order.flip(0)[:5].tolist()
        assert card.away[0].value == pytest.approx(float(z.min()), rel=1e-4)


def test_layer_scale_turns_the_direction():
    model = make_vit("deit3_small_patch16_224")
    batches = [(torch.randn(3, 3, 32, 32, dtype=torch.float64), torch.tensor([0, 1, 2]))]
    card = make_cards(model, batches, discover(model, batches, method="activation"), most=1).cards[0]
    block = model.blocks[int(card.layer.split(".")[1])]
    with torch.no_grad():
        column_D = block.ls2.gamma * block.mlp.fc2.weight[:, card.node]
        moved = model.head.weight @ (model.norm.weight * (column_D - column_D.mean()))
    assert card.towards[0].index == int(moved.argmax())


def test_steering_is_what_a_scaled_column_answers_at_all_tokens(tiny_vit, images, batches):
    found = discover(tiny_vit, batches, tokens="all", method="activation", nodes=BOTH)
    for card in make_cards(tiny_vit, batches, found, most=6).cards:
        assert [each.factor for each in card.steering] == list(FACTORS)
        for steering in card.steering:
            scaled = copy.deepcopy(tiny_vit)
            with torch.no_grad():
                reader_of(scaled, card.layer).weight[:, card.node] *= steering.factor
                expected = scaled(images[card.images[0]].unsqueeze(0)).softmax(-1)[0]
            order = expected.argsort(descending=True)
            assert [each.index for each in steering.answers] == order[:5].tolist()
            assert [each.value for each in steering.answers] == pytest.approx(expected[order[:5]].tolist(), rel=1e-4)


def test_steering_at_the_class_token_leaves_the_patches(made, tiny_vit, images):
    card = next(card for card in made.cards if card.layer == "blocks.1.mlp")

    def double(_module, inputs):
        h_1NH = inputs[0].clone()
        h_1NH[:, 0, card.node] *= 2
        return (h_1NH,)

    handle = reader_of(tiny_vit, card.layer).register_forward_pre_hook(double)
    with torch.no_grad():
        expected = tiny_vit(images[card.images[0]].unsqueeze(0)).softmax(-1)[0]
    handle.remove()
    doubled = next(each for each in card.steering if each.factor == 2)
    assert doubled.answers[0].value == pytest.approx(float(expected.max()), rel=1e-5)


def test_batches_do_not_matter(made, tiny_vit, images, found):
    other = make_cards(tiny_vit, [(images, LABELS)], found, num_images=2, class_names={3: "tench"})
    torch.testing.assert_close(other.maps, made.maps)
    assert torch.equal(other.pictures, made.pictures)
    assert [card.images for card in other.cards] == [card.images for card in made.cards]


def test_a_model_without_a_linear_head_points_nowhere():
    model = make_vit()
    model.head = torch.nn.Sequential(torch.nn.Linear(model.embed_dim, 5), torch.nn.Tanh()).double()
    batches = [(torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.tensor([0, 0]))]
    card = make_cards(model, batches, discover(model, batches, method="activation"), most=1).cards[0]
    assert card.towards == card.away == ()
    assert card.peak is None  # one class


@pytest.mark.parametrize(
    ("changed", "message"), [({"most": 0}, "must be at least 1"), ({"batches": []}, "no images to make cards of")]
)
def test_refuses(changed, message, tiny_vit, batches, found):
    with pytest.raises(vitprune.VitpruneError, match=message):
        make_cards(tiny_vit, **{"batches": batches, "found": found, **changed})


def test_a_strip_is_bright_where_the_node_is_active():
    pictures = torch.full((2, 40, 40, 3), 200, dtype=torch.uint8)
    maps = torch.zeros(2, 2, 2)
    maps[1, 1, 1] = 3.0
    strip = draw_strip(pictures, maps)
    assert (strip.width, strip.height) == (80 + GAP, 40)
    with urllib.request.urlopen(strip.uri) as stream:
        pixels = np.asarray(Image.open(io.BytesIO(stream.read()))).astype(float).mean(2)
    assert pixels[:, :38].mean() == pytest.approx(200 * DARK, abs=6)
    assert pixels[34:, 76:].mean() > 180
    assert pixels[:4, 46:52].mean() == pytest.approx(200 * DARK, abs=10)


def test_from_the_command_line_to_the_page(saved_vit, image_folder, tmp_path, capsys):
    run, folder, page = tmp_path / "run", tmp_path / "analysis", tmp_path / "page.html"
    arguments = ["--data", str(image_folder), "--tokens", "cls", "--nodes", *BOTH, "-o", str(run)]
    assert main(["discover", str(saved_vit), *arguments]) == 0
    capsys.readouterr()
    asked = ["analyze", str(run), "--experiments", "cards", "scores", "-o", str(folder)]
    assert main([*asked, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    cards = answer["cards"]["cards"]
    assert {"layer", "node", "towards", "steering", "peak"} <= set(cards[0])
    assert (folder / "cards.safetensors").is_file()
    first = (folder / "analysis.json").read_bytes(), (folder / "cards.safetensors").read_bytes()
    assert main(asked) == 0
    assert "neurons of the class paths, at tokens cls" in capsys.readouterr().out
    assert ((folder / "analysis.json").read_bytes(), (folder / "cards.safetensors").read_bytes()) == first
    assert main(["report", str(run), str(folder), "-o", str(page)]) == 0
    text = page.read_text()
    assert text.count('class="shot neuron-card"') == len(cards)
    assert "Attention of block 1" in text
    assert "http" not in text.split("<body>")[1].replace("http://www.w3.org", "")
