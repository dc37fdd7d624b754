"""Models for a front, made once and judged once: what is finished lies in a folder, and is read back from there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from vitprune.data import ImageBatches
from vitprune.errors import VitpruneError
from vitprune.evaluation.accuracy import Accuracy, accuracy_as_json, accuracy_from_json, evaluate
from vitprune.evaluation.alternatives import Alternative
from vitprune.files import FORMAT_VERSION, read_json, write_json
from vitprune.models.load import load
from vitprune.models.macs import count_macs
from vitprune.models.saved_folder import save
from vitprune.options import BUDGET, DENSE, LEVERS
from vitprune.progress import Track, untracked
from vitprune.pruning.choose_tokens import Weighed, weigh
from vitprune.speed.fit_latency import Fitted, Format, Writer, fit_latency
from vitprune.speed.prune_for_speed import prune_for_speed
from vitprune.speed.speed_candidates import OutOfReachError, open_as
from vitprune.speed.speed_folder import load_speed, save_for_speed


@dataclass(frozen=True)
class JudgedModel:
    """A model in one format, and how often it is right.

    Attributes:
        lever: key of ``LEVERS``.
        name: which one of it.
        wanted: the format.
        source: what runs it there: the model in torch, or a file.
        macs: multiply-accumulates of one image.
        accuracy: as it is run.
        predicted_speedup: by the fitted model; None where nothing was predicted.
    """

    lever: str
    name: str
    wanted: Format
    source: nn.Module | Path
    macs: int
    accuracy: Accuracy
    predicted_speedup: float | None = None


@dataclass(frozen=True)
class Workshop:
    """Where models are made and judged.

    Attributes:
        model: the dense one.
        calibration: images to weigh and to fit on.
        evaluation: other images.
        models: folder of what is pruned for a speed.
        points: folder of everything else that is finished.
        writer: writes files to run, which are needed until all are timed.
        formats: what models are run as.
        parts: keys of ``PARTS``: what may go.
        options: ``batch_sizes``, ``num_threads``, ``ridge`` and ``seed``, as ``prune_for_speed`` takes them.
        track: wraps (items, description) of long loops, for progress.
    """

    model: nn.Module
    calibration: ImageBatches
    evaluation: ImageBatches
    models: Path
    points: Path
    writer: Writer
    formats: tuple[Format, ...]
    parts: tuple[str, ...]
    options: Mapping[str, Any]
    track: Track = untracked

    def said(self, prefix: str) -> Workshop:
        """Return the same, whose progress says first what it is for."""
        return replace(self, track=lambda items, what, **more: self.track(items, f"{prefix}, {what}", **more))


def judge_dense(shop: Workshop) -> list[JudgedModel]:
    """Judge the dense model in all formats, in float32 on the first backend before all."""
    formats = dict.fromkeys([Format(shop.formats[0].backend), *shop.formats])
    return [_judge(shop, DENSE, DENSE, each, shop.model) for each in formats]


def prune_for_speeds(shop: Workshop, speedups: Sequence[float]) -> tuple[list[JudgedModel], dict[str, str]]:
    """Make a model for every speed in every format; what is common to them is measured once.

    Returns:
        The models, and "speed, format" -> why there is none.
    """
    wanted = [(speedup, each) for speedup in speedups for each in shop.formats]
    made, unreached = [], {}
    known: dict[str, Any] = {}
    for number, (speedup, each) in enumerate(wanted, start=1):
        name = f"{speedup:g} x"
        of_one = shop.said(f"{name} {each} ({number} of {len(wanted)})")
        folder = shop.models / f"{speedup:g}x-{each.backend}-{each.precision}"
        reason = shop.points / f"{folder.name}-unreached.json"
        if not folder.exists() and not reason.exists():
            if not known:
                known = {"fitted": _fit(shop), "weighed": _weigh(shop)}
            try:
                result = prune_for_speed(
                    shop.model,
                    shop.calibration,
                    speedup,
                    formats=[each],
                    parts=shop.parts,
                    track=of_one.track,
                    **known,
                    **shop.options,
                )
            except OutOfReachError as error:
                write_json(reason, {"kind": "unreached speed", "version": FORMAT_VERSION, "reason": str(error)})
            else:
                folder.parent.mkdir(exist_ok=True)
                save_for_speed(result, folder)
        if reason.exists():
            unreached[f"{name}, {each}"] = read_json(reason, kind="unreached speed")["reason"]
            continue
        point = _judge(of_one, BUDGET, name, each, load(str(folder)))
        made.append(replace(point, predicted_speedup=load_speed(folder).facts["predicted_speedup"]))
    return made, unreached


def judge_alternatives(shop: Workshop, alternatives: Iterable[Alternative]) -> tuple[list[JudgedModel], dict[str, str]]:
    """Make alternatives and judge them in all formats.

    Returns:
        The models, and "lever, name" -> why there is none.
    """
    made, left_out = [], {}
    for each in alternatives:
        folder = shop.points / _as_file_name(f"{each.lever} {each.name}")
        if not folder.exists():
            try:
                network, plan = each.make()
            except VitpruneError as error:
                left_out[f"{LEVERS[each.lever]}, {each.name}"] = str(error)
                continue
            save(network, folder, plan=plan)
        network = load(str(folder))
        made += [_judge(shop, each.lever, each.name, wanted, network) for wanted in shop.formats]
    return made, left_out


def _fit(shop: Workshop) -> Fitted:
    path = shop.points / "latency.json"
    if path.is_file():
        return Fitted.from_json(read_json(path, kind="fitted latency"))
    timing = {name: shop.options[name] for name in ("batch_sizes", "num_threads", "seed")}
    fitted = fit_latency(shop.model, shop.formats, track=shop.track, **timing)
    write_json(path, {"kind": "fitted latency", "version": FORMAT_VERSION, **fitted.as_json()})
    return fitted


def _weigh(shop: Workshop) -> Weighed:
    options = {name: shop.options[name] for name in ("ridge", "seed")}
    return weigh(shop.model, shop.calibration, shop.parts, track=shop.track, **options)


def _judge(shop: Workshop, lever: str, name: str, wanted: Format, network: nn.Module) -> JudgedModel:
    stem = _as_file_name(f"{lever} {name}" if lever != BUDGET else f"{lever} {name} {wanted}")
    path = shop.points / f"{_as_file_name(f'{lever} {name} {wanted}')}.json"
    if not path.is_file():
        batches = shop.evaluation.of_model(network)
        opened = open_as(network, wanted, shop.writer, stem)
        accuracy = evaluate(opened, _Told(batches, f"{LEVERS[lever]}, {name}: evaluate", shop.track))
        write_json(path, {"kind": "front point", "version": FORMAT_VERSION, "accuracy": accuracy_as_json(accuracy)})
    accuracy = accuracy_from_json(read_json(path, kind="front point")["accuracy"])
    return JudgedModel(lever, name, wanted, shop.writer.source(network, wanted, stem), count_macs(network), accuracy)


def _as_file_name(text: str) -> str:
    return text.replace("%", "percent").replace(" ", "-")


class _Told:
    """Batches whose reading shows progress."""

    def __init__(self, batches: ImageBatches, description: str, track: Track) -> None:
        self.batches, self.description, self.track = batches, description, track

    @property
    def images(self):
        return self.batches.images

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self):
        yield from self.track(self.batches, self.description)
