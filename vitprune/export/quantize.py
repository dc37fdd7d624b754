"""8-bit integer products: weights quantised once, activations as they come."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path

import onnx
from onnxruntime.quantization import QuantType, quantize_dynamic


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
    stored = onnx.load(source, load_external_data=False).graph.initializer
    external = any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in stored)
    float32 = onnx.load(source)
    # The quantizer infers shapes itself and stumbles over those of weights that it turns.
    del float32.graph.value_info[:]
    with _quiet_quantizer():
        quantize_dynamic(
            float32,
            path,
            op_types_to_quantize=["MatMul", "Gemm"],
            weight_type=QuantType.QInt8,
            per_channel=True,
            use_external_data_format=external,
            # Behind an operator of ONNX Runtime's own the quantizer cannot tell that values are floats.
            extra_options={"MatMulConstBOnly": True, "DefaultTensorType": onnx.TensorProto.FLOAT},
        )
    quantized = onnx.load(path, load_external_data=False)
    onnx.helper.set_model_props(quantized, dict(metadata))
    onnx.save(quantized, path)


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
