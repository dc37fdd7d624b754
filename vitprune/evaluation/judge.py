"""Ask one model, or two of them, about the images of a folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from vitprune.data import (
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
from vitprune.evaluation.embeddings import NUM_NEIGHBOURS, NeighbourClassifier, compare_embedded, embed
from vitprune.evaluation.embeddings_folder import EmbeddingComparison
from vitprune.evaluation.evaluation_folder import Evaluation, Judged, name_classes
from vitprune.evaluation.open_model import Reading, Source, describe_source, open_sources, read_images, refuse_changed
from vitprune.seen_images import check_unseen, seen_by


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
    knn: ImageChoice | None = None,
    num_neighbours: int = NUM_NEIGHBOURS,
) -> tuple[Evaluation | EmbeddingComparison, ImageSet]:
    """Ask a model about the images of a folder, and another one about the same images.

    Models without classes answer those of the nearest among ``knn``; without such, embeddings are compared.

    Args:
        source: the model.
        choice: the images; each model numbers their classes in its own way.
        against: the model to compare with; the checkpoint of the dense model that a pruned one came from may be left
            out.
        device: of torch models.
        onnx_device: where an ONNX file was asked to run; only a CPU can.
        reading: how to read images.
        allow_overlap: ask about images that had a say in a model as well, and count them.
        knn: images of known classes, of whose nearest models answer that have none.
        num_neighbours: how many of them vote.

    Returns:
        The evaluation, or the comparison of embeddings, and the images that were found.

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
    asked, opened = open_sources(source, against, device=device, onnx_device=onnx_device)
    encoders = opened
    if knn is None and all(model.num_classes == 0 for model in opened):
        return _compare(choice, asked, opened, reading, allow_overlap)
    if knn is not None:
        opened = [_by_neighbours(each, knn, num_neighbours, reading) for each in encoders]
    _share_names(opened)
    images = choice.find(opened[0])
    chosen = [images]
    if against is not None:
        chosen.append(_same_images(choice.find(opened[1]), images, asked[1].name))
    if not allow_overlap:
        # Before the first model is asked anything.
        for each, model, of_model in zip(asked, opened, chosen, strict=True):
            check_unseen(of_model, seen_by(model), each.name)
    judged, read = [], []
    for each, model, of_model in zip(asked, opened, chosen, strict=True):
        answers, batches = _ask(each, model, of_model, reading, allow_overlap)
        judged.append(answers)
        read.append(batches)
    refuse_changed(choice.root, read)
    used = images.only(read[0].files_read)
    evaluation = Evaluation(
        root=images.root,
        files=used.files,
        images_sha256=digest_images(hash_images(used)),
        skipped=tuple(name for name, _reason in read[0].skipped),
        judged=judged[0],
        against=judged[1] if against is not None else None,
    )
    if knn is not None and against is not None:
        read = [
            reading.wrap(read_images(each, of_model, reading), "compare embeddings")
            for each, of_model in zip(encoders, chosen, strict=True)
        ]
        fidelity = compare_embedded(*(embed(each, batches) for each, batches in zip(encoders, read, strict=True)))
        evaluation = replace(evaluation, fidelity=fidelity)
    return evaluation, images


def _compare(
    choice: ImageChoice, asked: Sequence[Source], opened: Sequence[Any], reading: Reading, allow_overlap: bool
) -> tuple[EmbeddingComparison, ImageSet]:
    """Ask two encoders about the images of a folder, and say how near their embeddings are."""
    if len(opened) < 2:
        raise VitpruneError(
            f"{asked[0].name} has no classifier (num_classes=0), so it has no accuracy of its own: name images of "
            "known classes whose neighbours answer (`knn`), or a model to compare its embeddings with (`against`)"
        )
    images = choice.find(opened[0], labels_matter=False)
    if not allow_overlap:
        for each, model in zip(asked, opened, strict=True):
            check_unseen(images, seen_by(model), each.name)
    read = [read_images(model, images, reading) for model in opened]
    embedded = [
        embed(model, reading.wrap(batches, f"embed by {Path(each.name).name}"))
        for each, model, batches in zip(asked, opened, read, strict=True)
    ]
    refuse_changed(choice.root, read)
    used = images.only(read[0].files_read)
    comparison = EmbeddingComparison(
        root=images.root,
        files=used.files,
        images_sha256=digest_images(hash_images(used)),
        skipped=tuple(name for name, _reason in read[0].skipped),
        model=describe_source(asked[0], opened[0]),
        against=describe_source(asked[1], opened[1]),
        fidelity=compare_embedded(*embedded),
    )
    return comparison, images


def _by_neighbours(model: Any, choice: ImageChoice, num_neighbours: int, reading: Reading) -> NeighbourClassifier:
    """Return an encoder that answers the classes of a choice of images."""
    if model.num_classes:
        raise VitpruneError(
            f"neighbours are for models without classes, and this one has {model.num_classes}; leave them out"
        )
    images = choice.find(model, labels_matter=False)
    if not images.has_labels:
        raise VitpruneError(f"{images.root}: nothing tells the classes of these images, by which neighbours answer")
    batches = reading.wrap(read_images(model, images, reading), "embed neighbours")
    return NeighbourClassifier(model, batches, num_neighbours=num_neighbours)


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


def _ask(
    source: Source, model: Any, images: ImageSet, reading: Reading, allow_overlap: bool
) -> tuple[Judged, ImageBatches]:
    batches = read_images(model, images, reading)
    wrapped = reading.wrap(batches, f"evaluate {Path(source.name).name}")
    answers = collect_answers(model, wrapped, allow_overlap=allow_overlap)
    if isinstance(model, NeighbourClassifier):
        facts = replace(describe_source(source, model.encoder), num_classes=model.num_classes)
    else:
        facts = describe_source(source, model)
    return Judged(facts, answers, name_classes(model, images, answers)), batches


def _same_images(others: ImageSet, images: ImageSet, against: str) -> ImageSet:
    """Return the images that both models are asked about, in the numbering of the other model."""
    kept = others.only(images.files)
    if kept.files != images.files:
        missing = next(name for name in images.files if name not in set(kept.files))
        raise VitpruneError(f"{against} has no class for {missing} and {len(images) - len(kept) - 1} more images")
    return replace(kept, left_out=())
