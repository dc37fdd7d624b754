"""A run: the folder that ``discover`` leaves behind and ``prune`` starts from."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitprune.data import ImageSet, hash_images, remember_names
from vitprune.discovery.discover import Discovery
from vitprune.errors import VitpruneError
from vitprune.files import FORMAT_VERSION, atomic_folder, read_json, read_tensors, write_json, write_tensors
from vitprune.models.identity import hash_weights
from vitprune.models.load import load
from vitprune.seal import parsing
from vitprune.seen_images import SeenImages, as_hashes, as_numbers

# Tensor of the paths file: hashes of the images, as ``as_numbers`` writes them.
_SEEN = "seen_images"
RUN_FILE, PATHS_FILE, SCORES_FILE = "run.json", "paths.safetensors", "class_scores.safetensors"
RUN_FILES = frozenset({RUN_FILE, PATHS_FILE, SCORES_FILE})


@dataclass(frozen=True)
class Run:
    """What a run folder holds.

    Attributes:
        found: paths and class scores.
        images: the images they were found on.
        model: what to pass to ``vitprune.load``: name or folder.
        checkpoint: absolute path of the weights, or None where the hub or the folder has them.
        weights_sha256: ``hash_weights`` of the model.
        transform: how the images were prepared, in the words of ``data_config``; None: by the model's own transform.
        images_sha256: ``digest_images`` of the images as they were read; None in runs of earlier versions.
        model_transform: ``data_config`` of the model, for the record; None in runs of earlier versions.
        opened: what else to pass to ``vitprune.load``.
    """

    found: Discovery
    images: ImageSet
    model: str
    checkpoint: str | None
    weights_sha256: str
    transform: Mapping[str, Any] | None = None
    images_sha256: str | None = None
    model_transform: Mapping[str, Any] | None = None
    opened: Mapping[str, Any] = field(default_factory=dict)

    def load(self, device: str = "cpu") -> nn.Module:
        """Load the model that it is of; errors are those of ``vitprune.load``."""
        return load(self.model, checkpoint=self.checkpoint, device=device, **self.opened)


def is_run(folder: str | Path) -> bool:
    """Tell whether ``folder`` was written by ``save_run``."""
    return (Path(folder) / RUN_FILE).is_file()


def save_run(run: Run, folder: str | Path) -> None:
    """Write a run folder, all or nothing: ``run.json``, ``paths.safetensors`` and ``class_scores.safetensors``.

    >>> import tempfile, timm
    >>> from vitprune import discover
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=2).eval()
    >>> found = discover(model, [(torch.zeros(1, 3, 32, 32), torch.tensor([1]))], method="activation")
    >>> run = Run(found, ImageSet(Path("photos"), ("dog/1.png",), (1,), {1: "dog"}), "tiny", None, hash_weights(model))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_run(run, folder)
    ...     load_run(folder).images.class_names
    {1: 'dog'}
    """
    found, images = run.found, run.images
    asked = ("method", "tokens", "quadrature", "target", "quantity", "precision")
    facts = {name: getattr(found, name) for name in asked}
    tensors = {
        "neurons": found.neurons,
        "joint_scores": found.joint_scores,
        "labels": found.labels,
        "predictions": found.predictions,
    }
    if found.completeness_errors is not None:
        tensors["completeness_errors"] = found.completeness_errors
    if found.seen:
        tensors[_SEEN] = torch.tensor(as_numbers(sorted(found.seen.sha256)))
    with atomic_folder(folder) as temporary:
        write_tensors(
            temporary / PATHS_FILE,
            tensors,
            kind="paths",
            facts={**facts, "layers": found.layers, "images": images.files},
        )
        write_tensors(
            temporary / SCORES_FILE,
            found.class_scores,
            kind="class_scores",
            facts={**facts, "layers": found.layers, "classes": found.classes},
        )
        write_json(
            temporary / RUN_FILE,
            {
                "kind": "run",
                "version": FORMAT_VERSION,
                **facts,
                "model": run.model,
                "checkpoint": run.checkpoint,
                "weights_sha256": run.weights_sha256,
                "data": str(images.root),
                "num_images": len(images),
                "top_k": found.neurons.shape[-1],
                **({"heads": dict(found.heads)} if found.heads else {}),
                "class_names": {str(index): name for index, name in images.class_names.items()},
                **({"label_names": list(images.label_names)} if images.label_names else {}),
                **({} if run.transform is None else {"transform": dict(run.transform)}),
                **({} if run.images_sha256 is None else {"images_sha256": run.images_sha256}),
                **({} if run.model_transform is None else {"model_transform": dict(run.model_transform)}),
                **({"opened": dict(run.opened)} if run.opened else {}),
            },
        )


def load_run(folder: str | Path) -> Run:
    """Read a run folder.

    Raises:
        VitpruneError: if the folder is no run, or its files disagree.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     load_run(folder)
    Traceback (most recent call last):
    vitprune.errors.VitpruneError: ... is no run of a discovery: it has no run.json
    """
    folder = Path(folder)
    if not is_run(folder):
        raise VitpruneError(f"{folder} is no run of a discovery: it has no {RUN_FILE}")
    facts = read_json(folder / RUN_FILE, kind="run")
    tensors, path_facts = read_tensors(folder / PATHS_FILE, kind="paths")
    class_scores, score_facts = read_tensors(folder / SCORES_FILE, kind="class_scores")
    with parsing(folder):
        return _read_run(folder, facts, (tensors, path_facts), (class_scores, score_facts))


def _read_run(folder: Path, facts: Mapping[str, Any], paths: tuple[Any, Any], scores: tuple[Any, Any]) -> Run:
    (tensors, path_facts), (class_scores, score_facts) = paths, scores
    _check_agreement(folder, tensors, path_facts, class_scores)
    found = Discovery(
        layers=_layers(path_facts),
        neurons=tensors["neurons"],
        joint_scores=tensors["joint_scores"],
        labels=tensors["labels"],
        predictions=tensors["predictions"],
        completeness_errors=tensors.get("completeness_errors"),
        classes=tuple(map(operator.index, score_facts["classes"])),
        class_scores=class_scores,
        method=facts["method"],
        tokens=facts["tokens"],
        quadrature=facts["quadrature"],
        target=facts["target"],
        quantity=facts["quantity"],
        precision=facts.get("precision", "float32"),
        seen=SeenImages(
            frozenset(as_hashes(tensors[_SEEN].tolist())) if _SEEN in tensors else frozenset(),
            facts["data"],
            tuple(path_facts["images"]),
            tuple(tensors["labels"].tolist()),
        ),
        heads={name: operator.index(count) for name, count in facts.get("heads", {}).items()},
    )
    images = ImageSet(
        Path(facts["data"]),
        tuple(path_facts["images"]),
        tuple(tensors["labels"].tolist()),
        {int(index): name for index, name in facts["class_names"].items()},
        label_names=tuple(facts.get("label_names", ())),
    )
    return Run(
        found,
        images,
        facts["model"],
        facts["checkpoint"],
        facts["weights_sha256"],
        transform=facts.get("transform"),
        images_sha256=facts.get("images_sha256"),
        model_transform=facts.get("model_transform"),
        opened=facts.get("opened", {}),
    )


def _layers(path_facts: Mapping[str, Any]) -> tuple[str, ...]:
    # What earlier versions called them, which knew FFNs alone.
    return tuple(path_facts["layers" if "layers" in path_facts else "ffns"])


def open_run(folder: str | Path, *, device: str = "cpu") -> tuple[Run, nn.Module]:
    """Read a run folder, and load the model that it is of; the model is told the names of its classes.

    Args:
        folder: of a run.
        device: where to put the model.

    Raises:
        VitpruneError: if the folder is no run, or its model cannot be loaded or has other weights now.
    """
    run = load_run(folder)
    model = run.load(device)
    if hash_weights(model) != run.weights_sha256:
        raise VitpruneError(
            f"{folder}: its scores are of other weights than {run.checkpoint or run.model} holds; discover again"
        )
    if not run.found.seen:  # earlier versions did not say which images they were
        seen = run.found.seen.with_hashes(hash_images(run.images))
        run = replace(run, found=replace(run.found, seen=seen))
    remember_names(model, run.images.label_names)
    return run, model


def _check_agreement(
    folder: Path, tensors: Mapping[str, Any], path_facts: Mapping[str, Any], class_scores: Mapping[str, Any]
) -> None:
    num_images = len(tensors["neurons"])
    if num_images != len(path_facts["images"]) or sorted(class_scores) != sorted(_layers(path_facts)):
        raise VitpruneError(f"{folder}: {PATHS_FILE} and {SCORES_FILE} are not of the same run")
