"""ONNX files as callables: images -> logits on ONNX Runtime."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor

from vitprune.errors import VitpruneError
from vitprune.seal import parsing

METADATA_KEY = "vitprune"
CPU = "CPUExecutionProvider"
PROVIDERS: Mapping[str, str] = {
    "onnxruntime-cpu": CPU,
    "onnxruntime-cuda": "CUDAExecutionProvider",
    "onnxruntime-tensorrt": "TensorrtExecutionProvider",
    "onnxruntime-openvino": "OpenVINOExecutionProvider",
}


# What an input may be of, by ONNX Runtime's name of it.
_DTYPES: Mapping[str, torch.dtype] = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(double)": torch.float64,
}
FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE)
_TRANSFORM = ("input_size", "mean", "std", "crop_pct", "crop_mode", "interpolation")


@dataclass(frozen=True)
class ImageInput:
    """How a file takes its images.

    Attributes:
        name: of the input.
        dtype: floating point.
        channels_last: whether images are [B, height, width, channels].
        batch_size: images per run, where the file fixes it; None where it takes any number.
        size: channels, height and width; None where the file leaves one open.
    """

    name: str
    dtype: torch.dtype
    channels_last: bool
    batch_size: int | None
    size: tuple[int | None, int | None, int | None]

    def feed(self, images: Tensor) -> dict[str, np.ndarray]:
        """Return what a session takes of images [B, channels, height, width]."""
        images = images.to("cpu", self.dtype)
        return {self.name: (images.movedim(1, -1).contiguous() if self.channels_last else images).numpy()}


class OnnxModel:
    """An ONNX file opened in ONNX Runtime; call it like a torch model.

    Attributes:
        data_config: the transform that its images need, as ``timm.data.resolve_model_data_config`` gives it.
        num_classes: length of the logits.
        label_names: folder names of its classes, or None where the file does not tell.
        calibration: content hashes of the images that the pruned model was calibrated on.
        batch_size: images per run, where the file fixes it; None where it takes any number.
    """

    def __init__(
        self, session: onnxruntime.InferenceSession, facts: Mapping[str, Any], source: str | Path = "the file"
    ) -> None:
        self.session, self.source = session, source
        self.data_config: Mapping[str, Any] = facts["data_config"]
        self.label_names: tuple[str, ...] | None = tuple(facts.get("label_names", ())) or None
        self.calibration = frozenset(facts.get("calibration_sha256", ()))
        self._input = read_input(session, source)
        self._output = _find_output(session, source)
        self.batch_size = self._input.batch_size
        _check_size(self._input, self.data_config, source)
        self.num_classes: int = facts["num_classes"] if "num_classes" in facts else self._count_classes()

    def __call__(self, images: Tensor) -> Tensor:
        """Return logits [B, C] (float32) of images [B, channels, height, width].

        Where the file fixes the batch size, they run in as many batches as it takes, the last one filled up.
        """
        _check_images(images, self._input, self.source)
        if self.batch_size is None:
            return self._run(images)
        parts = [self._run(fill_up(part, self.batch_size))[: len(part)] for part in images.split(self.batch_size)]
        return torch.cat(parts)

    def explain_not_finite(self) -> str | None:
        """Say why answers may be no numbers though all weights are; None where nothing is known."""
        if self._input.dtype == torch.float16:
            return "the file computes in float16, which may be too narrow for it; take a float32 file"
        return None

    def _run(self, images: Tensor) -> Tensor:
        (logits,) = self.session.run([self._output], self._input.feed(images))
        return torch.from_numpy(logits).float()

    def _count_classes(self) -> int:
        shape = next(each.shape for each in self.session.get_outputs() if each.name == self._output)
        if len(shape) == 2 and isinstance(shape[1], int):
            return shape[1]
        answer = self(torch.zeros(1, *self.data_config["input_size"]))
        if answer.ndim != 2:
            raise VitpruneError(
                f"{self.source}: its output '{self._output}' is {list(answer.shape)} for one image, not logits "
                "[images, classes]; export the model with its pooling and classifier"
            )
        return answer.shape[1]


def find_input(session: onnxruntime.InferenceSession, source: str | Path) -> onnxruntime.NodeArg:
    """Return a file's only input, which is of floating-point numbers.

    Raises:
        VitpruneError: if it has several, or one of another type.
    """
    inputs = session.get_inputs()
    if len(inputs) != 1:
        names = ", ".join(each.name for each in inputs)
        raise VitpruneError(
            f"{source}: it has {len(inputs)} inputs ({names}), a model of images has one; export it with the images "
            "as its only input"
        )
    (image,) = inputs
    if image.type not in _DTYPES:
        refuse_input_type(source, image.name, image.type.removeprefix("tensor(").removesuffix(")"))
    return image


def read_input(session: onnxruntime.InferenceSession, source: str | Path) -> ImageInput:
    """Return how a file takes its images.

    Raises:
        VitpruneError: if it has not one input of floating-point images.
    """
    image = find_input(session, source)
    if len(image.shape) != 4:
        raise VitpruneError(
            f"{source}: its input '{image.name}' is {image.shape}, not images [batch, channels, height, width]; export "
            "it with such an input"
        )
    batch, *lengths = (length if isinstance(length, int) and length > 0 else None for length in image.shape)
    channels_last = has_channels_last(lengths)
    size = (lengths[2], lengths[0], lengths[1]) if channels_last else tuple(lengths)
    return ImageInput(image.name, _DTYPES[image.type], channels_last, batch, size)


def has_channels_last(lengths: Sequence[int | None]) -> bool:
    """Tell whether the lengths of an image are height, width, channels.

    >>> has_channels_last([224, 224, 3]), has_channels_last([3, 224, 224])
    (True, False)
    """
    return lengths[2] in (1, 3) and lengths[0] not in (1, 3)


def refuse_input_type(source: str | Path, name: str | None, type_name: str) -> NoReturn:
    """Refuse a file whose images are no floating-point numbers.

    Raises:
        VitpruneError: always.
    """
    raise VitpruneError(
        f"{source}: its input '{name}' is {type_name}, and images under a transform are floating point; export it "
        "without the preprocessing, with an input of float32"
    )


def _find_output(session: onnxruntime.InferenceSession, source: str | Path) -> str:
    names = [each.name for each in session.get_outputs()]
    if len(names) == 1 or "logits" in names:
        return "logits" if "logits" in names else names[0]
    raise VitpruneError(
        f"{source}: it has {len(names)} outputs ({', '.join(names)}), and none is called logits; export it with the "
        "logits as its only output"
    )


def _check_size(image: ImageInput, transform: Mapping[str, Any], source: str | Path) -> None:
    given = tuple(transform["input_size"])
    if any(own is not None and own != other for own, other in zip(image.size, given, strict=True)):
        raise VitpruneError(
            f"{source}: it reads images {list(image.size)} (channels, height, width), its transform gives "
            f"{list(given)}; tell it with `transform`"
        )


def _check_images(images: Tensor, image: ImageInput, source: str | Path) -> None:
    given = tuple(images.shape[1:])
    if len(given) != 3 or any(own is not None and own != other for own, other in zip(image.size, given, strict=True)):
        raise VitpruneError(
            f"{source}: it reads images {list(image.size)} (channels, height, width), these are {list(given)}; prepare "
            "them with its own transform"
        )


def fill_up(images: Tensor, batch_size: int) -> Tensor:
    """Return images with as many black ones behind them as a file of a fixed batch size takes."""
    return torch.cat([images, images.new_zeros(batch_size - len(images), *images.shape[1:])])


def open_onnx(
    path: str | Path,
    *,
    transform: Mapping[str, Any] | None = None,
    num_threads: int | None = None,
    backend: str = "onnxruntime-cpu",
) -> OnnxModel:
    """Open an ONNX file: one that vitprune exported, or any other whose transform is told.

    Images are fed in the file's own floating-point type, and with channels last where it takes them so.

    Args:
        path: the file.
        transform: what its images need, as timm describes it: ``mean`` and ``std``, and where they are not as usual
            ``interpolation`` (bicubic), ``crop_pct`` (0.875), ``crop_mode`` (center) and ``input_size``
            (channels, height, width; what the file fixes). Takes the place of what the file says of itself.
        num_threads: of ONNX Runtime's operators; None leaves the choice to it.
        backend: key of ``PROVIDERS``.

    Raises:
        VitpruneError: if there is no such file, ONNX Runtime cannot read it, its weights hold NaN or infinity, it has
            not one input of floating-point images and one output, or nobody says which transform its images need.

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
    check_finite_initializers(path)
    facts = read_facts(session, path)
    find_input(session, path)
    if transform is not None:
        facts["data_config"] = _complete(transform, facts.get("data_config"), read_input(session, path), path)
    if "data_config" not in facts:
        raise VitpruneError(
            f"{path}: does not say which transform its images need; pass `transform`, or export it anew"
        )
    with parsing(path):
        return OnnxModel(session, facts, path)


def _complete(
    transform: Mapping[str, Any], own: Mapping[str, Any] | None, image: ImageInput, path: str | Path
) -> dict[str, Any]:
    """Return a transform with what is left out as the file has it, or else as timm does."""
    unknown = [key for key in transform if key not in _TRANSFORM]
    if unknown:
        raise VitpruneError(f"transform has {', '.join(_TRANSFORM)}, got '{unknown[0]}'")
    usual = {"crop_pct": 0.875, "crop_mode": "center", "interpolation": "bicubic"}
    if None not in image.size:
        usual["input_size"] = image.size
    told = {**usual, **(own or {}), **{key: value for key, value in transform.items() if value is not None}}
    missing = [key for key in ("mean", "std", "input_size") if key not in told]
    if missing:
        raise VitpruneError(f"{path}: does not say which {missing[0]} its images need; tell it in `transform`")
    return {key: list(value) if isinstance(value, tuple) else value for key, value in told.items()}


def check_finite_initializers(path: str | Path) -> None:
    """Refuse a file whose weights hold NaN or infinity; a mask may hold minus infinity beside zeros.

    Raises:
        VitpruneError: naming the first such initializer, or the file with the weights where that is missing.
    """
    try:
        initializers = ir.load(path).graph.initializers.values()
        for value in initializers:
            if value.const_value is not None and value.const_value.dtype in FLOATS:
                _check_initializer(path, value.name, value.const_value.numpy())
    except OSError as error:
        raise VitpruneError(f"{path}: its weights cannot be read ({error})") from error


def _check_initializer(path: str | Path, name: str | None, values: np.ndarray) -> None:
    wrong = ~np.isfinite(values)
    if not wrong.any() or (np.isneginf(values[wrong]).all() and not values[~wrong].any()):
        return
    raise VitpruneError(
        f"{path}: {name} holds NaN or infinity in {int(wrong.sum())} of {values.size} numbers; export a model whose "
        "weights are whole"
    )


def read_facts(session: onnxruntime.InferenceSession, source: str | Path) -> dict[str, Any]:
    """Return what vitprune wrote into a file, of this name, about itself; nothing for the files of others.

    Raises:
        VitpruneError: if that is damaged.
    """
    with parsing(source):
        return dict(json.loads(session.get_modelmeta().custom_metadata_map.get(METADATA_KEY, "{}")))


def complete_size(
    lengths: Sequence[int | None], facts: Mapping[str, Any], source: str | Path
) -> tuple[int, int, int] | None:
    """Return [channels, height, width] of the images that a file is for, where its graph leaves some of them open.

    Args:
        lengths: of its images; None where the graph takes any.
        facts: what the file says of itself.
        source: the file, for messages.

    Returns:
        None where nobody says.

    >>> complete_size((3, None, None), {"data_config": {"input_size": [3, 224, 224]}}, "any.onnx")
    (3, 224, 224)
    """
    with parsing(source):
        told = facts.get("data_config", {}).get("input_size", [None] * 3)
        whole = tuple(length if isinstance(length, int) else said for length, said in zip(lengths, told, strict=True))
    return None if None in whole else whole


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
