"""What a recipe remembers of its finished steps, in its output folder: nothing is run again for nothing."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vitprune.errors import VitpruneError
from vitprune.files import FORMAT_VERSION, read_json, write_json
from vitprune.recipe.contents import Contents, is_there
from vitprune.recipe.read import Recipe, Step, overlap, texts_of

STATE_FOLDER = ".recipe"
STATE_FILE, HASHES_FILE, LOCK_FILE = "state.json", "hashes.json", "lock"
# Options that may name a model of the hub -> the option whose weights replace the hub's.
_MODEL_OPTIONS = {
    "model": "checkpoint",
    "models": "checkpoint",
    "source": "checkpoint",
    "against": "against_checkpoint",
}


@dataclass(frozen=True)
class Basis:
    """Everything that the outcome of a step depends on; JSON values.

    Attributes:
        version: of vitprune.
        command: its name.
        options: the step's, with defaults.
        inputs: file or folder that it reads -> absolute path and content hash; model from the hub -> hash of its
            weights, None before they are there.
        steps: output of an earlier step that it reads -> fingerprint of that step and content hash of the output.
    """

    version: str
    command: str
    options: Mapping[str, Any]
    inputs: Mapping[str, Any]
    steps: Mapping[str, Any]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Decision:
    """Whether a step has to run.

    Attributes:
        basis: of the step; None where it is known only once an earlier step has run.
        reason: why it has to run; empty where it has not.
        answer: what it answered when it ran, where it has not to run again.
        overwrite: whether what an earlier time left of its output gives way.
    """

    basis: Basis | None
    reason: str
    answer: Any = None
    overwrite: bool = False


class State:
    """The records of a recipe's steps: by what they write, or by what they ask where they only answer.

    Args:
        recipe: with an output folder.
        contents: hashes of files and folders.
        version: of vitprune.

    Raises:
        VitpruneError: if the output folder is another recipe's, or outputs of steps are there that this recipe did not
            write; all of them are named.
    """

    def __init__(self, recipe: Recipe, contents: Contents, *, version: str) -> None:
        self._recipe, self._contents, self._version = recipe, contents, version
        self._path = state_file(recipe)
        self._outputs = [None if step.output is None else Path(os.path.abspath(step.output)) for step in recipe.steps]
        self._fingerprints: dict[int, str] = {}
        self._before: dict[str, Any] | None = None
        self._records: dict[str, dict[str, Any]] = {}
        if self._path.is_file():
            content = read_json(self._path, kind="recipe")
            if content["recipe"] != recipe.path.stem:
                raise VitpruneError(
                    f"{recipe.output} holds the results of recipe '{content['recipe']}'; choose another output"
                )
            self._records = content["steps"]
        foreign = [
            f"step {position}: {step.command}: {step.output} exists, and this recipe did not write it"
            for position, step in enumerate(recipe.steps, 1)
            if _is_there(step) and self._name(step) not in self._records
        ]
        if foreign:
            raise VitpruneError(f"recipe {recipe.path}: {'; '.join(foreign)}; move it away, or choose another output")

    def decide(self, position: int) -> Decision:
        """Decide on a step (0, 1, ..); all before it have run, or were found unchanged."""
        step = self._recipe.steps[position]
        basis = self._find_basis(position)
        self._fingerprints[position] = basis.fingerprint
        record = self._records.get(self._name(step))
        reason = self._find_reason(position, record, basis)
        return Decision(basis, reason, None if reason else record["answer"], overwrite=record is not None)

    def foresee(self) -> list[Decision]:
        """Decide on all steps, as far as can be told before any of them runs."""
        decisions: list[Decision] = []
        for position, step in enumerate(self._recipe.steps):
            pending = [str(other + 1) for other in self._find_steps(position) if decisions[other].reason]
            if pending:
                reason = f"reads what step{'s' if len(pending) > 1 else ''} {', '.join(pending)} will write"
                decisions.append(Decision(None, reason, overwrite=self._name(step) in self._records))
            else:
                decisions.append(self.decide(position))
        return decisions

    def begin(self, position: int) -> None:
        """Remember that a step is about to run: what it writes is this recipe's, whatever interrupts it."""
        step = self._recipe.steps[position]
        self._before = self._records.get(self._name(step))
        self._records[self._name(step)] = {"command": step.command, "output": step.output, "finished": False}
        self._save()

    def give_up(self, position: int) -> None:
        """Remember that the step that had begun was interrupted: an output that it did not get to is nobody's."""
        step = self._recipe.steps[position]
        if self._before is not None:
            self._records[self._name(step)] = self._before
        elif not _is_there(step) and not os.path.lexists(f"{step.output}.shards"):  # those of 'discover'
            del self._records[self._name(step)]
        self._save()

    def finish(self, position: int, basis: Basis, answer: Any) -> None:
        """Remember that a step has run.

        Args:
            position: 0, 1, ..
            basis: as it was decided on.
            answer: JSON values.
        """
        step = self._recipe.steps[position]
        fetched = {name: self._hash_weights(name) for name, found in basis.inputs.items() if found is None}
        basis = replace(basis, inputs={**basis.inputs, **fetched})
        self._fingerprints[position] = basis.fingerprint
        self._records[self._name(step)] = {
            "command": step.command,
            "output": step.output,
            "finished": True,
            "basis": asdict(basis),
            "output_sha256": self._hash_output(position),
            "answer": answer,
        }
        self._save()

    def _save(self) -> None:
        content = {"kind": "recipe", "version": FORMAT_VERSION, "recipe": self._recipe.path.stem}
        write_json(self._path, {**content, "steps": self._records})
        self._contents.save(self._path.with_name(HASHES_FILE))

    def _name(self, step: Step) -> str:
        if step.output is not None:
            return os.path.relpath(step.output, self._recipe.output)
        return f"{step.command} {hashlib.sha256(json.dumps(dict(step.options)).encode()).hexdigest()[:16]}"

    def _find_reason(self, position: int, record: Mapping[str, Any] | None, basis: Basis) -> str:
        step = self._recipe.steps[position]
        if record is None:
            return "has not run yet"
        if not record["finished"]:
            return "was interrupted"
        before = Basis(**record["basis"])
        if before != basis:
            return _tell_difference(before, basis)
        if step.output is not None and not _is_there(step):
            return f"{step.output} is gone"
        if self._hash_output(position) != record["output_sha256"]:
            return f"{step.output} was changed since"
        return ""

    def _find_steps(self, position: int) -> list[int]:
        """Return the earlier steps that write what a step reads, or a part of it, or a folder around it."""
        paths = [Path(os.path.abspath(text)) for text in texts_of(self._recipe.steps[position])]
        return [
            earlier
            for earlier, output in enumerate(self._outputs[:position])
            if output is not None and any(overlap(path, output) for path in paths)
        ]

    def _find_basis(self, position: int) -> Basis:
        step = self._recipe.steps[position]
        outputs = frozenset(output for output in self._outputs if output is not None)
        inputs: dict[str, Any] = {}
        for text in texts_of(step):
            path = Path(os.path.abspath(text))
            if self._is_made_here(path) or not is_there(path):
                continue
            inputs[text] = [str(path), self._contents.hash_once(path, leave_out=outputs)]
            for behind in _find_behind(path):
                inputs[f"{behind} of {text}"] = self._contents.hash_once(behind)
        if step.options.get("checkpoint") is None:
            for name in _names_of_models(step):
                if name not in inputs and not self._is_made_here(Path(os.path.abspath(name))):
                    inputs[name] = self._hash_weights(name)
        steps = {
            self._recipe.steps[earlier].output: [self._fingerprints[earlier], self._hash_output(earlier)]
            for earlier in self._find_steps(position)
        }
        options = {name: value for name, value in step.options.items() if name != "overwrite"}
        return Basis(self._version, step.command, json.loads(json.dumps(options)), inputs, steps)

    def _is_made_here(self, path: Path) -> bool:
        return any(output is not None and output in (path, *path.parents) for output in self._outputs)

    def _hash_output(self, position: int) -> str | None:
        output = self._outputs[position]
        if output is None or not is_there(output):
            return None
        others = [other for other in self._outputs if other is not None and other != output]
        return self._contents.hash(output, leave_out=others)

    def _hash_weights(self, name: str) -> str | None:
        from vitprune.models.sources import find_hub_weights

        path = find_hub_weights(name)
        return None if path is None else self._contents.hash_once(path)


def state_file(recipe: Recipe) -> Path:
    """Return where a recipe with an output folder remembers its steps."""
    return Path(recipe.output) / STATE_FOLDER / STATE_FILE


def _is_there(step: Step) -> bool:
    return step.output is not None and is_there(step.output)


def _names_of_models(step: Step) -> Iterator[str]:
    """Yield what may be names of models whose weights come from the hub."""
    for option, checkpoint in _MODEL_OPTIONS.items():
        value = step.options.get(option)
        if value is not None and step.options.get(checkpoint) is None:
            yield from value if isinstance(value, list) else [value]


def _find_behind(path: Path) -> Sequence[Path]:
    """Return what a run folder names and commands read with it: its images, its checkpoint, the folder of its model."""
    if not (path / "run.json").is_file():
        return ()
    facts = read_json(path / "run.json", kind="run")
    named = [Path(facts[name]) for name in ("data", "checkpoint", "model") if facts.get(name)]
    return [each for each in named if each.is_absolute() and each.exists()]


def _tell_difference(before: Basis, now: Basis) -> str:
    told = []
    if before.version != now.version:
        told.append(f"vitprune {before.version} made it, this is {now.version}")
    if before.command != now.command:
        told.append(f"was made by '{before.command}'")
    else:
        names = sorted(before.options.keys() | now.options.keys())
        other = [name for name in names if before.options.get(name) != now.options.get(name)]
        told += [f"other {', '.join(other)}"] if other else []
    for old, new in ((before.inputs, now.inputs), (before.steps, now.steps)):
        told += [f"{name} changed" for name in sorted(old.keys() & new.keys()) if old[name] != new[name]]
        told += [f"reads {name}" for name in sorted(new.keys() - old.keys())]
        told += [f"reads {name} no more" for name in sorted(old.keys() - new.keys())]
    return "; ".join(told)
