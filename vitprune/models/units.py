"""The feed-forward view of a timm Vision Transformer: the only file that knows FFN classes.

A neuron is one input feature of an FFN's output projection, after the activation (and after the gate of a gated
FFN). Every supported class hands that vector to ``fc2``, so one hook in front of ``fc2`` serves them all.

Letters: B images, N tokens, D embedding width, H hidden neurons.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from timm.layers import GluMlp, Mlp, SwiGLU
from torch import Tensor, nn

from vitprune.errors import VitpruneError

_FFN_NAME = re.compile(r"(?:^|\.)blocks\.\d+(?:\.ffns\.\d+)?\.mlp$")
_SUPPORTED = "Mlp, GluMlp, SwiGLUPacked, SwiGLU"


@dataclass(frozen=True)
class FeedForward:
    """One FFN by name; holds no module, so it can travel and be compared.

    Attributes:
        name: module name, such as ``"blocks.3.mlp"``.
        up_projs: names of the linear layers that compute the hidden neurons.
        down_proj: name of the linear layer that reads them.
        num_neurons: H, at least 1.
        packed: True where one up-projection holds 2H rows and neuron j is computed by rows j and j + H.
    """

    name: str
    up_projs: tuple[str, ...]
    down_proj: str
    num_neurons: int
    packed: bool = False

    def up_rows(self, neurons: Tensor) -> Tensor:
        """Return the rows of every up-projection that compute ``neurons`` (int64 [n] -> int64 [n] or [2n])."""
        return torch.cat([neurons, neurons + self.num_neurons]) if self.packed else neurons


def find_feed_forwards(model: nn.Module) -> list[FeedForward]:
    """Find the FFNs of the Transformer blocks, in block order.

    Args:
        model: timm Vision Transformer.

    Returns:
        One entry per FFN, never empty.

    Raises:
        VitpruneError: if the model has no FFN that belongs to a Transformer block, or one where removing a neuron
            would not equal masking it.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=2)
    >>> [(ffn.name, ffn.num_neurons) for ffn in find_feed_forwards(model)]
    [('blocks.0.mlp', 768), ('blocks.1.mlp', 768)]
    """
    ffns = []
    for name, module in model.named_modules():
        if _FFN_NAME.search(name) and _has_attention(model, name):
            ffns.append(_describe(name, module))
    if not ffns:
        raise VitpruneError(
            f"{type(model).__name__} has no supported FFN: no block with attention has an 'mlp' of type {_SUPPORTED}"
        )
    return ffns


def _has_attention(model: nn.Module, ffn_name: str) -> bool:
    block = model.get_submodule(re.sub(r"(\.ffns\.\d+)?\.mlp$", "", ffn_name))
    return any("attn" in child for child, _ in block.named_children())


def _describe(name: str, module: nn.Module) -> FeedForward:
    # Exact types: a subclass may compute its hidden neurons in another way.
    if type(module) is SwiGLU:
        up_names, packed = ("fc1_g", "fc1_x"), False
    elif type(module) in (Mlp, GluMlp):
        up_names, packed = ("fc1",), type(module) is GluMlp
    else:
        raise VitpruneError(f"{name}: FFN of type {type(module).__name__} is not supported (supported: {_SUPPORTED})")
    if not isinstance(module.norm, nn.Identity):
        raise VitpruneError(
            f"{name}: {type(module).__name__} normalises its hidden activations, "
            "so removing a neuron would change the others"
        )
    if not isinstance(module.fc2, nn.Linear):
        raise VitpruneError(f"{name}: {type(module.fc2).__name__} projections are not supported, only Linear")
    return FeedForward(
        name=name,
        up_projs=tuple(f"{name}.{up}" for up in up_names),
        down_proj=f"{name}.fc2",
        num_neurons=module.fc2.in_features,
        packed=packed,
    )


@contextmanager
def capture(model: nn.Module, ffns: Sequence[FeedForward], *, outputs: bool = False) -> Iterator[dict[str, Tensor]]:
    """Collect what the FFNs compute in the next forward pass, for ``torch.autograd.grad`` to differentiate at.

    Gradients are switched on inside. Parameters are frozen there, so that the graph holds nothing for their sake.

    Args:
        model: the model that ``ffns`` were found in.
        ffns: FFNs to watch.
        outputs: collect the FFNs' outputs [..., D] instead of their hidden activations [..., H].

    Yields:
        FFN name -> tensor, filled by the forward pass; part of its graph.
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
                for ffn in ffns:
                    handles.append(model.get_submodule(ffn.down_proj).register_forward_hook(make_hook(ffn.name)))
                yield captured
            else:
                with hook_hidden(model, ffns, keep):
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
    model: nn.Module, ffns: Sequence[FeedForward], visit: Callable[[str, Tensor], Tensor | None]
) -> Iterator[None]:
    """Call ``visit(ffn_name, hidden)`` whenever an FFN runs; what it returns, if not None, replaces the hidden vector.

    Args:
        model: the model that ``ffns`` were found in; not compiled (``torch.compile`` ignores later hooks).
        ffns: FFNs to watch.
        visit: receives hidden activations [..., H] in the model's dtype, before the output projection.
    """

    def make_hook(name: str):
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]):
            replaced = visit(name, inputs[0])
            return None if replaced is None else (replaced, *inputs[1:])

        return hook

    handles = []
    try:
        for ffn in ffns:
            handles.append(model.get_submodule(ffn.down_proj).register_forward_pre_hook(make_hook(ffn.name)))
        yield
    finally:
        for handle in handles:
            handle.remove()
