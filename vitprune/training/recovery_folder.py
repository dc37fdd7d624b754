"""The folder of a recovered model: a pruned model's, with how it was trained and a picture of it."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vitprune.figures.recovery_figure import draw_recovery
from vitprune.figures.style import save_figure
from vitprune.files import FORMAT_VERSION, atomic_folder, read_json, write_json
from vitprune.models.saved_folder import FOLDER_FILES, save
from vitprune.seal import parsing
from vitprune.training.loop import STEPS_FILE, EpochRow
from vitprune.training.recover import Recovered
from vitprune.training.settings import Training

RECOVERY_FILE, PICTURE_FILE = "recovery.json", "recovery.png"
RECOVERED_FILES = FOLDER_FILES | {RECOVERY_FILE, PICTURE_FILE, STEPS_FILE}


@dataclass(frozen=True)
class Recovery:
    """How a folder's model was trained.

    Attributes:
        rows: one for each epoch.
        best: the number of the one that was kept.
        before: what held-back images cost before training, and their accuracy.
        num_images: that had a say.
        is_flattered: whether ``before`` is of images that the model was fitted to already.
    """

    rows: tuple[EpochRow, ...]
    best: int
    before: tuple[float | None, float | None]
    num_images: int
    is_flattered: bool = False


def load_recovery(folder: str | Path) -> Recovery | None:
    """Read how a folder's model was trained; None where it was not.

    >>> load_recovery("nowhere") is None
    True
    """
    path = Path(folder) / RECOVERY_FILE
    if not path.is_file():
        return None
    content = read_json(path, kind="recovery")
    with parsing(path):
        before = content["before"]
        rows = tuple(EpochRow(**row) for row in content["epochs"])
        return Recovery(
            rows,
            content["best"],
            (before["held_back"], before["accuracy"]),
            content["num_images"],
            is_flattered=content.get("before_is_flattered", False),
        )


def describe_recovery(recovered: Recovered, training: Training) -> dict[str, Any]:
    """Return how a model was trained, and how that went; JSON values.

    >>> from torch import nn
    >>> describe_recovery(Recovered(nn.Identity(), None, (), 0, (None, None), frozenset()), Training())["best"]
    0
    """
    return {
        "training": asdict(training),
        "before": {"held_back": recovered.before[0], "accuracy": recovered.before[1]},
        "before_is_flattered": recovered.is_flattered,
        "best": recovered.best,
        "num_images": len(recovered.sha256),
        "epochs": [asdict(row) for row in recovered.rows],
    }


def save_recovery(
    recovered: Recovered, training: Training, output: str | Path, *, steps: str | Path | None = None
) -> None:
    """Write the folder of a recovered model; whole or not at all.

    Args:
        recovered: from ``recover``.
        training: how.
        output: the folder; replaced if it exists.
        steps: JSON lines of the steps, to be kept beside.

    Raises:
        VitpruneError: if it would not load again, or cannot be written.

    >>> import tempfile, timm
    >>> model = timm.create_model("vit_tiny_patch16_224", num_classes=5)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_recovery(Recovered(model, None, (), 0, (None, None), frozenset()), Training(), Path(folder) / "out")
    ...     sorted(path.name for path in (Path(folder) / "out").iterdir())
    ['README.md', 'config.json', 'model.safetensors', 'recovery.json']
    """
    with atomic_folder(output) as temporary:
        save(recovered.model, temporary, plan=recovered.plan)
        described = describe_recovery(recovered, training)
        write_json(temporary / RECOVERY_FILE, {"kind": "recovery", "version": FORMAT_VERSION, **described})
        if recovered.rows:
            save_figure(draw_recovery(recovered.rows, before=recovered.before), temporary / PICTURE_FILE)
        if steps is not None:
            shutil.copyfile(steps, temporary / STEPS_FILE)
