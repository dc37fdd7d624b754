"""The command line: unpack, call, save, print; nothing else happens here."""

from __future__ import annotations

import argparse
import contextlib
import errno
import inspect
import json
import logging
import os
import shlex
import signal
import sys
import threading
import time
import warnings
from argparse import ArgumentError
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace

from vitprune.card import make_card, write_card
from vitprune.cli import (
    analyze,
    bench,
    convert,
    curve,
    demo,
    discover,
    doctor,
    elastic,
    evaluate,
    export,
    finetune,
    info,
    predict,
    prune,
    push,
    recover,
    report,
    run,
)
from vitprune.cli.number_ranges import check_numbers
from vitprune.cli.several_processes import SHARE_IMAGES, refuse_command, run_together
from vitprune.cli.terminal import forget_held, note_at_work, said, say_held
from vitprune.cli.wording import in_flags
from vitprune.errors import VitpruneError, VitpruneNote
from vitprune.files import LONGEST_NAME, held
from vitprune.processes import count_processes
from vitprune.recipe.command_options import command_line, explain_mistake, option_names

EXIT_MISTAKE, EXIT_INTERRUPTED, EXIT_TERMINATED = 2, 130, 143
# What torch, oneDNN and the loader of libraries say where the machine gives no more memory.
_OUT_OF_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "annot allocate memory",
    "std::bad_alloc",
    "could not create a primitive",
    "could not create a memory",
    "failed to map segment",
)
# What gloo and NCCL say where another process has ended.
_PEER_IS_GONE = ("gloo/", "Connection closed by peer", "Connection reset by peer", "NCCL", "Broken pipe")
# What every command takes beside its own options.
COMMON = ("quiet", "verbose", "threads")
# Each has SUMMARY, add_arguments(parser), and run(**options), which returns the answer for --json and a function
# that prints it for people; None where another process has it.
COMMANDS = {
    "demo": demo,
    "info": info,
    "discover": discover,
    "finetune": finetune,
    "prune": prune,
    "push": push,
    "recover": recover,
    "elastic": elastic,
    "curve": curve,
    "evaluate": evaluate,
    "predict": predict,
    "analyze": analyze,
    "convert": convert,
    "export": export,
    "bench": bench,
    "doctor": doctor,
    "report": report,
    "run": run,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for a user's mistake, 130 after Ctrl-C, 143 after SIGTERM."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    try:
        parser, commands = build_parser()
        arguments = _parse(parser, commands, argv)
        command, given = arguments.subcommand, arguments[arguments.subcommand]
        with _terminable():
            _run_command(command, given.as_dict())
    except VitpruneError as error:
        print(f"vitprune: {in_flags(' '.join(str(error).split()))}", file=sys.stderr)
        return EXIT_MISTAKE
    except _TerminatedError:
        print("vitprune: terminated; nothing half-written was kept", file=sys.stderr)
        return EXIT_TERMINATED
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        # torch says so wherever this process is by then.
        print(f"vitprune: {str(error).splitlines()[0]}; try --workers 0", file=sys.stderr)
        return EXIT_MISTAKE
    except KeyboardInterrupt:
        print("vitprune: interrupted; nothing half-written was kept", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


class _TerminatedError(BaseException):
    """Somebody, such as a cluster whose time is up, has asked this process to end."""


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """End as after Ctrl-C where SIGTERM comes, so that temporary files go."""
    is_main = threading.current_thread() is threading.main_thread()
    # Of several processes, one that waits for another must end at once.
    if not is_main or count_processes() > 1 or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def end(_signal: int, _frame: Any) -> None:
        raise _TerminatedError

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _parse(parser: ArgumentParser, commands: dict[str, ArgumentParser], argv: Sequence[str] | None) -> Namespace:
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv in (["--version"], ["-V"]):
        from vitprune import __version__

        print(__version__)
        raise SystemExit(0)
    if not argv:
        parser.print_help()
        raise SystemExit(EXIT_MISTAKE)
    if argv[0] == "run":
        # argparse gives all KEY=VALUE to the first place where some may stand: flags go behind them.
        argv[1:] = sorted(argv[1:], key=lambda word: word.startswith("-"))
    try:
        return parser.parse_args(argv)
    except UnicodeDecodeError as error:
        raise VitpruneError(f"--config: not a text file ({error.reason})") from error
    except ArgumentError as error:
        command = commands.get(argv[0])
        raise VitpruneError(explain_mistake(error, option_names(command) if command else commands)) from error


def _run_command(command: str, given: dict[str, Any]) -> None:
    """Run one command, or the commands of a recipe, and print the answer on stdout."""
    as_json = given.pop("json", False)
    several = count_processes() > 1
    if several:
        refuse_command(command)
    if command == "run":
        _parser, commands = build_parser()
        del commands["run"]
        summaries = {name: COMMANDS[name].SUMMARY for name in commands}
        common = {key: given.pop(key) for key in COMMON}
        steps = {"commands": commands, "summaries": summaries, "execute": execute}
        with _as_asked(**common):
            answer = run.run_recipe(**given, as_json=as_json, **steps)
    else:
        run_own = partial(execute, command)
        outcome = run_together(run_own, given) if several and command in SHARE_IMAGES else run_own(given)
        if outcome is None:
            return
        answer, show = outcome
        if not as_json:
            show()
    if as_json:
        print(json.dumps(answer, indent=2))


def execute(command: str, given: dict[str, Any]) -> tuple[dict[str, Any], Callable[[], None]] | None:
    """Run one command with stdout kept for its result, and leave a card in the folder that it wrote.

    What libraries print goes to stderr. None where another process has the result.
    """
    started = time.perf_counter()
    given = {key: value for key, value in given.items() if key not in ("config", "json")}
    passed = {key: value for key, value in given.items() if key not in COMMON or _has_own(command, key)}
    common = {key: given[key] for key in COMMON if key in given and key not in passed}
    seed = given.get("seed", 0)
    if not 0 <= seed < 2**63:
        raise VitpruneError(f"seed must be in [0, 2^63), got {seed}")
    check_numbers(given)
    # Now, because a command may replace the folder that it was started in.
    output = Path(given["output"]).absolute() if given.get("output") else None
    try:
        with contextlib.redirect_stdout(sys.stderr), _notes_are_shown(), _as_asked(**common), _alone_at(output):
            forget_held()
            outcome = COMMANDS[command].run(**passed)
            say_held()
    except (MemoryError, RuntimeError, ImportError, OSError) as error:
        remedy = "a smaller model" if command == "discover" else "a smaller --batch-size"
        if type(error).__name__ == "OutOfMemoryError":  # torch's, named so that torch need not be imported here
            raise VitpruneError(f"out of memory on the device; try {remedy}, or --device cpu") from error
        if _says_out_of_memory(error):
            raise VitpruneError(f"out of memory; try {remedy}") from error
        if count_processes() > 1 and any(said in str(error) for said in _PEER_IS_GONE):
            raise VitpruneError("this process stops because another one did; see its message") from error
        raise
    if outcome is not None and output is not None and output.is_dir():
        typed = shlex.join(command_line(_build_command(command), command, given))
        write_card(make_card(typed, given, seconds=time.perf_counter() - started), output)
    return outcome


@contextlib.contextmanager
def _alone_at(output: Path | None) -> Iterator[None]:
    """Refuse to work on an output that another command on this machine works on."""
    # Of processes that work together the first one stands for all.
    first = os.environ.get("RANK", "0") == "0"
    lock = None if output is None else output.with_name(f".{output.name}.lock")
    # A path that cannot be written is refused by the command, which says why.
    writable = lock is not None and os.path.isdir(lock.parent) and os.access(lock.parent, os.W_OK)
    if not first or not writable or len(os.fsencode(lock.name)) > LONGEST_NAME:
        yield
        return
    with held(lock, what=output.name):
        yield


def _says_out_of_memory(error: Exception) -> bool:
    """Tell whether memory was short, whichever library says so."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) in (errno.ENOMEM, errno.EAGAIN):
        return True
    return any(said in str(error) for said in _OUT_OF_MEMORY)


@contextlib.contextmanager
def _as_asked(*, quiet: bool = False, verbose: bool = False, threads: int | None = None) -> Iterator[None]:
    """Do what the options that all commands share ask for, while one runs."""
    if threads is not None and threads < 1:
        raise VitpruneError(f"threads must be at least 1, got {threads}")
    with contextlib.ExitStack() as stack:
        stack.enter_context(said(quiet=quiet))
        if verbose:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("default")
            logging.basicConfig(level=logging.INFO, stream=sys.stderr)
        if threads is not None:
            import torch

            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(threads)
        yield


@contextlib.contextmanager
def _notes_are_shown() -> Iterator[None]:
    """Print what the library tells a Python user as a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", VitpruneNote)
        others = warnings.showwarning

        def show(message, category, *where, **more):
            if issubclass(category, VitpruneNote):
                note_at_work(in_flags(" ".join(str(message).split())))
            else:
                others(message, category, *where, **more)

        warnings.showwarning = show
        yield


def _has_own(command: str, option: str) -> bool:
    """Tell whether a command itself reads an option of a common name, as those do that time."""
    return command != "run" and option in inspect.signature(COMMANDS[command].run).parameters


class _PlainHelp(DefaultHelpFormatter):
    """Help as it was written, without types and defaults behind it."""

    def _get_help_string(self, action: argparse.Action) -> str:
        return action.help or ""


def build_parser() -> tuple[ArgumentParser, dict[str, ArgumentParser]]:
    parser = ArgumentParser(
        prog="vitprune",
        description="Influential neuron paths of timm Vision Transformers, and smaller models without the rest.",
        exit_on_error=False,
        formatter_class=_PlainHelp,
    )
    subcommands = parser.add_subcommands(
        required=True, title="commands", description="'vitprune COMMAND --help' explains one."
    )
    commands = {}
    for name, module in COMMANDS.items():
        commands[name] = _build_command(name)
        subcommands.add_subcommand(name, commands[name], help=module.SUMMARY)
    return parser, commands


def _build_command(name: str) -> ArgumentParser:
    command = ArgumentParser(description=COMMANDS[name].SUMMARY, exit_on_error=False, formatter_class=_PlainHelp)
    COMMANDS[name].add_arguments(command)
    common = command.add_argument_group("common to all commands")
    common.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    common.add_argument("-q", "--quiet", action="store_true", help="no progress and no notes, the result alone")
    common.add_argument("-v", "--verbose", action="store_true", help="what libraries warn of and log as well")
    if not _has_own(name, "threads"):
        common.add_argument("--threads", type=int, help="of torch's operators (default: torch's choice)")
    if name != "run":
        common.add_argument("--config", action="config", help="YAML file with any of these options")
    for action in command._actions:
        _show_default(action)
    return command


def _show_default(action: Any) -> None:
    """Let the help of an option end in its default, where it has one and does not say so."""
    default = action.default
    if not action.option_strings or not isinstance(default, (int, float, str, list)) or isinstance(default, bool):
        return
    shown = (
        " ".join(map(str, default))
        if isinstance(default, list)
        else f"{default:g}"
        if isinstance(default, float)
        else default
    )
    if shown != argparse.SUPPRESS and not action.help.endswith(f"({shown})"):
        action.help = f"{action.help} ({shown})"
