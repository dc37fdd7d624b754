"""Rewrite an ONNX graph into one that runs faster and gives the same answers.

Three changes were worth it in ONNX Runtime on a CPU: attention as one operator; queries, keys and values by a product
each; and computing the last block for the tokens alone that the head reads. What ONNX Runtime fuses by itself when it
opens a file (bias and GELU, scale and matrix product) is left to it; SkipLayerNormalization, which it also has, made
things slower.

Letters: B images, N tokens, D embedding width, H heads, d width of a head.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from vitprune.export.fuse_merging import find_cosines, read_wider_keys
from vitprune.export.graph import (
    add_constant,
    attribute,
    constant,
    numbers,
    only_user,
    permutation,
    producer,
    product_and_bias,
    scalar,
    size,
)

MICROSOFT = "com.microsoft"
# Operators that treat every token by itself; their second input, if any, is a constant or another such value.
_UNARY = frozenset({"Gelu", "Erf", "Sigmoid", "Tanh", "Relu", "Exp", "Sqrt", "Neg", "LayerNormalization"})
_BINARY = frozenset({"Add", "Sub", "Mul", "Div", "Pow"})


def fuse_attention(model: ir.Model) -> int:
    """Replace softmax attention over heads by one ``com.microsoft.MultiHeadAttention`` each.

    Queries, keys and values may come from one packed projection (timm) or from three. What is added to the logits of a
    key whatever the query, as merged tokens have it, rides as one more dimension of queries and keys. Attention with
    another mask or bias, a norm or a rotation of queries and keys is left as it is.

    Args:
        model: with shapes; changed in place.

    Returns:
        How many were replaced.
    """
    graph = model.graph
    found = [match for node in graph if node.op_type == "Softmax" and (match := _match_attention(node))]
    thirds: dict[ir.Value, tuple[ir.Value, ...]] = {}
    riders: dict[tuple[ir.Value, int, int, float], ir.Value] = {}
    for query, key, value, mask, num_heads, scale, result in found:
        inputs = []
        for linear, part in (query, key, value):
            if part is not None and linear not in thirds:
                thirds[linear] = _part_projection(graph, linear) or _split(graph, linear)
            inputs.append(linear if part is None else thirds[linear][part])
        if mask is not None:
            width = size(inputs[0], 2) // num_heads
            rider = mask, num_heads, width, scale
            if rider not in riders:
                riders[rider] = _spread_over_keys(graph, *rider)
            inputs[0] = _widen(graph, inputs[0], num_heads, 1.0)
            compared = find_cosines(inputs[1])
            # The keys' bias adds the same to all logits of a query, which the softmax does not see.
            inputs[1] = _widen(graph, inputs[1], num_heads, 0.0 if compared else None)
            for heads in compared:
                read_wider_keys(heads, inputs[1])
            inputs[1] = _add(graph, inputs[1], riders[rider])
        fused = ir.node(
            "MultiHeadAttention", inputs, {"num_heads": num_heads, "scale": scale}, domain=MICROSOFT, num_outputs=1
        )
        fused.outputs[0].shape, fused.outputs[0].type = result.shape, result.type
        graph.append(fused)
        ir.convenience.replace_all_uses_with(result, fused.outputs[0])
    if found:
        model.opset_imports[MICROSOFT] = 1
        _tidy(model)
    return len(found)


def _match_attention(softmax: ir.Node):
    """Return (query, key, value, mask, heads, scale, the value that the fused node gives), or None.

    Each of the first three is (value [B, N, D], None) or (packed value [B, N, 3 D], which third). The mask is None, or
    what is added to the logits of all queries [B, 1, 1, N].
    """
    read = only_user(softmax.outputs[0], "MatMul")
    turned = None if read is None else only_user(read.outputs[0], "Transpose")
    if read is None or read.inputs[0] is not softmax.outputs[0] or turned is None:
        return None
    flat = only_user(turned.outputs[0], "Reshape")
    if (
        flat is None
        or tuple(attribute(turned, "perm", ())) != (0, 2, 1, 3)
        or attribute(softmax, "axis", -1) not in (-1, 3)
    ):
        return None
    logits, mask = _unmasked(softmax.inputs[0])
    scores, scale = _unscaled(logits)
    product = producer(scores, "MatMul")
    if product is None or only_user(product.outputs[0], "Softmax", "Mul", "Div", "Add") is None:
        return None
    query, of_query = _unscaled(product.inputs[0])
    key, of_key = _unscaled(product.inputs[1])
    turned_key = permutation(key, 0, 1, 3, 2)
    if turned_key is not None:
        turned_key, inner = _unscaled(turned_key)
        of_key *= inner
        key_source = _without_heads(turned_key)
    else:
        key_source = _from_heads(permutation(key, 0, 2, 3, 1))
    sources = (_without_heads(query), key_source, _without_heads(read.inputs[1]))
    num_heads, width = size(query, 1), size(flat.outputs[0], 2)
    if None in sources or num_heads is None or width is None or len(flat.outputs[0].shape) != 3:
        return None
    # One more dimension of queries and keys needs them in projections of their own.
    if mask is not None and not all(part is None and _projection(linear) for linear, part in sources[:2]):
        return None
    return *sources, mask, num_heads, scale * of_query * of_key, flat.outputs[0]


def _unmasked(logits: ir.Value) -> tuple[ir.Value, ir.Value | None]:
    """Part logits from what is added for each key, the same for all heads and queries."""
    add = producer(logits, "Add")
    for value, mask in (add.inputs, reversed(add.inputs)) if add is not None else ():
        if mask.shape is not None and len(mask.shape) == 4 and size(mask, 1) == size(mask, 2) == 1:
            return value, mask
    return logits, None


def _unscaled(value: ir.Value) -> tuple[ir.Value, float]:
    """Look through multiplications by a number."""
    scale = 1.0
    while (node := producer(value, "Mul", "Div")) is not None:
        factors = [scalar(each) for each in node.inputs]
        if node.op_type == "Mul" and factors[0] is not None:
            value, scale = node.inputs[1], scale * factors[0]
        elif factors[1] is not None:
            value, scale = node.inputs[0], scale * (factors[1] if node.op_type == "Mul" else 1 / factors[1])
        else:
            break
    return value, scale


def _without_heads(value: ir.Value):
    """Return where a value [B, H, N, d] comes from: a third of a packed projection, or a projection of its own."""
    node = producer(value, "Squeeze", "Gather")
    if node is None:
        return _from_heads(permutation(value, 0, 2, 1, 3))
    packed, part = node.inputs[0], None
    if node.op_type == "Gather" and attribute(node, "axis", 0) == 0 and scalar(node.inputs[1]) is not None:
        part = int(scalar(node.inputs[1]))
    cut = producer(packed, "Slice")
    if node.op_type == "Squeeze" and cut is not None and len(cut.inputs) >= 4 and numbers(cut.inputs[3]) == (0,):
        starts, ends = numbers(cut.inputs[1]), numbers(cut.inputs[2])
        if starts is not None and ends is not None and ends[0] == starts[0] + 1:
            packed, part = cut.inputs[0], starts[0]
    parting = producer(packed, "Split")
    if node.op_type == "Squeeze" and parting is not None and attribute(parting, "axis", 0) == 0:
        packed, part = parting.inputs[0], parting.outputs.index(packed)
    headed = None if part is None else permutation(packed, 2, 0, 3, 1, 4)
    shaped = producer(headed, "Reshape")
    if shaped is None or size(headed, 2) != 3 or shaped.inputs[0].shape is None or len(shaped.inputs[0].shape) != 3:
        return None
    return shaped.inputs[0], part % 3


def _projection(linear: ir.Value) -> tuple[ir.Value, np.ndarray, np.ndarray] | None:
    """Return what a linear layer reads, its weights and its bias; None where it is no product with constant weights."""
    add = producer(linear, "Add")
    product, bias_value = (producer(linear, "MatMul"), None) if add is None else product_and_bias(add)
    weight = None if product is None else constant(product.inputs[1])
    if weight is None or weight.ndim != 2:
        return None
    bias = np.zeros(weight.shape[1], weight.dtype) if add is None else constant(bias_value)
    return None if bias is None or bias.shape != weight.shape[1:] else (product.inputs[0], weight, bias)


def _widen(graph: ir.Graph, linear: ir.Value, num_heads: int, number: float | None) -> ir.Value:
    """Compute a projection whose heads have one dimension more, which is a number for all tokens; None: 0, no bias."""
    read, weight, bias = _projection(linear)
    wide = np.pad(weight.reshape(len(weight), num_heads, -1), ((0, 0), (0, 0), (0, 1))).reshape(len(weight), -1)
    product = ir.node("MatMul", [read, add_constant(graph, wide, f"{linear.name}_wide_weight")], num_outputs=1)
    _describe(product.outputs[0], linear, wide.shape[1])
    graph.append(product)
    if number is None:
        return product.outputs[0]
    wide_bias = np.pad(bias.reshape(num_heads, -1), ((0, 0), (0, 1)), constant_values=number).reshape(-1)
    return _add(graph, product.outputs[0], add_constant(graph, wide_bias, f"{linear.name}_wide_bias"))


def _spread_over_keys(graph: ir.Graph, mask: ir.Value, num_heads: int, width: int, scale: float) -> ir.Value:
    """Return what to add to keys with one dimension more: queries of 1 there then add a mask to the logits."""
    dimension = np.zeros((num_heads, width + 1), np.float32)
    dimension[:, width] = 1 / scale
    spread = add_constant(graph, dimension.reshape(-1), "last_dimension")
    nodes = []
    column = permutation(_unsqueezed(mask), 0, 2, 1)
    if column is None:
        nodes.append(ir.node("Reshape", [mask, add_constant(graph, np.array([0, -1, 1]), "by_token")], num_outputs=1))
        column = nodes[0].outputs[0]
    nodes.append(ir.node("Mul", [column, spread], num_outputs=1))
    for node, last in zip(reversed(nodes), (dimension.size, 1), strict=False):
        node.outputs[0].type = mask.type
        node.outputs[0].shape = ir.Shape([mask.shape[0], mask.shape[3], last])
    graph.extend(nodes)
    return nodes[-1].outputs[0]


def _unsqueezed(mask: ir.Value) -> ir.Value | None:
    """Return the values [B, 1, N] that a mask [B, 1, 1, N] was made of."""
    node = producer(mask, "Unsqueeze")
    whole = node is not None and node.inputs[0].shape is not None and len(node.inputs[0].shape) == 3
    return node.inputs[0] if whole and size(node.inputs[0], 1) == 1 else None


def _add(graph: ir.Graph, value: ir.Value, other: ir.Value) -> ir.Value:
    node = ir.node("Add", [value, other], num_outputs=1)
    _describe(node.outputs[0], value, size(value, 2))
    graph.append(node)
    return node.outputs[0]


def _from_heads(headed: ir.Value | None):
    shaped = producer(headed, "Reshape")
    if shaped is None or shaped.inputs[0].shape is None or len(shaped.inputs[0].shape) != 3 or len(headed.shape) != 4:
        return None
    whole, heads, width = size(shaped.inputs[0], 2), size(headed, 2), size(headed, 3)
    return (shaped.inputs[0], None) if None not in (whole, heads, width) and whole == heads * width else None


def unspread_biases(model: ir.Model) -> int:
    """Add a bias to tokens as it is, where a graph gives it to every token first.

    Args:
        model: with shapes; changed in place.

    Returns:
        How many.
    """
    count = 0
    for node in model.graph:
        for at, value in enumerate(node.inputs if node.op_type == "Add" else ()):
            spread, other = producer(value, "Expand"), node.inputs[1 - at]
            bias = None if spread is None else constant(spread.inputs[0])
            known = other.shape is not None and node.outputs[0].shape is not None
            if bias is not None and bias.ndim == 1 and known and list(other.shape) == list(node.outputs[0].shape):
                node.replace_input_with(at, spread.inputs[0])
                count += 1
                break
    if count:
        _tidy(model)
    return count


def skip_unread_tokens(model: ir.Model) -> int:
    """Compute behind the last attention only what the head reads of its tokens.

    A head on the class token leaves the other tokens' queries, attention, projection and FFN of the last block unread.

    Args:
        model: with shapes; changed in place.

    Returns:
        Matrix products that became smaller.
    """
    graph = model.graph
    read, count = _find_read_tokens(graph)
    if read is None:
        return 0
    nodes = list(graph)
    num_tokens = read.shape[1]
    narrow: set[ir.Node] = set()
    for node in reversed(nodes):
        if not _is_per_token(node, num_tokens):
            continue
        uses = [use for result in node.outputs for use in result.uses()]
        if node.outputs[0] is read or (uses and all(user in narrow and _narrows(user, at) for user, at in uses)):
            narrow.add(node)
    shrunk = sum(node.op_type == "MatMul" for node in narrow)
    if not shrunk:
        return 0
    narrowed: dict[ir.Value, ir.Value] = {}

    def first_tokens(value: ir.Value) -> ir.Value:
        if value not in narrowed:
            axes = [add_constant(graph, np.array([number]), f"first_tokens_{number}") for number in (0, count, 1)]
            cut = ir.node("Slice", [value, *axes], num_outputs=1)
            graph.append(cut)
            narrowed[value] = cut.outputs[0]
        return narrowed[value]

    for node in nodes:
        if node not in narrow:
            continue
        inputs = [
            value if value is None or not _has_tokens(value, num_tokens) or not _narrows(node, at)
            else first_tokens(value)
            for at, value in enumerate(node.inputs)
        ]  # fmt: skip
        attributes = {name: each.value for name, each in node.attributes.items()}
        smaller = ir.node(node.op_type, inputs, attributes, domain=node.domain, num_outputs=len(node.outputs))
        graph.append(smaller)
        narrowed.update(zip(node.outputs, smaller.outputs, strict=True))
    ir.convenience.replace_all_uses_with(read, narrowed[read])
    _tidy(model)
    return shrunk


def _find_read_tokens(graph: ir.Graph) -> tuple[ir.Value | None, int]:
    """Return the value [B, N, D] of which only the first tokens are read, and how many."""
    for node in reversed(list(graph)):
        if node.op_type != "Gather" or attribute(node, "axis", 0) != 1 or not node.inputs[0].uses():
            continue
        value = node.inputs[0]
        users = [user for user, _at in value.uses()]
        places = [
            scalar(user.inputs[1]) if user.op_type == "Gather" and attribute(user, "axis", 0) == 1 else None
            for user in users
        ]
        if None in places or min(places) < 0 or value.shape is None or len(value.shape) != 3:
            return None, 0
        num_tokens, count = value.shape[1], int(max(places)) + 1
        if isinstance(num_tokens, int):
            return (value, count) if count < num_tokens else (None, 0)
        # Any number of patches stands behind them, as long as it is known to be the same number everywhere.
        return (value, count) if num_tokens.value is not None else (None, 0)
    return None, 0


def _is_per_token(node: ir.Node, num_tokens: int | ir.SymbolicDim) -> bool:
    """Tell whether a node's result for a token depends on that token alone, attention's queries among them."""
    if not all(_has_tokens(result, num_tokens) and not result.is_graph_output() for result in node.outputs):
        return False
    if node.op_type == "Split":
        return attribute(node, "axis", 0) in (-1, 2)
    if node.op_type == "LayerNormalization":
        return attribute(node, "axis", -1) in (-1, 2)
    if node.op_type == "MatMul":
        weight = constant(node.inputs[1])
        return weight is not None and weight.ndim == 2
    if node.op_type == "MultiHeadAttention":
        return len(node.inputs) == 3
    if node.op_type in _BINARY:
        return all(value.shape is not None for value in node.inputs)
    return node.op_type in _UNARY


def _narrows(node: ir.Node, at: int) -> bool:
    return at == 0 or node.op_type in _BINARY


def _has_tokens(value: ir.Value, num_tokens: int | ir.SymbolicDim) -> bool:
    return value.shape is not None and len(value.shape) == 3 and value.shape[1] == num_tokens


def _part_projection(graph: ir.Graph, packed: ir.Value) -> tuple[ir.Value, ...] | None:
    """Compute queries, keys and values by a product each: that is faster than one product and a split.

    None where they are no product with constant weights.
    """
    found = _projection(packed)
    if found is None:
        return None
    read, weight, bias = found
    width = weight.shape[1] // 3
    parts = []
    for number, name in enumerate(("queries", "keys", "values")):
        columns = slice(number * width, (number + 1) * width)
        part = add_constant(graph, weight[:, columns], f"{packed.name}_{name}_weight")
        nodes = [ir.node("MatMul", [read, part], num_outputs=1)]
        if producer(packed, "Add") is not None:
            part = add_constant(graph, bias[columns], f"{packed.name}_{name}_bias")
            nodes.append(ir.node("Add", [nodes[0].outputs[0], part], num_outputs=1))
        for node in nodes:
            _describe(node.outputs[0], packed, width)
        graph.extend(nodes)
        parts.append(nodes[-1].outputs[0])
    return tuple(parts)


def _split(graph: ir.Graph, packed: ir.Value) -> tuple[ir.Value, ...]:
    """Part the last axis in three; the sizes are an input, which opset 13 has as well."""
    width = size(packed, 2) // 3
    sizes = add_constant(graph, np.full(3, width, np.int64), f"thirds_{width}")
    parting = ir.node("Split", [packed, sizes], {"axis": -1}, num_outputs=3)
    for each in parting.outputs:
        _describe(each, packed, width)
    graph.append(parting)
    return tuple(parting.outputs)


def _describe(value: ir.Value, like: ir.Value, width: int) -> None:
    """Give a value the type and shape of another one, but for its width."""
    value.type, value.shape = like.type, ir.Shape([*like.shape[:2], width])


def _tidy(model: ir.Model) -> None:
    RemoveUnusedNodesPass()(model)
    model.graph.sort()
