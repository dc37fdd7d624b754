"""Units: what can be taken out of a model by itself, in groups of the same kind and layer.

A *unit* owns rows of the linear layers that compute it and columns of the one that reads it. A neuron is one input
feature of an FFN's output projection, after the activation (and after the gate of a gated FFN): it owns a row of
``fc1`` and a column of ``fc2``. Of an attention, a dimension of queries and keys owns a row of ``q`` and ``k`` for each
head, one of values a row of ``v`` and a column of ``proj`` for each head, and a head all that is its own. A layer as a
whole is a unit too: what is left of it is the bias of its output projection. One index rule removes units of any kind.
This is the only file that knows FFN classes.

Letters: B images, N tokens, D embedding width, H units of a group (hidden neurons of an FFN).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.layers import GluMlp, Mlp, SwiGLU
from timm.models.tiny_vit import NormMlp
from torch import Tensor, nn

from vitprune.entry import entry
from vitprune.errors import VitpruneError
from vitprune.models.attention import HEADS, QK, VO, SplitAttention, check_attention, find_attention
from vitprune.models.left_out import is_left_out

FFN, LAYERS = "ffn", "layers"
# Kinds of units, with what one of each is called.
KINDS: Mapping[str, str] = {
    FFN: "neuron",
    QK: "query/key dimension",
    VO: "value dimension",
    HEADS: "head",
    LAYERS: "layer",
}

_SUPPORTED = "Mlp, GluMlp, SwiGLUPacked, SwiGLU, NormMlp"
# Whatever stands beside attention under such a name is meant to be an FFN.
_FFN_NAME = re.compile(r"^(mlp|ffn|feed_?forward)", re.IGNORECASE)
_ATTENTION_NAME = re.compile(r"attn|attention|xca|mhsa", re.IGNORECASE)
# Blocks behind it run on the class token alone: next to no work, and they cannot be run by their states.
_OF_CLASS_TOKEN = re.compile(r"^ClassAtt")


@dataclass(frozen=True)
class Slice:
    """The part of one linear layer that belongs to the units of a group.

    Attributes:
        linear: name of the layer.
        axis: 0 for rows of its weight (outputs, with their biases), 1 for columns (inputs).
        copies: how often the units stand in it, one whole set behind the other: 2 where one layer computes gate and
            value, the number of heads where each has its own dimensions.
        unit_size: rows or columns of one unit in one copy, where it is not the group's.
    """

    linear: str
    axis: int
    copies: int = 1
    unit_size: int | None = None

    def indices(self, units: Tensor, num_units: int, unit_size: int = 1) -> Tensor:
        """Return the rows or columns of some units, where the layer has ``num_units`` of them.

        >>> Slice("fc1", axis=0, copies=2).indices(torch.tensor([0, 2]), num_units=3)
        tensor([0, 2, 3, 5])
        """
        places = (units.unsqueeze(1) * unit_size + torch.arange(unit_size, device=units.device)).flatten()
        return torch.cat([places + copy * num_units * unit_size for copy in range(self.copies)])


@dataclass(frozen=True)
class Group:
    """Units of one kind in one place; holds no module, so it can travel and be compared.

    Attributes:
        name: of the module, such as ``"blocks.3.mlp"``.
        kind: key of ``KINDS``.
        num_units: H, at least 1.
        owned: what goes with a unit when it is removed; rows before columns. Nothing where the layer goes as a whole.
        read_by: name of the linear layer whose input holds the units; of queries and keys, which no layer reads, that
            of the queries.
        unit_size: features of that input that one unit has.
    """

    name: str
    kind: str
    num_units: int
    owned: tuple[Slice, ...]
    read_by: str
    unit_size: int = 1

    @property
    def module(self) -> str:
        """Name of the FFN or attention that the units are in."""
        return self.name.removesuffix(f".{self.kind}")

    @property
    def silenced(self) -> Slice:
        """The part that is zeroed to mask units, which is columns of their reader or rows of the queries."""
        axis = 0 if self.kind == QK else 1
        found = (part for part in self.owned if part.linear == self.read_by and part.axis == axis)
        return next(found, Slice(self.read_by, axis=axis))

    def indices(self, part: Slice, units: Tensor) -> Tensor:
        """Return the rows or columns of some units in a layer that they own a part of (int64)."""
        return part.indices(units, self.num_units, part.unit_size or self.unit_size)

    @property
    def num_neurons(self) -> int:
        """``num_units``, as the units of an FFN are called."""
        return self.num_units

    @property
    def up_projs(self) -> tuple[str, ...]:
        """Names of the linear layers that compute the units."""
        return tuple(part.linear for part in self.owned if part.axis == 0)

    @property
    def down_proj(self) -> str:
        """``read_by``, as an FFN's reader is called."""
        return self.read_by

    def columns(self, units: Tensor) -> Tensor:
        """Return the input features of the reader that some units are (int64)."""
        return self.indices(self.silenced, units)


# What an FFN's units were called before there were others.
FeedForward = Group


def kind_of(group: str) -> str:
    """Return the kind of a group's units, by its name.

    >>> kind_of("blocks.0.attn.qk"), kind_of("blocks.0.mlp")
    ('qk', 'ffn')
    """
    kind = group.rpartition(".")[2]
    return kind if kind in (QK, VO, HEADS, LAYERS) else FFN


def module_of(group: str) -> str:
    """Return the name of the FFN or attention that a group's units are in, by the group's name.

    >>> module_of("blocks.0.attn.qk"), module_of("blocks.0.mlp")
    ('blocks.0.attn', 'blocks.0.mlp')
    """
    return group.removesuffix(f".{kind_of(group)}")


@entry
def find_groups(model: nn.Module, kinds: Sequence[str] = (FFN,)) -> list[Group]:
    """Find the groups of units of some kinds, in block order.

    Args:
        model: timm Vision Transformer.
        kinds: keys of ``KINDS``.

    Returns:
        Never empty.

    Raises:
        VitpruneError: if a kind is unknown, or the model has none of it that could be removed.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=1)
    >>> [(group.name, group.kind, group.num_units) for group in find_groups(model)]
    [('blocks.0.mlp', 'ffn', 768)]
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise VitpruneError(f"kinds of units are {', '.join(KINDS)}, got '{unknown[0]}'")
    return [group for kind in kinds for group in _FIND[kind](model)]


@entry
def find_feed_forwards(model: nn.Module) -> list[Group]:
    """Find the FFNs of the Transformer blocks, in block order.

    Args:
        model: timm Vision Transformer.

    Returns:
        One group of neurons per FFN, never empty.

    Raises:
        VitpruneError: if the model has no FFN that belongs to a Transformer block, or one where removing a neuron
            would not equal masking it.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=2)
    >>> [(ffn.name, ffn.num_neurons) for ffn in find_feed_forwards(model)]
    [('blocks.0.mlp', 768), ('blocks.1.mlp', 768)]
    """
    ffns = find_left(model)
    if not ffns:
        raise VitpruneError(
            f"{type(model).__name__} has no supported FFN: no block with attention has an FFN of type {_SUPPORTED}"
        )
    return ffns


def find_left(model: nn.Module) -> list[Group]:
    """Find the FFNs that a model has left; errors as in ``find_feed_forwards``, but there may be none.

    >>> import timm
    >>> find_left(timm.create_model("resnet18"))
    []
    """
    found, names = [], {}
    for name, module in model.named_modules(remove_duplicate=False):
        if is_left_out(module) or not _is_ffn(name, module) or not _has_attention(model, name):
            continue
        if module in names:
            raise VitpruneError(f"{name} and {names[module]} are one FFN that runs twice, which cannot be pruned yet")
        names[module] = name
        found.append(_describe(name, module))
    return found


def _find_in_attention(model: nn.Module, kind: str) -> list[Group]:
    """Return the groups of a kind that attention has, one for each that is left; all must be ``SplitAttention``."""
    present = {name: module for name, module in find_attention(model).items() if not is_left_out(module)}
    check_attention(model, [kind])
    whole = [name for name, module in present.items() if type(module) is not SplitAttention]
    if whole:
        raise VitpruneError(
            f"{whole[0]}: {KINDS[kind]}s of {type(present[whole[0]]).__name__} are no units yet; split it first "
            "(split_attention)"
        )
    return [_group_in_attention(name, module, kind) for name, module in present.items()]


def _group_in_attention(name: str, attention: SplitAttention, kind: str) -> Group:
    heads, qk_width, v_width = attention.num_heads, attention.qk_width, attention.v_width
    if kind == QK:
        owned = tuple(Slice(f"{name}.{linear}", axis=0, copies=heads) for linear in ("q", "k"))
        return Group(f"{name}.{QK}", QK, qk_width, owned, f"{name}.q")
    if kind == VO:
        owned = (Slice(f"{name}.v", axis=0, copies=heads), Slice(f"{name}.proj", axis=1, copies=heads))
        return Group(f"{name}.{VO}", VO, v_width, owned, f"{name}.proj")
    owned = (
        *(Slice(f"{name}.{linear}", axis=0, unit_size=qk_width) for linear in ("q", "k")),
        Slice(f"{name}.v", axis=0),
        Slice(f"{name}.proj", axis=1),
    )
    return Group(f"{name}.{HEADS}", HEADS, heads, owned, f"{name}.proj", unit_size=v_width)


def find_layers(model: nn.Module) -> list[Group]:
    """Find the attentions and FFNs that can go as a whole, each a group of one unit, in the order in which they run.

    Args:
        model: timm Vision Transformer.

    Raises:
        VitpruneError: if the model has no block whose attention writes through ``proj``.

    >>> import timm
    >>> [group.name for group in find_layers(timm.create_model("vit_tiny_patch16_224", depth=1))]
    ['blocks.0.attn.layers', 'blocks.0.mlp.layers']
    """
    readers = {ffn.name: ffn.read_by for ffn in find_feed_forwards(model)}
    ffns = set(readers)
    for name, module in find_attention(model).items():
        if isinstance(getattr(module, "proj", None), nn.Linear) and not is_left_out(module):
            readers[name] = f"{name}.proj"
    if set(readers) == ffns:
        raise VitpruneError(f"part {LAYERS}: {type(model).__name__} has no attention that writes through 'proj'")
    order = [name for name, _module in model.named_modules() if name in readers]
    # Attention is named before the FFN in every block, which is the order in which they run.
    return [Group(f"{name}.{LAYERS}", LAYERS, 1, (), readers[name], _width(model, readers[name])) for name in order]


def _width(model: nn.Module, linear: str) -> int:
    return model.get_submodule(linear).in_features


_FIND: Mapping[str, Callable[[nn.Module], list[Group]]] = {
    FFN: find_feed_forwards,
    QK: partial(_find_in_attention, kind=QK),
    VO: partial(_find_in_attention, kind=VO),
    HEADS: partial(_find_in_attention, kind=HEADS),
    LAYERS: find_layers,
}


def _is_ffn(name: str, module: nn.Module) -> bool:
    """Tell whether a module is an FFN, by its type or because it is called one and has weights."""
    if type(module) in (Mlp, GluMlp, SwiGLU, NormMlp):
        return True
    return bool(_FFN_NAME.search(name.rpartition(".")[2])) and _has_weights(module)


def _has_attention(model: nn.Module, ffn_name: str) -> bool:
    """Tell whether attention stands beside an FFN in its block; blocks may have several of both, in lists."""
    block = re.sub(r"\.ffns\.\d+$", "", ffn_name.rpartition(".")[0])
    found = [
        type(child).__name__
        for name, child in model.get_submodule(block).named_children()
        if _has_weights(child) and f"{block}.{name}" != ffn_name and not isinstance(child, nn.Linear)
        if _ATTENTION_NAME.search(name) or _ATTENTION_NAME.search(type(child).__name__)
    ]
    return bool(found) and not any(map(_OF_CLASS_TOKEN.search, found))


def _has_weights(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _describe(name: str, module: nn.Module) -> Group:
    # Exact types: a subclass may compute its hidden neurons in another way.
    if any(isinstance(each, nn.Conv1d | nn.Conv2d | nn.Conv3d) for each in module.modules()):
        raise VitpruneError(f"{name}: {type(module).__name__} has convolutions, and only FFNs of Linear are supported")
    if type(module) is SwiGLU:
        up_names, copies = ("fc1_g", "fc1_x"), 1
    elif type(module) in (Mlp, GluMlp, NormMlp):
        up_names, copies = ("fc1",), 2 if type(module) is GluMlp else 1
    else:
        raise VitpruneError(f"{name}: FFN of type {type(module).__name__} is not supported (supported: {_SUPPORTED})")
    # That of NormMlp normalises what the FFN reads.
    if type(module) is not NormMlp and not isinstance(module.norm, nn.Identity):
        raise VitpruneError(
            f"{name}: {type(module).__name__} normalises its hidden activations, "
            "so removing a neuron would change the others"
        )
    for layer in (*up_names, "fc2"):
        if not isinstance(getattr(module, layer), nn.Linear):
            kind = type(getattr(module, layer)).__name__
            raise VitpruneError(f"{name}: {kind} projections are not supported, only Linear")
    return group_of_neurons(
        name, tuple(f"{name}.{up}" for up in up_names), f"{name}.fc2", module.fc2.in_features, copies
    )


def group_of_neurons(name: str, up_projs: Sequence[str], down_proj: str, num_neurons: int, copies: int = 1) -> Group:
    """Return the group that the neurons of one FFN are.

    Args:
        name: of the FFN.
        up_projs: the linear layers that compute its neurons.
        down_proj: the one that reads them.
        num_neurons: H.
        copies: 2 where one up-projection holds 2H rows, and neuron j is computed by rows j and j + H.
    """
    owned = (*(Slice(up, axis=0, copies=copies) for up in up_projs), Slice(down_proj, axis=1))
    return Group(name, FFN, num_neurons, owned, down_proj)


def read_group(described: Mapping[str, Any]) -> Group:
    """Return a group from its fields as JSON has them; those of version 0.1.0 spoke of FFNs alone."""
    if "up_projs" in described:
        copies = 2 if described["packed"] else 1
        return group_of_neurons(
            described["name"], described["up_projs"], described["down_proj"], described["num_neurons"], copies
        )
    return Group(**{**described, "owned": tuple(Slice(**part) for part in described["owned"])})


def take_units(state: Mapping[str, Tensor], groups: Sequence[Group], units: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict with only some units of each group, in the order given; groups of whole layers stay.

    Args:
        state: of a model or of a part of it; its groups may be narrower than ``groups`` say.
        groups: what the units own.
        units: group name -> positions in ``state`` (int64).
    """
    result = dict(state)
    for group in groups:
        for part in group.owned:
            for key in (f"{part.linear}.weight", *([f"{part.linear}.bias"] if part.axis == 0 else [])):
                if key in state:
                    unit_size = part.unit_size or group.unit_size
                    width = state[key].shape[part.axis] // (part.copies * unit_size)
                    index = part.indices(units[group.name], width, unit_size).to(state[key].device)
                    result[key] = state[key].index_select(part.axis, index)
    return result


@contextmanager
def capture(model: nn.Module, groups: Sequence[Group], *, outputs: bool = False) -> Iterator[dict[str, Tensor]]:
    """Collect what groups compute in the next forward pass, for ``torch.autograd.grad`` to differentiate at.

    Gradients are switched on inside. Parameters are frozen there, so that the graph holds nothing for their sake.

    Args:
        model: the model that ``groups`` were found in.
        groups: to watch.
        outputs: collect what their readers write [..., D] instead of what they read [..., H].

    Yields:
        Group name -> tensor, filled by the forward pass; part of its graph.
    """
    captured: dict[str, Tensor] = {}

    def keep(name: str, tensor: Tensor) -> Tensor:
        captured[name] = tensor if tensor.requires_grad else tensor.detach().requires_grad_()
        return captured[name]

    def make_hook(name: str):
        return lambda _module, _inputs, output: keep(name, output)

    handles = []
    with torch.enable_grad(), frozen(model):
        try:
            if outputs:
                for group in groups:
                    handles.append(model.get_submodule(group.read_by).register_forward_hook(make_hook(group.name)))
                yield captured
            else:
                with hook_hidden(model, groups, keep):
                    yield captured
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Ask for no gradients of the parameters for a while: a forward pass then keeps less for the backward pass."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def hook_hidden(
    model: nn.Module, groups: Sequence[Group], visit: Callable[[str, Tensor], Tensor | None]
) -> Iterator[None]:
    """Call ``visit(name, hidden)`` whenever a group's reader runs; what it returns, if not None, is read instead.

    Args:
        model: the model that ``groups`` were found in; not compiled (``torch.compile`` ignores later hooks).
        groups: to watch.
        visit: receives hidden activations [..., H] in the model's dtype, before the output projection.
    """

    def make_hook(name: str):
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]):
            replaced = visit(name, inputs[0])
            return None if replaced is None else (replaced, *inputs[1:])

        return hook

    handles = []
    try:
        for group in groups:
            handles.append(model.get_submodule(group.read_by).register_forward_pre_hook(make_hook(group.name)))
        yield
    finally:
        for handle in handles:
            handle.remove()
