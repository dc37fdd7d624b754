"""The feed-forward view of an ONNX graph: find the FFNs, write their weights, remove their neurons.

An FFN is what it computes: a product with constant weights whose input comes, by operators that treat each neuron by
itself, from one or more other such products. Names play no part in that.

Letters: D embedding width, H hidden neurons, I inputs and O outputs of a linear, K kept neurons.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from vitprune.errors import VitpruneError
from vitprune.export.graph import add_constant, attribute, constant, numbers, only_user, producer, replace_constant

# Operators whose result for a neuron depends on that neuron alone, other inputs being constants or such values.
_PLAIN = frozenset({"Add", "Sub", "Identity", "Dropout"})
_ACTIVATIONS = frozenset(
    {"BiasGelu", "Celu", "Elu", "Erf", "FastGelu", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mish", "PRelu"}
    | {"QuickGelu", "Relu", "Selu", "Sigmoid", "Softplus", "Softsign", "Swish", "Tanh"}
    | {"Abs", "Clip", "Div", "Exp", "Log", "Max", "Min", "Mul", "Neg", "Pow", "Reciprocal", "Sqrt", "Where"}
)
_QUANTIZED = re.compile(r"Quantize|^QLinear|^QGemm|^QAttention|Integer|NBits")


@dataclass(frozen=True)
class Linear:
    """A product with a constant matrix, and the bias added to it.

    Attributes:
        product: ``MatMul`` or ``Gemm``.
        add: the ``Add`` of a bias behind it, if there is one.
    """

    product: ir.Node
    add: ir.Node | None

    @property
    def output(self) -> ir.Value:
        """What it gives, the bias included."""
        return (self.add or self.product).outputs[0]

    @property
    def weight_IO(self) -> np.ndarray:
        """The weights, inputs by outputs however the file keeps them."""
        weight = _matrix(self.product.inputs[1])
        return weight.T if attribute(self.product, "transB", 0) else weight

    @property
    def bias_O(self) -> np.ndarray | None:
        """The bias; None without one."""
        place = self.bias_place
        return None if place is None else constant(place[0].inputs[place[1]]).reshape(-1)

    @property
    def bias_place(self) -> tuple[ir.Node, int] | None:
        """Which node reads the bias, and as which input."""
        if self.add is not None:
            return self.add, int(constant(self.add.inputs[1]) is not None)
        has_own = self.product.op_type == "Gemm" and len(self.product.inputs) > 2 and self.product.inputs[2] is not None
        return (self.product, 2) if has_own else None

    @property
    def constants(self) -> tuple[str, ...]:
        """Names of its weights and bias, without those that it shares with other nodes."""
        places = [(self.product, 1), *([] if self.bias_place is None else [self.bias_place])]
        values = [node.inputs[at] for node, at in places]
        return tuple(value.name for value in values if len(list(value.uses())) == 1)


@dataclass(frozen=True)
class GraphFfn:
    """One FFN of a graph; valid until its neurons are removed.

    Attributes:
        name: its position, such as ``"ffn 0"``, and the name of a constant of its output projection.
        num_neurons: H.
        packed: True where one up-projection gives 2H values and neuron j comes from columns j and j + H.
        ups: what computes the hidden neurons.
        down: what reads them.
        scales: nodes (and which of their inputs) with a constant for each neuron, or each of the 2H values.
        partings: what cuts packed values in halves (``Split`` or ``Slice``), and where each begins.
    """

    name: str
    num_neurons: int
    packed: bool
    ups: tuple[Linear, ...]
    down: Linear
    scales: tuple[tuple[ir.Node, int], ...]
    partings: tuple[tuple[ir.Node, int], ...]

    @property
    def hidden(self) -> ir.Value:
        """The hidden activations [..., H] that the output projection reads."""
        return self.down.product.inputs[0]

    def belongs_to(self, module: str) -> bool:
        """Tell whether one of its constants is named after a torch module."""
        inside = re.compile(rf"(^|\.){re.escape(module)}\.")
        return any(inside.search(name) for linear in (*self.ups, self.down) for name in linear.constants)

    def up_columns(self, neurons: np.ndarray) -> np.ndarray:
        """Return the columns of every up-projection that compute ``neurons`` ([n] -> [n] or [2n])."""
        return np.concatenate([neurons, neurons + self.num_neurons]) if self.packed else neurons


def find_linears(model: ir.Model) -> list[Linear]:
    """Find the products with constant matrices, in topological order.

    Args:
        model: from ``read_graph``.
    """
    linears = []
    for node in model.graph:
        plain_gemm = node.op_type == "Gemm" and (
            attribute(node, "alpha", 1.0) == attribute(node, "beta", 1.0) == 1 and not attribute(node, "transA", 0)
        )
        if node.op_type != "MatMul" and not plain_gemm:
            continue
        weight = _matrix(node.inputs[1])
        if weight is None or weight.ndim != 2:
            continue
        add = only_user(node.outputs[0], "Add")
        width = weight.shape[0 if attribute(node, "transB", 0) else 1]
        if add is not None and not any(_is_vector(constant(value), width) for value in add.inputs):
            add = None
        own = node.inputs[2] if plain_gemm and len(node.inputs) > 2 else None
        if own is not None and not _is_vector(constant(own), width):
            continue
        linears.append(Linear(node, add if own is None else None))
    return linears


def _matrix(value: ir.Value) -> np.ndarray | None:
    """Return the numbers of a constant, turned where the file turns them only when it runs."""
    turned = producer(value, "Transpose")
    if turned is None:
        return constant(value)
    array = constant(turned.inputs[0])
    return None if array is None or array.ndim != 2 else array.transpose(attribute(turned, "perm", (1, 0)))


def _is_vector(array: np.ndarray | None, width: int) -> bool:
    return array is not None and array.ndim > 0 and array.size == array.shape[-1] == width


def find_graph_ffns(model: ir.Model) -> list[GraphFfn]:
    """Find the FFNs of a graph, in topological order.

    Behind attention, or with a norm of the hidden activations on the way, a projection is none: there removing a
    neuron would change others.

    Args:
        model: from ``read_graph``; files of torch's two exporters and of ``export_onnx``.

    Returns:
        One entry per FFN, never empty.

    Raises:
        VitpruneError: if there is none, or the weights are quantised or no float32 numbers.
    """
    quantized = next((node.op_type for node in model.graph if _QUANTIZED.search(node.op_type)), None)
    if quantized is not None:
        raise VitpruneError(
            f"its weights are quantised ({quantized}); prune the float32 file, and quantise what comes out"
        )
    linears = find_linears(model)
    by_output = {linear.output: linear for linear in linears}
    ffns: list[GraphFfn] = []
    for linear in linears:
        found = _trace_back(linear, by_output, f"ffn {len(ffns)}")
        if found is not None:
            ffns.append(found)
    if not ffns:
        raise VitpruneError(
            f"no FFN among its {len(linears)} products with constant weights: none reads what another one gives by "
            "element-wise operators alone"
        )
    dtypes = {linear.weight_IO.dtype.name for ffn in ffns for linear in (*ffn.ups, ffn.down)}
    if dtypes != {"float32"}:
        raise VitpruneError(
            f"its weights are {', '.join(sorted(dtypes - {'float32'}))}; "
            "prune the float32 file, and convert what comes out"
        )
    return ffns


def _trace_back(down: Linear, by_output: Mapping[ir.Value, Linear], position: str) -> GraphFfn | None:
    """Return the FFN whose output projection a linear is, if it is one."""
    num_neurons = len(down.weight_IO)
    widths: dict[ir.Value, int] = {}
    nodes: set[ir.Node] = {down.product}
    ups: dict[Linear, int] = {}
    scales: list[tuple[ir.Node, int]] = []
    partings: dict[tuple[ir.Node, int], None] = {}
    ahead = [(down.product.inputs[0], num_neurons)]
    while ahead:
        value, width = ahead.pop()
        if value in widths:
            if widths[value] != width:
                return None
            continue
        widths[value] = width
        linear, node = by_output.get(value), value.producer()
        if linear is not None:
            if linear.weight_IO.shape[1] != width:
                return None
            ups[linear] = width
            continue
        if node is None:
            return None
        half = _find_half(value, width) if width == num_neurons else None
        if half is not None:
            partings[node, half] = None
            ahead.append((node.inputs[0], 2 * width))
        elif node.op_type in _ACTIVATIONS | _PLAIN:
            for at, each in enumerate(node.inputs):
                array = constant(each)
                if array is None:
                    ahead += [] if each is None else [(each, width)]
                elif _is_vector(array, width) and width > 1:
                    scales.append((node, at))
                elif array.size != 1:
                    return None
        else:
            return None
        nodes.add(node)
    acts = any(node.op_type in _ACTIVATIONS for node in nodes)
    packed = set(ups.values()) == {2 * num_neurons}
    if not acts or len(set(ups.values())) > 1 or (packed and {start for _node, start in partings} != {0, num_neurons}):
        return None
    if not all(_stays_inside(value, nodes) for value in widths):
        return None
    order = [linear for linear in by_output.values() if linear in ups]
    return GraphFfn(
        name=f"{position} ({(*down.constants[::-1], down.product.inputs[1].name)[0]})",
        num_neurons=num_neurons,
        packed=packed,
        ups=tuple(order),
        down=down,
        scales=tuple(scales),
        partings=tuple(partings),
    )


def _stays_inside(value: ir.Value, nodes: set[ir.Node]) -> bool:
    # Bounds of a Slice may be computed from the shape of what it cuts; they are written as numbers later.
    users = (user for user, _at in value.uses())
    return not value.is_graph_output() and all(user in nodes or user.op_type == "Shape" for user in users)


def _find_half(value: ir.Value, width: int) -> int | None:
    """Return where a half of 2 x width values begins, if this is one: 0 or width."""
    node = value.producer()
    if node.op_type == "Split":
        parts = attribute(node, "split", None) or (numbers(node.inputs[1]) if len(node.inputs) > 1 else None)
        halves = len(node.outputs) == 2 and (parts is None or tuple(parts) == (width, width))
        last = _is_last(attribute(node, "axis", 0), node.inputs[0])
        return node.outputs.index(value) * width if halves and last else None
    if node.op_type != "Slice" or not 4 <= len(node.inputs) <= 5:
        return None
    axes = numbers(node.inputs[3])
    steps = numbers(node.inputs[4]) if len(node.inputs) > 4 else (1,)
    if axes is None or len(axes) != 1 or not _is_last(axes[0], node.inputs[0]) or steps != (1,):
        return None
    start, end = (_evaluate(bound, node.inputs[0], axes[0], 2 * width) for bound in node.inputs[1:3])
    if None in (start, end):
        return None
    start, end = (min(bound + 2 * width if bound < 0 else bound, 2 * width) for bound in (start, end))
    return start if (start, end) in ((0, width), (width, 2 * width)) else None


def _is_last(axis: int, value: ir.Value) -> bool:
    # Behind operators of ONNX Runtime's own the graph knows no shapes, but there are tokens before the neurons.
    return axis == -1 or (axis == len(value.shape) - 1 if value.shape is not None else axis >= 2)


def _evaluate(value: ir.Value, cut: ir.Value, axis: int, length: int) -> int | None:
    """Return the number that a bound is, which may follow from how long the axis is that it cuts."""
    known = numbers(value)
    if known is not None:
        return known[0] if len(known) == 1 else None
    node = value.producer()
    if node is None:
        return None
    if node.op_type == "Gather":
        shape = producer(node.inputs[0], "Shape")
        at = numbers(node.inputs[1])
        return length if shape is not None and shape.inputs[0] is cut and at == (axis,) else None
    if node.op_type not in ("Add", "Sub", "Mul", "Div"):
        return None
    left, right = (_evaluate(each, cut, axis, length) for each in node.inputs)
    if None in (left, right):
        return None
    return {"Add": left + right, "Sub": left - right, "Mul": left * right, "Div": left // (right or 1)}[node.op_type]


def write_linear(graph: ir.Graph, linear: Linear, weight_IO: np.ndarray, bias_O: np.ndarray | None = None) -> None:
    """Write a linear's weights, and its bias where one is given, which it gets if it has none."""
    weight = weight_IO.T if attribute(linear.product, "transB", 0) else weight_IO
    replace_constant(graph, linear.product, 1, weight.astype(np.float32), name=f"{linear.output.name}_weight")
    if bias_O is None:
        return
    if linear.bias_place is not None:
        # Some exporters write a bias as [1, O].
        node, at = linear.bias_place
        shape = (*constant(node.inputs[at]).shape[:-1], -1)
        replace_constant(graph, node, at, bias_O.astype(np.float32).reshape(shape))
        return
    before = linear.output
    users = list(before.uses())
    bias = add_constant(graph, bias_O.astype(np.float32), f"{before.name}_bias")
    add = ir.node("Add", [before, bias], num_outputs=1)
    after = add.outputs[0]
    after.type, after.shape = before.type, before.shape
    graph.insert_after(linear.product, add)
    for user, at in users:
        user.replace_input_with(at, after)
    if before.is_graph_output():
        after.name, before.name = before.name, f"{before.name}_product"
        graph.outputs[graph.outputs.index(before)] = after


def remove_neurons(graph: ir.Graph, ffn: GraphFfn, kept: np.ndarray) -> None:
    """Make an FFN smaller: columns of its up-projections, rows of its output projection, what parts packed values.

    Args:
        graph: that the FFN was found in; changed in place, its shapes are left to ``forget_shapes``.
        ffn: no longer valid afterwards.
        kept: indices of the neurons that stay, ascending.
    """
    columns = ffn.up_columns(kept)
    for up in ffn.ups:
        write_linear(graph, up, up.weight_IO[:, columns], None if up.bias_O is None else up.bias_O[columns])
    for node, at in ffn.scales:
        array = constant(node.inputs[at])
        replace_constant(graph, node, at, array[..., kept if array.size == ffn.num_neurons else columns])
    for node, start in ffn.partings:
        if node.op_type == "Slice":
            begin = len(kept) if start else 0
            for at, bound in ((1, begin), (2, begin + len(kept))):
                replace_constant(graph, node, at, np.array([bound]), name=f"{node.outputs[0].name}_bound")
        elif "split" in node.attributes:
            node.attributes["split"] = ir.AttrInt64s("split", [len(kept)] * 2)
        elif len(node.inputs) > 1:
            replace_constant(graph, node, 1, np.full(2, len(kept)))
    write_linear(graph, ffn.down, ffn.down.weight_IO[kept])


def match_ffns(ffns: Sequence[GraphFfn], modules: Sequence[str]) -> dict[str, GraphFfn]:
    """Pair torch modules with the FFNs of a graph: by the names of constants where they tell, else in order.

    Args:
        ffns: in topological order.
        modules: names of FFNs, in block order.

    Returns:
        Module name -> FFN; empty where no names tell and there are more of the ones than of the others.
    """
    named = {module: [ffn for ffn in ffns if ffn.belongs_to(module)] for module in modules}
    if all(len(found) == 1 for found in named.values()):
        return {module: found[0] for module, found in named.items()}
    return dict(zip(modules, ffns, strict=True)) if len(modules) == len(ffns) else {}
