"""What is finished of a long call, in a folder: the same call goes on there after it was killed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from vitprune.files import FORMAT_VERSION, atomic_folder, open_resumable, read_json, write_json
from vitprune.models.identity import architecture, hash_weights
from vitprune.models.load import load
from vitprune.models.saved_folder import PLAN_FILE, save
from vitprune.pruning.plan import Plan, read_plan
from vitprune.seen_images import files_of, hash_images
from vitprune.views import data_config

Value = TypeVar("Value")
FACTS_FILE = "stage.json"


class Stages:
    """Stages of a call by name, each made once and read back from then on.

    What is read back is used from the start, so that a call that was killed ends as an undisturbed one.

    Args:
        folder: of a call, from ``open_stages``; None: nothing is kept.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def facts(
        self,
        name: str,
        make: Callable[[], Value],
        as_json: Callable[[Value], Mapping[str, Any]],
        from_json: Callable[[Mapping[str, Any]], Value],
    ) -> Value:
        """Return what a stage found.

        >>> Stages(None).facts("sum", lambda: 1 + 1, dict, int)
        2
        """
        if self.folder is None:
            return make()
        path = self.folder / f"{name}.json"
        if not path.is_file():
            write_json(path, {"kind": f"stage {name}", "version": FORMAT_VERSION, **as_json(make())})
        return from_json(read_json(path, kind=f"stage {name}"))

    def model(
        self, name: str, make: Callable[[], tuple[nn.Module, Plan, Mapping[str, Any]]]
    ) -> tuple[nn.Module, Plan, Mapping[str, Any]]:
        """Return the model that a stage made, its plan, and what else there is to say of it (JSON values)."""
        if self.folder is None:
            return make()
        path = self.folder / name
        if not path.is_dir():
            model, plan, facts = make()
            with atomic_folder(path) as temporary:
                save(model, temporary, plan=plan)
                write_json(temporary / FACTS_FILE, {"kind": "stage", "version": FORMAT_VERSION, **facts})
        return load(path), read_plan(path / PLAN_FILE), read_json(path / FACTS_FILE, kind="stage")


def open_stages(
    folder: str | Path | None, model: nn.Module, batches: Any, asked: Mapping[str, Any], *, names: Iterable[str]
) -> Stages:
    """Open the folder of a call, anew where it is of another one.

    Args:
        folder: made if it does not exist; None: nothing is kept.
        model: what the call is about.
        batches: images and labels that it reads.
        asked: all else that it depends on; JSON values.
        names: files and folders of its stages.

    Raises:
        VitpruneError: if the folder holds anything else.
    """
    if folder is None:
        return Stages(None)
    images = files_of(batches)
    request = {
        "architecture": architecture(model),
        "transform": data_config(model),
        "weights": hash_weights(model),
        "images": None if images is None else sorted(hash_images(images)),
        **asked,
    }
    names = frozenset(names)
    half_written = {
        path.name for path in Path(folder).glob(".*") if any(path.name.startswith(f".{name}.") for name in names)
    }
    return Stages(open_resumable(folder, request, owned=names | half_written, overwrite=True))
