"""Keep a thread's alternate signal stack as it was, across a library that puts its own there."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class _Stack(ctypes.Structure):
    """``stack_t`` of Linux."""

    _fields_ = (("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@contextmanager
def kept_signal_stack() -> Iterator[None]:
    """Put the alternate signal stack of this thread back at the end; does nothing but on Linux.

    OpenVINO gives a thread one for every model that it compiles, and on deleting them in another order than the
    reverse leaves one that is unmapped. The next signal that has a handler, such as that of a child process that
    ended, then ends the program.

    >>> with kept_signal_stack():
    ...     pass
    """
    if sys.platform != "linux":
        yield
        return
    sigaltstack = ctypes.CDLL(None, use_errno=True).sigaltstack
    before = _Stack()
    sigaltstack(None, ctypes.byref(before))
    try:
        yield
    finally:
        sigaltstack(ctypes.byref(before), None)
