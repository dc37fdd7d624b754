"""Of a pruned model: which neurons stayed, and by what decision."""

from __future__ import annotations

from collections.abc import Sequence

from vitprune import options
from vitprune.data import describe_class
from vitprune.discovery.discover import class_paths, only_ffns
from vitprune.figures.candidates_figure import draw_candidates
from vitprune.figures.recovery_figure import draw_recovery
from vitprune.figures.widths_figure import draw_widths
from vitprune.models.units import FFN
from vitprune.report.page_blocks import Cell, Column, Grid, Row, Section
from vitprune.report.pictures import embed_figure
from vitprune.report.pruned_folder import (
    PrunedModel,
    count_removed,
    list_other_parts,
    same_weights,
    widths_of,
)
from vitprune.report.shown_folder import Artefact, card_id, of_kind, part_name
from vitprune.report.text import percent, plural
from vitprune.speed.speed_folder import SpeedRecord
from vitprune.training.recovery_folder import Recovery


def pruned_section(artefact: Artefact, artefacts: Sequence[Artefact]) -> Section:
    """Tell which neurons stayed, and by what decision."""
    content: PrunedModel = artefact.content
    facts = content.plan.facts
    removed, dense = count_removed(content)
    lead = [
        f"{removed:,} of {dense:,} FFN neurons ({percent(removed / dense)}) are removed"
        + (", by masking: the shapes are those of the dense model." if facts.mode == "mask" else "."),
        *_describe_shape(content),
        describe_decision(content),
    ]
    if content.label_names:
        kept = ", ".join(map(describe_class, content.label_names[:8]))
        more = f" and {len(content.label_names) - 8} more" if len(content.label_names) > 8 else ""
        lead.append(f"It answers {len(content.label_names)} classes: {kept}{more}.")
    runs = [run for run in of_kind(artefacts, "run") if same_weights(content, run.content)]
    lead += [_kept_on_paths(content, run) for run in runs if FFN in run.content.found.nodes]
    rows = tuple(
        Row(
            (
                Cell(name, place),
                Cell(f"{content.dense_widths[name]:,}", content.dense_widths[name]),
                Cell(f"{width:,}", width),
                Cell(percent(width / content.dense_widths[name], 0), width / content.dense_widths[name]),
            )
        )
        for place, (name, (width, _dense)) in enumerate(widths_of(content).items())
    )
    columns = (Column("FFN"), Column("dense"), Column("kept"), Column("kept share"))
    grid = Grid(f"{artefact.key}-widths", "Neurons by FFN", columns, rows, sorted_by=(0, False))
    picture = embed_figure(
        draw_widths({artefact.name: widths_of(content)}),
        id=f"{artefact.key}-picture",
        caption="Neurons kept in the FFN of each block; dashed: the dense model.",
    )
    blocks = [picture, grid]
    others = list_other_parts(content)
    if others:
        rows = tuple(
            Row((Cell(name, place), Cell(f"{dense:,}", dense), Cell(f"{width:,}", width)))
            for place, (name, width, dense) in enumerate(others)
        )
        columns = (Column("part"), Column("dense"), Column("kept"))
        blocks.append(Grid(f"{artefact.key}-parts", "Attention and layers", columns, rows, sorted_by=(0, False)))
    if content.speed is not None:
        lead.append(_describe_speed(content.speed))
        drawn = draw_candidates(content.speed.candidates, asked=content.speed.facts["asked_speedup"])
        caption = "Ways to that speed, each refitted at once, by what they lose; coloured: the one that was taken."
        blocks.append(embed_figure(drawn, id=f"{artefact.key}-candidates", caption=caption))
    if content.recovery is not None and content.recovery.rows:
        lead.append(_describe_recovery(content.recovery))
        drawn = draw_recovery(content.recovery.rows, before=content.recovery.before)
        caption = "Training afterwards: the losses, and what images say that were held back."
        blocks.append(embed_figure(drawn, id=f"{artefact.key}-recovery", caption=caption))
    title = f"{artefact.name}: what was removed"
    name = part_name(artefact, artefacts, "Neurons removed")
    return Section(artefact.key, name, "pruned model", title, tuple(lead), tuple(blocks), card_id(artefact))


def _describe_speed(speed: SpeedRecord) -> str:
    """Say how fast a model was to be, and how fast it is."""
    facts = speed.facts
    measured = ", ".join(f"{ratio:.2f} at batch {size}" for size, ratio in facts["speedups"].items())
    return (
        f"It was to be {facts['asked_speedup']:.2f} times as fast in {facts['backend']}; measured, in "
        f"{facts['precision']}: {measured} times (predicted {facts['predicted_speedup']:.2f})."
    )


def _describe_recovery(recovery: Recovery) -> str:
    """Say how a model was trained after pruning."""
    told = f"Then it was trained on {recovery.num_images:,} images, {plural(len(recovery.rows), 'epoch')}"
    best = next((row for row in recovery.rows if row.epoch == recovery.best), None)
    if best is None or best.held_back is None or recovery.before[0] is None:
        return f"{told}."
    flattered = " Pruning was fitted to these images too: before, it looks better on them than it is."
    return (
        f"{told}: the loss of images held back went from {recovery.before[0]:.4f} to {best.held_back:.4f} in epoch "
        f"{recovery.best}, which was kept.{flattered if recovery.is_flattered else ''}"
    )


def _describe_shape(pruned: PrunedModel) -> list[str]:
    """Say what went beside neurons: attention and layers, tokens, pixels."""
    facts, said = pruned.plan.facts, []
    narrower = [name for name, width, dense in list_other_parts(pruned) if width < dense]
    if narrower:
        said.append(f"{plural(len(narrower), 'group')} of attention or layers became smaller as well.")
    if facts.merge:
        merges = ", ".join(f"{r} in block {block}" for block, r in enumerate(facts.merge) if r)
        said.append(f"Tokens merge: {merges}.")
    if facts.image_size:
        said.append(f"It is fed images of {facts.image_size[0]} x {facts.image_size[1]} pixels.")
    return said


def describe_decision(pruned: PrunedModel) -> str:
    """Say in a sentence how neurons were chosen and what made up for the others."""
    facts = pruned.plan.facts
    known = (
        ("criterion", options.CRITERIA, facts.criterion),
        ("allocation", options.ALLOCATIONS, facts.allocation),
    )
    said = [f"{what} {name} ({choices[name]})" for what, choices, name in known if name in choices]
    if facts.keep_paths is not None:
        said.append(f"the paths of the classes, {plural(facts.keep_paths, 'neuron')} of each in each FFN")
    if facts.compensation is not None:
        said.append("no compensation" if facts.compensation == "none" else f"compensation {facts.compensation}")
    return f"Decided by {', '.join(said)}." if said else "The plan does not say how it was decided."


def _kept_on_paths(pruned: PrunedModel, run: Artefact) -> str:
    found = only_ffns(run.content.found)
    on_paths = {
        (name, int(neuron))
        for path in class_paths(found).values()
        for name, of_ffn in zip(found.layers, path, strict=True)
        for neuron in of_ffn
    }
    kept = sum(bool(pruned.plan.keep[name][neuron]) for name, neuron in on_paths)
    removed, dense = count_removed(pruned)
    return (
        f"Of the {plural(len(on_paths), 'neuron')} on the class paths of {run.name}, {kept:,} stay "
        f"({percent(kept / len(on_paths), 0)}; of all neurons {percent(1 - removed / dense, 0)})."
    )
