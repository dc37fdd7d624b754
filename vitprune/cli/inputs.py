"""What several commands do before their work: open models and runs, find images, refuse what does not fit."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vitprune.cli.terminal import note
from vitprune.errors import VitpruneError


def pick_device(device: str | None, processes: Any = None) -> str:
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return f"cuda:{processes.local_rank}" if device == "cuda" and processes and processes.count > 1 else device


def load_model(model: str, checkpoint: str | None, device: str = "cpu", ratio: float | None = None):
    from vitprune.models.load import load

    refuse_run(model)
    return load(model, checkpoint=checkpoint, device=device, ratio=ratio)


def open_model(model: str, checkpoint: str | None, device: str | None, ratio: float | None = None):
    if Path(model).suffix != ".onnx":
        return load_model(model, checkpoint, pick_device(device), ratio)
    if ratio is not None:
        raise VitpruneError(f"{model} has one width only; leave --ratio out")
    if checkpoint is not None:
        raise VitpruneError(f"{model} holds its own weights; leave --checkpoint out")
    if device not in (None, "cpu"):
        raise VitpruneError(f"{model} runs on ONNX Runtime's CPU provider, not on '{device}'")
    from vitprune.export.runtime import open_onnx

    return open_onnx(model)


def open_source(source: str, checkpoint: str | None, device: str | None):
    """Open what 'prune' and 'curve' start from: a run (with its model) or a model."""
    from vitprune.discovery.run import is_run, load_run
    from vitprune.models.identity import hash_weights

    if not is_run(source):
        return None, load_model(source, checkpoint, pick_device(device))
    run = load_run(source)
    if checkpoint is not None:
        raise VitpruneError(f"{source} is a run and names its own weights; leave --checkpoint out")
    network = load_model(run.model, run.checkpoint, pick_device(device))
    if hash_weights(network) != run.weights_sha256:
        raise VitpruneError(
            f"{source}: its scores are of other weights than {run.checkpoint or run.model} holds; discover again"
        )
    return run, network


def plan_of(model: str, ratio: float | None = None):
    from vitprune.models.saved_folder import PLAN_FILE
    from vitprune.pruning.elastic import read_elastic_plan
    from vitprune.pruning.plan import read_plan

    if Path(model).suffix == ".safetensors" and Path(model).is_file():
        return read_elastic_plan(model, ratio)
    return read_plan(model) if (Path(model) / PLAN_FILE).is_file() else None


def choose_images(network, data: str, class_map, classes, images_per_class, seed: int, *, labels_matter: bool = True):
    from vitprune.data import find_images

    if images_per_class is not None and images_per_class < 1:
        raise VitpruneError(f"images_per_class must be at least 1, got {images_per_class}")
    label_names = getattr(network, "label_names", None)
    images = find_images(
        data,
        network.num_classes if labels_matter else network.num_classes or None,
        class_map=class_map,
        label_names=label_names,
        classes=classes,
        images_per_class=images_per_class,
        seed=seed,
    )
    if label_names is not None:
        others = [entry.name for entry in Path(data).iterdir() if entry.is_dir() and entry.name not in label_names]
        if others and class_map is None:
            note(f"left out {len(others)} folders of {data} that are none of the model's {len(label_names)} classes")
    return images


def images_of(source: str, run, network, data, class_map, classes, images_per_class, seed: int):
    """Find the calibration images: those of --data, else those of the run, else None."""
    if data is not None:
        return choose_images(network, data, class_map, classes, images_per_class, seed, labels_matter=False)
    if run is None:
        return None
    if not run.images.root.is_dir():
        raise VitpruneError(f"the images of {source} are no longer at {run.images.root}; pass --data DIR")
    return run.images


def make_batches(images, model, *, batch_size: int, workers: int, strict: bool, transform=None):
    from vitprune.data import ImageBatches

    if batch_size < 1:
        raise VitpruneError(f"batch_size must be at least 1, got {batch_size}")
    if workers < 0:
        raise VitpruneError(f"workers must not be negative, got {workers}")
    return ImageBatches(images, model, batch_size=batch_size, num_workers=workers, strict=strict, transform=transform)


def report_skipped(batches) -> list[str]:
    if batches.skipped:
        name, reason = batches.skipped[0]
        note(f"skipped {len(batches.skipped)} images that cannot be decoded (first: {name}, {reason})")
    return [name for name, _reason in batches.skipped]


def warn_of_few_classes(network: Any, images: Any, what: str) -> None:
    seen = len(set(images.labels))
    if seen < network.num_classes / 2:
        note(
            f"warning: the {what} images show {seen} of the {network.num_classes} classes that the model chooses "
            "among; nothing is learned of the others (prune --keep-classes drops them)"
        )


def describe_calibration(used, scored_on, *plans) -> dict[str, Any]:
    """Record every image that had a say: those read now, those of the run's scores, and those of earlier plans."""
    from vitprune.data import hash_images

    hashes = {digest for plan in plans if plan is not None for digest in plan.calibration}
    for images in (used, scored_on):
        if images is not None:
            hashes.update(hash_images(images))
    named = used or scored_on
    facts = {} if named is None else {"data": str(named.root), "files": named.files, "labels": named.labels}
    return {**facts, "sha256": sorted(hashes - {""})}


def as_stored(model: str) -> str:
    return str(Path(model).resolve()) if Path(model).is_dir() else model


def refuse_run(model: str) -> None:
    from vitprune.discovery.run import is_run

    if is_run(model):
        raise VitpruneError(f"{model} is a run, not a model; 'vitprune prune {model} -o PRUNED' makes one of it")


def refuse_elastic(model: str) -> None:
    if Path(model).suffix == ".safetensors":
        raise VitpruneError(f"{model}: name the ONNX file of one ratio; 'vitprune export {model} OUT.onnx --ratio R'")


def refuse_without_data(data: str | None, **options_of_data: Any) -> None:
    """Refuse options that choose among images where no images are named."""
    given = [name for name, value in options_of_data.items() if value is not None]
    if data is None and given:
        raise VitpruneError(f"{', '.join(given)}: choose among the images of --data DIR, which is missing")


def refuse_overlap(model: str, network, images) -> None:
    plan = plan_of(model)
    used = getattr(network, "calibration", frozenset()) if plan is None else plan.calibration
    if used:
        refuse_shared(images, used, model)


def refuse_shared(images, used: Iterable[str], source: str) -> None:
    """Refuse to measure accuracy on images that had a say, whose content hashes are given."""
    from vitprune.data import hash_images

    used = set(used) - {""}
    shared = [name for name, digest in zip(images.files, hash_images(images), strict=True) if digest in used]
    if shared:
        raise VitpruneError(
            f"{len(shared)} of {len(images)} evaluation images were calibration images of {source} "
            f"(first: {shared[0]}); evaluate on others"
        )
