"""Of a run: the paths of its classes, and the neurons that they share."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from vitprune import options
from vitprune.analysis.stability import measure_stability
from vitprune.analysis.utilisation import measure_utilisation
from vitprune.data import describe_class
from vitprune.discovery.discover import Discovery, class_paths, count_correct
from vitprune.discovery.heads import node_names
from vitprune.discovery.run import Run
from vitprune.evaluation.accuracy import count_right
from vitprune.evaluation.evaluation_folder import Evaluation
from vitprune.figures.path_figure import MAX_CLASSES, draw_paths
from vitprune.figures.style import name_blocks
from vitprune.figures.utilisation_figure import draw_utilisation
from vitprune.figures.violins_figure import draw_violins
from vitprune.models.path_layers import count_layers
from vitprune.report.page_blocks import Cell, Column, Grid, Picture, Row, Section
from vitprune.report.pictures import embed_figure
from vitprune.report.pruned_folder import PrunedModel, same_weights
from vitprune.report.sections.evaluation_section import accuracy_by_name
from vitprune.report.shown_folder import Artefact, card_id, class_id, of_kind, part_name
from vitprune.report.text import plural, points
from vitprune.report.thumbnails import Thumbnail, make_thumbnail

# A thumbnail takes about 6 kB of the page.
MOST_EXAMPLES = 100
MOST_SHARED = 15
MOST_PANELS = 6


def run_section(artefact: Artefact, artefacts: Sequence[Artefact]) -> Section:
    """Tell the paths of classes, and which neurons they share."""
    run: Run = artefact.content
    found = run.found
    num_right = int((found.labels == found.predictions).sum())
    lead = [
        f"The neuron paths of {plural(len(found.labels), 'image')} of "
        f"{plural(len(found.classes), 'class', 'classes')}: {plural(found.neurons.shape[2], _noun(found))} in each of "
        f"{count_layers(found.layers)}, found by {found.method} ({_method(found.method)}) at {_tokens(found.tokens)}; "
        f"mean joint attribution score {found.joint_scores.mean():.2f}. "
        f"The model answers {num_right:,} of these images rightly."
    ]
    blocks: list[Grid | Picture] = [_path_grid(artefact, artefacts), *_draw(artefact, artefacts)]
    shared = _shared_grid(artefact, artefacts)
    if shared.rows:
        blocks.append(shared)
    title = f"{artefact.name}: influential neuron paths"
    name = part_name(artefact, artefacts, "Paths")
    return Section(artefact.key, name, "run", title, tuple(lead), tuple(blocks), card_id(artefact))


def _draw(artefact: Artefact, artefacts: Sequence[Artefact]) -> list[Picture]:
    run: Run = artefact.content
    found = run.found
    paths = class_paths(found)
    chosen, which = _choose_classes(run, artefacts, MAX_CLASSES)
    pictures = []
    if len(chosen) > 1:
        named = {_unique_name(run, index): paths[index].tolist() for index in chosen}
        stability = measure_stability(found, classes=chosen)
        sure = {_unique_name(run, index): stability.sure(index).tolist() for index in chosen}
        pictures.append(
            embed_figure(
                draw_paths(found.layers, named, name_node=node_names(found), sure=sure),
                id=f"{artefact.key}-paths",
                caption=f"Paths of {which} from block to block; lines meet in neurons that classes share.",
            )
        )
    chosen, which = _choose_classes(run, artefacts, MOST_PANELS)
    pictures.append(
        embed_figure(
            draw_violins(found, {index: describe_class(run.images.class_names[index]) for index in chosen}),
            id=f"{artefact.key}-violins",
            caption=f"Neurons on the paths of the images of {which}: rows of points are neurons that images share.",
        )
    )
    used = measure_utilisation(found)
    figure = draw_utilisation(
        [row.ffn for row in used],
        [row.num_neurons for row in used],
        num_used=[row.num_visited for row in used],
        effective=[row.effective_neurons for row in used],
    )
    caption = f"Neurons that lie on the path of any of {plural(len(found.labels), 'image')}, by block."
    return [*pictures, embed_figure(figure, id=f"{artefact.key}-utilisation", caption=caption)]


def _choose_classes(run: Run, artefacts: Sequence[Artefact], most: int) -> tuple[list[int], str]:
    """Choose the classes of a picture: all, or those whose accuracy changed most, or with the highest scores."""
    classes = list(run.found.classes)
    if len(classes) <= most:
        return classes, plural(len(classes), "class", "classes")
    changed = _changes(artefacts)
    known = [index for index in classes if run.images.class_names[index] in changed]
    if len(known) >= most:
        known.sort(key=lambda index: -abs(changed[run.images.class_names[index]][1]))
        return sorted(known[:most]), f"the {most} classes whose accuracy changed most"
    scores = {index: run.found.joint_scores[run.found.labels == index].mean().item() for index in classes}
    return sorted(sorted(classes, key=lambda index: -scores[index])[:most]), f"the {most} classes of the highest scores"


def _unique_name(run: Run, index: int) -> str:
    """Name a class in words, or by its folder where two have the same."""
    names = [describe_class(name) for name in run.images.class_names.values()]
    name = describe_class(run.images.class_names[index])
    return name if names.count(name) == 1 else run.images.class_names[index]


def _method(method: str) -> str:
    return options.METHODS.get(method, "another method").removesuffix(" (the paper)")


def _tokens(scope: str) -> str:
    return {"cls": "the class token", "patch": "the patch tokens", "all": "all tokens"}.get(scope, scope)


def _visitors(run: Run) -> dict[tuple[int, int], list[int]]:
    """Return which classes have a node (place of its layer, index) on their paths."""
    visitors: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, path_LK in class_paths(run.found).items():
        for layer, neurons in enumerate(path_LK.tolist()):
            for neuron in neurons:
                visitors[layer, neuron].append(index)
    return visitors


def _path_grid(artefact: Artefact, artefacts: Sequence[Artefact]) -> Grid:
    run: Run = artefact.content
    found, names = run.found, run.images.class_names
    visitors, removed_by = _visitors(run), _removers(run, artefacts)
    right, total = (each.tolist() for each in count_correct(found))
    examples = _examples(artefact, artefacts)
    changed = _changes(artefacts)
    rows = []
    for row, (index, path_LK) in enumerate(class_paths(found).items()):
        name, members = describe_class(names[index]), found.labels == index
        score = found.joint_scores[members].mean().item()
        link, change = changed.get(names[index], ("", None))
        cells = [Cell(name, name, thumbnail=examples.get(index))]
        for layer, neurons in enumerate(path_LK.tolist()):
            cells.append(_path_cell(found, layer, neurons, [visitors[layer, n] for n in neurons], removed_by))
        cells.append(Cell(f"{score:.2f}", score))
        if changed:
            cells.append(Cell("" if change is None else points(change), change, link))
        cells += [Cell(str(number), number) for number in (total[row], right[row])]
        rows.append(Row(tuple(cells), class_id(artefact, index)))
    columns = [Column("class", numeric=False), *(Column(name, sortable=False) for name in name_blocks(found.layers))]
    columns += [Column("mean score")] + [Column("change, points")] * bool(changed)
    columns += [Column("images"), Column("right")]
    rows.sort(key=lambda row: row.cells[0].order)
    note = "Under each block the neuron of its FFN that lies most often on the paths of the class"
    if found.heads:
        note = "Under each block the node that lies most often on the paths of the class: the neuron of its FFN, and "
        note += "where an a stands, the head of its attention and the dimension in it"
    note += f" (first of {found.neurons.shape[2]})." if found.neurons.shape[2] > 1 else "."
    note += " Tinted: on the paths of several classes, the stronger the more."
    if removed_by:
        note += f" Struck through: removed in {next(iter(removed_by))}."
    if examples:
        note += " Pictures: the image with the highest score."
        absent = len(rows) - len(examples)
        note += f" {plural(absent, 'class', 'classes')} without one: no room, or the image is gone." if absent else ""
    if changed:
        note += " Change: of top-1, in the first comparison above."
    title = "Path of each class"
    return Grid(f"{artefact.key}-classes", title, tuple(columns), tuple(rows), note, sorted_by=(0, False))


def _noun(found: Discovery) -> str:
    return "node" if found.heads else "neuron"


def _removes(pruned: PrunedModel, layer: str, node: int) -> bool:
    """Tell whether a pruned model has lost a neuron; dimensions of attention are other units there than here."""
    return layer in pruned.plan.keep and not pruned.plan.keep[layer][node]


def _path_cell(
    found: Discovery,
    place: int,
    neurons: Sequence[int],
    visitors: Sequence[Sequence[int]],
    removed_by: Mapping[str, PrunedModel],
) -> Cell:
    layer = found.layers[place]
    names = [node_names(found)(layer, neuron) for neuron in neurons]
    shared = len(visitors[0])
    look = "neuron" + (f" shared{min(3, shared - 1)}" if shared > 1 else "")
    hint = f"{layer}: {_noun(found)} {', '.join(names)}"
    hint += f"; on the paths of {shared} classes" if shared > 1 else ""
    removers = [name for name, pruned in removed_by.items() if _removes(pruned, layer, neurons[0])]
    if removers:
        # Of several pruned models, the first: what the page is about.
        look += " removed" if removers[0] == next(iter(removed_by)) else ""
        hint += f"; removed in {', '.join(removers)}"
    return Cell(names[0], look=look, hint=hint)


def _removers(run: Run, artefacts: Sequence[Artefact]) -> dict[str, PrunedModel]:
    pruned = {each.name: each.content for each in of_kind(artefacts, "pruned")}
    return {name: content for name, content in pruned.items() if same_weights(content, run)}


def _changes(artefacts: Sequence[Artefact]) -> dict[str, tuple[str, float]]:
    """Return class name -> its row in the first comparison, and the change of its accuracy."""
    for artefact in of_kind(artefacts, "evaluation"):
        evaluation: Evaluation = artefact.content
        if evaluation.against is None:
            continue
        before, names = accuracy_by_name(evaluation.against), evaluation.judged.class_names
        after = count_right(evaluation.judged.answers).top1_by_class
        return {names[index]: (class_id(artefact, index), now - before[names[index]]) for index, now in after.items()}
    return {}


def _examples(artefact: Artefact, artefacts: Sequence[Artefact]) -> dict[int, Thumbnail]:
    """Return class -> thumbnail of its image with the highest score, for as many classes as there is room for."""
    run: Run = artefact.content
    room = MOST_EXAMPLES // len(of_kind(artefacts, "run"))
    made = {}
    for index in run.found.classes[:room]:
        places = (run.found.labels == index).nonzero().flatten()
        best = int(places[run.found.joint_scores[places].argmax()])
        picture = make_thumbnail(run.images.root / run.images.files[best])
        if not isinstance(picture, str):
            made[index] = picture
    return made


def _shared_grid(artefact: Artefact, artefacts: Sequence[Artefact]) -> Grid:
    run: Run = artefact.content
    removed_by = _removers(run, artefacts)
    several = [(place, classes) for place, classes in _visitors(run).items() if len(classes) > 1]
    several.sort(key=lambda pair: (-len(pair[1]), pair[0]))
    rows = []
    for (layer, neuron), classes in several[:MOST_SHARED]:
        name = run.found.layers[layer]
        names = [describe_class(run.images.class_names[index]) for index in classes]
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        cells = [Cell(name, layer), Cell(node_names(run.found)(name, neuron), neuron)]
        cells += [Cell(str(len(classes)), len(classes)), Cell(shown, shown)]
        if removed_by:
            removers = [each for each, pruned in removed_by.items() if _removes(pruned, name, neuron)]
            cells.append(Cell(", ".join(removers) or "none", ", ".join(removers)))
        rows.append(Row(tuple(cells)))
    columns = [
        Column("layer" if run.found.heads else "FFN"),
        Column(_noun(run.found)),
        Column("classes"),
        Column("which", numeric=False),
    ]
    columns += [Column("removed in", numeric=False)] if removed_by else []
    total = len(several)
    title = "Neurons that classes share" + (f": {MOST_SHARED} of {total:,}" if total > MOST_SHARED else "")
    return Grid(f"{artefact.key}-shared", title, tuple(columns), tuple(rows), sorted_by=(2, True))
