"""A command on the processes that ``torchrun`` started: all of them work, the first one writes and prints."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from vitprune.cli.terminal import said
from vitprune.errors import VitpruneError

# Commands that divide their images and exchange what they sum, and those that have a way of their own.
SHARE_IMAGES = ("prune", "evaluate", "curve", "analyze")
BY_THEMSELVES = ("discover", "finetune", "recover")
# torchrun ends the others within that time where one has told what is wrong.
_SECONDS_TO_BE_ENDED = 3


def refuse_command(command: str) -> None:
    """Refuse a command that several processes cannot do together."""
    if command in (*SHARE_IMAGES, *BY_THEMSELVES):
        return
    *others, last = (f"'{name}'" for name in sorted((*SHARE_IMAGES, *BY_THEMSELVES)))
    raise VitpruneError(
        f"'{command}' runs on one process; only {', '.join(others)} and {last} share their images with others"
    )


def run_together(run: Callable[[dict[str, Any]], Any], given: dict[str, Any]) -> Any:
    """Run a command on this process as its share of the images.

    Args:
        run: takes options, returns the outcome.
        given: options; on all but the first process the output goes where nobody keeps it.

    Returns:
        The outcome on the first process, None on the others.
    """
    from vitprune.sharing import own_output, share_images

    with share_images() as processes:
        first = processes.rank == 0
        try:
            with own_output(given.get("output")) as output, said(quiet=not first):
                outcome = run(given if first or output is None else {**given, "output": str(output)})
                # The first one may still fail to write.
                processes.wait()
        except VitpruneError:
            if not first:  # what is wrong on all processes is told by the first
                time.sleep(_SECONDS_TO_BE_ENDED)
            raise
    return outcome if first else None


def refuse_timing(what: str) -> None:
    """Refuse to time anything beside other processes."""
    from vitprune.processes import count_processes

    if count_processes() > 1:
        raise VitpruneError(f"{what}: what is timed runs on one process, not beside others; leave torchrun out")
