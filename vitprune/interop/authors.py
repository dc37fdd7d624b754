"""Result files of the authors' program for arXiv:2503.09046: ``PREFIX.args.json`` and ``PREFIX-LABEL.rlt.jsonl``.

``args.json`` holds the arguments of the program. Each class has a file of JSON lines; LABEL is its index among the
model's outputs. No line names its image or its class: the images of a class come in the order of torchvision's
``ImageFolder``. What a line holds depends on the program that wrote it:

=================  ==================================================================================================
path search        a list with a record per image of a batch: ``{"ja": [[neuron per FFN]], "ja_score": [[score]],
                   "base": .., "base_score": ..}``; ``ja`` is the method jas, ``base`` the method activation
top-K search       one record: ``{"ja": [[K neurons] per FFN], "ja_score": [[score]], "base": .., "base_score": ..}``;
                   the scores count the last neuron of each FFN only
influence pattern  ``{"path": [[neuron per FFN]]}`` with neurons as floats; on MAE ``"score": [[score]]`` beside it
its scores on ViT  a list of records ``{"ja": [[neuron per FFN]], "ja_score": [score]}``; ``args.json`` says
                   ``"method": "influence_pattern"``
=================  ==================================================================================================

Files that vitprune writes hold the key ``vitprune`` in ``args.json`` with what theirs have no place for.

Letters: I images of a class, L FFNs, K neurons per FFN.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from vitprune.discovery.discover import Discovery
from vitprune.discovery.run import Run
from vitprune.errors import VitpruneError
from vitprune.files import FORMAT_VERSION, atomic_siblings, write_json
from vitprune.options import AUTHORS_METHODS, check_choice
from vitprune.seal import parsing

ARGS_SUFFIX = ".args.json"
MOST_NEURONS = 2**31

_PATH_KEYS = {"jas": "ja", "activation": "base", "influence-pattern": "path"}
_SCORE_KEYS = {"ja": "ja_score", "base": "base_score", "path": "score"}
_SCORED_PATTERN = "influence_pattern"


@dataclass(frozen=True)
class AuthorsPaths:
    """Paths by one method, by class; within a class in the order of its images.

    Attributes:
        prefix: folder and PREFIX, as the files are named by.
        method: key of ``AUTHORS_METHODS``.
        args: content of ``args.json``.
        neurons: class index -> int64 [I, L, K]; best first. The same L and K everywhere, the classes ascending.
        joint_scores: class index -> float32 [I]; None where the files have no score of the whole path.
        activation_neurons: class index -> int64 [I, L, K], the paths of highest activation; None where the files have
            none.
    """

    prefix: str
    method: str
    args: Mapping[str, Any]
    neurons: Mapping[int, Tensor]
    joint_scores: Mapping[int, Tensor] | None
    activation_neurons: Mapping[int, Tensor] | None


def find_args_file(source: str | Path) -> Path:
    """Return ``PREFIX.args.json`` of a source that names it, or only PREFIX with its folder.

    Raises:
        VitpruneError: if there is no such file.
    """
    path = Path(source)
    if not path.name.endswith(ARGS_SUFFIX):
        path = path.with_name(path.name + ARGS_SUFFIX)
    if not path.is_file():
        raise VitpruneError(f"{path}: no such file; name the PREFIX{ARGS_SUFFIX} that lies beside the result files")
    return path


def read_authors(source: str | Path, *, method: str = "jas") -> AuthorsPaths:
    """Read the paths of one method from the files of the authors' program, or from files of ``write_authors``.

    Args:
        source: ``PREFIX.args.json``, or PREFIX with its folder.
        method: key of ``AUTHORS_METHODS``.

    Raises:
        VitpruneError: if files are missing or malformed, disagree about the number of FFNs or neurons, have no paths by
            this method, or hold other results than paths.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "mine.args.json").write_text('{"ig_total_step": 20}')
    ...     _ = Path(folder, "mine-3.rlt.jsonl").write_text('[{"ja": [[5, 0, 47]], "ja_score": [[0.125]]}]')
    ...     paths = read_authors(Path(folder, "mine"))
    >>> paths.neurons, paths.joint_scores
    ({3: tensor([[[ 5],
             [ 0],
             [47]]])}, {3: tensor([0.1250])})
    """
    check_choice("method", method, AUTHORS_METHODS)
    args_file = find_args_file(source)
    args = _read_args(args_file)
    prefix = str(args_file).removesuffix(ARGS_SUFFIX)
    if args.get("dataset", "imagenet1k") != "imagenet1k":
        raise VitpruneError(
            f"{args_file}: its images are those of dataset '{args['dataset']}', which is no image folder; only "
            "imagenet1k can be read"
        )
    if "edit_operation" in args:
        raise VitpruneError(
            f"{args_file}: results of the manipulation experiment, not paths; name the files that its ja_path was"
        )
    scored_pattern = args.get("method") == _SCORED_PATTERN
    if scored_pattern and method != "influence-pattern":
        raise VitpruneError(f"{args_file}: its paths are influence patterns; ask for method influence-pattern")
    key = "ja" if scored_pattern else _PATH_KEYS[method]
    files = _class_files(Path(prefix))
    if not files:
        raise VitpruneError(f"{prefix}-LABEL.rlt.jsonl: there is no such file beside {args_file.name}")
    shape = _Shape()
    neurons, scores, activation_neurons = {}, {}, {}
    for label, path in files.items():
        images = list(_read_class(path, key, shape))
        neurons[label] = torch.tensor([image.neurons for image in images])
        if images[0].score is not None:
            scores[label] = torch.tensor([image.score for image in images], dtype=torch.float32)
        if images[0].activation is not None:
            activation_neurons[label] = torch.tensor([image.activation for image in images])
    # The top-K program adds up the last neuron of each FFN only; vitprune adds up all of them.
    of_whole_paths = shape.top_k == 1 or "vitprune" in args
    return AuthorsPaths(
        prefix, method, args, neurons, (scores or None) if of_whole_paths else None, activation_neurons or None
    )


def _read_args(path: Path) -> dict[str, Any]:
    try:
        args = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise VitpruneError(f"{path}: not a JSON file ({error})") from error
    if not isinstance(args, dict):
        raise VitpruneError(f"{path}: expected a JSON object of arguments, found {_name_type(args)}")
    with parsing(path):
        if args.get("vitprune", {}).get("version", 0) > FORMAT_VERSION:
            raise VitpruneError(f"{path}: written by a newer vitprune; upgrade this one")
    return args


def _class_files(prefix: Path) -> dict[int, Path]:
    name = re.compile(rf"{re.escape(prefix.name)}-(0|[1-9]\d*)\.rlt\.jsonl")
    matches = [name.fullmatch(path.name) for path in prefix.parent.glob("*")]
    return dict(sorted((int(match[1]), prefix.with_name(match[0])) for match in matches if match))


@dataclass(frozen=True)
class _Image:
    """What the files hold of one image: neurons [L][K], and what else there is."""

    neurons: list[list[int]]
    score: float | None
    activation: list[list[int]] | None


@dataclass
class _Shape:
    """What the first record says that all others must agree with."""

    num_ffns: int = 0
    top_k: int = 0
    optional: frozenset[str] = frozenset()

    def check(self, where: str, neurons: list[list[int]], optional: frozenset[str]) -> None:
        num_ffns, top_k = len(neurons), len(neurons[0])
        if self.num_ffns == 0:
            self.num_ffns, self.top_k, self.optional = num_ffns, top_k, optional
        if (num_ffns, top_k) != (self.num_ffns, self.top_k):
            raise VitpruneError(
                f"{where}: a path of {num_ffns} FFNs with {top_k} neurons each, where the records before have "
                f"{self.num_ffns} with {self.top_k}"
            )
        if optional != self.optional:
            (first, *_) = sorted(optional ^ self.optional)
            raise VitpruneError(f"{where}: some records have '{first}' and others have not")


def _read_class(path: Path, key: str, shape: _Shape) -> Iterator[_Image]:
    try:
        lines = path.read_text().splitlines()
    except UnicodeDecodeError as error:
        raise VitpruneError(f"{path}: not a text file") from error
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        try:
            content = json.loads(line)
        except json.JSONDecodeError as error:
            raise VitpruneError(f"{where}: not JSON ({error}); was the program that wrote it cut off?") from error
        if not isinstance(content, list | dict):
            raise VitpruneError(f"{where}: expected a record or a list of records, found {_name_type(content)}")
        for record in content if isinstance(content, list) else [content]:
            yield _read_record(record, key, shape, where, one_row=isinstance(content, list) or key == "path")
    if not lines:
        raise VitpruneError(f"{path}: no paths in it")


def _read_record(record: Any, key: str, shape: _Shape, where: str, *, one_row: bool) -> _Image:
    """Read one record, with a row [[neuron per FFN]] or a matrix [L][K] for a path."""
    if not isinstance(record, dict):
        raise VitpruneError(f"{where}: expected a record, found {_name_type(record)}")
    if "remove" in record or "prune" in record:
        raise VitpruneError(f"{where}: results of the manipulation experiment, not paths")
    if key not in record:
        there = [name for name, known in _PATH_KEYS.items() if known in record]
        remedy = f"; ask for method {' or '.join(there)}" if there else ""
        raise VitpruneError(f"{where}: no '{key}' in the record, which has {_list(record)}{remedy}")
    score_key = _SCORE_KEYS[key]
    if score_key not in record and key != "path":
        raise VitpruneError(f"{where}: no '{score_key}' in the record, which has {_list(record)}")
    neurons = _read_path(record[key], f"{where}: {key}", one_row=one_row)
    # A path of highest activation tells whether a model and its images are those of the files.
    activation = _read_path(record["base"], f"{where}: base", one_row=one_row) if "base" in record else None
    if activation is not None and [len(row) for row in activation] != [len(row) for row in neurons]:
        raise VitpruneError(f"{where}: '{key}' and 'base' have different numbers of FFNs or neurons")
    shape.check(where, neurons, frozenset({"base", score_key} & record.keys()))
    score = _read_score(record[score_key], f"{where}: {score_key}") if score_key in record else None
    return _Image(neurons, score, activation)


def _read_path(value: Any, where: str, *, one_row: bool) -> list[list[int]]:
    if not isinstance(value, list) or not value or not all(isinstance(row, list) and row for row in value):
        raise VitpruneError(f"{where}: expected a list of lists of neurons")
    if one_row and len(value) > 1:
        raise VitpruneError(
            f"{where}: {len(value)} paths where one is expected (an influence pattern of a batch is of none of its "
            "images; make them with a batch_size of 1)"
        )
    lengths = sorted({len(row) for row in value})
    if len(lengths) > 1:
        raise VitpruneError(f"{where}: ragged, with rows of {lengths[0]} and {lengths[-1]} neurons")
    rows = [_read_neurons(row, where) for row in value]
    path = [[neuron] for neuron in rows[0]] if one_row else rows
    for position, chosen in enumerate(path):
        if len(set(chosen)) < len(chosen):
            raise VitpruneError(f"{where}: names a neuron of FFN {position} twice")
    return path


def _read_neurons(row: list[Any], where: str) -> list[int]:
    if set(map(type, row)) == {int} and min(row) >= 0 and max(row) < MOST_NEURONS:
        return row
    for value in row:
        if type(value) not in (int, float) or not 0 <= value < MOST_NEURONS or value != int(value):
            raise VitpruneError(f"{where}: a neuron must be an index of at least 0, found {json.dumps(value)}")
    return [int(value) for value in row]


def _read_score(value: Any, where: str) -> float:
    number = value
    while isinstance(number, list) and len(number) == 1:
        (number,) = number
    if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
        raise VitpruneError(f"{where}: expected one finite number, found {json.dumps(value)[:60]}")
    return float(number)


def _name_type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")


def _list(record: Mapping[str, Any]) -> str:
    return ", ".join(f"'{key}'" for key in sorted(record)) or "nothing"


def folder_order(file: str) -> tuple[str, str]:
    """Return the key by which torchvision's ``ImageFolder`` orders the files of a class.

    >>> sorted(["fish/a/2.jpg", "fish/b.jpg", "fish/a-b/1.jpg"], key=folder_order)
    ['fish/b.jpg', 'fish/a/2.jpg', 'fish/a-b/1.jpg']
    """
    path = PurePosixPath(file)
    return str(path.parent), path.name


def write_authors(runs: Sequence[Run], prefix: str | Path) -> list[Path]:
    """Write runs as the authors' program writes its results, so that their scripts and notebooks can read them.

    A jas and an activation run go into the same records. Class scores, predictions and image names are left out: their
    files have no place for them.

    Args:
        runs: of the same images and weights, one per method.
        prefix: folder and PREFIX; may end in ``.args.json``. Files of the same names are replaced.

    Returns:
        The files written: ``PREFIX.args.json``, then one per class.

    Raises:
        VitpruneError: if their format has no place for a run, the runs do not belong together, or there are files of
            this prefix for other classes.

    >>> import tempfile, timm, vitprune
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=2).eval()
    >>> found = vitprune.discover(model, [(torch.zeros(2, 3, 224, 224), torch.tensor([0, 1]))], method="activation")
    >>> photos = vitprune.ImageSet(Path("photos"), ("cat/1.jpg", "dog/1.jpg"), (0, 1), {0: "cat", 1: "dog"})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     files = write_authors([Run(found, photos, "vit", None, "hash")], Path(folder, "mine"))
    >>> [file.name for file in files]
    ['mine.args.json', 'mine-0.rlt.jsonl', 'mine-1.rlt.jsonl']
    """
    prefix = Path(str(prefix).removesuffix(ARGS_SUFFIX))
    by_method = _check_together(runs)
    run = runs[0]
    records = _records(by_method)
    lines: dict[str, list[str]] = {f"{prefix.name}-{label}.rlt.jsonl": [] for label in run.found.classes}
    for place in sorted(range(len(records)), key=lambda place: folder_order(run.images.files[place])):
        name = f"{prefix.name}-{run.images.labels[place]}.rlt.jsonl"
        lines[name].append(json.dumps(records[place]) + "\n")
    strays = [path for label, path in _class_files(prefix).items() if label not in run.found.classes]
    if strays:
        raise VitpruneError(f"{strays[0]} is of a class that the runs do not have; remove it, or choose another prefix")
    args_file = prefix.with_name(prefix.name + ARGS_SUFFIX)
    with atomic_siblings(args_file) as temporary:
        write_json(temporary / args_file.name, _describe(by_method, prefix.name))
        for name, of_class in lines.items():
            (temporary / name).write_text("".join(of_class))
    return [args_file, *(args_file.with_name(name) for name in lines)]


def _check_together(runs: Sequence[Run]) -> dict[str, Run]:
    if not runs:
        raise VitpruneError("no runs to write")
    for run in runs:
        found, method = run.found, run.found.method
        if method not in AUTHORS_METHODS:
            raise VitpruneError(
                f"the authors' files have no place for method {method}, only for {', '.join(AUTHORS_METHODS)}"
            )
        if (found.target, found.quantity) != ("label", "probability") or found.tokens == "all":
            raise VitpruneError(
                "the authors' files are of the probability of each image's own class, at the class token or the "
                f"patches; the {method} run has target {found.target}, quantity {found.quantity}, tokens {found.tokens}"
            )
        if found.heads:
            raise VitpruneError("the authors' files have no place for attention; discover with `nodes` ffn alone")
        if found.neurons.shape[-1] > 1 and method == "influence-pattern":
            raise VitpruneError(
                "the authors' files have no place for more than one neuron per FFN of influence-pattern"
            )
    by_method = {method: run for method in AUTHORS_METHODS for run in runs if run.found.method == method}
    if len(by_method) < len(runs):
        raise VitpruneError(f"one run per method, got {', '.join(run.found.method for run in runs)}")
    if len(runs) > 1 and "influence-pattern" in by_method:
        raise VitpruneError("influence patterns have files of their own; write that run to another prefix")
    first = runs[0]
    for run in runs[1:]:
        facts = {
            "images": (run.images.root, run.images.files, run.images.labels)
            == (first.images.root, first.images.files, first.images.labels),
            "weights": run.weights_sha256 == first.weights_sha256,
            "transform": run.transform == first.transform,
            "tokens": run.found.tokens == first.found.tokens,
            "top_k": run.found.neurons.shape == first.found.neurons.shape,
        }
        different = [name for name, same in facts.items() if not same]
        if different:
            raise VitpruneError(f"runs that share files must be of the same {', '.join(different)}")
    return by_method


def _records(by_method: Mapping[str, Run]) -> list[Any]:
    """Return what the line of each image holds."""
    (first, *_) = (run.found for run in by_method.values())
    if first.method == "influence-pattern":
        return _pattern_records(first)
    one_neuron = first.neurons.shape[-1] == 1
    records: list[dict[str, Any]] = [{} for _path in first.neurons]
    for method, run in by_method.items():
        found, key = run.found, _PATH_KEYS[method]
        paths = found.neurons.transpose(1, 2).tolist() if one_neuron else found.neurons.tolist()
        for record, path, score in zip(records, paths, found.joint_scores.tolist(), strict=True):
            record |= {key: path, _SCORE_KEYS[key]: [[score]]}
    return [[record] for record in records] if one_neuron else records


def _pattern_records(found: Discovery) -> list[Any]:
    paths = zip(found.neurons[..., 0].tolist(), found.joint_scores.tolist(), strict=True)
    if found.tokens == "cls":
        return [[{"ja": [path], "ja_score": [score]}] for path, score in paths]
    return [{"path": [list(map(float, path))], "score": [[score]]} for path, score in paths]


def _describe(by_method: Mapping[str, Run], prefix: str) -> dict[str, Any]:
    """Return ``args.json``: their names for what is known, ours for what theirs lack."""
    (run, *_) = by_method.values()
    found = run.found
    rule, _, steps = found.quadrature.partition(":")
    top_k = found.neurons.shape[-1]
    return {
        "batch_size": 1,
        "dataset": "imagenet1k",
        "dataset_path": str(run.images.root),
        "ig_total_step": int(steps) if rule == "riemann" else None,
        "model_type": run.model,
        "output_prefix": prefix,
        "pretrain_weight": run.checkpoint,
        **({"topK": top_k} if top_k > 1 else {}),
        **({"method": _SCORED_PATTERN} if "influence-pattern" in by_method and found.tokens == "cls" else {}),
        "vitprune": {
            "version": FORMAT_VERSION,
            "images": list(run.images.files),
            "tokens": found.tokens,
            "transform": run.transform,
            "quadrature": {method: each.found.quadrature for method, each in by_method.items()},
            "precision": {method: each.found.precision for method, each in by_method.items()},
        },
    }
