"""What makes many small exports, benchmarks and processes quick, and changes nothing that they answer."""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import json
import multiprocessing
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

NUMBERS = "numbers of names"
LONGEST_ROUND_SECONDS = 0.01
# Forks of one process that has imported what commands need, and done nothing else.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["vitprune.speed.bench", "vitprune.cli.commands", "vitprune.evaluation.curve_folder"])


def hurry() -> None:
    """Keep what every export builds anew, look for garbage less often, and time programs for as short as one can.

    For processes of the tests only. Of an export of a small model, the table of operators is a fifth, and going through
    all objects of all imported libraries again and again a third. No test depends on how exact a time is, or waits for
    a quiet machine.
    """
    from vitprune import timing

    with contextlib.suppress(ImportError, AttributeError):  # torch's own affair: another version has it elsewhere
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        ONNXRegistry.from_torchlib = staticmethod(functools.cache(ONNXRegistry.from_torchlib))
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    repeat = timing._repeat
    timing.SETTLE_SECONDS = 0
    timing._repeat = lambda run, seconds: repeat(run, min(seconds, LONGEST_ROUND_SECONDS)) if seconds else []


def fork_footprints() -> None:
    """Fork the processes that tell a torch model's memory, instead of having each import torch."""
    from vitprune.speed import bench

    bench.multiprocessing = SimpleNamespace(get_context=lambda _spawn: FORKS)


def start(function: Callable[..., Any], *arguments: Any) -> BaseProcess:
    """Call a function in a fork; its exit code is 0, or what it passes to ``sys.exit``."""
    process = FORKS.Process(target=function, args=arguments)
    process.start()
    return process


def start_command(
    arguments: Sequence[Any],
    *,
    stdout: str | Path = os.devnull,
    stderr: str | Path = os.devnull,
    exports: Path | None = None,
    **environment: Any,
) -> BaseProcess:
    """Run ``vitprune`` in a fork.

    Args:
        arguments: after the program's name.
        stdout: file for what it prints.
        stderr: file for what it tells.
        exports: folder of ``keep_exports``, for a command that is in a hurry.
        environment: variables beside those of this session.
    """
    environment = {name: str(value) for name, value in environment.items()}
    return start(_run_command, list(map(str, arguments)), (stdout, stderr), exports, environment)


def _run_command(arguments, streams, exports, environment) -> None:
    os.environ.update(environment)
    for path, stream in zip(streams, (sys.stdout, sys.stderr), strict=True):
        with open(path, "w") as file:
            os.dup2(file.fileno(), stream.fileno())
    if exports is not None:
        hurry()
        keep_exports(exports)
    from vitprune.cli import main

    sys.exit(main(arguments))


def keep_exports(folder: Path) -> None:
    """Let torch export each model once: what it wrote is in a folder that processes share.

    Files come out byte for byte as they would. Only the newer exporter is slow enough to be worth it.
    """
    import torch

    export = torch.onnx.export

    @functools.wraps(export)
    def export_once(model, args=(), f=None, **options):
        if not options.get("dynamo"):
            return export(model, args, f, **options)
        name = "graph.onnx" if f is None else Path(f).name
        kept = folder / _describe(model, args, {**options, "name": name})
        if not kept.exists():
            with tempfile.TemporaryDirectory(dir=folder) as made:
                if f is None:
                    _save_graph(export(model, args, **options).model, Path(made, name))
                else:
                    export(model, args, Path(made, name), **options)
                with contextlib.suppress(OSError):  # another process was faster
                    Path(made).rename(kept)
                    Path(made).mkdir()
        if f is None:
            return SimpleNamespace(model=_load_graph(kept / name))
        shutil.copytree(kept, Path(f).parent, dirs_exist_ok=True)
        return None

    torch.onnx.export = export_once


def _save_graph(graph_model, path: Path) -> None:
    """Write a graph with the numbers by which it names what is added to it."""
    import onnx_ir as ir

    numbers = {key: value for key, value in vars(graph_model.graph._name_authority).items() if isinstance(value, int)}
    graph_model.metadata_props[NUMBERS] = json.dumps(numbers)
    ir.save(graph_model, path)


def _load_graph(path: Path):
    import onnx_ir as ir

    graph_model = ir.load(path)
    vars(graph_model.graph._name_authority).update(json.loads(graph_model.metadata_props.pop(NUMBERS)))
    return graph_model


def _describe(model, args, options) -> str:
    """Hash all that a graph depends on: classes, settings and weights of the model, shapes of its input, options."""
    plain = (bool, int, float, str, tuple, type(None))
    told = [repr(model), repr([(value.shape, value.dtype) for value in args]), repr(options)]
    for name, module in model.named_modules():
        settings = {key: value for key, value in vars(module).items() if isinstance(value, plain)}
        told.append(f"{name} {type(module)} {sorted(settings.items(), key=str)}")
    hashed = hashlib.sha256("\n".join(told).encode())
    for name, value in sorted(model.state_dict().items()):
        hashed.update(f"{name} {value.dtype} {value.shape}".encode())
        hashed.update(value.contiguous().numpy().data)
    return hashed.hexdigest()


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


def run_on_processes(count: int, arguments: Sequence[Any], folder: Path) -> tuple[bool, str]:
    """Do what torchrun does, with processes that start at once.

    Returns:
        Whether all went well, and what they told, the first one first.
    """
    place = {"WORLD_SIZE": count, "MASTER_ADDR": "localhost", "MASTER_PORT": free_port()}
    logs = [folder / f"{rank}.log" for rank in range(count)]
    ranks = [start_command(arguments, stderr=log, RANK=rank, LOCAL_RANK=rank, **place) for rank, log in enumerate(logs)]
    waiting = {process.sentinel: process for process in ranks}
    while waiting:
        ended = [waiting.pop(sentinel) for sentinel in wait(list(waiting))]
        if any(process.exitcode for process in ended):
            for process in ranks:
                process.terminate()
    for process in ranks:
        process.join()
    return not any(process.exitcode for process in ranks), "".join(log.read_text() for log in logs)
