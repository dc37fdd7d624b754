"""Words for neurons, against the formula in loops, and files of strangers."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

import vitprune
from vitprune.analysis.concepts import FIRST, LAST, SHARPNESS, read_concepts, score_concepts
from vitprune.cli import main
from vitprune.discovery.run import load_run


def test_scores_are_those_of_the_formula():
    generator = torch.Generator().manual_seed(0)
    values, similarity = torch.randn(4, 20, generator=generator), torch.randn(20, 5, generator=generator)
    got = score_concepts(values, similarity)
    logs = []
    for neuron in range(4):
        top = sorted(range(20), key=lambda image: -float(values[neuron, image]))[:10]
        of_neuron = []
        for concept in range(5):
            total = 0.0
            for rank, image in enumerate(top):
                exponentials = [math.exp(SHARPNESS * float(each)) for each in similarity[image]]
                share = FIRST + (LAST - FIRST) * rank / 9
                total += math.log(1 + share * (exponentials[concept] / sum(exponentials) - 1))
            of_neuron.append(total)
        logs.append(of_neuron)
    for concept in range(5):
        prior = math.log(sum(math.exp(each[concept]) for each in logs) / 4)
        for neuron in range(4):
            assert got[neuron, concept].item() == pytest.approx(logs[neuron][concept] - prior, rel=1e-6)


def test_a_neuron_of_one_concept_gets_its_word():
    similarity = torch.eye(3).repeat_interleave(20, 0)
    values = torch.eye(3).repeat_interleave(20, 1) + 0.01 * torch.randn(
        3, 60, generator=torch.Generator().manual_seed(0)
    )
    assert score_concepts(values, similarity).argmax(1).tolist() == [0, 1, 2]


def arrays(**changed):
    files = [f"{number}.png" for number in range(4)]
    return {"concepts": ["cat", "dog"], "similarity": np.ones((4, 2), np.float32), "files": files, **changed}


def test_rows_are_in_the_order_asked_for(tmp_path):
    similarity = np.arange(8, dtype=np.float64).reshape(4, 2)
    np.savez(tmp_path / "a.npz", **arrays(similarity=similarity))
    read = read_concepts(tmp_path / "a.npz", ["2.png", "0.png"])
    assert read.names == ("cat", "dog")
    assert read.similarity.tolist() == [[4, 5], [0, 1]]


class Evil:
    def __reduce__(self):
        return (print, ("unpickled",))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"similarity": np.ones((4, 3), np.float32)}, r"similarity is \[4, 3\], for 4 files and 2 concepts"),
        ({"similarity": np.ones(8, np.float32)}, r"similarity is \[8\]"),
        ({"similarity": np.full((4, 2), np.nan)}, "finite"),
        ({"similarity": np.array([["a", "b"]] * 4)}, "finite floating-point"),
        ({"concepts": ["cat"], "similarity": np.ones((4, 1))}, "give at least two"),
        ({"files": ["0.png", "1.png", "x.png", "y.png"]}, r"2 of 4 images are not in it \(first: 2.png\)"),
        ({"concepts": np.array([Evil(), Evil()], dtype=object)}, "no .npz with the arrays"),
    ],
)
def test_files_of_strangers_are_refused(changed, message, tmp_path, capsys):
    np.savez(tmp_path / "a.npz", **arrays(**changed))
    with pytest.raises(vitprune.VitpruneError, match=message):
        read_concepts(tmp_path / "a.npz", [f"{number}.png" for number in range(4)])
    assert "unpickled" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and nothing", b"\x93NUMPY\x01\x00"])
def test_what_is_no_archive_is_refused(content, tmp_path):
    path = tmp_path / "a.npz"
    path.write_bytes(content)
    with pytest.raises(vitprune.VitpruneError, match="no .npz with the arrays"):
        read_concepts(path, [])
    with pytest.raises(vitprune.VitpruneError, match="no .npz with the arrays"):
        read_concepts(tmp_path / "absent.npz", [])


def test_words_stand_on_cards(saved_vit, image_folder, tmp_path, capsys):
    run, folder, page = tmp_path / "run", tmp_path / "analysis", tmp_path / "page.html"
    assert main(["discover", str(saved_vit), "--data", str(image_folder), "-o", str(run)]) == 0
    images = load_run(run).images
    similarity = np.array([[float(label == index) for index in range(5)] for label in images.labels])
    words = [f"word{index}" for index in range(5)]
    np.savez(tmp_path / "words.npz", concepts=words, files=images.files, similarity=similarity)
    capsys.readouterr()
    asked = ["analyze", str(run), "--concepts", str(tmp_path / "words.npz")]
    assert main([*asked, "--experiments", "cards", "-o", str(folder), "--json"]) == 0
    cards = json.loads(capsys.readouterr().out)["cards"]["cards"]
    assert all(len(card["concepts"]) == 5 for card in cards)
    assert main(["report", str(folder), "-o", str(page)]) == 0
    assert "words" in page.read_text()
    assert main([*asked, "--experiments", "scores"]) == 2
    assert "for the experiment cards" in capsys.readouterr().err
