"""ONNX files as callables: images -> logits on ONNX Runtime's CPU provider."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor

from vitprune.errors import VitpruneError

METADATA_KEY = "vitprune"


class OnnxModel:
    """An ONNX file opened in ONNX Runtime; call it like a torch model.

    Attributes:
        data_config: the transform that its images need, as ``timm.data.resolve_model_data_config`` gives it.
        num_classes: length of the logits.
        label_names: folder names of its classes, or None where the file does not tell.
        calibration: content hashes of the images that the pruned model was calibrated on.
    """

    def __init__(self, session: onnxruntime.InferenceSession, facts: Mapping[str, Any]) -> None:
        self.session = session
        self.data_config: Mapping[str, Any] = facts["data_config"]
        self.num_classes: int = facts["num_classes"]
        self.label_names: tuple[str, ...] | None = tuple(facts.get("label_names", ())) or None
        self.calibration = frozenset(facts["calibration_sha256"])

    def __call__(self, images: Tensor) -> Tensor:
        """Return logits [B, C] (float32) of images [B, channels, height, width]."""
        name = self.session.get_inputs()[0].name
        (logits,) = self.session.run(None, {name: images.float().cpu().numpy()})
        return torch.from_numpy(logits)


def open_onnx(path: str | Path, *, num_threads: int | None = None) -> OnnxModel:
    """Open an ONNX file that vitprune exported.

    Args:
        path: the file.
        num_threads: of ONNX Runtime's operators; None leaves the choice to it.

    Raises:
        VitpruneError: if there is no such file, ONNX Runtime cannot read it, or it does not say which transform its
            images need.
    """
    path = Path(path)
    if not path.is_file():
        raise VitpruneError(f"{path}: no such file")
    options = onnxruntime.SessionOptions()
    if num_threads is not None:
        options.intra_op_num_threads = num_threads
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions have no public base class
        raise VitpruneError(f"{path}: ONNX Runtime cannot open it ({str(error).splitlines()[0]})") from error
    text = session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
    if text is None:
        raise VitpruneError(f"{path}: does not say which transform its images need; export it with 'vitprune export'")
    return OnnxModel(session, json.loads(text))
