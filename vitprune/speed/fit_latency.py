"""Time a model in a dozen shapes on a machine, and fit what its blocks cost there."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn

from vitprune.data import Batches
from vitprune.entry import entry
from vitprune.errors import VitpruneError
from vitprune.export.onnx_file import write_unchecked
from vitprune.export.openvino_file import (
    OPENVINO,
    SUFFIX,
    collect_images,
    import_nncf,
    import_openvino,
    quantize_for_openvino,
)
from vitprune.export.quantize import halve, quantize
from vitprune.export.runtime import PROVIDERS, check_provider
from vitprune.images.resized_batches import resize_batches
from vitprune.models.attention import QK, VO, split_attention
from vitprune.models.image_size import set_image_size, smaller_sizes
from vitprune.models.merging import check_merging, set_merging
from vitprune.models.units import FFN, LAYERS, find_groups
from vitprune.options import ALLOWED_PRECISIONS, BACKENDS, check_choice
from vitprune.progress import Track, untracked
from vitprune.pruning.apply import remove_neurons
from vitprune.pruning.decide_parts import multiple_of
from vitprune.pruning.latency_model import LatencyModel, fit_rates, shape_of
from vitprune.pruning.plan import Plan
from vitprune.speed.bench import FILE_BACKENDS, Runner, Setting, make_backend_runner, operators_for
from vitprune.timing import Latency, measure_latency, paired_speedup
from vitprune.views import data_config, num_patches

NUM_SAMPLES = 12
# Images that candidates are quantised by, where that is static; and random ones, where they are timed alone.
NUM_QUANTISED, NUM_RANDOM = 64, 2
SECONDS_EACH = 1.0


@dataclass(frozen=True)
class Format:
    """What a model is run as.

    Attributes:
        backend: key of ``BACKENDS``.
        precision: of the products with weights; key of ``PRECISIONS_ONNX`` for files, or ``float32``.
    """

    backend: str
    precision: str = "float32"

    def __str__(self) -> str:
        return f"{self.backend} {self.precision}"

    @property
    def is_file(self) -> bool:
        """Whether a file is run, and no model of torch."""
        return self.backend in FILE_BACKENDS


@dataclass(frozen=True)
class Fitted:
    """How long a model takes in some formats, by its shape.

    Attributes:
        dense_ms: of the dense model in the first format in float32, at the first batch size.
        models: format -> its latencies, in the time of the reference: ``dense_ms`` times the share of the dense run
            that a run takes, averaged over batch sizes.
        reference: what the dense model ran as.
    """

    dense_ms: float
    models: Mapping[Format, LatencyModel]
    reference: Format

    def as_json(self) -> dict[str, Any]:
        """Return JSON values."""
        models = [asdict(latency) for latency in self.models.values()]
        return {"dense_ms": self.dense_ms, "reference": asdict(self.reference), "models": models}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Fitted:
        """Read what ``as_json`` gave."""
        models = [LatencyModel(**{**each, "rates": tuple(each["rates"])}) for each in content["models"]]
        by_format = {Format(each.backend, each.precision): each for each in models}
        return cls(content["dense_ms"], by_format, Format(**content["reference"]))


@entry
def fit_latency(
    model: nn.Module,
    formats: Sequence[Format],
    *,
    batch_sizes: Sequence[int] = (1,),
    num_threads: int | None = None,
    num_samples: int = NUM_SAMPLES,
    seed: int = 0,
    track: Track = untracked,
) -> Fitted:
    """Time a model whole and in random shapes, all formats in turn, and fit what each of its parts takes.

    The shapes have narrower FFNs and attention, layers that are gone, merged tokens and smaller
    images. Weights play no part in it.

    Args:
        model: timm Vision Transformer in eval mode whose tokens can merge.
        formats: to time; the first one's float32 is what all times refer to.
        batch_sizes: images per run, each at least 1.
        num_threads: of the operators; None takes torch's.
        num_samples: shapes beside the dense one.
        seed: of the shapes.
        track: wraps (shapes, description), for progress.

    Raises:
        VitpruneError: if a format is unknown or absent here, or the model is of another kind.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=2, embed_dim=48, img_size=64).eval()
    >>> eager = Format("torch-eager")
    >>> fit_latency(model, [eager], num_samples=3).models[eager].predict(model) > 0
    True
    """
    check_merging(model)
    if not formats:
        raise VitpruneError("no `formats` to time")
    for each in formats:
        check_choice("backend", each.backend, BACKENDS)
    if min(batch_sizes, default=0) < 1:
        raise VitpruneError(f"batch sizes must be at least 1, got {list(batch_sizes)}")
    reference = Format(formats[0].backend)
    wanted = list(dict.fromkeys([reference, *formats]))
    samples = list(sample_shapes(model, num_samples, seed=seed))
    with tempfile.TemporaryDirectory() as folder:
        writer = Writer(Path(folder))
        sources = {}
        for number, sample in enumerate(track(samples, "prepare shapes")):
            for each in wanted if number == 0 else formats:
                sources[each, number] = writer.source(sample, each, f"{number}")
        first = (reference, 0)
        measured = [
            time_sources(sources, batch_size, num_threads)
            for batch_size in track(list(batch_sizes), f"time {len(sources)} models")
        ]
    dense_ms = measured[0][first].median_ms
    shares = [
        {key: 1 / paired_speedup(of_size[first], latency).ratio for key, latency in of_size.items()}
        for of_size in measured
    ]
    models = {}
    for each in formats:
        on_graph = each.is_file
        shapes = [shape_of(sample, reads_last_block=not on_graph) for sample in samples]
        times = [dense_ms * fmean(of_size[each, number] for of_size in shares) for number in range(len(samples))]
        rates, error = fit_rates(shapes, times)
        models[each] = LatencyModel(each.backend, each.precision, rates, not on_graph, error)
    return Fitted(dense_ms, models, reference)


def list_formats(backends: Sequence[str], allow: Sequence[str] = ()) -> list[Format]:
    """Return what a model may be run as: float32 on each backend first, then what is allowed where a backend has it.

    Args:
        backends: keys of ``BACKENDS``.
        allow: keys of ``ALLOWED_PRECISIONS``.

    Raises:
        VitpruneError: if a name is unknown, a backend is absent, or none has a precision that is allowed.

    >>> [str(each) for each in list_formats(["onnxruntime-cpu"], ["int8"])]
    ['onnxruntime-cpu float32', 'onnxruntime-cpu int8']
    """
    for backend in backends:
        check_choice("backend", backend, BACKENDS)
        if backend in PROVIDERS:
            check_provider(backend)
        elif backend in FILE_BACKENDS:
            import_openvino()
    formats = [Format(backend) for backend in dict.fromkeys(backends)]
    for precision in dict.fromkeys(allow):
        check_choice("allow", precision, ALLOWED_PRECISIONS)
        able = (*PROVIDERS, OPENVINO) if precision == "int8" else tuple(PROVIDERS)
        having = [backend for backend in backends if backend in able]
        if not having:
            raise VitpruneError(f"{', '.join(backends)} has no {precision}; name a backend of files, onnxruntime-cpu")
        if OPENVINO in having:
            import_nncf()
        formats += [Format(backend, precision) for backend in having]
    return formats


def time_sources(
    sources: Mapping[tuple[Format, Any], nn.Module | Path],
    batch_size: int,
    num_threads: int | None = None,
    *,
    seconds_each: float = SECONDS_EACH,
) -> dict[tuple[Format, Any], Latency]:
    """Time in turns what a ``Writer`` wrote.

    Args:
        sources: (format, name) -> a torch model, or a file that the format's backend runs.
        batch_size: images per run.
        num_threads: of the operators; None takes torch's.
        seconds_each: to spend on each.
    """
    runners: dict[Any, Runner] = {}
    for key, source in sources.items():
        each = key[0]
        precision = "float32" if each.is_file else each.precision
        device = str(next(source.parameters()).device) if isinstance(source, nn.Module) else "cpu"
        setting = Setting(each.backend, precision, batch_size, num_threads or torch.get_num_threads(), device)
        runners[key] = make_backend_runner(source, setting)
        runners[key]()
    return measure_latency(runners, seconds=seconds_each * len(runners))


class Writer:
    """Writes models as what a format runs, into a folder; a float32 file that several formats need is written once.

    Args:
        folder: to write into.
        batches: images of the models and labels, to quantise by where that is static; random images where there are
            none, which serve to be timed.
    """

    def __init__(self, folder: Path, batches: Batches | None = None) -> None:
        self.folder, self.batches = folder, batches

    def source(self, model: nn.Module, wanted: Format, name: str) -> nn.Module | Path:
        """Return what ``make_backend_runner`` takes: the model itself for torch, a file for others."""
        if not wanted.is_file:
            return model
        operators = operators_for([wanted.backend])
        path = self.folder / f"{name}-{operators}.onnx"
        if not path.exists():
            write_unchecked(model, path, operators=operators)
        if wanted.precision == "float32":
            return path
        if wanted.backend == OPENVINO:
            return self._quantise_statically(model, path)
        narrow = path.with_name(f"{path.stem}-{wanted.precision}.onnx")
        if not narrow.exists():
            {"int8": quantize, "float16": halve}[wanted.precision](path, narrow, {})
        return narrow

    def _quantise_statically(self, model: nn.Module, path: Path) -> Path:
        narrow = path.with_name(f"{path.stem}-int8{SUFFIX}")
        if not narrow.exists():
            facts = {"data_config": data_config(model), "num_classes": model.num_classes}
            images = collect_images(self._images(model), None, num_images=NUM_QUANTISED)
            quantize_for_openvino(path, narrow, images, facts)
        return narrow

    def _images(self, model: nn.Module) -> Batches:
        if self.batches is None:
            size = data_config(model)["input_size"]
            return [
                (torch.randn(NUM_RANDOM, *size, generator=torch.Generator().manual_seed(0)), torch.zeros(NUM_RANDOM))
            ]
        return resize_batches(self.batches, model)


def sample_shapes(model: nn.Module, num_samples: int, *, seed: int = 0) -> Iterator[nn.Module]:
    """Yield the model itself, then models of other shapes: one part changed at a time first, then all together.

    Args:
        model: timm Vision Transformer in eval mode whose tokens can merge.
        num_samples: how many others.
        seed: of what is drawn.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=2).eval()
    >>> [sum(p.numel() for p in each.parameters()) <= 2_000_000 for each in sample_shapes(model, 2)]
    [True, True, True]
    """
    yield model
    drawn = random.Random(seed)
    split, depth, patches = split_attention(model), len(model.blocks), num_patches(model)
    third = max(1, depth // 3)
    spread = dict.fromkeys(range(0, depth - 1, third), patches // 4)
    steady = {block: max(1, patches // (2 * depth)) for block in range(depth)}
    # Shares of units, merges, layers that are gone.
    designed: list[tuple[dict[str, float], dict[int, int], int]] = [
        ({FFN: 0.5}, {}, 0),
        ({}, spread, 0),
        ({QK: 0.5}, {}, 0),
        ({}, steady, 0),
        ({VO: 0.5}, {}, 0),
        ({}, {}, max(1, depth // 4)),
        ({FFN: 0.5, QK: 0.5, VO: 0.75}, spread, 0),
    ]
    sizes = smaller_sizes(model) if hasattr(model, "set_input_size") else []
    if sizes and num_samples > len(designed):
        yield set_image_size(model, sizes[len(sizes) // 2])
        num_samples -= 1
    for number in range(num_samples):
        if number < len(designed):
            shares, merges, gone = designed[number]
        else:
            shares = {kind: drawn.choice((0.25, 0.5, 0.75, 1.0)) for kind in (FFN, QK, VO)}
            blocks = drawn.sample(range(depth), min(depth, drawn.randint(0, 4)))
            merges = {block: drawn.randint(1, max(1, patches // 5)) for block in blocks}
            gone = drawn.randint(0, max(1, depth // 6))
        left_out = {f"blocks.{block}.{drawn.choice(('attn', 'mlp'))}" for block in drawn.sample(range(depth), gone)}
        narrow = remove_neurons(split, _plan(split, shares, left_out, drawn))
        yield set_merging(narrow, _fit(merges, depth, patches, left_out)) if merges else narrow


def _plan(model: nn.Module, shares: Mapping[str, float], left_out: set[str], drawn: random.Random) -> Plan:
    keep, kinds = {}, {}
    for group in find_groups(model, [FFN, QK, VO, LAYERS]):
        if group.kind == LAYERS:
            keep[group.name] = torch.tensor([group.module not in left_out])
        else:
            step = multiple_of(group.num_units)
            share = min(1.0, shares.get(group.kind, 1.0) * drawn.uniform(0.8, 1.25)) if group.kind in shares else 1.0
            width = max(step, round(group.num_units * share / step) * step)
            gone = group.module in left_out
            keep[group.name] = (
                torch.zeros(group.num_units, dtype=torch.bool) if gone else (torch.arange(group.num_units) < width)
            )
        if group.kind != FFN:
            kinds[group.name] = group.kind
    return Plan(keep, kinds=kinds)


def _fit(merges: Mapping[int, int], depth: int, patches: int, left_out: set[str]) -> list[int]:
    schedule, left = [], patches
    for block in range(depth):
        r = 0 if f"blocks.{block}.attn" in left_out else min(merges.get(block, 0), left // 2)
        schedule.append(r)
        left -= r
    return schedule
