"""Narrower numbers: 8-bit integer products, their activations quantised as they come or beforehand, and float16."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from onnxruntime.transformers.float16 import convert_float_to_float16

PRODUCTS = ["MatMul", "Gemm"]


def quantize(source: Path, path: Path, metadata: Mapping[str, str]) -> None:
    """Quantise the products with weights of a float32 ONNX file, dynamically; products in attention stay float32.

    Weights are signed and scaled by output channel: ONNX Runtime is much slower with unsigned ones.

    Args:
        source: the float32 file.
        path: the file to write, another one; its weights lie beside it if those of ``source`` do.
        metadata: of the new file.

    Source:
        ``onnxruntime.quantization.quantize_dynamic``.
    """
    float32 = _read(source)
    with _quiet_quantizer():
        quantize_dynamic(
            float32,
            path,
            op_types_to_quantize=PRODUCTS,
            weight_type=QuantType.QInt8,
            per_channel=True,
            use_external_data_format=_is_external(source),
            # Behind an operator of ONNX Runtime's own the quantizer cannot tell that values are floats.
            extra_options={"MatMulConstBOnly": True, "DefaultTensorType": onnx.TensorProto.FLOAT},
        )
    _tell(path, metadata)


def quantize_statically(source: Path, path: Path, images: Sequence[np.ndarray], metadata: Mapping[str, str]) -> None:
    """Quantise the products with weights of a float32 ONNX file, by what their inputs are on some images.

    ONNX's own operators say so (QuantizeLinear, DequantizeLinear), so that other runtimes can run it. Products in
    attention and the comparison of tokens that merge stay float32.

    Args:
        source: the float32 file.
        path: the file to write, another one; its weights lie beside it if those of ``source`` do.
        images: as the file reads them, a batch each.
        metadata: of the new file.

    Source:
        ``onnxruntime.quantization.quantize_static``, by smallest and largest values.
    """
    float32 = _read(source)
    weights = {tensor.name for tensor in float32.graph.initializer}
    for number, node in enumerate(float32.graph.node):
        node.name = node.name or f"node_{number}"
    of_activations = [
        node.name for node in float32.graph.node if node.op_type in PRODUCTS and node.input[1] not in weights
    ]
    with _quiet_quantizer():
        quantize_static(
            float32,
            str(path),
            _Images(float32.graph.input[0].name, images),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=PRODUCTS,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            nodes_to_exclude=of_activations,
            use_external_data_format=_is_external(source),
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
        )
    _tell(path, metadata)


def halve(source: Path, path: Path, metadata: Mapping[str, str]) -> None:
    """Write a float32 ONNX file in float16: weights, what is computed, images and answers.

    Args:
        source: the float32 file.
        path: the file to write, another one; its weights lie beside it if those of ``source`` do.
        metadata: of the new file.

    Source:
        ``onnxruntime.transformers.float16``.
    """
    half = convert_float_to_float16(onnx.load(source), keep_io_types=False)
    if _is_external(source):
        onnx.save(half, path, save_as_external_data=True, location=f"{path.name}.data")
    else:
        onnx.save(half, path)
    _tell(path, metadata)


class _Images(CalibrationDataReader):
    def __init__(self, name: str, images: Sequence[np.ndarray]) -> None:
        self.feeds = ({name: each} for each in images)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.feeds, None)


def _is_external(source: Path) -> bool:
    stored = onnx.load(source, load_external_data=False).graph.initializer
    return any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in stored)


def _read(source: Path) -> onnx.ModelProto:
    float32 = onnx.load(source)
    # The quantizer infers shapes itself and stumbles over those of weights that it turns.
    del float32.graph.value_info[:]
    return float32


def _tell(path: Path, metadata: Mapping[str, str]) -> None:
    written = onnx.load(path, load_external_data=False)
    onnx.helper.set_model_props(written, dict(metadata))
    onnx.save(written, path)


@contextmanager
def _quiet_quantizer():
    """Hold back its advice to preprocess the model, which makes ViTs slower."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
