"""Run the blocks of a Transformer one at a time on stored states.

Letters: B images, N tokens, D embedding width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitprune.answers import run
from vitprune.data import Batches, on_device
from vitprune.entry import entry
from vitprune.errors import VitpruneError
from vitprune.models.units import Group
from vitprune.sharing import from_first
from vitprune.views import block_of

_REMEDY = "compensate with ridge instead"


@dataclass(frozen=True)
class Attention:
    """Where a block's attention writes.

    Attributes:
        proj: module name of its output projection.
        reader: module name of what reads the residual stream next, the FFN's normalisation.
        gain_D: how much of the projection's output reaches the stream, by channel (LayerScale; else ones); float64.
    """

    proj: str
    reader: str
    gain_D: Tensor


@dataclass(frozen=True)
class BlockCall:
    """What it takes to run one block by itself.

    Attributes:
        name: module name of the block.
        args: what the model hands it after the states (position bias, ...).
        kwargs: the same by keyword (rotary embeddings, ...).
        follows: whether it reads exactly what the block before it writes.
        gain_D: how much of its FFN's output reaches the residual stream, by channel (LayerScale; else ones); float64.
        attention: None where it does not add its output to the stream image by image and token by token (several
            windows, as in a Swin Transformer), where its projection has no bias, or under other names than timm's
            ``attn.proj`` and ``norm2``.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    follows: bool
    gain_D: Tensor
    attention: Attention | None

    def run(self, model: nn.Module, states: Tensor) -> Tensor:
        """Return the block's output [B, ..., D], on the device of ``states``; the block is the model's of that name."""
        device = next(model.parameters()).device
        return model.get_submodule(self.name)(states.to(device), *self.args, **self.kwargs).to(states.device)


@entry
@torch.no_grad()
def study_blocks(model: nn.Module, ffns: Sequence[Group], batches: Batches) -> dict[str, BlockCall]:
    """Find out how to run every block that holds an FFN, from the first image.

    Args:
        model: timm Vision Transformer in eval mode.
        ffns: its FFNs, in the order in which they run.
        batches: pairs of images [B, 3, height, width] (normalised by the model's own transform) and labels, which are
            not used. Only the first batch is read.

    Returns:
        FFN name -> call.

    Raises:
        VitpruneError: if ``batches`` is empty, a block has several FFNs, is handed something else for each image, or
            does not add its FFN's output to the residual stream.
    """
    images = next((images for images, _labels in on_device(model, batches)), None)
    if images is None:
        raise VitpruneError("no calibration images")
    images = from_first(images[:1])
    names = {ffn.name: block_of(ffn.name) for ffn in ffns}
    parallel = [name for name in names if ".ffns." in name]
    if parallel:
        raise VitpruneError(f"{parallel[0]}: blocks with several FFNs cannot be run one at a time; {_REMEDY}")
    one, two = (_record_calls(model, names.values(), images.expand(count, -1, -1, -1)) for count in (1, 2))
    calls: dict[str, BlockCall] = {}
    previous = None
    for ffn in ffns:
        name = names[ffn.name]
        args, kwargs, output = two[name]
        if _extra_shapes(one[name]) != _extra_shapes(two[name]):
            raise VitpruneError(f"{name} is handed more than its states for each image; {_REMEDY}")
        follows = previous is not None and args[0].shape == previous.shape and torch.equal(args[0], previous)
        gain_D = _measure_gain(model, name, ffn.down_proj, name, one[name])
        if gain_D is None:
            raise VitpruneError(f"{name} does not add its FFN's output to the residual stream as it is; {_REMEDY}")
        # Where attention pools, what it writes is of other tokens than what the block reads.
        attention = _find_attention(model, name, two[name]) if output.shape == args[0].shape else None
        calls[ffn.name] = BlockCall(name, args[1:], kwargs, follows, gain_D, attention)
        previous = output
    return calls


def read_states_before(model: nn.Module, block: str, batches: Batches) -> list[Tensor]:
    """Return what a block reads [B, ..., D] for every batch, on the CPU; what comes after it does not run."""
    seen: list[Tensor] = []
    with stopping_before(model.get_submodule(block), seen.append):
        for images, _labels in on_device(model, batches):
            run_until_stopped(model, images)
            seen[-1] = seen[-1].cpu()
    return seen


class _Stop(Exception):
    pass


@contextmanager
def stopping_before(module: nn.Module, see: Callable[[Tensor], None]) -> Iterator[None]:
    """Hand a module's input to ``see`` and end ``run_until_stopped`` there."""

    def stop(_module: nn.Module, args: tuple[Any, ...]) -> None:
        see(args[0])
        raise _Stop

    handle = module.register_forward_pre_hook(stop)
    try:
        yield
    finally:
        handle.remove()


def run_until_stopped(function: Callable[..., Any], *args: Any) -> None:
    """Call something that a ``stopping_before`` ends."""
    try:
        function(*args)
    except _Stop:
        return
    raise AssertionError("the module to stop before did not run")


def _record_calls(model: nn.Module, blocks, images: Tensor) -> dict[str, tuple[tuple, dict, Tensor]]:
    calls: dict[str, tuple[tuple, dict, Tensor]] = {}

    def make_hook(name: str):
        return lambda _module, args, kwargs, output: calls.update({name: (args, kwargs, output)})

    handles = []
    try:
        for name in blocks:
            handles.append(model.get_submodule(name).register_forward_hook(make_hook(name), with_kwargs=True))
        run(model, images)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _extra_shapes(call: tuple[tuple, dict, Tensor]) -> list[tuple[int, ...]]:
    args, kwargs, _output = call
    return [tuple(value.shape) for value in (*args[1:], *kwargs.values()) if isinstance(value, Tensor)]


def _find_attention(model: nn.Module, block: str, call: tuple[tuple, dict, Tensor]) -> Attention | None:
    modules = dict(model.named_modules())
    proj, reader = f"{block}.attn.proj", f"{block}.norm2"
    if getattr(modules.get(proj), "bias", None) is None or reader not in modules:
        return None
    gain_D = _measure_gain(model, block, proj, reader, call)
    return None if gain_D is None else Attention(proj, reader, gain_D)


def _measure_gain(
    model: nn.Module, block: str, linear: str, reader: str, call: tuple[tuple, dict, Tensor]
) -> Tensor | None:
    """Return how much of a linear layer's output arrives at each channel; None if it arrives in another way.

    Arrival is seen at the block's output, or at the input of ``reader`` where that is a module inside the block.
    Something is added to the layer's output to see what comes of it, in float64: LayerScale may be tiny.
    """

    def widen(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    args, kwargs = tuple(map(widen, call[0])), {key: widen(value) for key, value in call[1].items()}
    copied = copy.deepcopy(model.get_submodule(block)).double()
    added: Tensor | float = 0.0
    shape = torch.Size()

    def add(_module: nn.Module, _inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        nonlocal shape
        shape = output.shape
        return output + added

    copied.get_submodule(linear.removeprefix(f"{block}.")).register_forward_hook(add)
    arrived: list[Tensor] = []
    if reader != block:
        inside = copied.get_submodule(reader.removeprefix(f"{block}."))
        inside.register_forward_pre_hook(lambda _module, inputs: arrived.append(inputs[0]))

    def arrive() -> Tensor:
        output = copied(*args, **kwargs)
        return output if reader == block else arrived[-1]

    base = arrive()
    # An FFN may see the tokens of an image in a row where the stream has them in a grid; windows are no images, and
    # channels may stand elsewhere.
    if base.numel() != shape.numel() or len(base) != shape[0] or base.shape[-1] != shape[-1]:
        return None
    added = 1.0
    gain_D = (arrive() - base).flatten(0, -2).mean(0)
    added = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(base.device)
    seen = (arrive() - base).reshape(shape)
    return gain_D if torch.allclose(seen, gain_D * added, rtol=1e-4, atol=1e-9) else None
