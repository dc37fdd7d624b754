"""ONNX files as callables: images -> logits on ONNX Runtime."""

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
CPU = "CPUExecutionProvider"
PROVIDERS: Mapping[str, str] = {
    "onnxruntime-cpu": CPU,
    "onnxruntime-cuda": "CUDAExecutionProvider",
    "onnxruntime-tensorrt": "TensorrtExecutionProvider",
    "onnxruntime-openvino": "OpenVINOExecutionProvider",
}


class OnnxModel:
    """An ONNX file opened in ONNX Runtime; call it like a torch model.

    Attributes:
        data_config: the transform that its images need, as ``timm.data.resolve_model_data_config`` gives it.
        num_classes: length of the logits.
        label_names: folder names of its classes, or None where the file does not tell.
        calibration: content hashes of the images that the pruned model was calibrated on.
        batch_size: images per run, where the file fixes it; None where it takes any number.
    """

    def __init__(self, session: onnxruntime.InferenceSession, facts: Mapping[str, Any]) -> None:
        self.session = session
        self.data_config: Mapping[str, Any] = facts["data_config"]
        self.num_classes: int = facts["num_classes"]
        self.label_names: tuple[str, ...] | None = tuple(facts.get("label_names", ())) or None
        self.calibration = frozenset(facts["calibration_sha256"])
        first = session.get_inputs()[0].shape[0]
        self.batch_size = first if isinstance(first, int) else None

    def __call__(self, images: Tensor) -> Tensor:
        """Return logits [B, C] (float32) of images [B, channels, height, width].

        Where the file fixes the batch size, they run in as many batches as it takes, the last one filled up.
        """
        if self.batch_size is None:
            return self._run(images)
        parts = [self._run(fill_up(part, self.batch_size))[: len(part)] for part in images.split(self.batch_size)]
        return torch.cat(parts)

    def _run(self, images: Tensor) -> Tensor:
        name = self.session.get_inputs()[0].name
        (logits,) = self.session.run(None, {name: images.float().cpu().numpy()})
        return torch.from_numpy(logits)


def fill_up(images: Tensor, batch_size: int) -> Tensor:
    """Return images with as many black ones behind them as a file of a fixed batch size takes."""
    return torch.cat([images, images.new_zeros(batch_size - len(images), *images.shape[1:])])


def open_onnx(path: str | Path, *, num_threads: int | None = None, backend: str = "onnxruntime-cpu") -> OnnxModel:
    """Open an ONNX file that vitprune exported.

    Args:
        path: the file.
        num_threads: of ONNX Runtime's operators; None leaves the choice to it.
        backend: key of ``PROVIDERS``.

    Raises:
        VitpruneError: if there is no such file, ONNX Runtime cannot read it, or it does not say which transform its
            images need.

    >>> import tempfile, timm
    >>> from vitprune import export_onnx
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=5).eval()
    >>> images = torch.randn(2, 3, 32, 32)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = export_onnx(model, Path(folder) / "model.onnx", [(images, torch.zeros(2))])
    ...     open_onnx(Path(folder) / "model.onnx")(images).shape
    torch.Size([2, 5])
    """
    session = open_session(path, num_threads=num_threads, backend=backend)
    facts = read_facts(session)
    if not facts:
        raise VitpruneError(f"{path}: does not say which transform its images need; export it anew")
    return OnnxModel(session, facts)


def read_facts(session: onnxruntime.InferenceSession) -> dict[str, Any]:
    """Return what vitprune wrote into a file about itself; nothing for the files of others."""
    return json.loads(session.get_modelmeta().custom_metadata_map.get(METADATA_KEY, "{}"))


def open_session(
    path: str | Path,
    *,
    num_threads: int | None = None,
    backend: str = "onnxruntime-cpu",
    options: onnxruntime.SessionOptions | None = None,
) -> onnxruntime.InferenceSession:
    """Open any ONNX file on a provider, which has to be there.

    Args:
        path: the file.
        num_threads: of ONNX Runtime's operators; None leaves the choice to it.
        backend: key of ``PROVIDERS``.
        options: further settings of the session.

    Raises:
        VitpruneError: if there is no such file, ONNX Runtime cannot read it, or the provider is absent.
    """
    path = Path(path)
    check_provider(backend)
    if not path.is_file():
        raise VitpruneError(f"{path}: no such file")
    options = options or onnxruntime.SessionOptions()
    if num_threads is not None:
        options.intra_op_num_threads = num_threads
    provider = PROVIDERS[backend]
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=list(dict.fromkeys([provider, CPU])))
    except Exception as error:  # ONNX Runtime's exceptions have no public base class
        raise VitpruneError(f"{path}: ONNX Runtime cannot open it ({str(error).splitlines()[0]})") from error
    if session.get_providers()[0] != provider:
        # It falls back without an error where the provider's libraries do not load.
        raise VitpruneError(
            f"{backend}: {provider} does not start here; ONNX Runtime took {session.get_providers()[0]}"
        )
    return session


def check_provider(backend: str) -> None:
    """Refuse a provider that this ONNX Runtime does not have.

    Raises:
        VitpruneError: naming those that it has.
    """
    there = onnxruntime.get_available_providers()
    if PROVIDERS[backend] not in there:
        raise VitpruneError(
            f"{backend} is not here: onnxruntime {onnxruntime.__version__} has {', '.join(there)}; install the package "
            "of ONNX Runtime for it"
        )
