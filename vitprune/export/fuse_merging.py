"""Rewrite what merges tokens in an ONNX graph into fewer operators that give the same answers.

Lengths of keys become one operator, and the sizes of tokens of which none has merged yet, all 1, are not multiplied
with. How tokens find their places is left as it is: in ONNX Runtime other operators for it were slower.

Letters: B images, N tokens, M tokens that are left, h heads, d width of a head's keys, F of all heads'.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from vitprune.export.graph import add_constant, attribute, numbers, only_user, permutation, producer, scalar, size


def fuse_merging(model: ir.Model) -> int:
    """Compare keys and weigh tokens by fewer operators, all of ONNX's own.

    Args:
        model: with shapes; changed in place.

    Returns:
        How many steps became simpler.
    """
    graph, count = model.graph, 0
    for node in list(graph):
        if node.op_type == "Div":
            count += _normalise_at_once(graph, node)
        elif node.op_type in ("Mul", "MatMul"):
            count += _leave_ones_out(graph, node)
    if count:
        RemoveUnusedNodesPass()(model)
        graph.sort()
    return count


def find_cosines(keys: ir.Value) -> list[ir.Node]:
    """Find where keys [B, N, F] are made directions head by head, only to be compared with each other.

    A dimension of the keys that is 0 for every token plays no part there.

    Returns:
        The nodes that part them by heads.
    """
    found = []
    for heads, _at in keys.uses():
        directions = only_user(heads.outputs[0], "LpNormalization") if heads.op_type == "Reshape" else None
        flat = None if directions is None else only_user(directions.outputs[0], "Reshape")
        if (
            flat is not None
            and numbers(heads.inputs[1]) == (0, 0, _num_heads(heads), -1)
            and numbers(flat.inputs[1]) == (0, 0, -1)
            and attribute(directions, "axis", -1) == -1
            and all(_is_compared(use, at) for use, at in flat.outputs[0].uses())
        ):
            found.append(heads)
    return found


def read_wider_keys(heads: ir.Node, keys: ir.Value) -> None:
    """Let what ``find_cosines`` found read keys with further dimensions that are 0."""
    heads.replace_input_with(0, keys)
    ahead = [heads]
    while ahead:
        node = ahead.pop()
        if node.op_type != "MatMul":
            for value in node.outputs:
                value.shape = None
                ahead += [user for user, _at in value.uses()]


def _num_heads(heads: ir.Node) -> int | None:
    return size(heads.outputs[0], 2)


def _is_compared(node: ir.Node, at: int) -> bool:
    """Tell whether a node multiplies keys with keys, or hands some tokens' to one that does."""
    if node.op_type == "MatMul":
        return True
    ahead = at == 0 and (
        (node.op_type == "Slice" and len(node.inputs) > 3 and numbers(node.inputs[3]) == (1,))
        or (node.op_type == "Transpose" and tuple(attribute(node, "perm", ())) == (0, 2, 1))
    )
    return ahead and all(_is_compared(user, place) for user, place in node.outputs[0].uses())


def _normalise_at_once(graph: ir.Graph, divide: ir.Node) -> bool:
    """Replace keys divided by their lengths, which are at least some tiny number."""
    keys = divide.inputs[0]
    bounded = producer(divide.inputs[1], "Clip", "Max")
    length = None if bounded is None else producer(bounded.inputs[0], "ReduceL2")
    flat = only_user(divide.outputs[0], "Reshape")
    least = None if bounded is None else scalar(bounded.inputs[1])
    if length is None or flat is None or length.inputs[0] is not keys or least is None or not 0 < least < 1e-9:
        return False
    axes = numbers(length.inputs[1]) if len(length.inputs) > 1 else tuple(attribute(length, "axes", ()))
    turned = permutation(permutation(keys, 0, 2, 1, 3), 0, 2, 1, 3)
    parted = producer(turned or keys, "Reshape")
    heads = size(keys, 2)
    if axes not in ((-1,), (3,)) or parted is None or heads is None or len(keys.shape) != 4:
        return False
    linear, result = parted.inputs[0], flat.outputs[0]
    if not (_is_flat(linear) and _is_flat(result)) or size(linear, 2) != size(result, 2):
        return False
    by_heads = add_constant(graph, np.array([0, 0, heads, -1]), "keys_by_heads")
    nodes = [ir.node("Reshape", [linear, by_heads], num_outputs=1)]
    nodes.append(ir.node("LpNormalization", [nodes[0].outputs[0]], {"axis": -1, "p": 2}, num_outputs=1))
    together = add_constant(graph, np.array([0, 0, -1]), "heads_together")
    nodes.append(ir.node("Reshape", [nodes[1].outputs[0], together], num_outputs=1))
    for node, like in zip(nodes, (keys, keys, result), strict=True):
        node.outputs[0].type, node.outputs[0].shape = like.type, like.shape
    graph.extend(nodes)
    ir.convenience.replace_all_uses_with(result, nodes[2].outputs[0])
    return True


def _is_flat(value: ir.Value) -> bool:
    return value.shape is not None and len(value.shape) == 3 and size(value, 2) is not None


def _leave_ones_out(graph: ir.Graph, node: ir.Node) -> bool:
    """Replace tokens [B, N, D] times sizes of 1 by the tokens, and a product [B, M, N] with such sizes by a sum."""
    ones = producer(node.inputs[1], "Expand")
    if ones is None or scalar(ones.inputs[0]) != 1 or node.outputs[0].is_graph_output():
        return False
    value, result = node.inputs[0], node.outputs[0]
    if value.shape is None or result.shape is None or len(value.shape) != len(result.shape):
        return False
    if node.op_type == "Mul" and list(value.shape) == list(result.shape):
        ir.convenience.replace_all_uses_with(result, value)
        return True
    if node.op_type == "MatMul" and size(node.inputs[1], -1) == 1:
        last = add_constant(graph, np.array([-1]), "last_axis")
        total = ir.node("ReduceSum", [value, last], {"keepdims": 1}, num_outputs=1)
        total.outputs[0].type, total.outputs[0].shape = result.type, result.shape
        graph.append(total)
        ir.convenience.replace_all_uses_with(result, total.outputs[0])
        return True
    return False
