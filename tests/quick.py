"""What makes many small exports and benchmarks in one process quick, and changes nothing that they answer."""

from __future__ import annotations

import contextlib
import functools
import gc


def hurry() -> None:
    """Keep what every export builds anew, look for garbage less often, and do not wait for a quiet machine.

    For processes of the tests only. Of an export of a small model, the table of operators is a fifth, and going through
    all objects of all imported libraries again and again a third.
    """
    from vitprune import timing

    with contextlib.suppress(ImportError, AttributeError):  # torch's own affair: another version has it elsewhere
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        ONNXRegistry.from_torchlib = staticmethod(functools.cache(ONNXRegistry.from_torchlib))
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    timing.SETTLE_SECONDS = 0.005  # no test depends on how long anything takes
