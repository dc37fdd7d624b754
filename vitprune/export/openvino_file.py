"""OpenVINO's own files as callables, and how they are written: images -> logits on OpenVINO's CPU runtime.

The packages are an extra, imported only when one of these functions runs.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from vitprune.errors import VitpruneError
from vitprune.export.runtime import METADATA_KEY, fill_up
from vitprune.export.signal_stack import kept_signal_stack
from vitprune.seal import parsing

OPENVINO = "openvino"
SUFFIX = ".xml"
# Images that static quantisation reads at most.
CALIBRATION_IMAGES = 200


class OpenVinoModel:
    """A file opened in OpenVINO; call it like a torch model.

    Attributes:
        data_config: the transform that its images need, as ``timm.data.resolve_model_data_config`` gives it.
        num_classes: length of the logits.
        label_names: folder names of its classes, or None where the file does not tell.
        calibration: content hashes of the images that the model was pruned or quantised with.
        batch_size: images per run, where the file fixes it; None where it takes any number.
        facts: what the file says of itself.
    """

    def __init__(self, compiled: Any, facts: Mapping[str, Any], source: str | Path) -> None:
        self.compiled, self.facts, self.source = compiled, facts, source
        self.data_config: Mapping[str, Any] = facts["data_config"]
        self.num_classes: int = facts["num_classes"]
        self.label_names: tuple[str, ...] | None = tuple(facts.get("label_names", ())) or None
        self.calibration = frozenset(facts.get("calibration_sha256", ()))
        self.batch_size = _fixed_batch(compiled.inputs[0])

    def __call__(self, images: Tensor) -> Tensor:
        """Return logits [B, C] (float32) of images [B, channels, height, width]."""
        size = tuple(self.data_config["input_size"])
        if tuple(images.shape[1:]) != size:
            raise VitpruneError(
                f"{self.source}: it reads images {list(size)} (channels, height, width), these are "
                f"{list(images.shape[1:])}; prepare them with its own transform"
            )
        if self.batch_size is None:
            return self._run(images)
        parts = [self._run(fill_up(part, self.batch_size))[: len(part)] for part in images.split(self.batch_size)]
        return torch.cat(parts)

    def _run(self, images: Tensor) -> Tensor:
        logits = self.compiled([np.ascontiguousarray(images.cpu().float().numpy())])[0]
        return torch.from_numpy(np.array(logits)).float()


def import_openvino() -> Any:
    """Import the package.

    Raises:
        VitpruneError: if it is not installed, saying how to install it.
    """
    try:
        import openvino
    except ImportError as error:
        raise VitpruneError(
            "OpenVINO is not installed; install it with: python -m pip install 'vitprune[openvino]'"
        ) from error
    return openvino


def import_nncf() -> Any:
    """Import the package that quantises.

    Raises:
        VitpruneError: if it is not installed, saying how to install it.
    """
    try:
        with _silence():
            import nncf
    except ImportError as error:
        raise VitpruneError(
            "nncf, which quantises, is not installed; install it with: python -m pip install 'vitprune[openvino]'"
        ) from error
    return nncf


def open_openvino(path: str | Path, *, num_threads: int | None = None) -> OpenVinoModel:
    """Open an OpenVINO file that vitprune exported.

    Args:
        path: the .xml file; its weights lie beside it.
        num_threads: of OpenVINO's operators; None leaves the choice to it.

    Raises:
        VitpruneError: if OpenVINO is not installed or cannot read the file, or the file does not say which transform
            its images need.
    """
    model = read_openvino(path)
    facts = facts_in(model)
    if "data_config" not in facts:
        raise VitpruneError(f"{path}: does not say which transform its images need; export it anew")
    return OpenVinoModel(_compile(path, model, num_threads), facts, path)


def read_openvino(path: str | Path) -> Any:
    """Read an .xml file, or an ONNX file of standard operators, as OpenVINO's model.

    Raises:
        VitpruneError: if there is no such file, or OpenVINO cannot read it.
    """
    openvino, path = import_openvino(), Path(path)
    if not path.is_file():
        raise VitpruneError(f"{path}: no such file")
    if path.suffix == SUFFIX and not path.with_suffix(".bin").is_file():
        raise VitpruneError(f"{path}: its weights are missing; copy {path.with_suffix('.bin').name} beside it")
    if path.suffix == ".onnx":
        _refuse_own_operators(path)
    try:
        return openvino.Core().read_model(str(path))
    except Exception as error:  # its exceptions have no public base class
        raise VitpruneError(f"{path}: OpenVINO cannot read it ({_first_line(error)})") from error


def facts_in(model: Any) -> dict[str, Any]:
    """Return what vitprune wrote into OpenVINO's model about itself; nothing for the files of others."""
    for place in ([METADATA_KEY], ["framework", METADATA_KEY]):
        if model.has_rt_info(place):
            with parsing("the OpenVINO file's own description"):
                return dict(json.loads(model.get_rt_info(place).astype(str)))
    return {}


@dataclass(frozen=True)
class OperatorRun:
    """What one operator took in a run.

    Attributes:
        kind: what it is: ``MatMul``, ``FullyConnected``, ...
        kernel: what computed it, with the precision: ``jit_avx2_f32``, ``ref_any_f32``, ...
        milliseconds: of one run.
    """

    kind: str
    kernel: str
    milliseconds: float


def profile_openvino(
    path: str | Path, batch_size: int, num_threads: int | None = None, *, num_runs: int = 5
) -> list[OperatorRun]:
    """Run a file on random images and say what each operator that is computed takes, the median over runs.

    Args:
        path: as in ``make_openvino_runner``, as are the next two.
        batch_size: images per run.
        num_threads: of the operators.
        num_runs: after one that warms up.
    """
    request, images = _open_request(path, batch_size, num_threads, {"PERF_COUNT": True})
    request.infer([images], share_inputs=True)
    # What takes less than a clock tick counts as not executed in some runs.
    runs: dict[str, list[Any]] = {}
    for _run in range(num_runs):
        request.infer([images], share_inputs=True)
        for each in request.get_profiling_info():
            if each.status == each.Status.EXECUTED:
                runs.setdefault(each.node_name, []).append(each)
    return [
        OperatorRun(each[0].node_type, each[0].exec_type, 1000 * median(one.real_time.total_seconds() for one in each))
        for each in runs.values()
    ]


def find_capabilities() -> frozenset[str]:
    """Return what this processor computes in: ``FP32``, ``INT8``, ``BF16``, ... by OpenVINO's names."""
    return frozenset(import_openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))


def make_openvino_runner(
    path: str | Path, batch_size: int, num_threads: int | None, *, precision: str = "f32"
) -> Callable[[], Any]:
    """Return a program that runs random images through a file once, in float32 where it is not quantised.

    Args:
        path: an .xml file, or an ONNX file of standard operators.
        batch_size: images per run, where the file leaves it open.
        num_threads: of OpenVINO's operators; None leaves the choice to it.
        precision: of what is not quantised: ``f32`` or, where the processor has it, ``bf16``.

    Raises:
        VitpruneError: if it cannot be read, or has not one input of images of a fixed size.
    """
    request, images = _open_request(path, batch_size, num_threads, {"INFERENCE_PRECISION_HINT": precision})
    return lambda: request.infer([images], share_inputs=True)


def random_images(path: str | Path, batch_size: int) -> np.ndarray:
    """Return random images as a file reads them [batch, channels, height, width]; arguments as above."""
    model = read_openvino(path)
    if len(model.inputs) != 1 or len(model.inputs[0].partial_shape) != 4:
        raise VitpruneError(f"{path}: expected one input of images [batch, channels, height, width]")
    batch, *size = model.inputs[0].partial_shape
    if any(each.is_dynamic for each in size):
        raise VitpruneError(f"{path}: leaves the size of its images open; export it with a fixed one")
    lengths = [each.get_length() for each in size]
    if not batch.is_dynamic and batch.get_length() != batch_size:
        raise VitpruneError(
            f"{path} runs {batch.get_length()} images at a time, not {batch_size}; pass {batch.get_length()} as "
            "`batch_size`"
        )
    images = np.random.default_rng(0).standard_normal((batch_size, *lengths), dtype=np.float32)
    return images.astype(model.inputs[0].element_type.to_dtype())


def _open_request(
    path: str | Path, batch_size: int, num_threads: int | None, settings: Mapping[str, Any]
) -> tuple[Any, np.ndarray]:
    """Return what runs a file, and random images for it."""
    images = random_images(path, batch_size)
    return _compile(path, read_openvino(path), num_threads, settings).create_infer_request(), images


def write_openvino(source: Path, path: Path, facts: Mapping[str, Any]) -> None:
    """Convert an ONNX file of standard operators, checked before, into OpenVINO's .xml and .bin.

    Args:
        source: the ONNX file.
        path: the .xml file to write.
        facts: what it says of itself.
    """
    _save(read_openvino(source), path, facts)


def quantize_openvino(source: Path, path: Path, images: Sequence[np.ndarray], facts: Mapping[str, Any]) -> None:
    """Quantise weights and activations of a float32 .xml file to 8 bits, by what activations are on some images.

    Products that compare and average tokens which merge stay float32: 8 bits there change which tokens merge.

    Args:
        source: the float32 file.
        path: the .xml file to write, another one.
        images: as the file reads them, a batch each.
        facts: what the new file says of itself.

    Source:
        ``nncf.quantize`` for Transformers, weights symmetric and activations not.
    """
    nncf, model = import_nncf(), read_openvino(source)
    left_out = _products_of_merging(model)
    with _silence(), kept_signal_stack():
        quantized = nncf.quantize(
            model,
            nncf.Dataset(list(images)),
            preset=nncf.QuantizationPreset.MIXED,
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(images),
            ignored_scope=nncf.IgnoredScope(names=left_out) if left_out else None,
        )
    _save(quantized, path, facts)


def quantize_for_openvino(source: Path, path: Path, images: Sequence[np.ndarray], facts: Mapping[str, Any]) -> None:
    """Write an ONNX file of standard operators as an 8-bit .xml file, by its float32 one, which is left beside it.

    Args:
        source: the ONNX file.
        path: the .xml file to write.
        images: as the file reads them, a batch each.
        facts: what the new file says of itself.
    """
    exact = source.with_suffix(SUFFIX)
    write_openvino(source, exact, facts)
    quantize_openvino(exact, path, images, facts)


def collect_images(batches: Any, batch_size: int | None, *, num_images: int = CALIBRATION_IMAGES) -> list[np.ndarray]:
    """Return the first images of batches as a file of this batch size (None: any) reads them, so many at most."""
    taken: list[Tensor] = []
    for images, _labels in batches:
        taken += list(images.cpu().float())
        if len(taken) >= num_images:
            break
    groups = torch.stack(taken[:num_images]).split(batch_size or 1)
    return [fill_up(group, batch_size or 1).numpy() for group in groups]


def _products_of_merging(model: Any) -> list[str]:
    """Return the names of products of two activations that are not attention's: these stand beside a softmax."""
    return [
        op.get_friendly_name()
        for op in model.get_ops()
        if op.get_type_name() == "MatMul"
        and not any(_is_constant(op.input_value(place).get_node()) for place in range(2))
        and not _is_attention(op)
    ]


def _is_constant(op: Any) -> bool:
    if op.get_type_name() in ("Convert", "Reshape", "Transpose"):
        return _is_constant(op.input_value(0).get_node())
    return op.get_type_name() == "Constant"


def _is_attention(product: Any) -> bool:
    """Tell whether a softmax is before or behind a product, with what moves, scales or adds numbers between."""
    between = ("Add", "Convert", "Multiply", "Reshape", "Transpose")

    def behind(op: Any, steps: int) -> bool:
        if op.get_type_name() == "Softmax":
            return True
        return steps > 0 and op.get_type_name() in between and behind(op.input_value(0).get_node(), steps - 1)

    def before(op: Any, steps: int) -> bool:
        readers = [reader.get_node() for reader in op.output(0).get_target_inputs()]
        return any(
            reader.get_type_name() == "Softmax"
            or (steps > 0 and reader.get_type_name() in between and before(reader, steps - 1))
            for reader in readers
        )

    return any(behind(product.input_value(place).get_node(), 3) for place in range(2)) or before(product, 4)


def _save(model: Any, path: Path, facts: Mapping[str, Any]) -> None:
    model.set_rt_info(json.dumps(facts, sort_keys=True), [METADATA_KEY])
    import_openvino().save_model(model, str(path), compress_to_fp16=False)


def _compile(
    path: str | Path, model: Any, num_threads: int | None, changed: Mapping[str, Any] = MappingProxyType({})
) -> Any:
    # Without the precision, processors with bfloat16 instructions compute in bfloat16 and say nothing.
    settings: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
        **changed,
    }
    if num_threads is not None:
        settings["INFERENCE_NUM_THREADS"] = num_threads
    try:
        with kept_signal_stack():
            return import_openvino().Core().compile_model(model, "CPU", settings)
    except Exception as error:  # its exceptions have no public base class
        raise VitpruneError(f"{path}: OpenVINO cannot run it ({_first_line(error)})") from error


def _fixed_batch(image: Any) -> int | None:
    batch = image.partial_shape[0]
    return None if batch.is_dynamic else batch.get_length()


def _refuse_own_operators(path: Path) -> None:
    try:
        graph = onnx.load(path, load_external_data=False).graph
    except Exception as error:  # protobuf's exceptions have no public base class
        raise VitpruneError(f"{path}: not an ONNX file ({_first_line(error)})") from error
    own = next((node.op_type for node in graph.node if node.domain.startswith("com.microsoft")), None)
    if own is not None:
        raise VitpruneError(
            f"{path} has {own}, an operator of ONNX Runtime's own, which OpenVINO cannot run; export it with "
            "`operators` standard"
        )


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[-1]


@contextmanager
def _silence() -> Iterator[None]:
    """Hold back progress bars and advice; errors stay exceptions."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            yield
    finally:
        logging.disable(before)
