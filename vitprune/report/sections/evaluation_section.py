"""Of an evaluation: accuracy by class, and the images whose answer flipped."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from vitprune.data import describe_class
from vitprune.evaluation.accuracy import Accuracy, count_right
from vitprune.evaluation.evaluation_folder import Evaluation, Judged, describe_evaluation, flipped
from vitprune.report.page_blocks import Cell, Column, Gallery, Grid, Row, Section, Shot
from vitprune.report.shown_folder import Artefact, card_id, class_id, of_kind, part_name
from vitprune.report.text import p_value, percent, plural, points
from vitprune.report.thumbnails import make_thumbnail

# A thumbnail takes about 6 kB of the page.
MOST_FLIPPED = 300
LOST, GAINED = "lost", "gained"
GROUPS = {LOST: "right before, wrong now", GAINED: "wrong before, right now"}


def evaluation_section(artefact: Artefact, artefacts: Sequence[Artefact]) -> Section:
    """Tell the accuracy of each class, and show the images whose answer flipped."""
    evaluation: Evaluation = artefact.content
    after = count_right(evaluation.judged.answers)
    facts = evaluation.judged.model
    title = f"{Path(facts.name).name}: accuracy"
    lead = [
        f"{percent(after.top1)} of {plural(after.num_images, 'image')} of "
        f"{plural(len(after.top1_by_class), 'class', 'classes')} are answered rightly (95 % interval "
        f"{_interval(after)}), {percent(after.top5)} among the first five; the model chooses among "
        f"{plural(facts.num_classes, 'class', 'classes')}."
    ]
    if evaluation.skipped:
        lead.append(f"{plural(len(evaluation.skipped), 'image')} could not be decoded and are left out.")
    blocks: tuple[Grid | Gallery, ...] = (_accuracy_grid(artefact, after, artefacts),)
    if evaluation.against is not None:
        title = f"{Path(facts.name).name} against {Path(evaluation.against.model.name).name}"
        lead = [*_compare(evaluation, after), *lead]
        shown = _choose_flips(evaluation, artefacts)
        blocks = (_change_grid(artefact, after, shown, artefacts), _gallery(artefact, shown))
    name = part_name(artefact, artefacts, "Accuracy")
    return Section(artefact.key, name, "evaluation", title, tuple(lead), blocks, card_id(artefact))


def _compare(evaluation: Evaluation, after: Accuracy) -> list[str]:
    measured = describe_evaluation(evaluation)["against"]
    lost, gained = len(measured["lost_images"]), len(measured["gained_images"])
    bound = points(-measured["drop_bound"])
    sentences = [
        f"Top-1 goes from {percent(measured['top1'])} to {percent(after.top1)}: {points(-measured['drop'])} points, "
        f"at worst {bound} at 95 % confidence (McNemar {p_value(measured['p_value'])}). "
        f"{plural(lost, 'image')} that were right are now wrong, {plural(gained, 'image')} the other way round."
    ]
    if measured["num_classes"] != evaluation.judged.model.num_classes:
        sentences.append(
            f"The two choose among different numbers of classes ({measured['num_classes']:,} before, "
            f"{evaluation.judged.model.num_classes:,} now): fewer make the task easier."
        )
    return sentences


def _interval(accuracy: Accuracy) -> str:
    low, high = accuracy.top1_interval
    return f"{percent(low)} to {percent(high)}"


def _class_cell(name: str, artefacts: Sequence[Artefact]) -> Cell:
    """Name a class, and lead to its path in the first run that has it."""
    shown = describe_class(name)
    for artefact in of_kind(artefacts, "run"):
        for index, known in artefact.content.images.class_names.items():
            if known == name:
                return Cell(shown, shown, class_id(artefact, index))
    return Cell(shown, shown)


def _accuracy_grid(artefact: Artefact, accuracy: Accuracy, artefacts: Sequence[Artefact]) -> Grid:
    names = artefact.content.judged.class_names
    ranked = sorted(accuracy.top1_by_class.items(), key=lambda pair: (pair[1], describe_class(names[pair[0]])))
    rows = tuple(
        Row(
            (
                _class_cell(names[index], artefacts),
                Cell(str(accuracy.images_by_class[index]), accuracy.images_by_class[index]),
                Cell(percent(top1), top1),
            ),
            class_id(artefact, index),
        )
        for index, top1 in ranked
    )
    columns = (Column("class", numeric=False), Column("images"), Column("top-1"))
    return Grid(f"{artefact.key}-classes", "Accuracy by class", columns, rows, sorted_by=(2, False))


def _change_grid(
    artefact: Artefact, after: Accuracy, shown: dict[str, list[int]], artefacts: Sequence[Artefact]
) -> Grid:
    evaluation: Evaluation = artefact.content
    names, labels = evaluation.judged.class_names, evaluation.judged.answers.labels.tolist()
    flips = dict(zip((LOST, GAINED), flipped(evaluation), strict=True))
    counts = {group: Counter(labels[place] for place in places) for group, places in flips.items()}
    linked = {(group, labels[place]) for group, places in shown.items() for place in places}
    before = accuracy_by_name(evaluation.against)
    changes = {index: now - before[names[index]] for index, now in after.top1_by_class.items()}
    largest = max(map(abs, changes.values())) or 1
    rows = []
    for index in sorted(changes, key=lambda index: (changes[index], describe_class(names[index]))):
        now, change = after.top1_by_class[index], changes[index]
        cells = [
            _class_cell(names[index], artefacts),
            Cell(points(change), change, bar=change / largest),
            Cell(percent(before[names[index]], 0), before[names[index]]),
            Cell(percent(now, 0), now),
        ]
        for group in (LOST, GAINED):
            link = _shot_id(artefact, group, index) if (group, index) in linked else ""
            cells.append(Cell(str(counts[group][index]), counts[group][index], link))
        cells.append(Cell(str(after.images_by_class[index]), after.images_by_class[index]))
        rows.append(Row(tuple(cells), class_id(artefact, index)))
    titles = ("change, points", "before", "now", "lost", "gained", "images")
    columns = (Column("class", numeric=False), *map(Column, titles))
    note = "Share of right first answers. The numbers of images lost and gained lead to these images"
    note += ", class names to the class's path." if any(row.cells[0].link for row in rows) else "."
    return Grid(f"{artefact.key}-classes", "Change by class", columns, tuple(rows), note, sorted_by=(1, False))


def accuracy_by_name(judged: Judged) -> dict[str, float]:
    """Return class name -> share of right answers, in [0, 1]."""
    return {judged.class_names[index]: top1 for index, top1 in count_right(judged.answers).top1_by_class.items()}


def _shot_id(artefact: Artefact, group: str, label: int) -> str:
    return f"{artefact.key}-{group}-{label}"


def _choose_flips(evaluation: Evaluation, artefacts: Sequence[Artefact]) -> dict[str, list[int]]:
    """Choose the flipped images that the page has room for, and their order.

    First the one of each class whose probability changed most, then the second of each, and so on.
    """
    compared = [each for each in of_kind(artefacts, "evaluation") if each.content.against is not None]
    room = MOST_FLIPPED // len(compared)
    flips = dict(zip((LOST, GAINED), flipped(evaluation), strict=True))
    total = sum(map(len, flips.values()))
    labels = evaluation.judged.answers.labels.tolist()
    change = (evaluation.against.answers.probabilities - evaluation.judged.answers.probabilities).abs().tolist()
    shown = {}
    for group, places in flips.items():
        of_class = defaultdict(list)
        for place in sorted(places, key=lambda place: -change[place]):
            of_class[labels[place]].append(place)
        ranked = sorted((rank, label) for label, own in of_class.items() for rank in range(len(own)))
        wanted = len(places) if total <= room else round(room * len(places) / total)
        shown[group] = [of_class[label][rank] for rank, label in ranked[:wanted]]
    return shown


def _gallery(artefact: Artefact, shown: dict[str, list[int]]) -> Gallery:
    evaluation: Evaluation = artefact.content
    names, labels = evaluation.judged.class_names, evaluation.judged.answers.labels.tolist()
    # Whose answer is the wrong one.
    failing = {LOST: ("now", evaluation.judged), GAINED: ("before", evaluation.against)}
    seen: set[str] = set()
    shots = []
    for group, places in shown.items():
        when, judged = failing[group]
        for place in places:
            anchor = _shot_id(artefact, group, labels[place])
            before, now = (each.answers.probabilities[place].item() for each in (evaluation.against, evaluation.judged))
            shots.append(
                Shot(
                    id="" if anchor in seen else anchor,
                    group=group,
                    title=describe_class(names[labels[place]]),
                    link=class_id(artefact, labels[place]),
                    change=f"{percent(before, 0)} → {percent(now, 0)}",
                    wrong=(when, describe_class(judged.class_names[int(judged.answers.predictions[place])])),
                    picture=make_thumbnail(evaluation.root / evaluation.files[place]),
                    file=evaluation.files[place],
                )
            )
            seen.add(anchor)
    total = sum(map(len, flipped(evaluation)))
    absent = Counter(shot.picture for shot in shots if isinstance(shot.picture, str))
    notes = ["Percentages: probability of the image's own class, before and now."]
    if len(shots) < total:
        notes.append(
            f"{len(shots)} of {total:,} are shown, those of each class that changed most; images.jsonl in "
            f"{artefact.name} has every answer."
        )
    notes += [
        f"{plural(number, 'image is', 'images are')} {reason} ({evaluation.root})."
        for reason, number in sorted(absent.items())
    ]
    title = f"{plural(total, 'image')} whose answer flipped" if total else "No image's answer flipped"
    return Gallery(f"{artefact.key}-flipped", title, GROUPS, tuple(shots), " ".join(notes) if total else "")
