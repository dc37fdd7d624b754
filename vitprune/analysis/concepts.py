r"""Words for neurons, from how much a model of images and texts sees of each concept in each image.

Which model that is, and which concepts, is the user's choice: a file holds the similarity of every image and concept.
A concept fits a neuron where the images that excite it most are more surely of that concept than images of other
neurons are (soft-WPMI of CLIP-Dissect):

.. math:: s_t = \sum_{x \in B} \log\bigl(1 + p_x (P(t \mid x) - 1)\bigr) - \log p(t)

with :math:`B` the neuron's top images, :math:`p_x` falling from .998 to .97 along them, :math:`P(\cdot \mid x)` the
softmax of ten times the similarities, and :math:`p(t)` the mean of the first term's exponential over the neurons.

Letters: I images, T concepts, P neurons.

Source:
    Oikarinen and Weng, ICLR 2023 (arXiv:2204.10965).
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vitprune.errors import VitpruneError

SHARPNESS, NUM_TOP, FIRST, LAST = 10.0, 100, 0.998, 0.97


@dataclass(frozen=True)
class Concepts:
    """How much of each concept is in each image.

    Attributes:
        names: of the T concepts.
        similarity: float32 [I, T]; such as the cosine of a CLIP's embeddings.
    """

    names: tuple[str, ...]
    similarity: Tensor


def read_concepts(path: str | Path, files: Sequence[str]) -> Concepts:
    """Read a .npz with the arrays ``concepts`` [T] (names), ``similarity`` [I, T] and ``files`` [I].

    Args:
        path: of the file; other arrays in it are not looked at.
        files: of the images that are asked for, as runs name them: relative to the data folder.

    Returns:
        The similarities in the order of ``files``.

    Raises:
        VitpruneError: if the file is none of that kind, or an image is not in it.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     arrays = {"concepts": ["a fish", "a truck"], "similarity": np.ones((1, 2)), "files": ["a.png"]}
    ...     np.savez(Path(folder, "clip.npz"), **arrays)
    ...     read_concepts(Path(folder, "clip.npz"), ["a.png"]).names
    ('a fish', 'a truck')
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            names, similarity, known = (arrays[name] for name in ("concepts", "similarity", "files"))
    except (OSError, ValueError, KeyError, EOFError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise VitpruneError(
            f"{path}: no .npz with the arrays concepts [T], similarity [I, T] and files [I] ({reason})"
        ) from error
    if similarity.ndim != 2 or similarity.shape != (len(np.atleast_1d(known)), len(np.atleast_1d(names))):
        raise VitpruneError(
            f"{path}: similarity is {list(similarity.shape)}, for {known.size} files and {names.size} concepts"
        )
    if not np.issubdtype(similarity.dtype, np.floating) or not np.isfinite(similarity).all():
        raise VitpruneError(f"{path}: similarity must hold finite floating-point numbers")
    if len(names) < 2:
        raise VitpruneError(f"{path}: one concept fits every neuron alike; give at least two")
    row_of = {str(name): row for row, name in enumerate(known.tolist())}
    absent = [name for name in files if name not in row_of]
    if absent:
        raise VitpruneError(f"{path}: {len(absent)} of {len(files)} images are not in it (first: {absent[0]})")
    rows = similarity[[row_of[name] for name in files]]
    return Concepts(tuple(map(str, names.tolist())), torch.from_numpy(np.ascontiguousarray(rows, dtype=np.float32)))


def score_concepts(values_PI: Tensor, similarity_IT: Tensor) -> Tensor:
    """Return how well each concept fits each neuron, [P, T]; higher is better.

    Args:
        values_PI: activations.
        similarity_IT: of the same images.

    >>> excited = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
    >>> similar = torch.tensor([[0.9, 0.1], [0.1, 0.9], [0.2, 0.8]])
    >>> score_concepts(excited, similar).argmax(1).tolist()
    [0, 1]
    """
    num_top = min(NUM_TOP, max(1, values_PI.shape[1] // 2))
    best_PB = values_PI.sort(dim=1, descending=True, stable=True).indices[:, :num_top]
    probability_IT = (SHARPNESS * similarity_IT.double()).softmax(1)
    weights_B1 = torch.linspace(FIRST, LAST, num_top, dtype=torch.float64).unsqueeze(1)
    found_PT = torch.stack([(1 + weights_B1 * (probability_IT[row] - 1)).log().sum(0) for row in best_PB])
    prior_T = found_PT.logsumexp(0) - np.log(len(found_PT))
    return found_PT - prior_T
