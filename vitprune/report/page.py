"""One HTML file that shows folders of any kinds: no server, no network, no other file."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from vitprune.files import atomic_file
from vitprune.report.artefacts import KINDS, read_artefacts
from vitprune.report.page_blocks import Gallery, Picture, Section
from vitprune.report.provenance import CardView, make_card_view
from vitprune.report.shown_folder import Artefact, of_kind
from vitprune.report.story import Story, tell_story
from vitprune.seal import parsing

TEMPLATES = "templates"


@dataclass(frozen=True)
class PageReport:
    """What was written.

    Attributes:
        path: the HTML file.
        size_bytes: of it.
        artefacts: (kind, name, folder) of what it shows.
        num_figures: pictures in it, thumbnails aside.
        num_thumbnails: of images.
        num_absent: images that it names but that are gone or cannot be decoded.
    """

    path: Path
    size_bytes: int
    artefacts: tuple[tuple[str, str, str], ...]
    num_figures: int
    num_thumbnails: int
    num_absent: int


def write_report(folders: Sequence[str | Path], path: str | Path) -> PageReport:
    """Write one self-contained HTML file about runs, pruned models, evaluations, curves, benches and analyses.

    The same folders give the same bytes.

    Args:
        folders: in any mixture; the first pruned model is what the summary is about.
        path: the file to write, all or nothing.

    Raises:
        VitpruneError: if a folder is of no kind that a report shows, or damaged.
    """
    artefacts = read_artefacts(folders)
    # What its files hold may fit its seal, as who means harm would write it, and yet be nothing to show.
    with parsing(", ".join(str(each.folder) for each in artefacts)):
        story = tell_story(artefacts)
    sections = [*([story.models] if story.models else []), *make_sections(artefacts)]
    html = render_page(story, sections, list(map(_show_card, artefacts)))
    path = Path(path)
    with atomic_file(path) as temporary:
        temporary.write_text(html, encoding="utf-8")
    blocks = [block for section in sections for block in section.blocks]
    shots = [shot.picture for block in blocks if isinstance(block, Gallery) for shot in block.shots]
    cells = [cell for block in blocks for row in getattr(block, "rows", ()) for cell in row.cells]
    return PageReport(
        path=path,
        size_bytes=path.stat().st_size,
        artefacts=tuple((each.kind, each.name, str(each.folder)) for each in artefacts),
        num_figures=sum(isinstance(block, Picture) for block in blocks),
        num_thumbnails=sum(not isinstance(shot, str) for shot in shots) + sum(bool(cell.thumbnail) for cell in cells),
        num_absent=sum(isinstance(shot, str) for shot in shots),
    )


def make_sections(artefacts: Sequence[Artefact]) -> list[Section]:
    """Tell what each folder holds, kind by kind."""
    sections = []
    for name, kind in KINDS.items():
        for each in of_kind(artefacts, name):
            with parsing(each.folder):
                sections.append(kind.section(each, artefacts))
    return sections


def _show_card(artefact: Artefact) -> CardView:
    with parsing(artefact.folder):
        return make_card_view(artefact)


def render_page(story: Story, sections: Sequence[Section], cards: Sequence[CardView]) -> str:
    """Return the page's HTML."""
    environment = Environment(
        loader=PackageLoader("vitprune.report", TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    own = {name: _read_own(f"report.{name}") for name in ("css", "js")}
    return environment.get_template("report.html.j2").render(
        story=story,
        sections=sections,
        cards=cards,
        policy=_write_policy(own),
        css=Markup(own["css"]),  # noqa: S704 (our own files)
        js=Markup(own["js"]),  # noqa: S704
    )


def _read_own(name: str) -> str:
    return files("vitprune.report").joinpath(TEMPLATES, name).read_text(encoding="utf-8")


def _write_policy(own: Mapping[str, str]) -> str:
    """Allow this style sheet, this script and embedded pictures; a browser refuses whatever else a page may hold."""
    hashes = {name: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for name, text in own.items()}
    return (
        f"default-src 'none'; img-src data:; style-src 'sha256-{hashes['css']}'; "
        f"script-src 'sha256-{hashes['js']}'; base-uri 'none'; form-action 'none'"
    )
