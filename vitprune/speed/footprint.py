"""How much memory a process holds that only runs an ONNX file: ``python -m vitprune.speed.footprint FILE``.

Imports nothing but ONNX Runtime and numpy, as a server would.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from vitprune.errors import VitpruneError
from vitprune.processes import peak_memory_bytes


def measure_footprint(path: str | Path, *, batch_size: int, num_threads: int) -> int:
    """Run a file three times on the CPU provider, in a process of its own.

    Args:
        path: an ONNX file with one input.
        batch_size: images per run, where the file leaves it open.
        num_threads: of ONNX Runtime's operators.

    Returns:
        The most memory that the process held, bytes.

    Raises:
        VitpruneError: if the process fails, for want of memory perhaps.
    """
    command = [sys.executable, "-m", "vitprune.speed.footprint", str(path), str(batch_size), str(num_threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 (this interpreter)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise VitpruneError(f"{path}: a process that only runs it ended before its memory was known ({last})")
    return int(done.stdout)


def _main(path: str, batch_size: str, num_threads: str) -> None:
    import json

    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(num_threads)
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    entry = session.get_inputs()[0]
    lengths = [length if isinstance(length, int) else None for length in entry.shape]
    if None in lengths[1:]:  # images of any size: of the one that vitprune wrote into the file
        lengths[1:] = json.loads(session.get_modelmeta().custom_metadata_map["vitprune"])["data_config"]["input_size"]
    shape = (lengths[0] or int(batch_size), *lengths[1:])
    dtypes = {"tensor(float16)": np.float16, "tensor(double)": np.float64, "tensor(uint8)": np.uint8}
    for _ in range(3):
        session.run(None, {entry.name: np.zeros(shape, dtypes.get(entry.type, np.float32))})
    sys.stdout.write(str(peak_memory_bytes()))


if __name__ == "__main__":
    _main(*sys.argv[1:])
