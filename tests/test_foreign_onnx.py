"""ONNX files that vitprune did not write: built by hand, so that nothing of the exporter's is taken for granted."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import vitprune
from vitprune.export.runtime import check_finite_initializers

TOLD = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
IMAGES = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(5) % 3
WEIGHT = np.random.default_rng(0).normal(size=(48, 3)).astype(np.float32)


def write(path, *, dtype=np.float32, batch="batch", channels_last=False, ends=(), inputs=(), outputs=(), weight=WEIGHT):
    """Write images -> flatten -> a linear layer -> whatever ``ends`` it."""
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    shape = [batch, 4, 4, 3] if channels_last else [batch, 3, 4, 4]
    turn = [helper.make_node("Transpose", ["x"], ["turned"], perm=[0, 3, 1, 2])] if channels_last else []
    nodes = [
        *turn,
        helper.make_node("Flatten", ["turned" if channels_last else "x"], ["flat"]),
        helper.make_node("MatMul", ["flat", "head.weight"], ["scores"]),
        *ends,
    ]
    last = nodes[-1].output[0]
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", kind, shape), *inputs],
        [helper.make_tensor_value_info(last, kind, [batch, 3]), *outputs],
        [numpy_helper.from_array(weight.astype(dtype), "head.weight")],
    )
    onnx.save(helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)]), path)
    return path


def right_answers():
    return tuple((torch.from_numpy(IMAGES.flatten(1).numpy() @ WEIGHT).argmax(1) == LABELS).tolist())


@pytest.mark.parametrize(
    "made",
    [{}, {"dtype": np.float16}, {"dtype": np.float64}, {"batch": 2}, {"channels_last": True}],
    ids=["plain", "float16", "float64", "fixed", "channels last"],
)
def test_a_file_is_fed_what_it_asks_for(made, tmp_path):
    opened = vitprune.open_onnx(write(tmp_path / "a.onnx", **made), transform=TOLD)
    accuracy = vitprune.evaluate(opened, [(IMAGES, LABELS)])
    assert accuracy.correct == right_answers()
    assert not accuracy.are_shares
    assert opened.data_config["input_size"] == [3, 4, 4]


def test_a_softmax_at_the_end_is_said_and_counted_once(tmp_path):
    ends = [helper.make_node("Softmax", ["scores"], ["shares"], axis=1)]
    accuracy = vitprune.evaluate(
        vitprune.open_onnx(write(tmp_path / "a.onnx", ends=ends), transform=TOLD), [(IMAGES, LABELS)]
    )
    assert accuracy.are_shares
    assert accuracy.correct == right_answers()


REFUSED = {
    "does not say which transform": ({}, None),
    "its input 'x' is uint8": ({"dtype": np.uint8}, TOLD),
    r"2 inputs \(x, scale\)": ({"inputs": [helper.make_tensor_value_info("scale", TensorProto.FLOAT, [1])]}, TOLD),
    r"2 outputs \(scores, flat\)": (
        {"outputs": [helper.make_tensor_value_info("flat", TensorProto.FLOAT, None)]},
        TOLD,
    ),
    "head.weight holds NaN or infinity": ({"weight": np.where(np.arange(3) == 1, np.nan, WEIGHT)}, TOLD),
    "transform has input_size, mean": ({}, {**TOLD, "crop": 0.9}),
    r"its transform gives \[3, 8, 8\]": ({}, {**TOLD, "input_size": (3, 8, 8)}),
    "does not say which std": ({}, {"mean": (0.5, 0.5, 0.5)}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_a_file_cannot_be_fed_is_named(message, tmp_path):
    made, told = REFUSED[message]
    path = tmp_path / "a.onnx"
    if made.get("dtype") is np.uint8:
        cast = helper.make_node("Cast", ["x"], ["wide"], to=TensorProto.FLOAT)
        flat = helper.make_node("Flatten", ["wide"], ["scores"])
        image = helper.make_tensor_value_info("x", TensorProto.UINT8, ["batch", 3, 4, 4])
        out = helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", 48])
        graph = helper.make_graph([cast, flat], "graph", [image], [out])
        onnx.save(helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)]), path)
    else:
        write(path, **made)
    with pytest.raises(vitprune.VitpruneError, match=message) as refusal:
        vitprune.open_onnx(path, transform=told)
    assert "\n" not in str(refusal.value)
    assert str(path) in str(refusal.value) or "transform has" in message


def test_images_of_another_size_are_refused(tmp_path):
    opened = vitprune.open_onnx(write(tmp_path / "a.onnx"), transform=TOLD)
    with pytest.raises(vitprune.VitpruneError, match=r"reads images \[3, 4, 4\].* these are \[3, 8, 8\]"):
        vitprune.evaluate(opened, [(torch.zeros(2, 3, 8, 8), LABELS[:2])])


def test_a_mask_of_minus_infinity_is_no_broken_weight(tmp_path):
    mask = np.where(np.eye(48, 3) > 0, -np.inf, 0)
    check_finite_initializers(write(tmp_path / "a.onnx", weight=mask))
    with pytest.raises(vitprune.VitpruneError, match="head.weight"):
        check_finite_initializers(write(tmp_path / "b.onnx", weight=-mask))
