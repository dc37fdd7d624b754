"""What numbers on the command line may be, so that a wrong one is refused before a model is fetched or built."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from vitprune.errors import VitpruneError

_AT_LEAST_1 = ("at least 1", lambda value: value >= 1)
_POSITIVE = ("above 0", lambda value: 0 < value < math.inf)
_PROPER = ("in (0, 1)", lambda value: 0 < value < 1)
# Option -> what it must be, and whether a value is.
_RANGES: Mapping[str, tuple[str, Callable[[float], bool]]] = {
    "batch_size": _AT_LEAST_1,
    "images_per_class": _AT_LEAST_1,
    "eval_images_per_class": _AT_LEAST_1,
    "num_images": _AT_LEAST_1,
    "latency_batch_size": _AT_LEAST_1,
    "top_k": _AT_LEAST_1,
    "keep_paths": _AT_LEAST_1,
    "num_neighbours": _AT_LEAST_1,
    "workers": ("at least 0", lambda value: value >= 0),
    "ratio": ("in [0, 1)", lambda value: 0 <= value < 1),
    "max_drop": _PROPER,
    "step": ("in (0, 1]", lambda value: 0 < value <= 1),
    "floor": ("in [0, 1]", lambda value: 0 <= value <= 1),
    "speedup": ("above 1", lambda value: 1 < value < math.inf),
    "target_latency": _POSITIVE,
    "target_macs": _POSITIVE,
    "target_params": _POSITIVE,
    "seconds": _POSITIVE,
}


def check_numbers(given: Mapping[str, Any]) -> None:
    """Refuse the first option whose number, or one of whose numbers, is out of range.

    >>> check_numbers({"ratio": 1.5, "data": "photos"})
    Traceback (most recent call last):
        ...
    vitprune.errors.VitpruneError: ratio must be in [0, 1), got 1.5
    """
    for name, (wanted, is_right) in _RANGES.items():
        value = given.get(name)
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, int | float) and not isinstance(each, bool) and not is_right(each):
                raise VitpruneError(f"{name} must be {wanted}, got {each:g}")
