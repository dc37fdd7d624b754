"""What is asked about images: models by their names, files, and how their images are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from vitprune.data import Batches, ImageBatches, ImageSet
from vitprune.errors import VitpruneError
from vitprune.evaluation.model_facts import ModelFacts, describe_file, describe_network
from vitprune.export.openvino_file import OpenVinoModel, open_openvino
from vitprune.export.runtime import OnnxModel, open_onnx
from vitprune.models.identity import hash_weights
from vitprune.models.load import load
from vitprune.models.sources import spell
from vitprune.pruning.plan import find_plan

# What may be said of an ONNX file's images, where it does not say so itself.
TOLD_OF_FILES = frozenset({"mean", "std", "crop_pct", "interpolation", "image_size"})


@dataclass(frozen=True)
class Source:
    """What to open, as ``open_model`` takes it.

    Attributes:
        name: timm name, folder of a saved model, elastic file, or ONNX file.
        checkpoint: weights for a timm name.
        ratio: of an elastic file.
        merge: which tokens merge, as ``parse_schedule`` reads it; None: as the model has it.
        opening: what else ``vitprune.load`` takes, such as ``model_args`` or ``mean``.
        transform: what images of an ONNX file need, as ``open_onnx`` takes it; None: as the file says.
    """

    name: str
    checkpoint: str | None = None
    ratio: float | None = None
    merge: str | None = None
    opening: Mapping[str, Any] = field(default_factory=dict)
    transform: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Reading:
    """How images are read.

    Attributes:
        batch_size: images at once.
        num_workers: processes that decode; 0 decodes in this one.
        strict: refuse an undecodable image instead of leaving it out.
        wrap: (batches, description) -> the same batches, with progress perhaps.
    """

    batch_size: int = 64
    num_workers: int = 0
    strict: bool = False
    wrap: Callable[[ImageBatches, str], Batches] = lambda batches, _description: batches


def open_model(source: Source, *, device: str | None = None) -> nn.Module | OnnxModel | OpenVinoModel:
    """Open what can be asked about images: whatever ``vitprune.load`` loads, or an ONNX or OpenVINO file.

    Args:
        source: what to open.
        device: of a torch model; an ONNX file runs on ONNX Runtime's CPU provider.

    Raises:
        VitpruneError: if it cannot be opened, or is asked for what it does not have.
    """
    name = source.name
    if not _is_file(source):
        return load(
            name,
            checkpoint=source.checkpoint,
            device=device or "cpu",
            ratio=source.ratio,
            merge=source.merge,
            **source.opening,
        )
    if source.ratio is not None:
        raise VitpruneError(f"{name} has one width only; leave `ratio` out")
    if source.merge is not None:
        raise VitpruneError(f"{name}: which tokens merge is fixed in such a file; leave `merge` out")
    if source.checkpoint is not None:
        raise VitpruneError(f"{name} holds its own weights; leave `checkpoint` out")
    fixed = [key for key in source.opening if key not in TOLD_OF_FILES]
    if fixed:
        raise VitpruneError(f"{name} is a file where this is fixed; leave `{fixed[0]}` out")
    if device not in (None, "cpu"):
        raise VitpruneError(f"{name} runs on the CPU, not on '{device}'")
    if Path(name).suffix == ".xml":
        if source.opening or source.transform:
            raise VitpruneError(f"{name} says itself how its images are prepared; leave `transform` out")
        return open_openvino(name)
    return open_onnx(name, transform=source.transform or _read_transform(source.opening))


def _read_transform(opening: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what was said of a file's images as timm describes a transform; None where nothing was."""
    transform = {key: value for key, value in opening.items() if key != "image_size"}
    if "image_size" in opening:
        size = opening["image_size"]
        sizes = [size] if isinstance(size, int) else list(size)
        transform["input_size"] = (len(opening.get("mean", (0, 0, 0))), sizes[0], sizes[-1])
    return transform or None


def find_dense(source: Source, against: Source) -> tuple[Source, str] | None:
    """Say how the dense model of a pruned folder or elastic file was loaded, and the hash of its weights.

    Args:
        source: the pruned model.
        against: the dense one by its name alone.

    Returns:
        None where ``against`` says more than a name, or ``source`` does not know that its model had a checkpoint.

    Raises:
        VitpruneError: if the checkpoint is gone.
    """
    if against.checkpoint is not None or against.opening or Path(against.name).exists():
        return None
    plan = None if _is_file(source) or not Path(source.name).exists() else find_plan(source.name, source.ratio)
    opened = {} if plan is None else dict(plan.facts.opened or {})
    if "checkpoint" not in opened or opened.pop("model", None) != spell(against.name) or not plan.facts.weights_sha256:
        return None
    checkpoint = opened.pop("checkpoint")
    if not Path(checkpoint).is_file():
        raise VitpruneError(
            f"{source.name} was pruned from {against.name} with the weights of {checkpoint}, which is gone; say where "
            "they are with `against_checkpoint`"
        )
    return replace(against, checkpoint=checkpoint, opening=opened), plan.facts.weights_sha256


def open_sources(
    source: Source, against: Source | None, *, device: str | None = None, onnx_device: str | None = None
) -> tuple[list[Source], list[Any]]:
    """Open a model, and the one to compare it with; arguments as in ``judge``.

    Returns:
        What was opened, with the checkpoint of a dense model where that was left out, and the models.
    """
    known = None if against is None else find_dense(source, against)
    against = against if known is None else known[0]
    asked = [source, *([] if against is None else [against])]
    opened = [open_model(each, device=onnx_device if _is_file(each) else device) for each in asked]
    if known is not None and hash_weights(opened[1]) != known[1]:
        raise VitpruneError(
            f"{against.checkpoint} holds other weights than when {source.name} was pruned from it; say which weights "
            f"{against.name} has with `against_checkpoint`"
        )
    return asked, opened


def read_images(model: Any, images: ImageSet, reading: Reading) -> ImageBatches:
    """Return batches of images by a model's own transform."""
    return ImageBatches(
        images, model, batch_size=reading.batch_size, num_workers=reading.num_workers, strict=reading.strict
    )


def refuse_changed(root: str | Path, read: Sequence[ImageBatches]) -> None:
    """Refuse batches of one choice of images that were not read alike.

    Raises:
        VitpruneError: if images appeared, went, or could be decoded only once.
    """
    if len({tuple(batches.files_read) for batches in read}) > 1:
        raise VitpruneError(f"{root}: images changed while they were read; evaluate again")


def describe_source(source: Source, opened: Any) -> ModelFacts:
    """Say which model was opened."""
    if _is_file(source):
        return describe_file(source.name, opened)
    return describe_network(opened, source.name, checkpoint=source.checkpoint, ratio=source.ratio)


def _is_file(source: Source) -> bool:
    return Path(source.name).suffix in (".onnx", ".xml")
