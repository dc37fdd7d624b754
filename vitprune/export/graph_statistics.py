"""What compensation needs to know of the FFNs of an ONNX graph, measured in ONNX Runtime.

Letters: B images, H hidden neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from vitprune.calibration.moments import Moments
from vitprune.calibration.statistics import Statistics
from vitprune.data import Batches
from vitprune.errors import VitpruneError
from vitprune.export.graph_ffns import GraphFfn
from vitprune.export.onnx_file import write_graph
from vitprune.export.runtime import fill_up, open_session, read_input

# Images in one run: the hidden activations of all FFNs are held at once.
IMAGES_PER_RUN = 8


def measure_graph_statistics(
    model: ir.Model, ffns: Sequence[GraphFfn], batches: Batches, path: Path
) -> list[Statistics]:
    """Stream the calibration images once and return mean and covariance of every FFN's hidden neurons.

    A file that computes its last block for the class token alone tells of that token alone there. That is right for
    such a file: what its last FFN makes of other tokens is never read.

    Args:
        model: the graph that the FFNs were found in; it gets them as further outputs.
        ffns: its FFNs.
        batches: pairs of images [B, channels, height, width] and labels, which are not used. Read once.
        path: of the file to write and run; left to the caller to remove.

    Returns:
        Statistics with moments, in the order of ``ffns``.

    Raises:
        VitpruneError: if ``batches`` is empty, or its images do not fit the graph.
    """
    # Not checked: outputs whose shapes the graph does not know are good enough for ONNX Runtime.
    for ffn in ffns:
        if ffn.hidden.type is None:
            ffn.hidden.type = ir.TensorType(ir.DataType.FLOAT)
        model.graph.outputs.append(ffn.hidden)
    write_graph(model, path)
    run = open_runner(path)
    sums = [Moments() for _ in ffns]
    num_images = 0
    for images, _labels in batches:
        for results in run(images):
            for each, hidden in zip(sums, results[-len(ffns) :], strict=True):
                each.add(torch.from_numpy(hidden).flatten(0, -2))
        num_images += len(images)
    if num_images == 0:
        raise VitpruneError("no calibration images")
    return [Statistics(num_images, round(each.count), *each.finish()) for each in sums]


def open_runner(path: Path) -> Callable[[Tensor], Iterator[list[np.ndarray]]]:
    """Open an ONNX file as a function images [B, channels, height, width] -> its outputs, a few images at a time.

    Raises:
        VitpruneError: in the function, if the images are of another size than the file takes.
    """
    session = open_session(path)
    taken = read_input(session, path.name)
    fixed = taken.batch_size

    def run(images: Tensor) -> Iterator[list[np.ndarray]]:
        wanted, got = taken.size, images.shape[1:]
        if len(wanted) != len(got) or any(a is not None and a != b for a, b in zip(wanted, got, strict=True)):
            raise VitpruneError(f"images are {_times(got)}, the file takes {_times(wanted)}")
        for part in images.split(fixed or IMAGES_PER_RUN):
            filled = part if fixed is None else fill_up(part, fixed)
            yield [result[: len(part)] for result in session.run(None, taken.feed(filled))]

    return run


def _times(shape) -> str:
    return " x ".join("any" if length is None else str(length) for length in shape)
