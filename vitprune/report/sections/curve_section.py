"""Of a curve: accuracy at many sizes."""

from __future__ import annotations

from collections.abc import Sequence

from vitprune.evaluation.curve import CurvePoint
from vitprune.evaluation.curve_folder import CurveRecord
from vitprune.report.page_blocks import Cell, Column, Grid, Row, Section
from vitprune.report.pictures import read_svg
from vitprune.report.shown_folder import Artefact, card_id, part_name
from vitprune.report.text import count, p_value, percent, plural, points

SIGNIFICANT = 0.05


def curve_section(artefact: Artefact, artefacts: Sequence[Artefact]) -> Section:
    """Tell what accuracy is left at many sizes."""
    curve: CurveRecord = artefact.content
    dense, *pruned = curve.points
    lead = [
        f"Top-1 on {plural(dense.num_images, 'image')} that had no say in the pruning; the dense model answers "
        f"{percent(dense.top1)} rightly."
    ]
    within = [point for point in pruned if point.p_value >= SIGNIFICANT]
    if within:
        best = max(within, key=lambda point: point.pruning_ratio)
        lead.append(
            f"Up to {percent(best.pruning_ratio, 0)} of the FFN neurons can go ({best.criterion}, {best.compensation}) "
            f"before these images show a difference ({p_value(best.p_value)})."
        )
    if curve.largest_ratio is not None:
        lead.append(
            f"The largest ratio that costs at most {points(curve.max_drop)} points at 95 % confidence: "
            f"{percent(curve.largest_ratio, 0)}."
        )
    picture = read_svg(
        artefact.folder / "curve.svg",
        id=f"{artefact.key}-picture",
        caption="Top-1 accuracy against the share of FFN neurons removed, with 95 % intervals; line: the dense model.",
    )
    grid = _curve_grid(artefact, dense, curve.points)
    title = f"{artefact.name}: accuracy against size"
    name = part_name(artefact, artefacts, "Sizes")
    return Section(artefact.key, name, "curve", title, tuple(lead), (picture, grid), card_id(artefact))


def _curve_grid(artefact: Artefact, dense: CurvePoint, rows: Sequence[CurvePoint]) -> Grid:
    names = ("criterion", "allocation", "compensation")
    pruned = [point for point in rows if point is not dense]
    varied = [name for name in names if len({getattr(point, name) for point in pruned}) > 1]
    same = [f"{name} {getattr(pruned[0], name)}" for name in names if name not in varied] if pruned else []

    def cells_of(point: CurvePoint) -> tuple[Cell, ...]:
        is_dense = point is dense
        words = [
            ("dense" if place == 0 else "") if is_dense else getattr(point, name) for place, name in enumerate(varied)
        ]
        share = "dense" if is_dense and not varied else percent(point.pruning_ratio)
        bound = ("", None) if is_dense else (points(-point.drop_bound), -point.drop_bound)
        return (
            *(Cell(word, word) for word in words),
            Cell(share, point.pruning_ratio),
            Cell(count(point.num_parameters), point.num_parameters),
            Cell(count(point.macs), point.macs),
            Cell(percent(point.top1), point.top1),
            Cell(f"{100 * point.top1_low:.1f} to {100 * point.top1_high:.1f}", point.top1_low),
            Cell("" if is_dense else points(-point.drop), -point.drop),
            Cell(*bound),
            Cell("" if is_dense else f"{point.p_value:.2g}", None if is_dense else point.p_value),
        )

    columns = (
        *(Column(name, numeric=False) for name in varied),
        *map(Column, ("removed", "parameters", "MACs", "top-1", "95 % interval", "change", "at worst", "p")),
    )
    note = "At worst: 95 % bound of the change, paired with the dense model; p: McNemar. "
    note += f"All: {', '.join(same)}." if same else ""
    return Grid(f"{artefact.key}-points", "All points", columns, tuple(Row(cells_of(point)) for point in rows), note)
