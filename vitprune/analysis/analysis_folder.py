"""The folder of an analysis: its results as JSON, the similarities of classes as tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from vitprune.discovery.run import Run
from vitprune.files import FORMAT_VERSION, read_json, read_tensors, write_json, write_tensors
from vitprune.seal import parsing

ANALYSIS_FILE, SIMILARITY_FILE, CARDS_FILE = "analysis.json", "similarity.safetensors", "cards.safetensors"
FIGURES_FOLDER, PASSES_FOLDER = "figures", "passes"
ANALYSIS_FILES = frozenset({ANALYSIS_FILE, SIMILARITY_FILE, CARDS_FILE, FIGURES_FOLDER, PASSES_FOLDER})


@dataclass(frozen=True)
class AnalysedRun:
    """A run whose paths were experimented on.

    Attributes:
        source: where it lies, as far as it is known, else its name.
        method: what the results call it: the method that found its paths, or another name that tells it apart.
        tokens: where the paths were found: ``cls``, ``patch`` or ``all``.
        quadrature: of the search, as in ``parse_quadrature``.
        top_k: K, neurons per FFN.
        num_images: with a path each.
    """

    source: str
    method: str
    tokens: str
    quadrature: str
    top_k: int
    num_images: int


@dataclass(frozen=True)
class Analysis:
    """What an analysis folder holds.

    Attributes:
        architecture: timm name of the model.
        weights_sha256: ``hash_weights`` of the model.
        class_names: class index -> folder name.
        runs: whose paths were experimented on; the first is compared with the others.
        experiments: keys of ``options.EXPERIMENTS`` that were made.
        results: experiment, with ``_`` for ``-`` -> JSON values, as ``run_experiments`` returns them; those of
            ``similarity`` without ``cosines``.
        cosines: ``visits`` and ``scores`` -> float64 [C, C], in [-1, 1]: the similarity of every two classes of the
            first run, where it was measured.
        skipped: other images that could not be decoded.
        pictures: of neuron cards, where they were made: ``pictures`` and ``maps`` of ``NeuronCards``.
    """

    architecture: str
    weights_sha256: str
    class_names: Mapping[int, str]
    runs: tuple[AnalysedRun, ...]
    experiments: tuple[str, ...]
    results: Mapping[str, Any]
    cosines: Mapping[str, Tensor]
    skipped: tuple[str, ...] = ()
    pictures: Mapping[str, Tensor] = field(default_factory=dict)


def describe_analysis(analysis: Analysis) -> dict[str, Any]:
    """Return all that ``analysis.json`` holds but its kind and version: JSON values."""
    return {
        "architecture": analysis.architecture,
        "weights_sha256": analysis.weights_sha256,
        "class_names": {str(index): name for index, name in analysis.class_names.items()},
        "runs": [asdict(run) for run in analysis.runs],
        "experiments": list(analysis.experiments),
        **analysis.results,
        "skipped": list(analysis.skipped),
    }


def save_analysis(analysis: Analysis, folder: str | Path, *, runs: Mapping[str, Run]) -> None:
    """Write ``analysis.json``; ``similarity.safetensors`` where classes were compared, ``cards.safetensors`` for cards.

    Args:
        analysis: what to write.
        folder: made where it is missing; what ``analyze`` keeps in it stays.
        runs: that ``analyze`` was given.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if analysis.cosines:
        classes = next(iter(runs.values())).found.classes
        write_tensors(folder / SIMILARITY_FILE, analysis.cosines, kind="similarity", facts={"classes": classes})
    if analysis.pictures:
        write_tensors(folder / CARDS_FILE, analysis.pictures, kind="neuron cards", facts={})
    content = {"kind": "analysis", "version": FORMAT_VERSION, **describe_analysis(analysis)}
    write_json(folder / ANALYSIS_FILE, content)


def load_analysis(folder: str | Path) -> Analysis:
    """Read an analysis folder.

    Raises:
        VitpruneError: if it is none.
    """
    folder = Path(folder)
    content = read_json(folder / ANALYSIS_FILE, kind="analysis")
    with parsing(folder / ANALYSIS_FILE):
        return _read_analysis(folder, content)


def _read_analysis(folder: Path, content: Mapping[str, Any]) -> Analysis:
    runs = tuple(AnalysedRun(**run) for run in content["runs"])
    names = (experiment.replace("-", "_") for experiment in content["experiments"])
    results = {name: content[name] for name in names}
    if "similarity" in results:
        # The file has the names in alphabetical order.
        results["similarity"] = {run.method: results["similarity"][run.method] for run in runs}
    has_cosines = (folder / SIMILARITY_FILE).is_file()
    return Analysis(
        architecture=content["architecture"],
        weights_sha256=content["weights_sha256"],
        class_names={int(index): name for index, name in content["class_names"].items()},
        runs=runs,
        experiments=tuple(content["experiments"]),
        results=results,
        cosines=read_tensors(folder / SIMILARITY_FILE, kind="similarity")[0] if has_cosines else {},
        skipped=tuple(content["skipped"]),
        pictures=read_tensors(folder / CARDS_FILE, kind="neuron cards")[0] if "cards" in results else {},
    )
