"""How far apart classes are in WordNet's hierarchy of nouns.

Letters: C classes, A nouns above any of them.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import shortest_path

from vitprune.errors import VitpruneError

NOUNS = "data.noun"
HYPERNYM, INSTANCE_HYPERNYM = "@", "@i"


def is_wnid(name: str) -> bool:
    """Tell whether a class name is a noun's WordNet identifier, as ImageNet's are.

    >>> is_wnid("n01440764"), is_wnid("tench")
    (True, False)
    """
    return re.fullmatch(r"n\d{8}", name) is not None


def measure_wordnet_distances(wnids: Sequence[str], *, wordnet: str | Path | None = None) -> np.ndarray:
    """Count the steps between every two classes: up to the nearest common hypernym, and down again.

    Unlike Wu and Palmer's similarity, steps need no convention for the depth of a noun that has several hypernyms.

    Args:
        wnids: of C classes, as ``n01440764``.
        wordnet: as in ``find_nouns``.

    Returns:
        float64 [C, C]; steps, whole numbers; infinite where nothing lies above both, which WordNet 3.0 does not have.

    Raises:
        VitpruneError: if a class is no wnid or no noun of this WordNet, or WordNet is not found or cannot be read.

    Source:
        The edge count of Rada et al., IEEE Transactions on Systems, Man, and Cybernetics 1989; as
        ``shortest_path_distance`` of NLTK.
    """
    for wnid in wnids:
        if not is_wnid(wnid):
            raise VitpruneError(f"class '{wnid}' is no wnid such as n01440764, so it has no place in WordNet")
    place = find_nouns(wordnet)
    hypernyms = read_hypernyms(place)
    for wnid in wnids:
        if wnid not in hypernyms:
            raise VitpruneError(f"{wnid} is no noun in {place}; ImageNet's classes are those of WordNet 3.0")
    position = {wnid: number for number, wnid in enumerate(_close_upward(wnids, hypernyms))}
    steps = [(position[lower], position[upper]) for lower in position for upper in hypernyms[lower]]
    rows, columns = np.array(steps, dtype=np.int64).reshape(-1, 2).T
    graph_AA = csr_array((np.ones(len(steps)), (rows, columns)), shape=(len(position), len(position)))
    up_CA = shortest_path(graph_AA, unweighted=True, indices=[position[wnid] for wnid in wnids])
    distances = []
    for up_A in up_CA:
        above = np.isfinite(up_A)
        distances.append((up_CA[:, above] + up_A[above]).min(1))
    return np.stack(distances)


def find_nouns(wordnet: str | Path | None = None) -> Path | zipfile.Path:
    """Find WordNet's file of nouns.

    Args:
        wordnet: folder of WordNet 3.0 with ``data.noun``, or the zip archive that NLTK's downloader leaves. None looks
            where that puts it (below ``NLTK_DATA``, ``~/nltk_data``, ``/usr/share/nltk_data``), then where Debian's
            package ``wordnet-base`` does (``/usr/share/wordnet``).

    Raises:
        VitpruneError: if it is not there.
    """
    places = _usual_places() if wordnet is None else [Path(wordnet)]
    for place in places:
        if (place / NOUNS).is_file():
            return place / NOUNS
        archive = place if place.suffix == ".zip" else Path(f"{place}.zip")
        if zipfile.is_zipfile(archive) and (inside := zipfile.Path(archive) / "wordnet" / NOUNS).is_file():
            return inside
    remedy = "install Debian's package wordnet-base, or run 'python -m nltk.downloader wordnet'"
    if wordnet is None:
        raise VitpruneError(f"WordNet 3.0 is not found; {remedy}, or name a folder that has {NOUNS}")
    raise VitpruneError(f"{wordnet} has no {NOUNS} of WordNet 3.0; {remedy}")


def read_hypernyms(nouns: Path | zipfile.Path) -> dict[str, tuple[str, ...]]:
    """Read which nouns each noun is a kind or an instance of.

    NLTK's reader is not used: it cannot open Debian's folder, which has no ``lexnames``, opens no folder outside its
    own search path, and reads the verbs, adjectives and adverbs as well.

    Args:
        nouns: WordNet's ``data.noun``.

    Returns:
        wnid -> wnids of its hypernyms.

    Raises:
        VitpruneError: if a line is not in WordNet's format.

    Source:
        The manual page wndb(5WN) of WordNet 3.0: offset, file number, type, number of words in hexadecimal digits,
        words with their numbers, number of pointers, pointers of four fields each.
    """
    hypernyms = {}
    with nouns.open("r", encoding="utf-8", errors="replace") as stream:
        for number, line in enumerate(stream, start=1):
            if line.startswith("  "):  # the licence
                continue
            try:
                offset, _file, _type, num_words, *rest = line.partition("|")[0].split()
                pointers = rest[2 * int(num_words, 16) :]
                fields = [pointers[1 + 4 * place : 5 + 4 * place] for place in range(int(pointers[0]))]
                upper = [f"n{target}" for symbol, target, _, _ in fields if symbol in (HYPERNYM, INSTANCE_HYPERNYM)]
            except (ValueError, IndexError) as error:
                raise VitpruneError(f"{nouns}: line {number} is not in the format of WordNet 3.0") from error
            hypernyms[f"n{offset}"] = tuple(upper)
    return hypernyms


def _close_upward(wnids: Sequence[str], hypernyms: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the classes and every noun above them, each once."""
    reached = dict.fromkeys(wnids)
    waiting = list(reached)
    while waiting:
        lower = waiting.pop()
        if lower not in hypernyms:
            raise VitpruneError(f"WordNet's file of nouns is not whole: {lower}, which lies above a class, is missing")
        new = [upper for upper in hypernyms[lower] if upper not in reached]
        reached.update(dict.fromkeys(new))
        waiting.extend(new)
    return list(reached)


def _usual_places() -> Iterator[Path]:
    named = [Path(folder) for folder in os.environ.get("NLTK_DATA", "").split(os.pathsep) if folder]
    for root in (*named, Path.home() / "nltk_data", Path("/usr/share/nltk_data")):
        yield root / "corpora" / "wordnet"
    yield Path("/usr/share/wordnet")
