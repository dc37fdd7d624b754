"""The verb: put a saved model onto the hub, with a card of what was measured."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vitprune.errors import VitpruneError
from vitprune.evaluation.accuracy import count_right, drop_bound
from vitprune.evaluation.embeddings_folder import EMBEDDINGS_FILE, load_embeddings
from vitprune.evaluation.evaluation_folder import EVALUATION_FILE, Evaluation, load_evaluation
from vitprune.models.model_card import MODEL_CARD_FILE
from vitprune.models.saved_folder import CONFIG_FILE, PLAN_FILE, WEIGHTS_FILE, describe_folder, load_folder
from vitprune.models.sources import HUB
from vitprune.pruning.plan import read_plan
from vitprune.seen_images import SeenImages
from vitprune.speed.bench_folder import BENCH_FILE, BenchRecord, load_bench

_REPOSITORY = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


@dataclass(frozen=True)
class Pushed:
    """What lies on the hub now.

    Attributes:
        repository: ``OWNER/NAME``.
        revision: the commit.
        model: by which ``load`` loads exactly these weights.
        url: of its page.
        files: that were put there.
    """

    repository: str
    revision: str
    model: str
    url: str
    files: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.url}\nvitprune.load({self.model!r})"

    def __repr__(self) -> str:
        return str(self)


def push(
    folder: str | Path,
    repository: str,
    *,
    measured: Sequence[str | Path] = (),
    private: bool = False,
    message: str | None = None,
) -> Pushed:
    """Put the folder of a saved model onto the hub: description, weights, plan, and a card.

    Where the images of calibration lie on this machine, and the checkpoint, is left out of the plan; their hashes stay,
    so that others cannot measure on them unawares.

    Args:
        folder: that ``save`` wrote.
        repository: ``OWNER/NAME``; made where there is none.
        measured: folders of evaluations, comparisons of embeddings and benchmarks of this model, whose figures the card
            shows.
        private: whether a repository that is made now is for its owner alone.
        message: of the commit.

    Raises:
        VitpruneError: if the folder is no saved model, what was measured is of another one, or the hub refuses.

    >>> push("nowhere", "me/mine")
    Traceback (most recent call last):
        ...
    vitprune.errors.VitpruneError: nowhere is no saved model: it has no config.json
    """
    folder = Path(folder)
    if not _REPOSITORY.fullmatch(repository):
        raise VitpruneError(f"{repository} is no repository of the hub; it is called OWNER/NAME")
    lines = describe_measured(folder, measured)
    text = describe_folder(folder, measured=lines, name=HUB + repository)
    with tempfile.TemporaryDirectory() as made:
        made = Path(made)
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if not (folder / name).is_file():
                raise VitpruneError(f"{folder} has no {name}; save it with this version first")
            shutil.copyfile(folder / name, made / name)
        if (folder / PLAN_FILE).is_file():
            _copy_plan(folder / PLAN_FILE, made / PLAN_FILE)
        (made / MODEL_CARD_FILE).write_text(text)
        load_folder(made)
        files = tuple(sorted(path.name for path in made.iterdir()))
        return _upload(made, repository, private, message or "A model pruned with vitprune", files)


def describe_measured(folder: Path, measured: Sequence[str | Path]) -> list[str]:
    """Return what folders of measurements say of a model, as Markdown.

    Raises:
        VitpruneError: if one is of another kind, or of another model.
    """
    lines: list[str] = []
    for each in map(Path, measured):
        if (each / EVALUATION_FILE).is_file():
            lines += _of_evaluation(load_evaluation(each), folder, each)
        elif (each / EMBEDDINGS_FILE).is_file():
            comparison = load_embeddings(each)
            _check_same(comparison.model.name, folder, each)
            lines += [f"- {line}" for line in str(comparison.fidelity).splitlines()]
        elif (each / BENCH_FILE).is_file():
            lines += _of_bench(load_bench(each), folder, each)
        else:
            raise VitpruneError(f"{each} holds neither an evaluation nor a comparison of embeddings nor a benchmark")
    return lines


def _of_evaluation(evaluation: Evaluation, folder: Path, source: Path) -> list[str]:
    _check_same(evaluation.judged.model.name, folder, source)
    accuracy = count_right(evaluation.judged.answers)
    low, high = accuracy.top1_interval
    lines = [
        f"- top-1 {accuracy.top1:.4f} (95 % interval {low:.4f} .. {high:.4f}), top-5 {accuracy.top5:.4f}, on "
        f"{accuracy.num_images} images of {evaluation.root.name}"
    ]
    if evaluation.against is not None:
        before = count_right(evaluation.against.answers)
        lines.append(
            f"- against {Path(evaluation.against.model.name).name}: top-1 {before.top1:.4f} there, a drop of "
            f"{before.top1 - accuracy.top1:+.4f} (at most {drop_bound(before, accuracy):+.4f} at 95 % confidence)"
        )
    if evaluation.fidelity is not None:
        lines += [f"- {line}" for line in str(evaluation.fidelity).splitlines()]
    return lines


def _of_bench(bench: BenchRecord, folder: Path, source: Path) -> list[str]:
    if not any(Path(row.model).name == folder.name for row in bench.rows):
        raise VitpruneError(f"{source} timed no model called {folder.name}; leave it out, or time this model")
    lines = ["", f"Timed on {bench.hardware['processor']}:", ""]
    lines += ["| model | backend | precision | batch | median ms | speed-up (95 % interval) |"]
    lines += ["|---|---|---|---|---|---|"]
    lines += [
        f"| {Path(row.model).name} | {row.backend} | {row.precision} | {row.batch_size} | {row.median_ms:.2f} | "
        f"{row.speedup:.2f} ({row.speedup_low:.2f} .. {row.speedup_high:.2f}) |"
        for row in bench.rows
    ]
    return lines


def _check_same(name: str, folder: Path, source: Path) -> None:
    if Path(name).resolve() != folder.resolve():
        raise VitpruneError(f"{source} was measured of {name}, not of {folder}; leave it out, or measure this model")


def _copy_plan(source: Path, target: Path) -> None:
    """Copy a plan without what it tells of this machine."""
    plan = read_plan(source)
    facts = plan.facts
    opened = {key: value for key, value in (facts.opened or {}).items() if key != "checkpoint"}
    if Path(str(opened.get("model", ""))).is_absolute():
        opened = {}
    plan.with_facts(opened=opened or None, calibration=SeenImages(facts.calibration.sha256)).write(target)


def _upload(made: Path, repository: str, private: bool, message: str, files: tuple[str, ...]) -> Pushed:
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=repository, folder_path=made, commit_message=message)
    except Exception as error:  # of the client, of its transport, of the network
        reason = " ".join(str(error).split()).split(". ")[0] or type(error).__name__
        raise VitpruneError(
            f"{repository}: the hub does not take it ({reason}); 'hf auth login', or HF_TOKEN, says who you are"
        ) from error
    return Pushed(repository, commit.oid, f"{HUB}{repository}@{commit.oid}", f"{api.endpoint}/{repository}", files)
