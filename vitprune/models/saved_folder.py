"""The folder of a saved model, dense or pruned: timm's own layout, and the plan beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from vitprune.entry import entry
from vitprune.errors import VitpruneError
from vitprune.files import atomic_folder, open_tensors
from vitprune.models.build import CONFIG_FILE, build, fill, restore, unrecorded
from vitprune.models.checkpoint_file import read_checkpoint
from vitprune.models.facts import Facts
from vitprune.models.foreign_file import explain_file
from vitprune.models.load_twin import is_of_transformers, load_transformers
from vitprune.models.model_card import MODEL_CARD_FILE, write_model_card
from vitprune.seal import SEAL, hash_tensors, seal, unseal
from vitprune.seen_images import seen_by

WEIGHTS_FILE, PLAN_FILE = "model.safetensors", "plan.safetensors"
_OTHER_WEIGHTS = ("pytorch_model.bin",)  # what timm wrote before
_WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".npz")
# In the description of a model that images had a say in which its plan does not name.
SEEN_KEY = "calibration_sha256"
FOLDER_FILES = frozenset({WEIGHTS_FILE, CONFIG_FILE, PLAN_FILE, MODEL_CARD_FILE})


@entry
def save(model: nn.Module, folder: str | Path, *, plan: Any = None) -> None:
    """Write ``config.json`` and ``model.safetensors`` in timm's layout, plan and card beside them; all or nothing.

    The written folder is loaded again before it takes its name, so what exists can be read.

    Args:
        model: a timm model, dense or pruned. If it was created with arguments that timm does not record, they are read
            from its attribute ``model_args`` (a dict); names of its classes from ``label_names`` (a sequence); hashes
            of the images that had a say in it from ``calibration``.
        folder: replaced if it exists.
        plan: a ``vitprune.Plan``, written to ``plan.safetensors``.

    Raises:
        VitpruneError: if the folder would not load again, or cannot be written.

    >>> import tempfile, timm
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(timm.create_model("vit_tiny_patch16_224", num_classes=5), folder)
    ...     sorted(path.name for path in Path(folder).iterdir())
    ['README.md', 'config.json', 'model.safetensors']
    """
    with atomic_folder(folder) as temporary:
        state = _unshared(model)
        save_file(state, temporary / WEIGHTS_FILE, metadata={SEAL: hash_tensors(state)})
        save_config_for_hf(model, str(temporary / CONFIG_FILE), **unrecorded(model))
        seen = seen_by(model)
        if plan is not None:
            plan.write(temporary / PLAN_FILE)
            seen -= plan.calibration
        config = json.loads((temporary / CONFIG_FILE).read_text())
        config |= {SEEN_KEY: sorted(seen)} if seen else {}
        (temporary / CONFIG_FILE).write_text(json.dumps(seal(config), indent=2))
        load_folder(temporary)
        (temporary / MODEL_CARD_FILE).write_text(describe_folder(temporary))


def describe_folder(folder: Path, *, measured: Sequence[str] = (), name: str | None = None) -> str:
    """Return the text of a folder's card.

    Args:
        folder: of a saved model.
        measured: lines of Markdown about accuracy and speed.
        name: by which others load it; None: FOLDER.

    Raises:
        VitpruneError: if the folder is no saved model.
    """
    config, facts, removed = read_config(folder), None, {}
    if (folder / PLAN_FILE).is_file():
        with open_tensors(folder / PLAN_FILE, kind="plan") as (stream, content):
            facts = Facts.from_json(content)
            for unit in content.get("units") or [{"name": name, "kind": "ffn"} for name in content["ffns"]]:
                keep = stream.get_tensor(unit["name"]).bool()
                gone, total = removed.get(unit["kind"], (0, 0))
                removed[unit["kind"]] = (gone + int((~keep).sum()), total + len(keep))
    return write_model_card(config, facts, removed, measured=measured, name=name or "FOLDER")


def _unshared(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's tensors, each with storage of its own: a file has no place for what layers share."""
    seen: set[int] = set()
    result = {}
    for key, value in model.state_dict().items():
        pointer = value.untyped_storage().data_ptr()
        result[key] = value.clone() if pointer in seen else value.contiguous()
        seen.add(pointer)
    return result


def load_folder(folder: Path) -> nn.Module:
    """Load the model of a folder: timm's layout, or of transformers, whose timm twin it is then.

    Raises:
        VitpruneError: if the folder is no saved model, or its files do not fit each other.
    """
    config = _read_json(folder) if (folder / CONFIG_FILE).is_file() else None
    if is_of_transformers(config):
        return load_transformers(folder, config)
    config = read_config(folder)
    weights_path = _find_weights(folder)
    state = dict(read_checkpoint(weights_path, what="").tensors)
    _check_seal(weights_path, state)
    model = restore(build(config, str(folder / CONFIG_FILE)), config)
    model = fill(model, state, f"{weights_path} does not fit its {CONFIG_FILE}")
    seen = _read_seen(folder)
    if seen:
        model.calibration = seen
    return model


def _check_seal(path: Path, state: Mapping[str, Tensor]) -> None:
    """Refuse weights that are not those that the file was written with; those that others wrote have no seal."""
    if path.suffix != ".safetensors":
        return
    with safe_open(path, framework="pt") as stream:
        sealed = (stream.metadata() or {}).get(SEAL)
    if sealed is not None and sealed != hash_tensors(state):
        raise VitpruneError(f"{path}: damaged, or changed since it was written (its hash does not fit)")


def _read_seen(folder: Path) -> frozenset[str]:
    """Return the hashes of the images that had a say in a folder's model: by its plan, or beside it."""
    seen = frozenset(read_config(folder).get(SEEN_KEY, ()))
    if (folder / PLAN_FILE).is_file():
        with open_tensors(folder / PLAN_FILE, kind="plan") as (_stream, facts):
            seen |= Facts.from_json(facts).calibration.sha256
    return seen


def build_dense(folder: str | Path) -> nn.Module:
    """Build the dense model that a pruned folder came from, with random weights: for timing, not for answers.

    Raises:
        VitpruneError: if the folder is no saved model.
    """
    return build(read_config(Path(folder))).eval()


def read_config(folder: Path) -> dict[str, Any]:
    """Return the description of a folder's model.

    Raises:
        VitpruneError: if the folder is no saved model.
    """
    if not (folder / CONFIG_FILE).is_file():
        weights = sorted(path.name for path in folder.glob("*") if path.suffix in _WEIGHTS)
        hint = f"; pass a timm name as the model, and {folder / weights[0]} as `checkpoint`" if weights else ""
        raise VitpruneError(f"{folder} is no saved model: it has no {CONFIG_FILE}{hint}")
    _find_weights(folder)
    config = _read_json(folder)
    if not isinstance(config, dict) or "architecture" not in config:
        raise VitpruneError(
            f"{folder} is no saved timm model: its {CONFIG_FILE} names no architecture"
            f"{_describe_foreign(config)}; pass the timm name as the model, and its file of weights as `checkpoint`"
        )
    return _complete(config)


def _read_json(folder: Path) -> Any:
    try:
        content = json.loads((folder / CONFIG_FILE).read_text())
    except (ValueError, RecursionError) as error:
        reason = explain_file(folder / CONFIG_FILE) or f"is no JSON ({error})"
        raise VitpruneError(f"{folder / CONFIG_FILE}: not a JSON file: it {reason}") from error
    return unseal(folder / CONFIG_FILE, content) if isinstance(content, dict) else content


def _find_weights(folder: Path) -> Path:
    """Return the file of a folder's weights, as timm names it."""
    names = (WEIGHTS_FILE, *_OTHER_WEIGHTS)
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise VitpruneError(f"{folder} is no saved model: it has no {WEIGHTS_FILE}{_describe_shards(folder)}")
    return found


def _describe_shards(folder: Path) -> str:
    index = next(iter(sorted(folder.glob("*.index.json"))), None)
    return f"; {index.name} {explain_file(index)}" if index is not None else ""


def _describe_foreign(config: Any) -> str:
    kinds = config.get("architectures") if isinstance(config, dict) else None
    return f" (it is transformers' {', '.join(map(str, kinds))})" if isinstance(kinds, list) else ""


def _complete(config: dict[str, Any]) -> dict[str, Any]:
    """Return a description in today's form: timm's first ones had the keys of ``pretrained_cfg`` at the top."""
    if isinstance(config.get("pretrained_cfg"), dict):
        return config
    known = (
        "input_size",
        "interpolation",
        "mean",
        "std",
        "crop_pct",
        "crop_mode",
        "first_conv",
        "classifier",
        "pool_size",
    )
    return {**config, "pretrained_cfg": {key: config[key] for key in known if key in config}}
