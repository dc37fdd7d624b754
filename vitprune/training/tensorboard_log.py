"""Training as TensorBoard shows it: a scalar for every loss, by step and by epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vitprune.errors import VitpruneError
from vitprune.training.loop import EpochRow

LogStep, LogEpoch = Callable[[Mapping[str, Any]], None], Callable[[EpochRow], None]


@contextmanager
def log_to_tensorboard(folder: str | Path) -> Iterator[tuple[LogStep, LogEpoch]]:
    """Give what ``recover`` takes as ``log_step`` and ``log_epoch``; both write to a folder that TensorBoard reads.

    Steps are counted through all epochs, so a run that was killed and goes on continues its curves.

    Args:
        folder: made if absent; what stands in it stays.

    Raises:
        VitpruneError: if the package tensorboard is not installed, or the folder cannot be written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with log_to_tensorboard(folder) as (log_step, log_epoch):
    ...         log_step({"epoch": 1, "step": 1, "steps": 1, "loss": 0.5})
    ...     len(list(Path(folder).iterdir()))
    1
    """
    check_tensorboard()
    from torch.utils.tensorboard import SummaryWriter

    try:
        writer = SummaryWriter(str(folder))
    except OSError as error:
        raise VitpruneError(f"{folder}: cannot be written ({error.strerror})") from error

    def log_step(row: Mapping[str, Any]) -> None:
        for name, value in row.items():
            if name not in ("epoch", "step", "steps"):
                writer.add_scalar(f"step/{name}", value, row["steps"])

    def log_epoch(row: EpochRow) -> None:
        found = {"loss": row.held_back, "accuracy": row.accuracy}
        for name, value in found.items():
            if value is not None:
                writer.add_scalar(f"held back/{name}", value, row.epoch)
        writer.add_scalar("images per second", row.images_per_second, row.epoch)
        writer.flush()

    with writer:
        yield log_step, log_epoch


def check_tensorboard() -> None:
    """Refuse to log where the package is absent.

    Raises:
        VitpruneError: naming the package.
    """
    try:
        import tensorboard  # noqa: F401
    except ImportError as error:
        raise VitpruneError(
            "the package tensorboard is not installed; install it, or leave out `tensorboard`"
        ) from error
