"""What an evaluation says of an ONNX file that it is of."""

from __future__ import annotations

import hashlib
from pathlib import Path

from vitprune.data import data_config
from vitprune.evaluation.record import ModelFacts
from vitprune.export.profile import count_graph_macs
from vitprune.export.runtime import OnnxModel, read_facts

_BLOCK_BYTES = 2**20


def describe_file(path: str | Path, opened: OnnxModel) -> ModelFacts:
    """Say which ONNX file it is.

    Args:
        path: the file; the weights of a large model lie beside it.
        opened: the same, opened.
    """
    path = Path(path).resolve()
    files = [file for file in (path, path.with_name(f"{path.name}.data")) if file.is_file()]
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(_BLOCK_BYTES):
                digest.update(block)
    return ModelFacts(
        name=str(path),
        checkpoint=None,
        ratio=None,
        architecture=read_facts(opened.session)["architecture"],
        weights_sha256=digest.hexdigest(),
        transform=data_config(opened),
        num_classes=opened.num_classes,
        num_parameters=None,
        macs=count_graph_macs(path),
        size_bytes=sum(file.stat().st_size for file in files),
    )
