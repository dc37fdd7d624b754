"""What a page is put together from: values that a template turns into HTML, one macro for each kind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

from vitprune.report.text import number
from vitprune.report.thumbnails import Thumbnail
from vitprune.table import Table


@dataclass(frozen=True)
class Cell:
    """One cell of a grid.

    Attributes:
        text: what it shows.
        order: what it is sorted by; None goes last.
        link: id of what it leads to; may be empty.
        look: names of CSS classes.
        hint: shown where a pointer rests; may be empty.
        bar: draws a bar from zero, in [-1, 1]; None draws none.
        thumbnail: a picture before the text.
    """

    text: str
    order: float | str | None = None
    link: str = ""
    look: str = ""
    hint: str = ""
    bar: float | None = None
    thumbnail: Thumbnail | None = None


@dataclass(frozen=True)
class Column:
    """Heading of a grid.

    Attributes:
        title: with the unit.
        numeric: set to the right and sorted by number.
        sortable: whether a reader can sort by it.
    """

    title: str
    numeric: bool = True
    sortable: bool = True


@dataclass(frozen=True)
class Row:
    """Row of a grid: its cells, and the id that links to it lead to."""

    cells: tuple[Cell, ...]
    id: str = ""


@dataclass(frozen=True)
class Grid:
    """A sortable table.

    Attributes:
        id: unique on the page.
        title: above it.
        columns: headings.
        rows: in the order shown first.
        note: below it; may be empty.
        sorted_by: column that the rows are in order of, and whether descending; None where they are in no order.
    """

    kind: ClassVar[str] = "grid"
    id: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    note: str = ""
    sorted_by: tuple[int, bool] | None = None


@dataclass(frozen=True)
class Picture:
    """A figure as an image of its own, so that nothing in it meets the page.

    Attributes:
        id: unique on the page.
        uri: data URI.
        width, height: natural size, CSS pixels.
        caption: below it; what it shows.
    """

    kind: ClassVar[str] = "picture"
    id: str
    uri: str
    width: int
    height: int
    caption: str


@dataclass(frozen=True)
class Shot:
    """An image in a gallery.

    Attributes:
        id: unique on the page; may be empty.
        group: key of the gallery's groups.
        title: its class.
        link: id of what the title leads to; may be empty.
        change: of the probability of its own class.
        wrong: when the wrong answer was given, and which.
        picture: the thumbnail, or why there is none.
        file: its name.
    """

    id: str
    group: str
    title: str
    link: str
    change: str
    wrong: tuple[str, str]
    picture: Thumbnail | str
    file: str


@dataclass(frozen=True)
class Gallery:
    """Images in groups, with a filter.

    Attributes:
        id: unique on the page.
        title: above it.
        groups: key -> what its images have in common.
        shots: in the order shown.
        note: what is not shown, and why; may be empty.
    """

    kind: ClassVar[str] = "gallery"
    id: str
    title: str
    groups: Mapping[str, str]
    shots: tuple[Shot, ...]
    note: str = ""


@dataclass(frozen=True)
class NeuronShot:
    """What is known of one neuron.

    Attributes:
        group: key of the groups.
        title: its name.
        peak: the class that excites it most; may be empty.
        strip: its top images beside each other, bright where it is active.
        facts: what is known of it, with what it is called.
        bars: heights of the histogram in [0, 1], of all images and of the peak's class.
        span: smallest and largest activation.
        steering: factor, and what the model answers with it.
    """

    group: str
    title: str
    peak: str
    strip: Thumbnail
    facts: tuple[tuple[str, str], ...]
    bars: tuple[tuple[float, float], ...]
    span: tuple[str, str]
    steering: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class NeuronGallery:
    """Cards of neurons in groups, with a filter.

    Attributes:
        id: unique on the page.
        title: above it.
        groups: key -> what its neurons have in common.
        shots: in the order shown.
        note: how to read them.
    """

    kind: ClassVar[str] = "neurons"
    id: str
    title: str
    groups: Mapping[str, str]
    shots: tuple[NeuronShot, ...]
    note: str


@dataclass(frozen=True)
class Section:
    """One folder's part of the page.

    Attributes:
        id: unique on the page.
        name: in the list of parts; short.
        eyebrow: what kind of folder it is.
        title: what it shows.
        lead: paragraphs.
        blocks: grids, pictures and galleries of images or neurons.
        card: id of its card; empty for a part that is of no folder.
    """

    id: str
    name: str
    eyebrow: str
    title: str
    lead: tuple[str, ...]
    blocks: tuple[Grid | Picture | Gallery | NeuronGallery, ...] = field(default=())
    card: str = ""


def grid_of(table: Table, *, id: str) -> Grid:
    """Make a grid of a table: columns of numbers are sorted by number, what is absent goes last."""
    columns = list(zip(*table.rows, strict=True)) if table.rows else [()] * len(table.columns)
    numeric = [all(value is None or isinstance(value, int | float) for value in column) for column in columns]
    headings = tuple(Column(title, is_numeric) for title, is_numeric in zip(table.columns, numeric, strict=True))
    rows = tuple(Row(tuple(map(_cell_of, row))) for row in table.rows)
    return Grid(id, _sentence(table.title), headings, rows, _sentence(table.note))


def _sentence(text: str) -> str:
    """Begin as sentences do; in a terminal titles need not."""
    return text[:1].upper() + text[1:]


def without_empty(grid: Grid) -> Grid:
    """Leave out the columns that show nothing in any row."""
    kept = [
        place for place in range(len(grid.columns)) if any(row.cells[place].text for row in grid.rows) or not grid.rows
    ]
    rows = tuple(replace(row, cells=tuple(row.cells[place] for place in kept)) for row in grid.rows)
    sorted_by = None
    if grid.sorted_by is not None and grid.sorted_by[0] in kept:
        sorted_by = (kept.index(grid.sorted_by[0]), grid.sorted_by[1])
    return replace(grid, columns=tuple(grid.columns[place] for place in kept), rows=rows, sorted_by=sorted_by)


def _cell_of(value: str | float | int | None) -> Cell:
    if value is None:
        return Cell("")
    return Cell(value, value) if isinstance(value, str) else Cell(number(value), value)
