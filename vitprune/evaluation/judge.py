"""Ask one model, or two of them, about the images of a folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from vitprune.data import (
    Batches,
    ImageBatches,
    ImageChoice,
    ImageSet,
    digest_images,
    hash_images,
    label_names_of,
    remember_names,
)
from vitprune.entry import entry
from vitprune.errors import VitpruneError
from vitprune.evaluation.accuracy import collect_answers
from vitprune.evaluation.evaluation_folder import Evaluation, Judged, name_classes
from vitprune.evaluation.model_facts import describe_file, describe_network
from vitprune.export.openvino_file import OpenVinoModel, open_openvino
from vitprune.export.runtime import OnnxModel, open_onnx
from vitprune.models.identity import hash_weights
from vitprune.models.load import load
from vitprune.models.sources import spell
from vitprune.pruning.plan import find_plan
from vitprune.seen_images import check_unseen, seen_by

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


@entry
def judge(
    source: Source,
    choice: ImageChoice,
    *,
    against: Source | None = None,
    device: str | None = None,
    onnx_device: str | None = None,
    reading: Reading | None = None,
    allow_overlap: bool = False,
) -> tuple[Evaluation, ImageSet]:
    """Ask a model about the images of a folder, and another one about the same images.

    Args:
        source: the model.
        choice: the images; each model numbers their classes in its own way.
        against: the model to compare with; the checkpoint of the dense model that a pruned one came from may be left
            out.
        device: of torch models.
        onnx_device: where an ONNX file was asked to run; only a CPU can.
        reading: how to read images.
        allow_overlap: ask about images that had a say in a model as well, and count them.

    Returns:
        The evaluation, and the images that were found.

    Raises:
        VitpruneError: if a model cannot be opened or has no classifier, an image had a say in one, or the other model
            has no class for an image.

    >>> import tempfile, timm
    >>> from PIL import Image
    >>> from vitprune import save
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for name in ("cat", "dog"):
    ...         (Path(folder) / "val" / name).mkdir(parents=True)
    ...         Image.new("RGB", (32, 32)).save(Path(folder) / "val" / name / "1.png")
    ...     save(timm.create_model("vit_tiny_patch16_224", num_classes=2), Path(folder) / "model")
    ...     evaluation, _images = judge(Source(f"{folder}/model"), ImageChoice(f"{folder}/val"))
    >>> evaluation.files, len(evaluation.judged.answers.predictions)
    (('cat/1.png', 'dog/1.png'), 2)
    """
    reading = Reading() if reading is None else reading
    known = None if against is None else find_dense(source, against)
    against = against if known is None else known[0]
    asked = [source, *([] if against is None else [against])]
    opened = [open_model(each, device=onnx_device if _is_file(each) else device) for each in asked]
    if known is not None and hash_weights(opened[1]) != known[1]:
        raise VitpruneError(
            f"{against.checkpoint} holds other weights than when {source.name} was pruned from it; say which weights "
            f"{against.name} has with `against_checkpoint`"
        )
    _share_names(opened)
    images = choice.find(opened[0])
    chosen = [images]
    if against is not None:
        chosen.append(_same_images(choice.find(opened[1]), images, against.name))
    if not allow_overlap:
        # Before the first model is asked anything.
        for each, model, of_model in zip(asked, opened, chosen, strict=True):
            check_unseen(of_model, seen_by(model), each.name)
    judged, read = [], []
    for each, model, of_model in zip(asked, opened, chosen, strict=True):
        answers, batches = _ask(each, model, of_model, reading, allow_overlap)
        judged.append(answers)
        read.append(batches)
    if len({tuple(batches.files_read) for batches in read}) > 1:
        raise VitpruneError(f"{choice.root}: images changed while they were read; evaluate again")
    used = images.only(read[0].files_read)
    evaluation = Evaluation(
        root=images.root,
        files=used.files,
        images_sha256=digest_images(hash_images(used)),
        skipped=tuple(name for name, _reason in read[0].skipped),
        judged=judged[0],
        against=judged[1] if against is not None else None,
    )
    return evaluation, images


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


@entry
def judge_network(
    model: nn.Module, images: ImageSet, *, name: str, reading: Reading | None = None, allow_overlap: bool = False
) -> Judged:
    """Ask a torch model about images.

    Args:
        model: in eval mode.
        images: numbered as it numbers its classes.
        name: what it was loaded by, or where it will be.
        reading: how to read images.
        allow_overlap: as in ``evaluate``.
    """
    return _ask(Source(name), model, images, reading or Reading(), allow_overlap)[0]


def _share_names(models: Sequence[Any]) -> None:
    """Tell a model what another one calls its classes, where it does not know and has as many: one of the other."""
    for model in models:
        for other in models:
            remember_names(model, label_names_of(other))


def _is_file(source: Source) -> bool:
    return Path(source.name).suffix in (".onnx", ".xml")


def _ask(
    source: Source, model: Any, images: ImageSet, reading: Reading, allow_overlap: bool
) -> tuple[Judged, ImageBatches]:
    batches = ImageBatches(
        images, model, batch_size=reading.batch_size, num_workers=reading.num_workers, strict=reading.strict
    )
    wrapped = reading.wrap(batches, f"evaluate {Path(source.name).name}")
    answers = collect_answers(model, wrapped, allow_overlap=allow_overlap)
    if _is_file(source):
        facts = describe_file(source.name, model)
    else:
        facts = describe_network(model, source.name, checkpoint=source.checkpoint, ratio=source.ratio)
    return Judged(facts, answers, name_classes(model, images, answers)), batches


def _same_images(others: ImageSet, images: ImageSet, against: str) -> ImageSet:
    """Return the images that both models are asked about, in the numbering of the other model."""
    kept = others.only(images.files)
    if kept.files != images.files:
        missing = next(name for name in images.files if name not in set(kept.files))
        raise VitpruneError(f"{against} has no class for {missing} and {len(images) - len(kept) - 1} more images")
    return replace(kept, left_out=())
