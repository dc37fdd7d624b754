"""Write an ONNX file and prove on real images that it gives torch's answers."""

from __future__ import annotations

import base64
import copy
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch import Tensor, nn

from vitprune.answer_loss import cosine_distance
from vitprune.answers import ask, has_several, of_classes, run, shape_like
from vitprune.batches import NO_LABEL
from vitprune.data import Batches, class_names, remember_names
from vitprune.entry import entry
from vitprune.errors import VitpruneError
from vitprune.export.any_size import any_size_dims, check_other_sizes, example_size
from vitprune.export.fuse import fuse_attention, skip_unread_tokens, unspread_biases
from vitprune.export.fuse_merging import fuse_merging
from vitprune.export.graph import forget_shapes
from vitprune.export.openvino_file import (
    SUFFIX,
    collect_images,
    import_nncf,
    import_openvino,
    make_openvino_runner,
    open_openvino,
    quantize_openvino,
    write_openvino,
)
from vitprune.export.profile import count_graph_macs, make_session_runner
from vitprune.export.quantize import halve, quantize, quantize_statically
from vitprune.export.runtime import METADATA_KEY, open_onnx, open_session
from vitprune.files import FORMAT_VERSION, atomic_siblings
from vitprune.models.identity import architecture
from vitprune.models.left_out import describe_left_out
from vitprune.models.merging import describe_merging, drop_unread_merge
from vitprune.models.trunk import plain_attention
from vitprune.models.units import find_left
from vitprune.options import OPERATORS, PRECISIONS_ONNX, check_choice
from vitprune.pruning.plan import Plan
from vitprune.seen_images import WatchedBatches, names_in, seen_by
from vitprune.timing import Speedup, measure_latency, paired_speedup
from vitprune.views import data_config, has_classifier

# Tolerances for float32 kernels that sum in another order.
PARITY_RTOL, PARITY_ATOL = 1e-3, 1e-4
# Changes of normalised images, a grey level being about 0.02, that show which answers rounding decides about; how often
# each is drawn, and how many times the tolerance the answers to such images may be apart.
NOISE, NUM_DRAWS, NEAR = (1e-6, 1e-5), 12, 5
# A protobuf message ends at 2 GiB; the graph itself needs some of it.
LARGEST_FILE_BYTES = 2**31 - 2**24
# The tests export with the first and the last.
OPSETS = range(18, 24)
# To spend on comparing a file of narrower numbers with the float32 graph it was made from.
SPEED_SECONDS = 1.0
# Without an upper bound, torch 2.6 gives up on a dynamic batch.
MAX_BATCH_SIZE = 2**16


@dataclass(frozen=True)
class Parity:
    """How close an ONNX file is to torch.

    Attributes:
        max_abs_diff: largest absolute difference of a logit, or of a number of an embedding, over all images.
        top1_agreement: share of images with the same first answer, in [0, 1]; None for features, which are none.
        top1: share of images that the file answers as their label says, in [0, 1]; None where they have no label each.
        num_images: images compared.
        near_ties: of these, images that rounding decides about: which tokens merge there is so close that torch gives
            the file's answer itself once the image changes by a thousandth of a grey level. They do not count in
            ``max_abs_diff``.
        mean_cosine: of the file's embeddings to torch's, where there are no classes; None where there are.
    """

    max_abs_diff: float
    top1_agreement: float | None
    top1: float | None
    num_images: int
    near_ties: int = 0
    mean_cosine: float | None = None

    def __str__(self) -> str:
        what = "logit difference to torch" if self.mean_cosine is None else "difference of embeddings to torch"
        text = f"largest {what} {self.max_abs_diff:.2e}"
        if self.mean_cosine is not None:
            text += f", cosine {self.mean_cosine:.6f} in the mean of {self.num_images} images"
        if self.top1_agreement is not None:
            text += f", same first answer on {self.top1_agreement:.2%} of {self.num_images} images"
        if self.near_ties:
            text += f" (on {self.near_ties} of them rounding decides which tokens merge)"
        return text if self.top1 is None else f"{text}, top-1 {self.top1:.4f}"

    def __repr__(self) -> str:
        return str(self)


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how close it is to torch.

    Attributes:
        path: the ONNX file, or OpenVINO's.
        max_abs_diff: largest absolute difference of a logit, or of a number of an embedding, over all parity images.
        top1_agreement: share of parity images with the same first answer, in [0, 1]; None for features.
        top1: share of parity images that the file answers as their label says, in [0, 1]; None without one label each.
        num_images: parity images.
        near_ties: of these, images where rounding decides which tokens merge, as in ``Parity``.
        size_bytes: of the file, and of the one beside it that holds the weights of a model above 2 GB.
        precision: of the matrix products with weights.
        float32: how close the float32 graph was that a file of narrower numbers was made from; None for float32 files.
        speedup: how many times faster than that graph it runs a batch of 1 (or of the fixed size) here.
        mean_cosine: of the file's embeddings to torch's, where there are no classes; None where there are.
    """

    path: Path
    max_abs_diff: float
    top1_agreement: float | None
    top1: float | None
    num_images: int
    size_bytes: int
    precision: str = "float32"
    float32: Parity | None = None
    speedup: Speedup | None = None
    near_ties: int = 0
    mean_cosine: float | None = None

    def __str__(self) -> str:
        own = Parity(
            self.max_abs_diff, self.top1_agreement, self.top1, self.num_images, self.near_ties, self.mean_cosine
        )
        lines = [] if self.float32 is None else [f"float32: {self.float32}"]
        lines += [f"{self.precision}: {own}", f"wrote {self.path} ({self.size_bytes / 1e6:.1f} MB)"]
        if self.speedup is not None:
            lines.append(
                f"{self.precision} runs {self.speedup.ratio:.2f} x as fast as float32 here "
                f"({self.speedup.low:.2f} .. {self.speedup.high:.2f})"
            )
        return "\n".join(lines)

    def __repr__(self) -> str:
        return str(self)


@entry
def export_onnx(
    model: nn.Module,
    path: str | Path,
    batches: Batches,
    *,
    plan: Plan | None = None,
    precision: str = "float32",
    operators: str = "onnxruntime",
    batch_size: int | None = None,
    opset: int | None = None,
    dynamic_size: bool = False,
) -> ExportReport:
    """Write an ONNX file that is fast in ONNX Runtime, or OpenVINO's own, check it, and compare it with torch.

    Args:
        model: a torch model in eval mode, dense or pruned; stays as it is.
        path: the file to write; it appears only if every check passed. Above 2 GB the weights go into PATH.data.
            One that ends in ``.xml`` is OpenVINO's, with its weights in a ``.bin`` beside it.
        batches: real images (normalised by the model's own transform) and labels, which only ``top1`` is for.
            Readable twice for int8.
        plan: what the model was pruned by, kept in the file; the file will not be evaluated on its calibration images.
        precision: key of ``PRECISIONS_ONNX``. Answers of others than ``float32`` are reported, not refused, where they
            differ, but the float32 graph that they are made from has to agree with torch. ``int8`` quantises
            activations as they come; ``int8-static`` reads up to 200 of ``batches``, all of which count as calibration
            images, and an ``.xml`` file in ``int8`` does the same. It pays on processors with 8-bit instructions
            (AVX-512 VNNI, AVX-VNNI) only.
        operators: ``onnxruntime`` (attention as one operator of ONNX Runtime's own), or ``standard`` (ONNX alone, for
            other runtimes, OpenVINO among them).
        batch_size: images per run, fixed; None leaves it open.
        opset: version of ONNX's operators, in 18 .. 23; None takes the one of torch's exporter.
        dynamic_size: take images of any height and width in whole patches; for models that timm builds so
            (``dynamic_img_size``), and not for OpenVINO.

    Raises:
        VitpruneError: if there are no images, an argument is unknown, or ONNX Runtime's float32 logits differ from
            torch's by more than rtol 1e-3, atol 1e-4, on any image (but see ``near_ties``); or if OpenVINO is asked for
            and not installed.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32, num_classes=5).eval()
    >>> batches = [(torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 1, 4]))]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     report = export_onnx(model, Path(folder) / "model.onnx", batches)
    >>> report.top1_agreement, report.max_abs_diff < 1e-4
    (1.0, True)
    """
    path = Path(path)
    check_choice("precision", precision, PRECISIONS_ONNX)
    check_choice("operators", operators, OPERATORS)
    if batch_size is not None and not 1 <= batch_size <= MAX_BATCH_SIZE:
        raise VitpruneError(f"batch_size must be in [1, {MAX_BATCH_SIZE}], got {batch_size}")
    if opset is not None and opset not in OPSETS:
        raise VitpruneError(f"opset must be in {OPSETS[0]} .. {OPSETS[-1]}, got {opset}")
    to_openvino = path.suffix == SUFFIX
    if to_openvino:
        if precision not in ("float32", "int8") or opset is not None:
            raise VitpruneError(f"{path}: OpenVINO's files are float32 or int8, and have no `opset`")
        if dynamic_size:
            raise VitpruneError(
                f"{path}: OpenVINO resizes position embeddings otherwise than torch, without antialiasing, so its "
                "files take images of one size; leave `dynamic_size` out, or write an ONNX file"
            )
        import_openvino()
        if precision == "int8":
            import_nncf()
    model = copy.deepcopy(model).cpu().float().eval()
    remember_names(model, names_in(batches))
    _check_one_output(model)
    float32 = speedup = None
    # Some families export only without fused attention, and the others are fused here.
    with plain_attention(model), atomic_siblings(path) as folder:
        written = folder / path.name
        # Facts first: they tell of every merge, one that nothing reads among them.
        facts = describe_facts(model, plan, "float32")
        drop_unread_merge(model)
        if to_openvino:
            return _export_openvino(model, written, path, batches, facts, precision, batch_size)
        _write(_trace(model, batch_size, operators, opset, dynamic_size), written, facts)
        if dynamic_size:
            check_other_sizes(model, open_onnx(written), what="the file")
        watched = WatchedBatches(batches)
        parity = measure_parity(model, open_onnx(written), watched, exact=True)
        if precision != "float32":
            float32 = parity
            facts = {**facts, "precision": precision}
            if precision == "int8-static":
                # Whoever calibrates a number format has a say in the answers.
                facts["calibration_sha256"] = sorted({*facts["calibration_sha256"], *watched.seen.sha256})
            with tempfile.TemporaryDirectory(dir=folder) as exact:
                for file in [file for file in folder.iterdir() if file.is_file()]:
                    file.rename(Path(exact) / file.name)
                source, told = Path(exact) / path.name, {METADATA_KEY: json.dumps(facts, sort_keys=True)}
                if precision == "float16":
                    halve(source, written, told)
                elif precision == "int8":
                    quantize(source, written, told)
                else:
                    quantize_statically(source, written, collect_images(batches, batch_size), told)
                speedup = _compare_speed(source, written, lambda file: _run_in_session(file, batch_size))
            parity = measure_parity(model, open_onnx(written), batches, exact=False)
        size_bytes = sum(file.stat().st_size for file in folder.iterdir())
    return ExportReport(
        path, **vars(parity), size_bytes=size_bytes, precision=precision, float32=float32, speedup=speedup
    )


def _check_one_output(model: nn.Module) -> None:
    """Refuse an encoder that answers several feature maps: files here have one output."""
    if has_classifier(model):
        return
    with torch.no_grad():
        answer = run(model, torch.zeros(1, *data_config(model)["input_size"]))
    if not isinstance(answer, Tensor) and len(answer) > 1:
        raise VitpruneError(
            f"{type(model).__name__} answers {len(answer)} feature maps, and such a file has one output here; write a "
            "program of torch.export (.pt2), or build the model with one of its `out_indices`"
        )


def write_unchecked(model: nn.Module, path: Path, *, operators: str) -> None:
    """Write the file that ``export_onnx`` would, only to be timed: nothing is compared, and it says nothing of itself.

    Args:
        model: a torch model in eval mode; stays as it is.
        path: the file to write.
        operators: key of ``OPERATORS``.
    """
    model = copy.deepcopy(model).cpu().float().eval()
    with plain_attention(model):
        drop_unread_merge(model)
        write_graph(_trace(model, None, operators), path)


def _export_openvino(
    model: nn.Module,
    written: Path,
    path: Path,
    batches: Batches,
    facts: Mapping[str, Any],
    precision: str,
    batch_size: int | None,
) -> ExportReport:
    """Write OpenVINO's files to ``written``, which will be ``path``."""
    watched, float32, speedup = WatchedBatches(batches), None, None
    with tempfile.TemporaryDirectory() as folder:
        graph, exact = Path(folder) / "graph.onnx", Path(folder) / "float32.xml"
        _write(_trace(model, batch_size, "standard"), graph, facts)
        facts = {**facts, "kind": "openvino", "macs": count_graph_macs(graph)}
        write_openvino(graph, written if precision == "float32" else exact, facts)
        parity = measure_parity(
            model, open_openvino(written if precision == "float32" else exact), watched, exact=True, runtime="OpenVINO"
        )
        if precision == "int8":
            float32 = parity
            # Whoever calibrates a number format has a say in the answers.
            seen = sorted({*facts["calibration_sha256"], *watched.seen.sha256})
            told = {**facts, "precision": "int8", "calibration_sha256": seen}
            quantize_openvino(exact, written, collect_images(batches, batch_size), told)
            speedup = _compare_speed(exact, written, lambda file: make_openvino_runner(file, batch_size or 1, None))
            parity = measure_parity(model, open_openvino(written), batches, exact=False)
    size_bytes = sum(file.stat().st_size for file in written.parent.iterdir())
    return ExportReport(
        path, **vars(parity), size_bytes=size_bytes, precision=precision, float32=float32, speedup=speedup
    )


def _run_in_session(path: Path, batch_size: int | None = None) -> Callable[[], Any]:
    return make_session_runner(open_session(path), batch_size or 1)


def _compare_speed(
    first: Path, second: Path, make_runner: Callable[[Path], Callable[[], Any]] = _run_in_session
) -> Speedup:
    """Time two files in turns and return how many times faster the second is."""
    runners = {path: make_runner(path) for path in (first, second)}
    measured = measure_latency(runners, seconds=SPEED_SECONDS)
    return paired_speedup(measured[first], measured[second])


def _trace(
    model: nn.Module, batch_size: int | None, operators: str, opset: int | None = None, dynamic_size: bool = False
) -> ir.Model:
    dims = any_size_dims(model) if dynamic_size else {}
    if batch_size is None:
        dims[0] = torch.export.Dim("batch", min=1, max=MAX_BATCH_SIZE)
    # Two images: torch.export takes a dimension of size 1 for a constant.
    example = torch.zeros(2 if batch_size is None else batch_size, *example_size(model, dynamic_size=dynamic_size))
    with quiet():
        program = torch.onnx.export(
            model,
            (example,),
            dynamo=True,
            input_names=["images"],
            output_names=["logits"],
            opset_version=opset,
            dynamic_shapes=(dims,) if dims else None,
            verbose=False,
        )
    graph_model = program.model
    unspread_biases(graph_model)
    fuse_merging(graph_model)
    if operators == "onnxruntime":
        fuse_attention(graph_model)
    skip_unread_tokens(graph_model)
    # Stack traces with local file paths.
    ClearMetadataAndDocStringPass()(graph_model)
    graph = graph_model.graph
    # torch 2.6 writes the example's batch size into the shapes of a graph that works for any.
    forget_shapes(graph)
    for value in (*graph.inputs, *graph.outputs):
        value.shape = ir.Shape(["batch" if batch_size is None else batch_size, *value.shape[1:]])
    if dynamic_size:
        (images,) = graph.inputs
        images.shape = ir.Shape([*images.shape[:2], "height", "width"])
    return graph_model


def describe_facts(model: nn.Module, plan: Plan | None, precision: str) -> dict[str, Any]:
    """Return what the file says of itself; nothing of it tells where files lie on this machine."""
    return {
        "kind": "onnx",
        "version": FORMAT_VERSION,
        "vitprune": _version(),
        "architecture": architecture(model),
        "precision": precision,
        "num_classes": model.num_classes,
        "label_names": list(getattr(model, "label_names", None) or ()),
        "class_names": list(class_names(model)),
        "data_config": data_config(model),
        "image_size": list(data_config(model)["input_size"][1:]),
        "widths": {ffn.name: ffn.num_neurons for ffn in find_left(model)},
        "left_out": describe_left_out(model),
        "merge": describe_merging(model),
        "calibration_sha256": sorted(seen_by(model) | (frozenset() if plan is None else plan.calibration)),
        "plan": None if plan is None else describe_plan(plan),
    }


def _version() -> str:
    from vitprune import __version__

    return __version__


def describe_plan(plan: Plan) -> Mapping[str, Any]:
    """Return what a file says of the plan that it was pruned by."""
    facts = {key: value for key, value in plan.facts.as_json().items() if key != "calibration"}
    keep = {name: base64.b64encode(np.packbits(mask.numpy())).decode() for name, mask in plan.keep.items()}
    num_units = {name: len(mask) for name, mask in plan.keep.items()}
    return {**facts, "kinds": dict(plan.kinds), "num_neurons_dense": num_units, "keep": keep}


def _write(graph_model: ir.Model, path: Path, facts: Mapping[str, Any]) -> None:
    graph_model.metadata_props[METADATA_KEY] = json.dumps(facts, sort_keys=True)
    save_graph(graph_model, path)


def save_graph(graph_model: ir.Model, path: Path) -> None:
    """Write a graph, with its weights in a file beside it where they are too many for one, and check it."""
    write_graph(graph_model, path)
    onnx.checker.check_model(str(path), full_check=True)


def write_graph(graph_model: ir.Model, path: Path) -> None:
    """Write a graph, with its weights in a file beside it where they are too many for one."""
    size_bytes = sum(value.const_value.nbytes for value in graph_model.graph.initializers.values())
    external = f"{path.name}.data" if size_bytes > LARGEST_FILE_BYTES else None
    ir.save(graph_model, path, external_data=external)


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back the exporter's progress messages and warnings; its errors stay exceptions."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _one_image_first(batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield all images and labels, the very first alone: a graph that is bound to one batch size fails at once."""
    for position, (images, labels) in enumerate(batches):
        images = images.cpu().float()
        cuts = (slice(0, 1), slice(1, None)) if position == 0 else (slice(None),)
        yield from ((images[cut], labels[cut]) for cut in cuts if len(images[cut]))


@torch.inference_mode()
def measure_parity(
    model: nn.Module,
    exported: Callable[[Tensor], Tensor],
    batches: Batches,
    *,
    exact: bool,
    runtime: str = "ONNX Runtime",
) -> Parity:
    """Compare what a written file answers with what torch does, image by image.

    Args:
        model: the torch model.
        exported: the file, opened.
        batches: images and labels.
        exact: whether another answer is refused; else it is reported.
        runtime: that runs the file, for messages.

    Raises:
        VitpruneError: if there are no images, or an answer differs that must not.
    """
    largest, agreed, right, labelled, count, near_ties, distance = 0.0, 0, 0, 0, 0, 0, 0.0
    has_classes = has_classifier(model)
    merges = any(describe_merging(model) or [])
    for images, labels in _one_image_first(batches):
        expected = ask(model, images)
        got = ask(exported, images) if has_classes else shape_like(model, run(exported, images))
        difference = (expected - got).abs()
        # Written so that NaN is beyond as well.
        beyond = ~(difference <= PARITY_ATOL + PARITY_RTOL * expected.abs()).flatten(1).all(1)
        if exact and bool(beyond.any()):
            wrong = beyond
            if merges:
                wrong = beyond.clone()
                wrong[beyond] = ~_decided_by_rounding(model, images[beyond], expected[beyond], got[beyond])
            if bool(wrong.any()):
                worst = difference[wrong].argmax()
                what = "a logit" if has_classes else "a number of an embedding"
                raise VitpruneError(
                    f"the exported graph differs from torch: {what} is {got[wrong].flatten()[worst]:.6g} in {runtime} "
                    f"and {expected[wrong].flatten()[worst]:.6g} in torch"
                )
            near_ties += int(beyond.sum())
            difference = difference[~beyond]
        largest = max(largest, float(difference.max()) if len(difference) else 0.0)
        count += len(images)
        if not has_classes:
            distance += float(cosine_distance(expected, got).sum())
            continue
        answers = of_classes(got).argmax(1)
        agreed += int((of_classes(expected).argmax(1) == answers).sum())
        if not has_several(labels):
            known = labels.cpu() != NO_LABEL
            right += int((answers == labels.cpu())[known].sum())
            labelled += int(known.sum())
    if count == 0:
        raise VitpruneError(f"no images to compare {runtime} with torch on")
    if near_ties == count:
        raise VitpruneError(
            f"the exported graph differs from torch on all {count} images, where rounding may decide which tokens "
            "merge; compare more images"
        )
    if not has_classes:
        return Parity(largest, None, None, count, near_ties, 1 - distance / count)
    return Parity(largest, agreed / count, right / labelled if labelled else None, count, near_ties)


def _decided_by_rounding(model: nn.Module, images: Tensor, expected: Tensor, got: Tensor) -> Tensor:
    """Tell of which images [B] torch itself gives the file's answer once they change by a thousandth of a grey level.

    Which tokens merge is a choice between numbers that may be nearly equal, and kernels that sum in another order then
    choose otherwise. Torch has to arrive at the very same answer by another tiny change, so no wrong graph passes.
    """
    generator = torch.Generator().manual_seed(0)
    explained = torch.zeros(len(images), dtype=torch.bool)
    for scale in NOISE:
        for _draw in range(NUM_DRAWS):
            moved = ask(model, images + scale * torch.randn(images.shape, generator=generator))
            near = (moved - got).abs() <= NEAR * (PARITY_ATOL + PARITY_RTOL * expected.abs())
            explained |= near.flatten(1).all(1)
            if bool(explained.all()):
                return explained
    return explained
