"""What the card of each kind of folder says of its model and its images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vitprune.analysis.analysis_folder import Analysis
from vitprune.data import digest_images
from vitprune.discovery.run import Run
from vitprune.evaluation.curve_folder import CurveRecord
from vitprune.evaluation.embeddings_folder import EmbeddingComparison
from vitprune.evaluation.evaluation_folder import Evaluation
from vitprune.evaluation.front import Front
from vitprune.evaluation.model_facts import ModelFacts
from vitprune.report.pruned_folder import PrunedModel
from vitprune.report.text import count, plural
from vitprune.speed.bench_folder import BenchRecord

UNKNOWN = "not recorded"


@dataclass(frozen=True)
class Fact:
    """A line of a card.

    Attributes:
        term: what it is.
        text: as people read it.
        code: whether it is to be read letter by letter: a command, a hash, a path.
    """

    term: str
    text: str
    code: bool = False


def describe_transform(transform: Mapping[str, Any] | None) -> str:
    """Say in a line how images become a model's inputs.

    >>> describe_transform({"input_size": [3, 224, 224], "interpolation": "bicubic", "crop_pct": 0.9, "mean": [0.5],
    ...     "std": [0.5]})
    '3 × 224 × 224, bicubic, crop 0.9, mean 0.5, std 0.5'
    """
    if not transform:
        return UNKNOWN
    parts = [" × ".join(map(str, transform["input_size"]))]
    parts += [str(transform[name]) for name in ("interpolation",) if name in transform]
    parts += [f"crop {transform['crop_pct']:g}" for _ in range(1) if "crop_pct" in transform]
    for name in ("mean", "std"):
        if name in transform:
            parts.append(f"{name} {' '.join(f'{value:g}' for value in transform[name])}")
    return ", ".join(parts)


def _describe_model(model: ModelFacts, *, role: str = "model") -> list[Fact]:
    size = "" if model.num_parameters is None else f", {count(model.num_parameters)} parameters"
    ratio = "" if model.ratio is None else f" at ratio {model.ratio:g}"
    facts = [
        Fact(role, f"{model.architecture}{ratio}{size}, {plural(model.num_classes, 'class', 'classes')}"),
        Fact(f"{role}: name", model.name, code=True),
    ]
    if model.checkpoint is not None:
        facts.append(Fact(f"{role}: checkpoint", model.checkpoint, code=True))
    return [
        *facts,
        Fact(f"{role}: SHA-256 of the weights", model.weights_sha256, code=True),
        Fact(f"{role}: transform", describe_transform(model.transform)),
    ]


def _describe_images(data: str, number: int, digest: str | None, *, role: str = "images") -> list[Fact]:
    return [
        Fact(role, plural(number, "image")),
        Fact(f"{role}: folder", data, code=True),
        Fact(f"{role}: SHA-256 of their contents", UNKNOWN if digest is None else digest, code=digest is not None),
    ]


def run_facts(run: Run) -> list[Fact]:
    """Say which model and images its paths are of, and how they were searched."""
    found = run.found
    facts = [Fact("model: name", run.model, code=True)]
    if run.checkpoint is not None:
        facts.append(Fact("model: checkpoint", run.checkpoint, code=True))
    return [
        *facts,
        Fact("model: SHA-256 of the weights", run.weights_sha256, code=True),
        Fact("model: transform", describe_transform(run.transform or run.model_transform)),
        *_describe_images(str(run.images.root), len(run.images), run.images_sha256),
        Fact(
            "search",
            f"{found.method}, tokens {found.tokens}, quadrature {found.quadrature}, target {found.target}, "
            f"{found.quantity}, {found.precision}",
        ),
    ]


def pruned_facts(pruned: PrunedModel) -> list[Fact]:
    """Say which model it is, and what decided about its neurons."""
    facts = pruned.plan.facts
    known = (
        "criterion",
        "keep_paths",
        "allocation",
        "compensation",
        "mode",
        "step",
        "round_to",
        "floor",
        "ridge",
        "seed",
    )
    seen = facts.calibration
    said = [f"{name} {getattr(facts, name)}" for name in known if getattr(facts, name) is not None]
    described = [
        *_describe_model(pruned.model),
        Fact("dense model: SHA-256 of the weights", pruned.dense.weights_sha256 or UNKNOWN, code=True),
        Fact("decision", ", ".join(said) or UNKNOWN),
    ]
    if not seen:
        return [*described, Fact("calibration", "no images")]
    number = len(seen.files) or len(seen.sha256)
    return described + _describe_images(seen.data or UNKNOWN, number, digest_images(seen.sha256), role="calibration")


def evaluation_facts(evaluation: Evaluation) -> list[Fact]:
    """Say which models answered, and to which images."""
    facts = _describe_model(evaluation.judged.model)
    if evaluation.against is not None:
        facts += _describe_model(evaluation.against.model, role="compared with")
    facts += _describe_images(str(evaluation.root), len(evaluation.files), evaluation.images_sha256)
    if evaluation.skipped:
        facts.append(Fact("skipped", plural(len(evaluation.skipped), "image") + " that could not be decoded"))
    return facts


def embeddings_facts(comparison: EmbeddingComparison) -> list[Fact]:
    """Say which models were compared, and on which images."""
    facts = _describe_model(comparison.model) + _describe_model(comparison.against, role="compared with")
    return facts + _describe_images(str(comparison.root), len(comparison.files), comparison.images_sha256)


def curve_facts(curve: CurveRecord) -> list[Fact]:
    """Say which model and images its points are of."""
    request = curve.request
    facts = _describe_asked(request)
    for role in ("calibration images", "evaluation images"):
        hashes = [digest for digest, _label in request[role]]
        described = _describe_images(curve.data, len(hashes), digest_images(hashes), role=role)
        facts += described if role == "evaluation images" else [described[0], described[2]]
    return [*facts, Fact("decision", f"step {request['step']:g}, seed {request['seed']}")]


def front_facts(front: Front) -> list[Fact]:
    """Say which model and images its rows are of."""
    facts = _describe_asked(front.request)
    for role in ("calibration images", "evaluation images"):
        hashes = [digest for digest, _label in front.request[role]]
        facts += [
            Fact(role, plural(len(hashes), "image")),
            Fact(f"{role}: SHA-256 of their contents", digest_images(hashes), code=True),
        ]
    return [*facts, Fact("decision", f"parts {', '.join(front.request['parts'])}, seed {front.request['seed']}")]


def _describe_asked(request: Mapping[str, Any]) -> list[Fact]:
    return [
        Fact("model", request["architecture"]),
        Fact("model: SHA-256 of the weights", request["weights"], code=True),
        Fact("model: transform", describe_transform(request["transform"])),
    ]


def bench_facts(bench: BenchRecord) -> list[Fact]:
    """Say which models were timed, and on what."""
    names = dict.fromkeys(row.model for row in bench.rows)
    return [
        *(Fact("model", name, code=True) for name in names),
        Fact("images", "random, of each model's input size"),
        Fact("timed on", ", ".join(f"{name} {value}" for name, value in bench.hardware.items())),
    ]


def analysis_facts(analysis: Analysis) -> list[Fact]:
    """Say which model and runs were experimented on."""
    facts = [
        Fact("model", analysis.architecture),
        Fact("model: SHA-256 of the weights", analysis.weights_sha256, code=True),
        Fact("experiments", ", ".join(analysis.experiments)),
    ]
    for run in analysis.runs:
        how = f"{run.method}, tokens {run.tokens}, quadrature {run.quadrature}, top {run.top_k}"
        facts.append(Fact("run", f"{run.source}: {how}; {plural(run.num_images, 'image')}"))
    return facts
