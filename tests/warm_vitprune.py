"""Commands and programs that start at once: forks of a process that has imported what they need, and done nothing else.

``python warm_vitprune.py SOCKET EXPORTS`` serves, with a folder for what torch exported; ``CLIENT`` is the ``vitprune``
that a shell finds, and hands over its arguments, folder and streams; ``Program`` runs blocks of Python one after
another in one namespace.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import traceback
from pathlib import Path

CLIENT = """#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect({address!r})
    request = {{"argv": sys.argv[1:], "folder": os.getcwd()}}
    socket.send_fds(connection, [json.dumps(request).encode()], [0, 1, 2])
    sys.exit(int(connection.recv(16) or b"70"))
"""


class Program:
    """A namespace in a process of its own.

    Args:
        address: the socket of the server.
        folder: where the program runs.
        output: open file that gets what it prints.
    """

    def __init__(self, address: str, folder: Path, output) -> None:
        self.connection = socket.socket(socket.AF_UNIX)
        self.connection.connect(address)
        request = json.dumps({"argv": None, "folder": str(folder)}).encode()
        socket.send_fds(self.connection, [request], [0, output.fileno(), output.fileno()])
        self.stream = self.connection.makefile("rw")

    def run(self, code: str, file: str, line: int) -> str:
        """Run one block; returns the traceback, or nothing. Lines count from ``line``, as in the page."""
        self.stream.write(json.dumps([code, file, line]) + "\n")
        self.stream.flush()
        return json.loads(self.stream.readline() or '"the program ended"')

    def close(self) -> None:
        """End the process."""
        self.stream.close()
        self.connection.close()


def serve(address: str, exports: Path) -> None:
    """Import what the commands import, then fork for every request, as long as the parent lives."""
    import onnxruntime  # noqa: F401
    import onnxscript  # noqa: F401
    import torch_pruning  # noqa: F401
    from quick import hurry, keep_exports
    from torch.onnx import _constants
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    import vitprune
    from vitprune import timing
    from vitprune.cli import commands  # noqa: F401

    for name in vitprune.__all__:
        getattr(vitprune, name)
    hurry()
    timing.ROUNDS = 3  # of a real model, whose every run takes its time
    keep_exports(exports)
    ONNXRegistry.from_torchlib(opset_version=_constants.ONNX_DEFAULT_OPSET)  # for every fork
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # finished forks are nobody's zombies
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        print("ready", flush=True)
        parent = os.getppid()
        listener.settimeout(10)
        while os.getppid() == parent:  # whoever started this is still there
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            connection.settimeout(None)
            if os.fork() == 0:
                listener.close()
                _answer(connection)
            connection.close()


def _answer(connection: socket.socket) -> None:
    """Run one command or program in this fork, and end it, whatever happens."""
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        message, streams, *_ = socket.recv_fds(connection, 2**16, 3)
        for stream, number in zip(streams, range(3), strict=True):
            os.dup2(stream, number)
            os.close(stream)
        request = json.loads(message)
        os.chdir(request["folder"])
        if request["argv"] is None:
            _run_blocks(connection)
            return
        status = _run_command(request["argv"])
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(BrokenPipeError):
                stream.flush()
        connection.sendall(str(status).encode())
    except BaseException:
        traceback.print_exc()
    finally:
        # The usual way out waits for threads that the fork does not have.
        os._exit(0)


def _run_command(argv: list[str]) -> int:
    from vitprune.cli import main

    sys.argv = ["vitprune", *argv]
    try:
        return main()
    except SystemExit as end:
        return end.code or 0
    except BaseException:
        traceback.print_exc()
        return 1


def _run_blocks(connection: socket.socket) -> None:
    namespace = {"__name__": "__main__"}
    sys.path.insert(0, "")
    stream = connection.makefile("rw")
    for message in stream:
        code, file, line = json.loads(message)
        failure = ""
        try:
            exec(compile("\n" * line + code, file, "exec"), namespace)
        except BaseException:
            failure = traceback.format_exc()
        sys.stdout.flush()
        stream.write(json.dumps(failure) + "\n")
        stream.flush()


if __name__ == "__main__":
    serve(sys.argv[1], Path(sys.argv[2]))
