"""Of a comparison of embeddings: how near they are, and the images that moved most."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vitprune.evaluation.embeddings_folder import EmbeddingComparison
from vitprune.figures.cosines_figure import draw_cosines
from vitprune.report.page_blocks import Cell, Column, Grid, Row, Section
from vitprune.report.pictures import embed_figure
from vitprune.report.shown_folder import Artefact, card_id, part_name
from vitprune.report.text import percent, plural

MOST_ROWS = 100


def embeddings_section(artefact: Artefact, artefacts: Sequence[Artefact]) -> Section:
    """Tell how near the embeddings of two models are."""
    comparison: EmbeddingComparison = artefact.content
    fidelity = comparison.fidelity
    lead = [
        f"The embeddings of {plural(len(fidelity.cosines), 'image')} have a cosine of {fidelity.mean_cosine:.3f} to "
        f"those of the other model in the mean, of {fidelity.tenth_cosine:.3f} or more for nine of ten, and of "
        f"{fidelity.least_cosine:.3f} at least.",
        f"Of the {fidelity.num_neighbours} other images that are nearest to an image, {percent(fidelity.agreement)} "
        "are the same for both models.",
    ]
    if comparison.skipped:
        lead.append(f"{plural(len(comparison.skipped), 'image')} could not be decoded and are left out.")
    picture = embed_figure(
        draw_cosines(fidelity.cosines),
        id=f"{artefact.key}-picture",
        caption="How many images have which cosine between their two embeddings.",
    )
    moved = sorted(zip(fidelity.cosines, comparison.files, strict=True))[:MOST_ROWS]
    grid = Grid(
        f"{artefact.key}-rows",
        "Images that moved most",
        (Column("image", numeric=False), Column("cosine")),
        tuple(Row((Cell(file, file), Cell(f"{cosine:.4f}", cosine))) for cosine, file in moved),
        f"The {len(moved)} of the lowest cosine." if len(moved) < len(fidelity.cosines) else "",
    )
    title = f"{Path(comparison.model.name).name} against {Path(comparison.against.name).name}: embeddings"
    name = part_name(artefact, artefacts, "Embeddings")
    return Section(artefact.key, name, "embeddings", title, tuple(lead), (picture, grid), card_id(artefact))
