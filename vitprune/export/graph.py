"""The vocabulary of everything that reads or changes an ONNX graph.

Letters: B images, N tokens, D embedding width, H hidden neurons.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass, ShapeInferencePass

from vitprune.errors import VitpruneError
from vitprune.export.runtime import check_finite_initializers


def read_graph(path: str | Path) -> ir.Model:
    """Read an ONNX file, with every constant as an initializer and with the shapes that follow from its inputs.

    Weights that lie in a file beside it are read as well.

    Raises:
        VitpruneError: if there is no such file, it is no ONNX file, or the file with its weights is missing.
    """
    path = Path(path)
    if not path.is_file():
        raise VitpruneError(f"{path}: no such file")
    try:
        model = ir.load(path)
    except Exception as error:  # protobuf's exceptions have no public base class
        raise VitpruneError(f"{path}: not an ONNX file ({str(error).splitlines()[0]})") from error
    try:
        ir.external_data.load_to_model(model)
    except OSError as error:
        raise VitpruneError(f"{path}: its weights cannot be read ({error})") from error
    check_finite_initializers(path)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    return ShapeInferencePass()(model).model


def producer(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """Return the node that computes a value, if it is one of these operators."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type in op_types else None


def only_user(value: ir.Value, *op_types: str) -> ir.Node | None:
    """Return the only node that reads a value, if it is one of these operators."""
    uses = list(value.uses())
    return uses[0][0] if len(uses) == 1 and not value.is_graph_output() and uses[0][0].op_type in op_types else None


def constant(value: ir.Value | None) -> np.ndarray | None:
    """Return the numbers of a constant; None for anything that is computed or fed."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def scalar(value: ir.Value | None) -> float | None:
    """Return the number of a constant with one element."""
    array = constant(value)
    return float(array.reshape(())) if array is not None and array.size == 1 else None


def numbers(value: ir.Value | None) -> tuple[int, ...] | None:
    """Return the integers of a constant list such as a shape."""
    array = constant(value)
    return None if array is None else tuple(int(number) for number in array.reshape(-1))


def attribute(node: ir.Node, name: str, default):
    """Return an attribute's value."""
    found = node.attributes.get(name)
    return default if found is None else found.value


def permutation(value: ir.Value | None, *perm: int) -> ir.Value | None:
    """Return what is transposed by exactly this permutation into a value."""
    node = producer(value, "Transpose")
    matches = node is not None and tuple(attribute(node, "perm", ())) == perm
    return node.inputs[0] if matches else None


def product_and_bias(add: ir.Node) -> tuple[ir.Node | None, ir.Value | None]:
    """Return the matrix product and the other operand that a node adds, in whichever order it names them."""
    for product, bias in (add.inputs, reversed(add.inputs)):
        node = producer(product, "MatMul")
        if node is not None:
            return node, bias
    return None, None


def size(value: ir.Value, axis: int) -> int | None:
    """Return how long an axis is, where the graph says so."""
    shape = value.shape
    if shape is None or not -len(shape) <= axis < len(shape):
        return None
    return shape[axis] if isinstance(shape[axis], int) else None


def add_constant(graph: ir.Graph, array: np.ndarray, name: str) -> ir.Value:
    """Add an initializer under a name that is not taken yet."""
    unique, number = name, 0
    while unique in graph.initializers:
        number += 1
        unique = f"{name}_{number}"
    value = ir.Value(
        name=unique,
        shape=ir.Shape(array.shape),
        type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
        const_value=ir.tensor(np.ascontiguousarray(array).reshape(array.shape), name=unique),
    )
    graph.register_initializer(value)
    return value


def replace_constant(graph: ir.Graph, node: ir.Node, at: int, array: np.ndarray, *, name: str | None = None) -> None:
    """Let a node read other numbers at one of its inputs; other nodes that share a constant keep theirs.

    Args:
        graph: that the node is in.
        node: changed in place.
        at: which input.
        array: the numbers.
        name: of the constant, where it takes the place of something computed.
    """
    old = node.inputs[at]
    if not old.is_initializer() or len(list(old.uses())) > 1:
        node.replace_input_with(at, add_constant(graph, array, name or old.name))
        return
    old.const_value = ir.tensor(np.ascontiguousarray(array).reshape(array.shape), name=old.name)
    old.shape = ir.Shape(array.shape)


def forget_shapes(graph: ir.Graph) -> None:
    """Drop the shapes of everything computed in between, which a change of the weights makes wrong."""
    for node in graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = None
