"""Prune an ONNX file of the dense model by a plan, without the torch model that it came from.

Letters: D embedding width, H hidden neurons, I inputs and O outputs of a linear, K kept neurons.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import Tensor, nn

from vitprune.data import Batches
from vitprune.entry import entry
from vitprune.errors import VitpruneError
from vitprune.export.graph import forget_shapes, read_graph
from vitprune.export.graph_ffns import (
    GraphFfn,
    Linear,
    find_graph_ffns,
    find_linears,
    match_ffns,
    remove_neurons,
    write_linear,
)
from vitprune.export.graph_statistics import measure_graph_statistics, open_runner
from vitprune.export.onnx_file import PARITY_ATOL, PARITY_RTOL, describe_plan, save_graph
from vitprune.export.runtime import FLOATS, METADATA_KEY, has_channels_last, refuse_input_type
from vitprune.files import atomic_siblings
from vitprune.models.attention import HEADS, QK, VO
from vitprune.models.merging import describe_merging
from vitprune.models.units import FFN, LAYERS, Group, find_feed_forwards
from vitprune.options import COMPENSATIONS, DEFAULT_RIDGE, check_choice
from vitprune.progress import Track, untracked
from vitprune.pruning.compensate import check_ridge
from vitprune.pruning.compensations import REGISTRY, check_compensation
from vitprune.pruning.plan import Plan
from vitprune.seal import parsing
from vitprune.seen_images import watch
from vitprune.views import data_config

# What can be computed from one FFN's own statistics; nothing at all, too.
IN_GRAPH = tuple(name for name, row in REGISTRY.items() if row.stand_in is not None or not row.reads_images)
# Images that both graphs are run on.
NUM_COMPARED = 4
_OTHER_WEIGHTS = (
    "the file's weights are not those the plan was compensated for; compensate anew by bias or ridge on calibration "
    "images (pass `batches`), or go without"
)


@dataclass(frozen=True)
class OnnxPruneReport:
    """What was written, and how closely the law of the package holds for it.

    Attributes:
        path: the ONNX file.
        widths: neurons kept, by the plan's FFN names.
        num_neurons: kept in all FFNs.
        num_neurons_dense: before pruning in all FFNs.
        pruning_ratio: share removed, in [0, 1).
        size_bytes: of the file, and of the one beside it that holds the weights of a model above 2 GB.
        max_abs_diff: largest absolute difference of an output between neurons removed and neurons masked.
        num_images: that this was measured on.
        donor_max_abs_diff: largest absolute difference of a logit to the donor in torch; None without one.
    """

    path: Path
    widths: Mapping[str, int]
    num_neurons: int
    num_neurons_dense: int
    pruning_ratio: float
    size_bytes: int
    max_abs_diff: float
    num_images: int
    donor_max_abs_diff: float | None = None

    def __str__(self) -> str:
        return (
            f"removed {self.pruning_ratio:.1%} of {self.num_neurons_dense} FFN neurons; removed and masked differ by "
            f"at most {self.max_abs_diff:.2e} on {self.num_images} images\n"
            f"wrote {self.path} ({self.size_bytes / 1e6:.1f} MB)"
        )

    def __repr__(self) -> str:
        return str(self)


# Why a graph cannot lose units of a kind: what is left of them in the pruned model are other weights.
_BEYOND: Mapping[str, str] = {
    QK: "dimensions of queries and keys are cut in a basis that the file's weights are not in",
    VO: "dimensions of values are cut in a basis that the file's weights are not in",
    HEADS: "only neurons of FFNs can be taken out of an ONNX graph, no heads",
    LAYERS: "only neurons of FFNs can be taken out of an ONNX graph, no whole layers",
}
_INSTEAD = "export the pruned model's folder instead"

# Position in ``find_linears`` -> weight [I, O] and bias [O] (None: as it is) of a dense linear, compensated.
_Weights = Mapping[int, tuple[np.ndarray, np.ndarray | None]]


@entry
def prune_onnx(
    source: str | Path,
    plan: Plan,
    output: str | Path,
    *,
    compensate: str = "none",
    batches: Batches | None = None,
    ridge: float = DEFAULT_RIDGE,
    donor: nn.Module | None = None,
    track: Track = untracked,
) -> OnnxPruneReport:
    """Remove neurons from an ONNX file of the dense model.

    The new file appears only if it gives the answers of the dense graph with masked neurons and the same compensation.

    Args:
        source: the dense model's file, float32: of ``export_onnx``, of torch's exporters, or any other whose FFNs
            ``find_graph_ffns`` finds.
        plan: which neurons stay. Its FFNs are found by the names of the file's constants, or else by order; its
            calibration images, to which ``batches`` belong, are recorded where the file is vitprune's own.
        output: the file to write. Above 2 GB the weights go into OUTPUT.data.
        compensate: ``none``, ``bias`` or ``ridge``, computed in the graph.
        batches: calibration images (normalised as the file expects) and labels, which are not used. Read once for
            ``bias`` and ``ridge``; otherwise the first ones only serve to compare.
        ridge: λ relative to the mean variance of the hidden neurons; positive.
        donor: a torch model with removed neurons that was made by this plan from the same dense weights: its
            compensation, of whichever kind, is taken over, that of its attention included.
        track: wraps (FFNs, description), for progress.

    Raises:
        VitpruneError: if the plan is not for this file or takes more than neurons of FFNs, an argument is out of
            range, images are missing, the donor was made from other weights, or the outputs of removal and masking
            differ by more than rtol 1e-3, atol 1e-4.

    >>> import tempfile, timm
    >>> from vitprune import export_onnx
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=5).eval()
    >>> plan = Plan({"blocks.0.mlp": torch.arange(768) < 384})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     dense, half = (Path(folder) / f"{name}.onnx" for name in ("dense", "half"))
    ...     _ = export_onnx(model, dense, [(torch.randn(2, 3, 32, 32), torch.zeros(2))])
    ...     prune_onnx(dense, plan, half).pruning_ratio
    0.5
    """
    source, output = Path(source), Path(output)
    _check_arguments(compensate, batches, ridge, donor)
    plan = _only_neurons(plan, donor)
    model = read_graph(source)
    ffns = fit_graph(model, plan, source)
    shape = _input_shape(model, donor, source)
    facts = {"mode": "remove"}
    if donor is None:
        # What came of the plan in torch, with another compensation maybe, is not what this file holds.
        facts |= {"compensation": compensate, "ridge": ridge}
    else:
        donor = copy.deepcopy(donor).cpu().float().eval()
    weights: _Weights = {}
    seen: list[Tensor] = []
    with atomic_siblings(output) as folder:
        written, other = folder / output.name, folder / f"{output.name}.other"
        if REGISTRY[compensate].reads_images:
            watched = watch(batches)
            read = _remembering(watched, seen)
            weights = _compensate(source, plan, read, other, compensation=compensate, ridge=ridge, track=track)
            calibration = watched.seen.with_hashes(plan.calibration)
            # These weights are not those of the model that the plan was made of.
            plan = plan.with_facts(calibration=calibration, weights_sha256=None)
            _remove(other)
        images = _images_to_compare(shape, batches, seen)
        if donor is not None:
            weights = _transplant(donor, plan, model, ffns, images)
        _write(model, source, plan, weights, written, remove=True, facts=facts)
        size_bytes = sum(file.stat().st_size for file in folder.iterdir())
        _write(read_graph(source), source, plan, weights, other, remove=False, facts=facts)
        got, masked = _run(written, images), _run(other, images)
        _remove(other)
        max_abs_diff = max(
            _largest_difference(*pair, f"{source}: removing neurons is not masking them here", ("removed", "masked"))
            for pair in zip(got, masked, strict=True)
        )
        donor_max_abs_diff = None
        if donor is not None:
            with torch.inference_mode():
                answers = donor(images).numpy()
            wrong = f"{source} does not become the donor"
            sides = ("in ONNX Runtime", "in torch")
            donor_max_abs_diff = _largest_difference(got[0], answers, wrong, sides, hint=f"; {_OTHER_WEIGHTS}")
    return OnnxPruneReport(
        path=output,
        widths=plan.widths,
        num_neurons=plan.num_neurons,
        num_neurons_dense=plan.num_neurons_dense,
        pruning_ratio=plan.pruning_ratio,
        size_bytes=size_bytes,
        max_abs_diff=max_abs_diff,
        num_images=len(images),
        donor_max_abs_diff=donor_max_abs_diff,
    )


def _check_arguments(compensation: str, batches: Batches | None, ridge: float, donor: nn.Module | None) -> None:
    if compensation in COMPENSATIONS and compensation not in IN_GRAPH:
        raise VitpruneError(
            f"compensation {compensation} cannot be computed in an ONNX graph, only {', '.join(IN_GRAPH)}; "
            "to have it, give as plan the folder of a torch model that was pruned so"
        )
    check_choice("compensation", compensation, {name: COMPENSATIONS[name] for name in IN_GRAPH})
    check_ridge(ridge)
    row = REGISTRY[compensation]
    if donor is not None and row.reads_images:
        raise VitpruneError(f"the donor brings its own compensation; leave out {compensation}, or the donor")
    check_compensation(compensation, has_images=batches is not None)


def _only_neurons(plan: Plan, donor: nn.Module | None) -> Plan:
    """Return what a plan says of FFNs, after refusing one that takes anything else."""
    for name in plan.keep:
        if plan.kind(name) != FFN and len(plan.removed(name)):
            raise VitpruneError(f"part {plan.kind(name)}: {name}: {_BEYOND[plan.kind(name)]}; {_INSTEAD}")
    if any(plan.facts.merge or ()) or (donor is not None and describe_merging(donor)):
        raise VitpruneError(f"merging: tokens of an ONNX graph cannot be made to merge; {_INSTEAD}")
    if plan.facts.image_size is not None:
        size = " x ".join(map(str, plan.facts.image_size))
        raise VitpruneError(f"image size: an ONNX graph cannot be made to take images of {size}; {_INSTEAD}")
    return plan.only(FFN)


def fit_graph(model: ir.Model, plan: Plan, source: Path) -> dict[str, GraphFfn]:
    """Return the graph's FFNs by the plan's names, after checking that the plan covers them and leaves none empty.

    Args:
        model: from ``read_graph``.
        plan: which neurons stay.
        source: for the messages.

    Raises:
        VitpruneError: naming both sides of the first mismatch, or why the graph has no FFN.
    """
    try:
        found = find_graph_ffns(model)
    except VitpruneError as error:
        raise VitpruneError(f"{source}: {error}") from error
    unfit = f"plan does not fit {source}:"
    facts = _own_facts(model) or {}
    sides = (plan.facts.architecture, facts.get("architecture"))
    if None not in sides and sides[0] != sides[1]:
        raise VitpruneError(f"{unfit} it is for {sides[0]}, the file is {sides[1]}")
    ffns = match_ffns(found, list(plan.keep))
    if not ffns:
        raise VitpruneError(
            f"{unfit} it covers {len(plan.keep)} FFNs ({_span(list(plan.keep))}), "
            f"the file has {len(found)} ({_span([ffn.name for ffn in found])})"
        )
    for name, ffn in ffns.items():
        if len(plan.keep[name]) != ffn.num_neurons:
            pruned = "; the file is pruned already, and the plan is for the dense model" if facts.get("plan") else ""
            raise VitpruneError(
                f"{unfit} {ffn.name} has {ffn.num_neurons} neurons, the plan covers {len(plan.keep[name])} "
                f"for {name}{pruned}"
            )
        if not plan.keep[name].any():
            raise VitpruneError(f"plan leaves {name} without neurons")
    return ffns


def _span(names: Sequence[str]) -> str:
    return f"{names[0]} .. {names[-1]}" if names else "none"


def _own_facts(model: ir.Model) -> dict[str, Any] | None:
    """Return what a file that vitprune wrote says of itself; None for anyone else's."""
    text = model.metadata_props.get(METADATA_KEY)
    with parsing("the ONNX file's own description"):
        return None if text is None else dict(json.loads(text))


def _input_shape(model: ir.Model, donor: nn.Module | None, source: Path) -> tuple[int, ...] | None:
    """Return [channels, height, width] of the images that the file takes; None where nobody says."""
    fed = [value for value in model.graph.inputs if not value.is_initializer()]
    if len(fed) != 1 or fed[0].shape is None or len(fed[0].shape) != 4:
        raise VitpruneError(
            f"{source}: expected one input of images [B, channels, height, width], found {len(fed)} inputs"
        )
    if fed[0].dtype is not None and fed[0].dtype not in FLOATS:
        refuse_input_type(source, fed[0].name, fed[0].dtype.name.lower())
    known = [size if isinstance(size, int) else None for size in fed[0].shape[1:]]
    if has_channels_last(known):
        known = [known[2], *known[:2]]
    for said in ((_own_facts(model) or {}).get("data_config"), None if donor is None else data_config(donor)):
        if said is not None:
            pairs = list(zip(known, said["input_size"], strict=True))
            if any(size not in (None, wanted) for size, wanted in pairs):
                raise VitpruneError(
                    f"{source} takes images of {known}, the model that it should be {said['input_size']}"
                )
            known = [wanted for _size, wanted in pairs]
    return None if None in known else tuple(known)


def _remembering(batches: Batches, seen: list[Tensor]) -> Batches:
    for images, labels in batches:
        if not seen:
            seen.append(images)
        yield images, labels


def _images_to_compare(shape: tuple[int, ...] | None, batches: Batches | None, seen: Sequence[Tensor]) -> Tensor:
    """Return the first images: those read already, else those there are, else random ones."""
    images = next(iter(seen), None)
    if images is None:
        images = next((images for images, _labels in batches or ()), None)
    if images is not None:
        return images[:NUM_COMPARED].float().cpu()
    if shape is None:
        raise VitpruneError("the file does not say how large its images are; pass some as `batches`")
    return torch.randn(NUM_COMPARED, *shape, generator=torch.Generator().manual_seed(0))


def _compensate(
    source: Path, plan: Plan, batches: Batches, path: Path, *, compensation: str, ridge: float, track: Track
) -> _Weights:
    model = read_graph(source)
    ffns = fit_graph(model, plan, source)
    positions = _positions(model)
    statistics = measure_graph_statistics(model, list(ffns.values()), batches, path)
    weights = {}
    for name, of_ffn in track(list(zip(ffns, statistics, strict=True)), "compensate"):
        if bool(plan.keep[name].all()):
            continue
        down = ffns[name].down
        weight_DH, shift_D = REGISTRY[compensation].stand_in(
            torch.from_numpy(down.weight_IO.T.copy()), of_ffn, plan.keep[name], ridge=ridge
        )
        bias_D = shift_D.numpy() + (0 if down.bias_O is None else down.bias_O)
        weights[positions[down]] = (weight_DH.T.numpy(), bias_D)
    return weights


def _positions(model: ir.Model) -> dict[Linear, int]:
    return {linear: at for at, linear in enumerate(find_linears(model))}


def _transplant(
    donor: nn.Module, plan: Plan, model: ir.Model, ffns: Mapping[str, GraphFfn], images: Tensor
) -> _Weights:
    """Take over what compensation changes in torch: output projections of FFNs, and of the attention before them.

    Up-projections are never changed by it, so they prove that file and donor come from the same dense weights.
    """
    torch_ffns = _fit_donor(donor, plan)
    positions = _positions(model)
    in_ffns = {linear for ffn in ffns.values() for linear in (*ffn.ups, ffn.down)}
    square = [(at, linear.weight_IO.shape) for linear, at in positions.items() if linear not in in_ffns]
    torch_order = _execution_order(donor, images)
    torch_in_ffns = {name for ffn in torch_ffns for name in (*ffn.up_projs, ffn.read_by)}
    torch_square = [
        (at, donor.get_submodule(name).weight.T.shape)
        for at, name in enumerate(torch_order)
        if name not in torch_in_ffns
    ]
    weights: dict[int, tuple[np.ndarray, np.ndarray | None]] = {}
    for torch_ffn in torch_ffns:
        ffn, kept = ffns[torch_ffn.name], plan.kept(torch_ffn.name).numpy()
        _check_same_ups(donor, torch_ffn, ffn, kept)
        weight_KD, bias_D = _read_linear(donor, torch_ffn.read_by)
        weight_HD = np.zeros_like(ffn.down.weight_IO)
        weight_HD[kept] = weight_KD
        weights[positions[ffn.down]] = (weight_HD, bias_D)
        width = weight_HD.shape[1]
        attention = _last_square(square, min(positions[up] for up in ffn.ups), width)
        torch_attention = _last_square(torch_square, min(map(torch_order.index, torch_ffn.up_projs)), width)
        if None not in (attention, torch_attention):
            weights[attention] = _read_linear(donor, torch_order[torch_attention])
    return weights


def _fit_donor(donor: nn.Module, plan: Plan) -> list[Group]:
    ffns = find_feed_forwards(donor)
    names = [ffn.name for ffn in ffns]
    if names != list(plan.keep):
        raise VitpruneError(
            f"donor does not fit the plan: it has {len(names)} FFNs ({_span(names)}), "
            f"the plan covers {len(plan.keep)} ({_span(list(plan.keep))})"
        )
    for ffn in ffns:
        kept, dense = plan.widths[ffn.name], len(plan.keep[ffn.name])
        if ffn.num_neurons != kept:
            masked = "; prune it with `mode` remove" if ffn.num_neurons == dense else ""
            raise VitpruneError(
                f"donor does not fit the plan: {ffn.name} has {ffn.num_neurons} neurons, "
                f"the plan keeps {kept} of {dense}{masked}"
            )
    return ffns


def _execution_order(model: nn.Module, images: Tensor) -> list[str]:
    """Return the names of linear layers in the order in which they run."""
    order: dict[str, None] = {}
    handles = []
    try:
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                hook = lambda _module, _inputs, _output, name=name: order.setdefault(name)  # noqa: E731
                handles.append(module.register_forward_hook(hook))
        with torch.inference_mode():
            model(images[:1])
    finally:
        for handle in handles:
            handle.remove()
    return list(order)


def _last_square(linears: Sequence[tuple[int, tuple[int, ...]]], before: int, width: int) -> int | None:
    """Return the last linear before a position that maps the embedding onto itself: attention's output projection."""
    return max((at for at, shape in linears if at < before and tuple(shape) == (width, width)), default=None)


def _check_same_ups(donor: nn.Module, torch_ffn: Group, ffn: GraphFfn, kept: np.ndarray) -> None:
    columns = ffn.up_columns(kept)
    ups = [(up.weight_IO[:, columns], None if up.bias_O is None else up.bias_O[columns]) for up in ffn.ups]
    for name in torch_ffn.up_projs:
        weight_IO, bias_O = _read_linear(donor, name)
        if not any(_same(weight_IO, weight) and _same(bias_O, bias) for weight, bias in ups):
            raise VitpruneError(f"{name} of the donor is not in {ffn.name} of the file: {_OTHER_WEIGHTS}")


def _same(left: np.ndarray | None, right: np.ndarray | None) -> bool:
    # No bias and one of zeros are the same; exporters differ in which they write.
    if left is None or right is None:
        return not any(side is not None and side.any() for side in (left, right))
    return np.array_equal(left, right)


def _read_linear(model: nn.Module, name: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the weight [I, O] and the bias [O] of a torch linear."""
    linear = model.get_submodule(name)
    bias_O = None if linear.bias is None else linear.bias.detach().numpy()
    return linear.weight.detach().numpy().T, bias_O


def _write(
    model: ir.Model, source: Path, plan: Plan, weights: _Weights, path: Path, *, remove: bool, facts: Mapping[str, Any]
) -> None:
    """Write the graph with other weights and with neurons removed, or masked by zero rows of the output projection."""
    linears, ffns = find_linears(model), fit_graph(model, plan, source)
    graph = model.graph
    for at, (weight_IO, bias_O) in weights.items():
        write_linear(graph, linears[at], weight_IO, bias_O)
    for name, ffn in ffns.items():
        if remove:
            remove_neurons(graph, ffn, plan.kept(name).numpy())
        else:
            write_linear(graph, ffn.down, ffn.down.weight_IO * plan.keep[name].numpy()[:, None])
    own = _own_facts(model)
    if own is not None:
        own["widths"] = plan.widths
        own["plan"] = describe_plan(plan.with_facts(**facts))
        own["calibration_sha256"] = sorted(plan.calibration | set(own.get("calibration_sha256", ())))
        model.metadata_props[METADATA_KEY] = json.dumps(own, sort_keys=True)
    RemoveUnusedNodesPass()(model)
    graph.sort()
    forget_shapes(graph)
    try:
        save_graph(model, path)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise VitpruneError(f"{source}: what comes out is no valid graph ({str(error).splitlines()[0]})") from error


def _run(path: Path, images: Tensor) -> list[np.ndarray]:
    return [np.concatenate(parts) for parts in zip(*open_runner(path)(images), strict=True)]


def _largest_difference(
    got: np.ndarray, expected: np.ndarray, wrong: str, sides: tuple[str, str], *, hint: str = ""
) -> float:
    if got.shape != expected.shape:
        raise VitpruneError(
            f"{wrong}: outputs are {list(got.shape)} {sides[0]}, {list(expected.shape)} {sides[1]}{hint}"
        )
    difference = np.abs(got - expected)
    if not (difference <= PARITY_ATOL + PARITY_RTOL * np.abs(expected)).all():
        worst = difference.argmax()
        numbers = f"{got.flat[worst]:.6g} {sides[0]}, {expected.flat[worst]:.6g} {sides[1]}"
        raise VitpruneError(f"{wrong}: an output is {numbers}{hint}")
    return float(difference.max())


def _remove(path: Path) -> None:
    for file in (path, path.with_name(f"{path.name}.data")):
        file.unlink(missing_ok=True)
