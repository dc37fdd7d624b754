"""One program on several processes, as ``torchrun`` starts them; and how much memory a process has held."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from vitprune.errors import VitpruneError

# Ranks may finish hours apart; torchrun ends the others when one dies.
_PATIENCE = timedelta(days=30)


@dataclass(frozen=True)
class Processes:
    """Which process this is, and of how many.

    Attributes:
        rank: 0 .. count - 1.
        count: processes that work together.
        local_rank: place among those of this machine: which of its GPUs to use.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    def wait(self) -> None:
        """Wait until every process has come here.

        Raises:
            VitpruneError: if one has ended instead.
        """
        if self.count > 1:
            import torch.distributed

            try:
                torch.distributed.barrier()
            except RuntimeError as error:
                raise VitpruneError(f"process {self.rank} stops because another one did; see its message") from error


def count_processes() -> int:
    """Return how many processes ``torchrun`` started; 1 where it started none."""
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
        return 1
    return int(os.environ["WORLD_SIZE"])


@contextmanager
def join_processes(*, exchanging: bool = False) -> Iterator[Processes]:
    """Meet the other processes that ``torchrun`` started; alone, there is nobody to wait for.

    Args:
        exchanging: whether they exchange tensors, each device by torch's own choice of backend. Else nothing but the
            news that they are there (gloo, whatever the device), and results meet as files.
    """
    count = count_processes()
    if count == 1:
        yield Processes()
        return
    import torch.distributed

    try:
        torch.distributed.init_process_group(None if exchanging else "gloo", timeout=_PATIENCE)
    except RuntimeError as error:
        raise VitpruneError(
            f"{count} processes could not meet ({str(error).splitlines()[0]}); start all anew"
        ) from error
    try:
        yield Processes(torch.distributed.get_rank(), count, int(os.environ.get("LOCAL_RANK", "0")))
    finally:
        torch.distributed.destroy_process_group()


def peak_memory_bytes() -> int:
    """Return the most memory that this process has held."""
    status = Path("/proc/self/status")
    if status.is_file():  # what getrusage knows began with the memory of the process that started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
