"""The first screen of a report: what model, what was removed, what it cost and what it brought."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vitprune.evaluation.accuracy import Accuracy, compare, count_right
from vitprune.evaluation.evaluation_folder import Evaluation, flipped
from vitprune.evaluation.model_facts import ModelFacts
from vitprune.figures.fronts_figure import FrontPoint, draw_front
from vitprune.figures.widths_figure import draw_widths
from vitprune.options import BACKENDS
from vitprune.report.page_blocks import Cell, Column, Grid, Picture, Row, Section, without_empty
from vitprune.report.pictures import embed_figure
from vitprune.report.pruned_folder import PrunedModel, count_removed, widths_of
from vitprune.report.shown_folder import Artefact, of_kind
from vitprune.report.text import count, p_value, percent, plural, points, scaled, times
from vitprune.speed.bench import BenchRow


@dataclass(frozen=True)
class Whisker:
    """A share with its interval, as a picture: all in [0, 1]."""

    name: str
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Tile:
    """One number of the first screen.

    Attributes:
        label: what it is.
        value: as shown.
        detail: what it is to be compared with.
        link: id of the part that it is from.
        whiskers: drawn below; may be empty.
    """

    label: str
    value: str
    detail: str
    link: str
    whiskers: tuple[Whisker, ...] = ()


@dataclass(frozen=True)
class Story:
    """The first screen.

    Attributes:
        title: the model, and what was done to it.
        sentences: of the summary.
        tiles: numbers.
        models: all models side by side, where there are more than two; else None.
    """

    title: str
    sentences: tuple[str, ...]
    tiles: tuple[Tile, ...]
    models: Section | None


@dataclass(frozen=True)
class _Main:
    """What the first screen is about: the first pruned model given and what was measured of it."""

    pruned: Artefact | None
    evaluation: Artefact | None
    bench: tuple[Artefact, BenchRow] | None


def tell_story(artefacts: Sequence[Artefact]) -> Story:
    """Sum up folders of any kinds."""
    main = _choose(artefacts)
    sentences, tiles = [], []
    if main.pruned is not None:
        sentences.append(_say_removed(main.pruned.content))
    if main.evaluation is not None:
        sentences.append(_say_accuracy(main.evaluation.content))
        tiles.append(_accuracy_tile(main.evaluation))
    if main.pruned is not None:
        tiles += _size_tiles(main.pruned)
    if main.bench is not None:
        tiles.append(_speed_tile(*main.bench))
        sentences.append(_say_speed(main.bench[1]))
    for artefact in of_kind(artefacts, "curve")[: 1 if main.evaluation is None else 0]:
        dense = artefact.content.points[0]
        whisker = Whisker("dense", dense.top1, dense.top1_low, dense.top1_high)
        detail = f"{plural(len(artefact.content.points) - 1, 'pruned model')} on {plural(dense.num_images, 'image')}"
        tiles.append(Tile("Top-1, dense", percent(dense.top1), detail, artefact.key, (whisker,)))
    for artefact in of_kind(artefacts, "run")[:1]:
        found = artefact.content.found
        detail = (
            f"images of {plural(len(found.classes), 'class', 'classes')}; mean score {found.joint_scores.mean():.3g}"
        )
        tiles.append(Tile("Neuron paths", f"{len(found.labels):,}", detail, artefact.key))
        if not sentences:
            sentences.append(
                f"The influential neuron paths of {plural(len(found.labels), 'image')} of "
                f"{plural(len(found.classes), 'class', 'classes')}."
            )
    return Story(_title(main, artefacts), tuple(sentences), tuple(tiles), _models_section(artefacts))


def _choose(artefacts: Sequence[Artefact]) -> _Main:
    pruned = next(iter(of_kind(artefacts, "pruned")), None)
    evaluations = of_kind(artefacts, "evaluation")
    if pruned is not None and evaluations:
        own = [each for each in evaluations if _judged(each) == pruned.content.model.weights_sha256]
        # An evaluation of something else is no measure of this model.
        evaluations = own
    compared = [each for each in evaluations if each.content.against is not None]
    evaluation = next(iter(compared or evaluations), None)
    name = pruned.name if pruned is not None else _model_name(evaluation) if evaluation is not None else None
    return _Main(pruned, evaluation, _find_speed(artefacts, name))


def _judged(artefact: Artefact) -> str:
    return artefact.content.judged.model.weights_sha256


def _model_name(artefact: Artefact) -> str:
    return Path(artefact.content.judged.model.name).name


def _find_speed(artefacts: Sequence[Artefact], name: str | None) -> tuple[Artefact, BenchRow] | None:
    """Return the timing to show of a model: ONNX Runtime's before torch's, small batches before large ones."""
    for artefact in of_kind(artefacts, "bench"):
        first = artefact.content.rows[0].model
        own = [row for row in artefact.content.rows if row.model != first and _is_called(row.model, name)]
        if own:
            return artefact, min(own, key=lambda row: (not row.backend.startswith("onnxruntime"), row.batch_size))
    return None


def _is_called(model: str, name: str | None) -> bool:
    """Tell whether a bench's model is a folder of this name, or the ONNX file called like it."""
    return name is not None and Path(name).name in (Path(model).name, Path(model).stem)


def _title(main: _Main, artefacts: Sequence[Artefact]) -> str:
    if main.pruned is not None:
        removed, dense = count_removed(main.pruned.content)
        share = percent(removed / dense, 0)
        return f"{main.pruned.content.model.architecture}: {share} of its FFN neurons removed"
    if main.evaluation is not None:
        return f"{_model_name(main.evaluation)}, evaluated"
    for artefact in of_kind(artefacts, "run"):
        return f"Neuron paths of {Path(artefact.content.model).name}"
    for artefact in of_kind(artefacts, "curve"):
        return f"{artefact.content.request['architecture']} at many sizes"
    for artefact in of_kind(artefacts, "front"):
        return f"{artefact.content.request['architecture']} at many speeds"
    return ", ".join(artefact.name for artefact in artefacts)


def _say_removed(pruned: PrunedModel) -> str:
    removed, dense = count_removed(pruned)
    facts = pruned.plan.facts
    how = "" if facts.criterion is None else f" by {facts.criterion}"
    how = how if facts.keep_paths is None else ", those on no class's path"
    made_good = facts.compensation or "none"
    how += f", with {made_good} compensation" if made_good != "none" else ", without compensation"
    return f"{removed:,} of {dense:,} FFN neurons were removed{how}."


def _say_accuracy(evaluation: Evaluation) -> str:
    after = count_right(evaluation.judged.answers)
    asked = f"{plural(after.num_images, 'image')} of {plural(len(after.top1_by_class), 'class', 'classes')}"
    if evaluation.against is None:
        return f"Of {asked} it answers {percent(after.top1)} rightly."
    before = count_right(evaluation.against.answers)
    lost, gained = map(len, flipped(evaluation))
    test = f"McNemar {p_value(compare(before, after).p_value)}"
    flips = f"{plural(lost, 'image')} lost, {gained:,} gained ({test})" if lost or gained else "no answer flipped"
    return (
        f"Of {asked} it answers {percent(after.top1)} rightly where {_reference_name(evaluation)} answers "
        f"{percent(before.top1)}: {flips}."
    )


def _reference_name(evaluation: Evaluation) -> str:
    return (
        f"the {_against_name(evaluation)} model" if _against_name(evaluation) == "dense" else _against_name(evaluation)
    )


def _against_name(evaluation: Evaluation) -> str:
    against, judged = evaluation.against.model, evaluation.judged.model
    same = against.architecture == judged.architecture and against.macs > judged.macs
    return "dense" if same else Path(against.name).name


def _say_speed(row: BenchRow) -> str:
    where = f"{BACKENDS.get(row.backend, row.backend)}, batch {row.batch_size}"
    if row.speedup_low <= 1 <= row.speedup_high:
        return f"No difference in speed was measured ({where})."
    return f"It runs {times(row.speedup)} as fast ({where})."


def _accuracy_tile(artefact: Artefact) -> Tile:
    evaluation: Evaluation = artefact.content
    after = count_right(evaluation.judged.answers)
    if evaluation.against is None:
        detail = f"{plural(after.num_images, 'image')}; bar: 95 % interval"
        return Tile("Top-1", percent(after.top1), detail, artefact.key, (_whisker("", after),))
    before = count_right(evaluation.against.answers)
    name = _against_name(evaluation)
    detail = f"{name} {percent(before.top1)}, {points(after.top1 - before.top1)} points"
    return Tile("Top-1", percent(after.top1), detail, artefact.key, (_whisker(name, before), _whisker("now", after)))


def _whisker(name: str, accuracy: Accuracy) -> Whisker:
    return Whisker(name, accuracy.top1, *accuracy.top1_interval)


def _size_tiles(artefact: Artefact) -> list[Tile]:
    content: PrunedModel = artefact.content
    model, dense = content.model, content.dense
    fewer = percent(1 - model.num_parameters / dense.num_parameters, 0)
    ceiling = times(dense.macs / model.macs)
    return [
        Tile(
            "Parameters",
            count(model.num_parameters),
            f"of {count(dense.num_parameters)}, {fewer} fewer; {scaled(model.size_bytes, 'B')} of "
            f"{scaled(dense.size_bytes, 'B')}",
            artefact.key,
        ),
        Tile(
            "MACs per image",
            count(model.macs),
            f"multiply-accumulates, of {count(dense.macs)}: at most {ceiling} as fast",
            artefact.key,
        ),
    ]


def _speed_tile(artefact: Artefact, row: BenchRow) -> Tile:
    ceiling = "" if row.speedup_ceiling is None else f", ceiling {row.speedup_ceiling:.2f}"
    detail = f"{row.speedup_low:.2f} to {row.speedup_high:.2f}{ceiling}; {row.backend}, batch {row.batch_size}"
    return Tile("Speed-up", times(row.speedup), detail, artefact.key)


@dataclass(frozen=True)
class _Entry:
    """A model of the report: where it is shown, and what is known of it."""

    name: str
    model: ModelFacts
    link: str
    accuracy: Accuracy | None
    images_sha256: str | None
    removed: float | None
    speed: BenchRow | None


def _list_models(artefacts: Sequence[Artefact]) -> list[_Entry]:
    """Return every model that was evaluated or pruned, once each, the largest first."""
    pruned = {each.content.model.weights_sha256: each for each in of_kind(artefacts, "pruned")}
    dense = {each.content.dense.weights_sha256 for each in pruned.values()}
    found: dict[str, tuple[ModelFacts, Artefact, Accuracy | None, str | None]] = {}
    for artefact in of_kind(artefacts, "evaluation"):
        for judged in (artefact.content.against, artefact.content.judged):
            if judged is not None:
                measured = (count_right(judged.answers), artefact.content.images_sha256)
                found.setdefault(judged.model.weights_sha256, (judged.model, artefact, *measured))
    for weights, artefact in pruned.items():
        found.setdefault(weights, (artefact.content.model, artefact, None, None))
    entries = []
    for weights, (model, artefact, accuracy, images) in found.items():
        own = pruned.get(weights)
        removed = 0.0 if weights in dense else None
        if own is not None:
            gone, whole = count_removed(own.content)
            removed = gone / whole
        name = own.name if own is not None else Path(model.name).name
        speed = _find_speed(artefacts, name)
        link = (own or artefact).key
        entries.append(_Entry(name, model, link, accuracy, images, removed, None if speed is None else speed[1]))
    return sorted(entries, key=lambda entry: -entry.model.macs)


def _models_section(artefacts: Sequence[Artefact]) -> Section | None:
    """Put all models side by side, where there are more than two."""
    entries = _list_models(artefacts)
    if len(entries) < 3:
        return None
    rows = []
    for entry in entries:
        model, accuracy, speed = entry.model, entry.accuracy, entry.speed
        rows.append(
            Row(
                (
                    Cell(entry.name, entry.name, entry.link),
                    Cell("" if accuracy is None else percent(accuracy.top1), accuracy and accuracy.top1),
                    Cell(_between(accuracy), accuracy and accuracy.top1_interval[0]),
                    Cell("" if entry.removed is None else percent(entry.removed, 0), entry.removed),
                    Cell("" if model.num_parameters is None else count(model.num_parameters), model.num_parameters),
                    Cell(scaled(model.size_bytes, "B"), model.size_bytes),
                    Cell(count(model.macs), model.macs),
                    Cell("" if speed is None else times(speed.speedup), speed and speed.speedup),
                )
            )
        )
    titles = ("top-1", "95 % interval", "neurons removed", "parameters", "size", "MACs", "speed-up")
    columns = (Column("model", numeric=False), *map(Column, titles))
    measured = [entry for entry in entries if entry.accuracy is not None]
    same_images = len({entry.images_sha256 for entry in measured}) == 1
    note = "" if same_images else "Accuracies are of different images: compare them with care."
    grid = Grid("models-table", "Side by side", columns, tuple(rows), note, sorted_by=(6, True))
    blocks: list[Grid | Picture] = [without_empty(grid)]
    if same_images and len(measured) > 2:
        points_of = [
            FrontPoint(entry.name, entry.accuracy.top1, *entry.accuracy.top1_interval, entry.model.macs)
            for entry in measured
        ]
        caption = "Top-1 with 95 % intervals against multiply-accumulates; the line: the best to be had."
        blocks.append(embed_figure(draw_front(points_of, quantity="macs"), id="models-front", caption=caption))
    pruned = of_kind(artefacts, "pruned")
    if len(pruned) > 1 and len({tuple(each.content.dense_widths.items()) for each in pruned}) == 1:
        figure = draw_widths({each.name: widths_of(each.content) for each in pruned})
        caption = "Neurons kept in the FFN of each block."
        blocks.append(embed_figure(figure, id="models-widths", caption=caption))
    return Section("models", "Models", "overview", "All models of this report", (), tuple(blocks))


def _between(accuracy: Accuracy | None) -> str:
    if accuracy is None:
        return ""
    low, high = accuracy.top1_interval
    return f"{100 * low:.1f} to {100 * high:.1f}"
