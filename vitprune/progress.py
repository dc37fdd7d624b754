"""Progress of long loops: functions that run one take a ``track`` that may show it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

# (items, description) -> the same items, one by one.
Track = Callable[[Sequence[Any], str], Iterable[Any]]


def untracked(items: Sequence[Any], _description: str) -> Iterable[Any]:
    """Show nothing."""
    return items
