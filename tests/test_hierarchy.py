"""The tree of classes, and its agreement with WordNet."""

from __future__ import annotations

import itertools
import zipfile
from pathlib import Path

import numpy as np
import pytest
from scipy.cluster.hierarchy import cophenet
from scipy.spatial.distance import squareform
from scipy.stats import spearmanr

import vitprune
from vitprune.analysis.hierarchy import cluster_classes, compare_with_wordnet, correlate_distances
from vitprune.analysis.similarity import ClassSimilarity
from vitprune.analysis.wordnet import find_nouns, measure_wordnet_distances, read_hypernyms

# A dog has two hypernyms; Rex is an instance.
HYPERNYMS = {
    "entity": [],
    "animal": ["entity"],
    "pet": ["animal"],
    "canine": ["animal"],
    "wolf": ["canine"],
    "dog": ["canine", "pet"],
    "goldfish": ["pet"],
    "rex": ["dog"],
    "artefact": ["entity"],
    "spoon": ["artefact"],
}
# Steps between wolf, dog, goldfish, rex, spoon, counted on paper.
LEAVES = ("wolf", "dog", "goldfish", "rex", "spoon")
STEPS = np.array([[0, 2, 4, 3, 5], [2, 0, 2, 1, 5], [4, 2, 0, 3, 5], [3, 1, 3, 0, 6], [5, 5, 5, 6, 0]])


def write_wordnet(folder):
    """Write the nouns of a small WordNet, with pointers of other kinds among those upward; return name -> wnid."""
    licence = "  1 WordNet 3.0 Copyright  \n"

    def lines(offsets):
        for name, uppers in HYPERNYMS.items():
            symbol = "@i" if name == "rex" else "@"
            pointers = [f"~ {offsets['dog']:08} n 0000", *(f"{symbol} {offsets[upper]:08} n 0000" for upper in uppers)]
            words = "0b " + " ".join([f"{name} 0", *(f"synonym_{number} 0" for number in range(10))])
            columns = f"{offsets[name]:08} 03 n {words} {len(uppers) + 2:03} {' '.join(pointers)} + 00000028 v 0101"
            yield f"{columns} | a {name} @ home  \n"

    lengths = [len(line) for line in lines(dict.fromkeys(HYPERNYMS, 0))]
    places = itertools.accumulate([len(licence), *lengths[:-1]])
    offsets = dict(zip(HYPERNYMS, places, strict=True))
    folder.mkdir()
    (folder / "data.noun").write_text(licence + "".join(lines(offsets)))
    return {name: f"n{offset:08}" for name, offset in offsets.items()}


@pytest.fixture
def wordnet(tmp_path):
    folder = tmp_path / "dict"
    return folder, write_wordnet(folder)


def test_steps_on_paper(wordnet):
    folder, wnid = wordnet
    measured = measure_wordnet_distances([wnid[name] for name in LEAVES], wordnet=folder)
    assert np.array_equal(measured, STEPS)


def test_nltks_archive_is_read_in_place(wordnet, tmp_path, monkeypatch):
    folder, _ = wordnet
    corpora = tmp_path / "nltk_data" / "corpora"
    corpora.mkdir(parents=True)
    with zipfile.ZipFile(corpora / "wordnet.zip", "w") as archive:
        archive.write(folder / "data.noun", "wordnet/data.noun")
    for place in (corpora / "wordnet.zip", corpora / "wordnet"):
        assert read_hypernyms(find_nouns(place)) == read_hypernyms(find_nouns(folder))
    monkeypatch.setenv("NLTK_DATA", str(tmp_path / "nltk_data"))
    assert str(find_nouns()) == str(find_nouns(corpora / "wordnet"))


def test_debians_wordnet_has_imagenets_classes():
    folder = Path("/usr/share/wordnet")
    if not folder.is_dir():
        pytest.skip("needs Debian's package wordnet-base")
    springers_and_tench = ["n02102040", "n02102177", "n01440764"]
    # As NLTK 3.10.4 counts them.
    assert measure_wordnet_distances(springers_and_tench, wordnet=folder)[0].tolist() == [0, 2, 17]


def test_refuses_what_is_not_in_wordnet(wordnet, tmp_path):
    folder, _ = wordnet
    for name in ("bad", "cut"):
        (tmp_path / name).mkdir()
    (tmp_path / "cut" / "data.noun").write_text("00000000 03 n 01 tench 0 001 @ 00000001 n 0000 | cut off above  \n")
    (tmp_path / "bad" / "data.noun").write_text("00000000 03 n 01 entity 0 002 @ 00000001 n 0000 | one of two  \n")
    for wnids, place, message in (
        (["tench"], folder, "class 'tench' is no wnid such as n01440764"),
        (["n00000001"], folder, "n00000001 is no noun in .*WordNet 3.0"),
        (["n00000001"], tmp_path, "has no data.noun of WordNet 3.0; install"),
        (["n00000001"], tmp_path / "bad", "data.noun: line 1 is not in the format"),
        (["n00000000"], tmp_path / "cut", "is not whole: n00000001"),
    ):
        with pytest.raises(vitprune.VitpruneError, match=message):
            measure_wordnet_distances(wnids, wordnet=place)


def test_without_wordnet_the_remedy_is_told(tmp_path, monkeypatch):
    if Path("/usr/share/wordnet").exists() or Path("/usr/share/nltk_data").exists():
        pytest.skip("WordNet is installed here")
    monkeypatch.setenv("NLTK_DATA", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(vitprune.VitpruneError, match="WordNet 3.0 is not found; install .* or name a folder"):
        find_nouns()


def similarity_of(distances):
    return ClassSimilarity("visits", tuple(range(10, 10 + len(distances))), 1 - distances)


def test_average_linkage_on_paper():
    distances = np.array([[0, 0.5, 0.1, 0.7], [0.5, 0, 0.3, 0.2], [0.1, 0.3, 0, 0.6], [0.7, 0.2, 0.6, 0]])
    tree = cluster_classes(similarity_of(distances))
    np.testing.assert_allclose(tree.linkage, [[0, 2, 0.1, 2], [1, 3, 0.2, 2], [4, 5, (0.5 + 0.7 + 0.3 + 0.6) / 4, 4]])
    assert tree.leaf_order in ((10, 12, 11, 13), (13, 11, 12, 10))


def test_classes_that_follow_wordnet_agree_with_it(wordnet):
    folder, wnid = wordnet
    agreement = compare_with_wordnet(similarity_of(STEPS / 10), [wnid[name] for name in LEAVES], wordnet=folder)
    assert agreement.cosine.rho == pytest.approx(1)
    assert agreement.cosine.p_value < 0.05
    tree = squareform(cophenet(cluster_classes(similarity_of(STEPS / 10)).linkage))
    assert agreement.tree == correlate_distances(tree, STEPS)
    with pytest.raises(vitprune.VitpruneError, match="5 classes need as many wnids, got 1"):
        compare_with_wordnet(similarity_of(STEPS / 10), [wnid["dog"]], wordnet=folder)


def random_distances(generator, count):
    points = generator.normal(size=(count, 2))
    return np.linalg.norm(points[:, None] - points, axis=-1)


def test_few_classes_are_permuted_in_every_way():
    generator = np.random.default_rng(0)
    first, second = random_distances(generator, 5), random_distances(generator, 5) + STEPS

    def rho(order):
        return spearmanr(
            squareform(first[np.ix_(order, order)], checks=False), squareform(second, checks=False)
        ).statistic

    every = np.array([rho(list(order)) for order in itertools.permutations(range(5))])
    measured = correlate_distances(first, second)
    assert measured.num_permutations == 120
    assert measured.rho == pytest.approx(every[0])
    least = min(np.mean(every >= every[0] - 1e-9), np.mean(every <= every[0] + 1e-9))
    assert measured.p_value == pytest.approx(min(1, 2 * least))


def test_the_same_seed_draws_the_same_permutations():
    generator = np.random.default_rng(1)
    first, second = random_distances(generator, 12), random_distances(generator, 12)
    assert correlate_distances(first, second, seed=3) == correlate_distances(first, second, seed=3)
    p_values = [correlate_distances(first, second, seed=seed).p_value for seed in range(3)]
    assert len(set(p_values)) > 1
    assert np.ptp(p_values) < 0.1


def test_unrelated_distances_are_rarely_found_related():
    generator, p_values = np.random.default_rng(2), []
    for _ in range(200):
        first, second = random_distances(generator, 8), random_distances(generator, 8)
        p_values.append(correlate_distances(first, second, num_permutations=99).p_value)
    assert np.mean(np.array(p_values) <= 0.05) < 0.09


def test_equal_distances_have_no_correlation():
    measured = correlate_distances(1 - np.eye(4), random_distances(np.random.default_rng(0), 4))
    assert (measured.rho, measured.p_value, measured.num_permutations) == (None, None, 0)
