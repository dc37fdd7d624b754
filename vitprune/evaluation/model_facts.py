"""Which model an evaluation is of: a torch model or an ONNX file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from vitprune.export.openvino_file import OpenVinoModel
from vitprune.export.profile import count_graph_macs
from vitprune.export.runtime import OnnxModel, read_facts
from vitprune.files import hash_file
from vitprune.models.identity import architecture, hash_weights
from vitprune.models.macs import Sizes, measure_sizes
from vitprune.models.merging import describe_merging
from vitprune.views import data_config


@dataclass(frozen=True)
class ModelFacts:
    """Which model answered.

    Attributes:
        name: timm name, or absolute path of a folder or file.
        checkpoint: absolute path of the weights, or None where the hub, the folder or the file has them.
        ratio: of an elastic file, the share of FFN neurons that was to be gone; else None.
        architecture: timm name, as far as it is known.
        weights_sha256: ``hash_weights`` of a torch model; of an ONNX file, the hash of the file.
        transform: that its images went through, as timm describes it.
        num_classes: length of the logits.
        num_parameters: None for an ONNX file.
        macs: multiply-accumulates of one image, as this model computes them.
        size_bytes: of the weights as stored; of an ONNX file, of the file.
        merge: how many tokens disappear in each block; None where none do, or where a file does not say.
    """

    name: str
    checkpoint: str | None
    ratio: float | None
    architecture: str
    weights_sha256: str
    transform: Mapping[str, Any]
    num_classes: int
    num_parameters: int | None
    macs: int
    size_bytes: int
    merge: Sequence[int] | None = None


def describe_network(
    network: nn.Module,
    name: str,
    *,
    checkpoint: str | None = None,
    ratio: float | None = None,
    sizes: Sizes | None = None,
) -> ModelFacts:
    """Say which torch model it is.

    Args:
        network: in eval mode.
        name: what it was loaded by; the path of a folder or file is made absolute.
        checkpoint: file of its weights.
        ratio: that it was loaded at.
        sizes: of it, where they are known.
    """
    sizes = measure_sizes(network) if sizes is None else sizes
    return ModelFacts(
        name=str(Path(name).resolve()) if Path(name).exists() else name,
        checkpoint=None if checkpoint is None else str(Path(checkpoint).resolve()),
        ratio=ratio,
        architecture=architecture(network),
        weights_sha256=hash_weights(network),
        transform=data_config(network),
        num_classes=network.num_classes,
        merge=describe_merging(network),
        **asdict(sizes),
    )


def describe_file(path: str | Path, opened: OnnxModel | OpenVinoModel) -> ModelFacts:
    """Say which ONNX or OpenVINO file it is.

    Args:
        path: the file; the weights of a large model lie beside it.
        opened: the same, opened.
    """
    path = Path(path).resolve()
    beside = path.with_suffix(".bin") if path.suffix == ".xml" else path.with_name(f"{path.name}.data")
    files = [file for file in (path, beside) if file.is_file()]
    is_openvino = isinstance(opened, OpenVinoModel)
    facts = opened.facts if is_openvino else read_facts(opened.session, path)
    return ModelFacts(
        name=str(path),
        checkpoint=None,
        ratio=None,
        architecture=facts.get("architecture", "OpenVINO" if is_openvino else "ONNX"),
        weights_sha256=hash_file(*files, digits=64),
        transform=data_config(opened),
        num_classes=opened.num_classes,
        num_parameters=None,
        macs=facts["macs"] if is_openvino else count_graph_macs(path),
        size_bytes=sum(file.stat().st_size for file in files),
    )
