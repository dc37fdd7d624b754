"""What several commands do with their options before they call the library."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vitprune.cli.terminal import note, note_at_work
from vitprune.cli.wording import in_flags
from vitprune.errors import VitpruneError


def pick_device(device: str | None, processes: Any = None) -> str:
    import torch

    from vitprune.sharing import sharing

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    processes = sharing() if processes is None else processes
    return f"cuda:{processes.local_rank}" if device == "cuda" and processes.count > 1 else device


def read_opening(opening: Mapping[str, Any]) -> dict[str, Any]:
    """Return what ``load`` takes of what was said beside a model's name, as ``add_checkpoint`` adds it."""
    read = {name: value for name, value in opening.items() if value is not None}
    if "model_args" in read:
        read["model_args"] = dict(map(_read_model_arg, read["model_args"]))
    if "crop" in read:
        read["crop_pct"] = read.pop("crop")
    if "class_names" in read and not Path(read["class_names"]).is_file():
        raise VitpruneError(f"--class-names {read['class_names']}: no such file")
    return read


def _read_model_arg(text: str) -> tuple[str, Any]:
    key, sign, value = text.partition("=")
    if not sign or not key.strip().isidentifier():
        raise VitpruneError(f"--model-args takes KEY=VALUE, such as num_heads=4; got {text}")
    try:
        return key.strip(), ast.literal_eval(value.strip())
    except (ValueError, SyntaxError):
        return key.strip(), value.strip()  # a word, such as global_pool=avg


def check_model(model: str, checkpoint: str | None, opening: Mapping[str, Any]) -> None:
    """Refuse paths and options of a model that cannot be right, before anything is fetched or built."""
    refuse_run(model)
    read_opening(opening)
    if checkpoint is not None and not Path(checkpoint).exists():
        raise VitpruneError(f"checkpoint {checkpoint}: no such file")
    if Path(model).suffix in (".onnx", ".xml") and not Path(model).exists():
        raise VitpruneError(f"{model}: no such file")


def check_data(data: str | None, class_map: str | None = None) -> None:
    """Refuse a folder of images or a file of classes that is not there, before a model is fetched or built."""
    if data is not None and not Path(data).exists():
        raise VitpruneError(f"{data}: no such data folder")
    if class_map is not None and not Path(class_map).is_file():
        raise VitpruneError(f"--class-map {class_map}: no such file")


def load_model(
    model: str,
    checkpoint: str | None,
    device: str = "cpu",
    ratio: float | None = None,
    merge: str | None = None,
    opening: Mapping[str, Any] | None = None,
):
    opened = read_opening(opening or {})
    refuse_run(model)
    from vitprune.models.load import load

    return load(model, checkpoint=checkpoint, device=device, ratio=ratio, merge=merge, **opened)


def open_source(source: str, checkpoint: str | None, device: str | None, opening: Mapping[str, Any]):
    """Open what 'prune' and 'curve' start from: a run (with its model) or a model."""
    from vitprune.discovery.run import is_run, open_run

    if not is_run(source):
        return None, load_model(source, checkpoint, pick_device(device), opening=opening)
    given = [name for name, value in {"checkpoint": checkpoint, **opening}.items() if value is not None]
    if given:
        raise VitpruneError(f"{source} is a run and names its own weights; leave --{given[0].replace('_', '-')} out")
    return open_run(source, device=pick_device(device))


def say_transform(transform: Any, name: str | None = None) -> None:
    """Say how the images of a model, or under a transform, are prepared: what is wrong there looks like a bad model."""
    from vitprune.views import data_config

    config = transform if isinstance(transform, Mapping) else data_config(transform)
    _channels, height, width = config["input_size"]
    mean, std = (" ".join(f"{value:.3g}" for value in config[key]) for key in ("mean", "std"))
    note_at_work(
        f"images{f' for {name}' if name else ''}: {height} x {width}, crop {config['crop_pct']:g}, "
        f"{config['interpolation']}, mean {mean}, std {std}"
    )


def choose(data: str, class_map=None, classes: Sequence[str] | None = None, images_per_class=None, seed: int = 0):
    from vitprune.data import ImageChoice

    return ImageChoice(data, class_map, classes, images_per_class, seed)


def find_images(choice, model, *, labels_matter: bool = True):
    """Find the images of a choice, say how their classes are numbered, and tell the model what they are called."""
    from vitprune.data import remember_names

    images = choice.find(model, labels_matter=labels_matter)
    say_found(images, model.num_classes)
    remember_names(model, images.label_names)
    return images


def say_found(images, num_classes: int) -> None:
    """Say how the classes of images are numbered, and what is left out."""
    if images.numbering:
        note_at_work(f"images of {images.root}: {in_flags(images.numbering)}")
    if images.left_out:
        note_at_work(
            f"left out {len(images.left_out)} folders of {images.root} that are none of the model's {num_classes} "
            f"classes (first: {images.left_out[0]})"
        )
    if images.passed_over:
        count = len(images.passed_over)
        note_at_work(
            f"left out {count} file{'' if count == 1 else 's'} of {images.root} that cannot be decoded or belong to no "
            f"class (first: {images.passed_over[0]})"
        )


def calibration_images(
    source: str, run, model, data, class_map, classes, images_per_class, seed: int, *, labels_matter: bool = False
):
    """Find the calibration images: those of --data, else those of the run, else None."""
    if data is not None:
        choice = choose(data, class_map, classes, images_per_class, seed)
        return find_images(choice, model, labels_matter=labels_matter)
    if run is None:
        return None
    if not run.images.root.exists():
        raise VitpruneError(f"the images of {source} are no longer at {run.images.root}; pass --data DIR")
    return run.images


def make_batches(images, model, *, batch_size: int, workers: int, strict: bool, transform=None):
    from vitprune.data import ImageBatches

    if workers < 0:
        raise VitpruneError(f"workers must not be negative, got {workers}")
    return ImageBatches(images, model, batch_size=batch_size, num_workers=workers, strict=strict, transform=transform)


def report_skipped(batches) -> list[str]:
    if batches.skipped:
        name, reason = batches.skipped[0]
        note(f"skipped {len(batches.skipped)} images that cannot be decoded (first: {name}, {reason})")
    return [name for name, _reason in batches.skipped]


def warn_of_few_classes(network: Any, images: Any, what: str) -> None:
    """Say what the library warns of, which the command line keeps quiet."""
    from vitprune.images.coverage import describe_coverage

    told = describe_coverage(network, images, what)
    if told is not None:
        note(f"warning: {in_flags(told)}")


def reads_labels(criteria: Sequence[str]) -> bool:
    """Tell whether a criterion among these reads the labels of the calibration images."""
    from vitprune.calibration.criteria import REGISTRY

    return any(criterion in REGISTRY and REGISTRY[criterion].needs_labels for criterion in criteria)


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
