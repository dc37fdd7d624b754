"""An evaluation: the folder that keeps what one model, or two of them, answered to every image."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from vitprune.data import ImageSet, class_names
from vitprune.errors import VitpruneError
from vitprune.evaluation.accuracy import Accuracy, Answers, compare, count_right, drop_bound
from vitprune.evaluation.embeddings import Fidelity, describe_fidelity, read_fidelity
from vitprune.evaluation.model_facts import ModelFacts
from vitprune.files import (
    FORMAT_VERSION,
    atomic_file,
    atomic_folder,
    check_lines,
    hash_file,
    read_json,
    read_json_lines,
    write_json,
)
from vitprune.seal import parsing
from vitprune.table import align

EVALUATION_FILE, ANSWERS_FILE = "evaluation.json", "images.jsonl"
EVALUATION_FILES = frozenset({EVALUATION_FILE, ANSWERS_FILE})
_OF_ONE = ("label", "prediction", "probability", "among_five")


@dataclass(frozen=True)
class Judged:
    """A model and what it answered.

    Attributes:
        model: which.
        answers: one for each image of the evaluation, in its order; in the model's own numbering of classes.
        class_names: class index -> name, for every class that is a label or an answer: the folder of its images, else
            what the model calls it.
    """

    model: ModelFacts
    answers: Answers
    class_names: Mapping[int, str]


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation folder holds.

    Attributes:
        root: the data folder, absolute.
        files: images that could be decoded, relative to ``root``.
        images_sha256: ``digest_images`` of them.
        skipped: images that could not be decoded.
        judged: the model that was evaluated.
        against: the model that it is compared with, on the same images; None where there is none.
        fidelity: how near their embeddings are, where both have no classes and answer by neighbours.
    """

    root: Path
    files: tuple[str, ...]
    images_sha256: str
    skipped: tuple[str, ...]
    judged: Judged
    against: Judged | None = None
    fidelity: Fidelity | None = None

    def __str__(self) -> str:
        rows = []
        for each in (self.judged, *([] if self.against is None else [self.against])):
            accuracy = count_right(each.answers)
            low, high = accuracy.top1_interval
            rows.append((each.model.name, f"{accuracy.top1:.4f}", f"{low:.3f} .. {high:.3f}", f"{accuracy.top5:.4f}"))
        table = align(("model", "top-1", "95 % interval", "top-5"), rows)
        return f"{table}\n{len(self.files)} images of {self.root}"

    def __repr__(self) -> str:
        return str(self)


def name_classes(network: Any, images: ImageSet, answers: Answers) -> dict[int, str]:
    """Return what every class is called that is a label or an answer; see ``Judged.class_names``.

    Args:
        network: a torch model, or an opened ONNX file.
        images: the images it was asked about.
        answers: what it answered.
    """
    known = dict(enumerate(class_names(network)))
    if not getattr(network, "label_names", None):
        # ImageNet's own names list every synonym.
        known = {index: name.split(", ")[0] for index, name in known.items()}
    indices = sorted({*answers.labels.tolist(), *answers.predictions.tolist()})
    return {index: images.class_names.get(index, known.get(index, str(index))) for index in indices}


def describe_accuracy(accuracy: Accuracy, num_classes: int, names: Mapping[int, str]) -> dict[str, Any]:
    """Return what was measured of one model, as JSON values; classes by name."""
    return {
        "top1": accuracy.top1,
        "top5": accuracy.top5,
        "num_images": accuracy.num_images,
        "num_classes": num_classes,
        "top1_interval": list(accuracy.top1_interval),
        "per_class": {
            names[index]: {"top1": top1, "num_images": accuracy.images_by_class[index]}
            for index, top1 in accuracy.top1_by_class.items()
        },
    }


def describe_evaluation(evaluation: Evaluation) -> dict[str, Any]:
    """Return everything that was measured, as JSON values.

    Beside what ``describe_accuracy`` gives of the model: ``skipped``, and ``against`` (None without another model) with
    the same of that one and the paired comparison: ``drop`` of top-1 from it to the model, ``drop_bound`` (95 % upper
    bound), ``p_value`` (McNemar), ``lost_images`` (only it was right) and ``gained_images`` (only the model was right).
    """
    judged, against = evaluation.judged, evaluation.against
    accuracy = count_right(judged.answers)
    answer = describe_accuracy(accuracy, judged.model.num_classes, judged.class_names)
    answer |= {"skipped": list(evaluation.skipped), "against": None}
    if judged.answers.num_overlap:
        answer["num_overlap"] = judged.answers.num_overlap
    if against is None:
        return answer
    if evaluation.fidelity is not None:
        answer["embeddings"] = describe_fidelity(evaluation.fidelity)
    before = count_right(against.answers)
    lost, gained = flipped(evaluation)
    answer["against"] = {
        "model": against.model.name,
        **describe_accuracy(before, against.model.num_classes, against.class_names),
        "drop": before.top1 - accuracy.top1,
        "drop_bound": drop_bound(before, accuracy),
        "p_value": compare(before, accuracy).p_value,
        "lost_images": [evaluation.files[place] for place in lost],
        "gained_images": [evaluation.files[place] for place in gained],
    }
    return answer


def flipped(evaluation: Evaluation) -> tuple[list[int], list[int]]:
    """Return the places of the images that only the other model, and that only the model, answers rightly.

    Raises:
        VitpruneError: if there is no other model.
    """
    if evaluation.against is None:
        raise VitpruneError("one model alone flips no answers; compare it with another one")
    after, before = (count_right(each.answers).correct for each in (evaluation.judged, evaluation.against))
    pairs = list(enumerate(zip(before, after, strict=True)))
    lost = [place for place, (was, now) in pairs if was and not now]
    return lost, [place for place, (was, now) in pairs if now and not was]


def save_evaluation(evaluation: Evaluation, folder: str | Path) -> None:
    """Write an evaluation folder, all or nothing: ``evaluation.json`` and ``images.jsonl``.

    ``images.jsonl`` has one object per image: ``file``, ``label``, ``prediction``, ``probability`` (of the label's
    class) and ``among_five``; and the last four again as ``against_label`` and so on, in the other model's numbering.
    """
    sides = {"model": evaluation.judged, "against": evaluation.against}
    facts = {
        side: {**asdict(judged.model), "class_names": {str(key): name for key, name in judged.class_names.items()}}
        for side, judged in sides.items()
        if judged is not None
    }
    content = {
        "kind": "evaluation",
        "version": FORMAT_VERSION,
        "data": str(evaluation.root),
        "images_sha256": evaluation.images_sha256,
        "models": facts,
        **describe_evaluation(evaluation),
    }
    with atomic_folder(folder) as temporary:
        with atomic_file(temporary / ANSWERS_FILE) as path, path.open("w") as stream:
            stream.writelines(json.dumps(row) + "\n" for row in _rows(evaluation))
        content["lines_sha256"] = hash_file(temporary / ANSWERS_FILE)
        write_json(temporary / EVALUATION_FILE, content)


def _rows(evaluation: Evaluation) -> Iterator[dict[str, Any]]:
    columns: dict[str, Sequence[Any]] = {"file": evaluation.files, **_columns(evaluation.judged.answers)}
    if evaluation.against is not None:
        columns |= {f"against_{name}": column for name, column in _columns(evaluation.against.answers).items()}
    if evaluation.fidelity is not None:
        columns["cosine"] = evaluation.fidelity.cosines
    for row in zip(*columns.values(), strict=True):
        yield dict(zip(columns, row, strict=True))


def _columns(answers: Answers) -> dict[str, list[Any]]:
    tensors = (answers.labels, answers.predictions, answers.probabilities, answers.among_five)
    return {name: tensor.tolist() for name, tensor in zip(_OF_ONE, tensors, strict=True)}


def load_evaluation(folder: str | Path) -> Evaluation:
    """Read an evaluation folder.

    Raises:
        VitpruneError: if the folder is no evaluation, or its files disagree.
    """
    folder = Path(folder)
    for name in (EVALUATION_FILE, ANSWERS_FILE):
        if not (folder / name).is_file():
            raise VitpruneError(f"{folder} is no evaluation: it has no {name}")
    content = read_json(folder / EVALUATION_FILE, kind="evaluation")
    with parsing(folder):
        return _read_evaluation(folder, content)


def _read_evaluation(folder: Path, content: Mapping[str, Any]) -> Evaluation:
    rows = read_json_lines(folder / ANSWERS_FILE)
    if len(rows) != content["num_images"]:
        raise VitpruneError(
            f"{folder}: {EVALUATION_FILE} is of {content['num_images']} images, {ANSWERS_FILE} of {len(rows)}"
        )
    check_lines(folder / ANSWERS_FILE, content)
    return Evaluation(
        root=Path(content["data"]),
        files=tuple(row["file"] for row in rows),
        images_sha256=content["images_sha256"],
        skipped=tuple(content["skipped"]),
        judged=_read_judged(content["models"]["model"], rows, ""),
        against=_read_judged(content["models"]["against"], rows, "against_") if content["against"] else None,
        fidelity=read_fidelity(content["embeddings"], rows) if "embeddings" in content else None,
    )


def _read_judged(facts: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], prefix: str) -> Judged:
    facts = dict(facts)
    names = {int(index): name for index, name in facts.pop("class_names").items()}
    dtypes = (torch.int64, torch.int64, torch.float64, torch.bool)
    columns = [
        torch.tensor([row[prefix + name] for row in rows], dtype=dtype)
        for name, dtype in zip(_OF_ONE, dtypes, strict=True)
    ]
    return Judged(ModelFacts(**facts), Answers(*columns), names)
