"""Write an ONNX file and prove on real images that it gives torch's answers."""

from __future__ import annotations

import copy
import json
import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

from vitprune.data import Batches, data_config
from vitprune.errors import VitpruneError
from vitprune.evaluation.macs import count_parameters
from vitprune.export.runtime import METADATA_KEY, open_onnx
from vitprune.feed_forward import find_feed_forwards
from vitprune.files import FORMAT_VERSION, atomic_file
from vitprune.models import architecture

# Tolerances for float32 kernels that sum in another order.
PARITY_RTOL, PARITY_ATOL = 1e-3, 1e-4
_PROTOBUF_LIMIT_BYTES = 2**31
# Without an upper bound, torch 2.6 gives up on a dynamic batch.
MAX_BATCH_SIZE = 2**16


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how close it is to torch.

    Attributes:
        path: the ONNX file.
        max_abs_diff: largest absolute difference of a logit over all parity images.
        top1_agreement: share of parity images with the same first answer, in [0, 1].
        num_images: parity images.
        size_bytes: of the file.
    """

    path: Path
    max_abs_diff: float
    top1_agreement: float
    num_images: int
    size_bytes: int


def export_onnx(
    model: nn.Module, path: str | Path, batches: Batches, *, calibration: Iterable[str] = ()
) -> ExportReport:
    """Write a float32 ONNX file with a dynamic batch dimension, check it, and compare it with torch.

    Args:
        model: a torch model in eval mode, dense or pruned; stays as it is.
        path: the file to write; it appears only if every check passed.
        batches: real images (normalised by the model's own transform) and labels, which are not used. Read once.
        calibration: content hashes of the images that the model was calibrated on (``Plan.calibration``), kept in the
            file so that it is not evaluated on them.

    Raises:
        VitpruneError: if there are no images, the model is too large for one file, or ONNX Runtime's logits differ from
            torch's by more than rtol 1e-3, atol 1e-4.
    """
    path = Path(path)
    if 4 * count_parameters(model) >= _PROTOBUF_LIMIT_BYTES:
        raise VitpruneError(f"{architecture(model)} needs more than 2 GB, the limit of one ONNX file")
    model = copy.deepcopy(model).cpu().float().eval()
    for module in model.modules():
        if getattr(module, "fused_attn", False):
            module.fused_attn = False  # some families export only so, and the others get fewer nodes
    with atomic_file(path) as temporary:
        _write(model, temporary, calibration)
        max_abs_diff, agreement, num_images = _measure_parity(model, temporary, batches)
        size_bytes = temporary.stat().st_size
    return ExportReport(path, max_abs_diff, agreement, num_images, size_bytes)


def _write(model: nn.Module, path: Path, calibration: Iterable[str]) -> None:
    config = data_config(model)
    # Two images: torch.export takes a dimension of size 1 for a constant.
    example = torch.zeros(2, *config["input_size"])
    with quiet():
        torch.onnx.export(
            model,
            (example,),
            str(path),
            dynamo=True,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=MAX_BATCH_SIZE)},),
            external_data=False,
            verbose=False,
        )
    graph_model = onnx.load(path)
    _strip(graph_model)
    _name_batch_dimension(graph_model)
    facts = {
        "kind": "onnx",
        "version": FORMAT_VERSION,
        "architecture": architecture(model),
        "num_classes": model.num_classes,
        "label_names": list(getattr(model, "label_names", None) or ()),
        "data_config": config,
        "calibration_sha256": sorted(calibration),
        "widths": {ffn.name: ffn.num_neurons for ffn in find_feed_forwards(model)},
    }
    onnx.helper.set_model_props(graph_model, {METADATA_KEY: json.dumps(facts, sort_keys=True)})
    onnx.checker.check_model(graph_model, full_check=True)
    onnx.save(graph_model, path)


def _strip(graph_model: onnx.ModelProto) -> None:
    """Drop what the exporter writes about this machine: stack traces with local file paths."""
    graph = graph_model.graph
    for item in (graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        del item.metadata_props[:]
        item.doc_string = ""
    for function in graph_model.functions:
        del function.metadata_props[:]
        for node in function.node:
            del node.metadata_props[:]


def _name_batch_dimension(graph_model: onnx.ModelProto) -> None:
    """Call the batch dimension by its name.

    torch 2.6 writes the example's batch size into the shapes of a graph that works for any: its annotations are
    dropped, and ONNX Runtime infers them anew.
    """
    for value in (*graph_model.graph.input, *graph_model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    del graph_model.graph.value_info[:]


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back the exporter's progress messages and warnings; its errors stay exceptions."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _one_image_first(batches: Batches) -> Iterator[Tensor]:
    """Yield all images, the very first alone: a graph that is bound to one batch size fails at once."""
    for position, (images, _labels) in enumerate(batches):
        images = images.cpu().float()
        yield from (part for part in (images[:1], images[1:]) if len(part)) if position == 0 else (images,)


@torch.inference_mode()
def _measure_parity(model: nn.Module, path: Path, batches: Batches) -> tuple[float, float, int]:
    exported = open_onnx(path)
    largest, agreed, count = 0.0, 0, 0
    for images in _one_image_first(batches):
        expected, got = model(images), exported(images)
        difference = (expected - got).abs()
        worst = difference.argmax()
        if not bool((difference <= PARITY_ATOL + PARITY_RTOL * expected.abs()).all()):
            raise VitpruneError(
                "the ONNX graph differs from torch: a logit is "
                f"{got.flatten()[worst]:.6g} in ONNX Runtime and {expected.flatten()[worst]:.6g} in torch"
            )
        largest = max(largest, float(difference.max()))
        agreed += int((expected.argmax(1) == got.argmax(1)).sum())
        count += len(images)
    if count == 0:
        raise VitpruneError("no images to compare ONNX Runtime with torch on")
    return largest, agreed / count, count
