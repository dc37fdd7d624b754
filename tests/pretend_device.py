"""A second device that this machine does not have: a tensor there is one of the CPU behind a wrapper.

What two devices keep apart is kept apart: an operation with operands on both is refused, and so is a generator of the
other one, or numpy. A tensor that was left on the CPU, or made there, is then an error on every machine.

Source: torch's backend that is written in Python (``torch.utils.backend_registration``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretend"
aten = torch.ops.aten
# Operations that go from one device to the other.
COPIES = (aten.copy_.default, aten._to_copy.default)
# As on other devices, rows may be named by a tensor on the CPU.
READS_INDICES = (
    aten.index.Tensor,
    aten._unsafe_index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
)
# How often each operation ran there.
ran: Counter[str] = Counter()


class OnDevice(torch.Tensor):
    """A tensor of the pretended device."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> OnDevice:
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=torch.device(NAME, 0),
        )
        tensor.inner = inner
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return dispatch(function, *args, **(kwargs or {}))

    def __repr__(self) -> str:
        return f"OnDevice({self.inner})"

    def tolist(self) -> list[Any]:
        return self.inner.tolist()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inner.untyped_storage()

    def numpy(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError(f"can't convert {NAME} device type tensor to numpy; use Tensor.cpu() first")

    __array__ = numpy


def is_here(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def unwrap(value: Any) -> Any:
    return value.inner if isinstance(value, OnDevice) else value


@contextmanager
def below_autograd() -> Iterator[None]:
    """Derivatives and inference mode are the wrapper's affair; a tensor of inference mode would forbid more."""
    outside = torch.inference_mode(False) if torch.is_inference_mode_enabled() else torch.no_grad()
    with outside, torch._C._AutoDispatchBelowAutograd():
        yield


def dispatch(function, *args: Any, **kwargs: Any) -> Any:
    """Run an operation of the device on the CPU; refuse what another device would refuse."""
    with below_autograd():
        return _run(function, args, kwargs)


def _run(function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    ran[str(function)] += 1
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    if function in COPIES:
        return _copy(function, args, kwargs)
    # A number is one on every device.
    strangers = [tensor for tensor in tensors if not isinstance(tensor, OnDevice) and tensor.ndim]
    if strangers and function not in READS_INDICES:
        found = ", ".join(f"{tensor.device} {list(tensor.shape)}" for tensor in tensors)
        raise RuntimeError(f"expected all tensors of {function} on one device, found {found}")
    if isinstance(kwargs.get("generator"), torch.Generator) and kwargs["generator"].device.type != NAME:
        raise RuntimeError(f"expected a {NAME} generator for {function}, found one of {kwargs['generator'].device}")
    if function is aten._efficientzerotensor.default:  # which has no numbers to wrap
        return OnDevice(torch.zeros(args[0], dtype=kwargs.get("dtype")))
    if function is aten._local_scalar_dense.default:
        return function(args[0].inner)
    inside = {key: torch.device("cpu") if isinstance(value, torch.device) else value for key, value in kwargs.items()}
    result = function(*tree_map(unwrap, args), **tree_map(unwrap, inside))
    if kwargs.get("device") is not None and not is_here(kwargs["device"]):
        return result
    known = {id(tensor.inner): tensor for tensor in tensors if isinstance(tensor, OnDevice)}

    def wrap(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return known[id(value)] if id(value) in known else OnDevice(value)

    return tree_map(wrap, result)


def _copy(function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if function is aten._to_copy.default:
        device = kwargs.get("device")
        inside = {**kwargs, "device": torch.device("cpu")}
        result = function(unwrap(args[0]), **inside)
        return OnDevice(result) if device is None or is_here(device) else result
    unwrap(args[0]).copy_(unwrap(args[1]))
    return args[0]


def add_device() -> None:
    """Make the device known to torch in this process, which is another one from then on."""
    _setup_privateuseone_for_python_backend(NAME)
    # A module's numbers are replaced as a whole, wrapper and all.
    torch.__future__.set_swap_module_params_on_conversion(True)
    library = torch.library.Library("aten", "IMPL")
    library.impl("empty.memory_format", _empty, "PrivateUse1")
    library.impl("empty_strided", _empty_strided, "PrivateUse1")
    library.impl("_copy_from", _copy_from, "PrivateUse1")
    every = torch.library.Library("_", "IMPL")
    every.fallback(dispatch, "PrivateUse1")
    _KEPT.extend((library, every))


# A library that is no longer referred to is taken back.
_KEPT: list[torch.library.Library] = []


def _empty(size, *, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    return OnDevice(torch.empty(size, dtype=dtype, memory_format=memory_format or torch.contiguous_format))


def _empty_strided(size, stride, *, dtype=None, layout=None, device=None, pin_memory=None):
    return OnDevice(torch.empty_strided(size, stride, dtype=dtype))


def _copy_from(source, target, non_blocking=False):
    with below_autograd():
        unwrap(target).copy_(unwrap(source))
    return target
