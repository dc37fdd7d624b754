"""Pictures show the numbers they were given, can be read, and repeat byte for byte."""

from __future__ import annotations

from itertools import combinations, pairwise

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.colors import to_rgba
from matplotlib.patches import PathPatch
from matplotlib.text import Annotation, Text
from PIL import Image
from scipy.cluster.hierarchy import dendrogram, leaves_list, linkage
from scipy.spatial.distance import squareform
from scipy.stats import t as student

import vitprune
from vitprune.analysis.topk_mask import CLEAN, ONE_PLAN, ORACLE, TopKRow
from vitprune.evaluation.curve import CurvePoint
from vitprune.figures import (
    bench_figure as bench,
)
from vitprune.figures import (
    curve_figure as curve,
)
from vitprune.figures import (
    deviations_figure as deviations,
)
from vitprune.figures import (
    fronts_figure as fronts,
)
from vitprune.figures import (
    joint_scores_figure as joint_scores,
)
from vitprune.figures import (
    path_figure as path_picture,
)
from vitprune.figures import (
    similarity_figure as similarity,
)
from vitprune.figures import (
    style,
)
from vitprune.figures import (
    top_images_figure as top_images,
)
from vitprune.figures import (
    topk_mask_figure as topk_mask,
)
from vitprune.figures import (
    utilisation_figure as utilisation,
)
from vitprune.figures import (
    violins_figure as violins,
)
from vitprune.figures import (
    widths_figure as widths,
)
from vitprune.figures.fronts_figure import FrontPoint
from vitprune.intervals import Interval
from vitprune.speed.bench import BenchRow

GENERATOR = np.random.default_rng(0)
FFNS = tuple(f"blocks.{index}.mlp" for index in range(4))
LONG = "German short-haired pointer of the third kind"


def make_found(counts=(7, 3, 6), *, num_neurons=40, top_k=2):
    """Random paths of some images of each class, as ``discover`` returns them."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(sum(counts), len(FFNS), num_neurons, generator=generator)
    neurons = draws.argsort(-1)[..., :top_k]
    neurons[: counts[0], 0] = torch.arange(top_k)  # the images of the first class agree
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    scores = {name: torch.rand(len(counts), num_neurons, generator=generator) for name in FFNS}
    return vitprune.Discovery(
        layers=FFNS,
        neurons=neurons,
        joint_scores=torch.rand(len(labels), generator=generator),
        labels=labels,
        predictions=labels,
        completeness_errors=None,
        classes=tuple(range(len(counts))),
        class_scores=scores,
        method="jas",
        tokens="cls",
        quadrature="adaptive",
    )


def make_similarity(num_classes, *, seed=0):
    features = np.random.default_rng(seed).random((num_classes, 30)) ** 3
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    matrix = features @ features.T
    distances = np.clip(1 - matrix, 0, None)
    np.fill_diagonal(distances, 0)
    return matrix, linkage(squareform(distances, checks=False), "average")


def make_rows():
    rows = [TopKRow(CLEAN, "", 0, 0.0, 0, 0.6, 0.7, 10)]
    for number, (kind, tokens, top_k, share) in enumerate(
        (kind, tokens, top_k, share)
        for kind in (ORACLE, ONE_PLAN)
        for tokens in ("cls", "all")
        for top_k in (1, 10)
        for share in (0.5, 1.0)
    ):
        rows.append(TopKRow(kind, tokens, top_k, share, 5, 0.6 - 0.02 * number, 0.5, 10))
    return rows


def make_points(count, *, seed=0):
    """The faster the model, the less accurate, give or take."""
    values = np.random.default_rng(seed)
    points = []
    for place, (value, luck) in enumerate(values.uniform((1, 0), (3, 0.2), (count, 2))):
        top1 = 0.95 - 0.2 * (value - 1) - luck
        points.append(FrontPoint(f"model {place}", top1, top1 - 0.02, top1 + 0.02, value, 0.97 * value, 1.03 * value))
    return points


def make_curve_points():
    def point(criterion, ratio, top1):
        return CurvePoint(
            criterion, "global", "ridge", 1.0, ratio, 5, 6, 7, top1, top1 - 0.1, top1 + 0.1, 0, 0.1, 0.5, 9
        )

    return [point("dense", 0.0, 0.8), point("obs", 0.5, 0.6), point("obs", 0.3, 0.7), point("random", 0.5, 0.4)]


def make_bench_rows():
    return [
        BenchRow(
            model, "torch-eager", "float32", 1, 1, 10, 11, 100 * speed, speed, speed - 0.1, speed + 0.1, 1.5, 0.9, 5
        )
        for model, speed in (("dense", 1.0), ("pruned", 1.4))
    ]


DEVIATIONS = {
    tokens: {
        (method, factor): GENERATOR.normal(-0.2 if factor == 0 else 0.1, 0.1, 9)
        for method in ("random", "jas", "activation")
        for factor in (0, 2)
    }
    for tokens in ("all", "cls")
}
SCORES = {"random": GENERATOR.normal(0, 1e-3, 30), "jas": GENERATOR.gamma(2, 1, 30), LONG: np.ones(1)}
PATHS = {"tench": [[1], [5], [7], [2]], "cassette player": [[1], [6], [7], [3]], LONG: [[4], [6], [7], [9]]}
PLANS = {
    "obs": {ffn: (kept, 40) for ffn, kept in zip(FFNS, (10, 20, 0, 40), strict=True)},
    LONG: dict.fromkeys(FFNS, (20, 40)),
}
IMAGES = [(Image.new("RGB", (50, 40), (place * 40, 80, 99)), f"class {place}", -0.1 * place) for place in range(5)]

# How to draw each picture, and with nothing to draw.
DRAWN = {
    "violins": lambda: violins.draw_violins(make_found(), {0: "tench", 2: LONG, 1: "church"}, title="paths"),
    "similarity": lambda: similarity.draw_similarity(*make_similarity(5), names=["tench", LONG, "a", "b", "c"]),
    "similarity of many": lambda: similarity.draw_similarity(*make_similarity(60), names=[LONG] * 60, title="many"),
    "utilisation": lambda: utilisation.draw_utilisation(
        FFNS, [40] * 4, num_used=[4, 8, 2, 40], effective=[3.5, 7, 2, 30], title="used"
    ),
    "deviations": lambda: deviations.draw_deviations(DEVIATIONS, title="removed and doubled"),
    "joint scores": lambda: joint_scores.draw_joint_scores(SCORES, title="scores"),
    "top-K mask": lambda: topk_mask.draw_topk_mask(make_rows(), title="kept"),
    "front": lambda: fronts.draw_front(make_points(12), quantity="speedup", title="front"),
    "kept width": lambda: widths.draw_widths(PLANS, title="width"),
    "kept width of many": lambda: widths.draw_widths({f"plan {n}": PLANS["obs"] for n in range(5)}),
    "paths": lambda: path_picture.draw_paths(FFNS, PATHS, title="three classes"),
    "top images": lambda: top_images.draw_top_images(IMAGES, title="neuron 3"),
    "curve": lambda: curve.draw_curve(make_curve_points(), title="curve", max_drop=0.1),
    "bench": lambda: bench.draw_bench(make_bench_rows(), title="bench"),
}
DRAWN["deviations beyond measure"] = lambda: deviations.draw_deviations(
    {"cls": {("jas", 0): [-0.5, 0.1], ("jas", 2): [0.3, 900.0]}}
)
DRAWN["joint scores of all magnitudes"] = lambda: joint_scores.draw_joint_scores(
    {"jas": [2.0, 3.0, 2.5], "random": [4e-7, 5e-7]}
)
LABELS = {
    "violins": {"block", "neuron index"},
    "similarity": {"distance", "cosine similarity"},
    "similarity of many": {"distance", "cosine similarity", "60 classes, one in 2 is named"},
    "utilisation": {"block", "share of neurons (%)", "neurons (of 40)"},
    "deviations": {"change of the probability of the true class (%)"},
    "joint scores": {"joint attribution score of a path"},
    "top-K mask": {"K, neurons per FFN that are never masked", "mean probability\nof the true class (%)"},
    "front": {"speed-up over the dense model (×)", "top-1 accuracy (%)"},
    "kept width": {"block", "neurons kept"},
    "paths": {"block"},
    "curve": {"FFN neurons removed (%)", "top-1 accuracy (%)"},
    "bench": {"images per second", "speed-up over dense (×)\n95 % interval; dotted: ceiling (Amdahl)"},
}
EMPTY = {
    "violins": lambda: violins.draw_violins(make_found(), {}),
    "similarity": lambda: similarity.draw_similarity(np.zeros((0, 0)), np.zeros((0, 4)), names=[]),
    "utilisation": lambda: utilisation.draw_utilisation([], [], num_used=[], effective=[]),
    "deviations": lambda: deviations.draw_deviations({}),
    "joint scores": lambda: joint_scores.draw_joint_scores({}),
    "top-K mask": lambda: topk_mask.draw_topk_mask(make_rows()[:1]),
    "front": lambda: fronts.draw_front([], quantity="speedup"),
    "kept width": lambda: widths.draw_widths({}),
    "paths": lambda: path_picture.draw_paths(FFNS, {}),
    "paths without neurons": lambda: path_picture.draw_paths(FFNS, {"a": [[]] * 4, "b": [[]] * 4}),
    "top images": lambda: top_images.draw_top_images([]),
    "curve": lambda: curve.draw_curve(make_curve_points()[:1]),
    "bench": lambda: bench.draw_bench([]),
}


@pytest.fixture(params=DRAWN)
def figure(request):
    return DRAWN[request.param]()


@style.styled
def lay_out(figure):
    figure.draw_without_rendering()
    return figure


def test_no_text_is_smaller_than_print_allows(figure):
    texts = [text for text in lay_out(figure).findobj(Text) if text.get_visible() and text.get_text()]
    assert min(text.get_fontsize() for text in texts) >= 7


def test_nothing_is_cut_off(figure):
    drawn, whole = lay_out(figure).get_tightbbox(), figure.bbox_inches
    assert drawn.x0 >= -0.02
    assert drawn.y0 >= -0.02
    assert drawn.x1 <= whole.x1 + 0.02
    assert drawn.y1 <= whole.y1 + 0.02


def texts_of(figure):
    """All texts but those of ticks beyond the axes, which are not drawn."""
    hidden = set()
    for axes in [each for main in figure.axes for each in (main, *main.child_axes)]:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                if not low - 1e-9 <= tick.get_loc() <= high + 1e-9:
                    hidden |= {tick.label1, tick.label2}
    return [text for text in figure.findobj(Text) if text.get_visible() and text.get_text() and text not in hidden]


def test_no_text_stands_on_another(figure):
    texts = texts_of(lay_out(figure))
    boxes = [(text.get_text(), Text.get_window_extent(text).padded(-1)) for text in texts]
    clashes = [(one, other) for (one, a), (other, b) in combinations(boxes, 2) if a.overlaps(b)]
    assert not clashes


@pytest.mark.parametrize("name", LABELS)
def test_axes_say_what_they_show_and_in_which_unit(name):
    figure = DRAWN[name]()
    labels = [
        label
        for axes in figure.axes
        for each in (axes, *axes.child_axes)
        for label in (each.get_xlabel(), each.get_ylabel())
    ]
    assert {*labels, figure.get_supylabel()} - {""} == LABELS[name]


@pytest.mark.parametrize("name", DRAWN)
def test_the_same_picture_has_the_same_bytes(name, tmp_path):
    for number in range(2):
        style.save_figure(DRAWN[name](), tmp_path / f"{number}.svg")
    assert (tmp_path / "0.svg").read_bytes() == (tmp_path / "1.svg").read_bytes()
    assert b"<dc:date>" not in (tmp_path / "0.svg").read_bytes()


def test_png_files_are_fit_for_print_and_repeat(tmp_path):
    for number in range(2):
        style.save_figure(DRAWN["violins"](), tmp_path / f"{number}.png")
    assert (tmp_path / "0.png").read_bytes() == (tmp_path / "1.png").read_bytes()
    picture = Image.open(tmp_path / "0.png")
    assert picture.width == pytest.approx(300 * style.COLUMN, abs=1)
    assert picture.info["dpi"][0] == pytest.approx(300, abs=0.1)


@pytest.mark.parametrize("name", EMPTY)
def test_nothing_to_draw_is_refused(name):
    with pytest.raises(vitprune.VitpruneError):
        EMPTY[name]()


@pytest.mark.parametrize("name", ["a.pdf", "a", "a.PNG.txt"])
def test_other_formats_are_refused(name, tmp_path):
    with pytest.raises(vitprune.VitpruneError, match=r"pictures are written as \.png or \.svg"):
        style.save_figure(DRAWN["kept width"](), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_drawing_leaves_the_users_settings(tmp_path):
    before = dict(matplotlib.rcParams)
    style.save_figure(widths.draw_widths(PLANS), tmp_path / "a.svg")
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize(
    ("draw", "value", "given"),
    [
        (violins.draw_violins, make_found(), {"classes": {0: "a"}}),
        (similarity.draw_similarity, make_similarity(2)[0], {"linkage": make_similarity(2)[1], "names": ["a", "b"]}),
        (utilisation.draw_utilisation, FFNS, {"num_neurons": [9] * 4, "num_used": [1] * 4, "effective": [1] * 4}),
        (deviations.draw_deviations, DEVIATIONS, {}),
        (joint_scores.draw_joint_scores, SCORES, {}),
        (topk_mask.draw_topk_mask, make_rows(), {}),
        (fronts.draw_front, make_points(2), {"quantity": "median_ms"}),
        (widths.draw_widths, PLANS, {}),
        (path_picture.draw_paths, FFNS, {"paths": PATHS}),
        (top_images.draw_top_images, IMAGES, {}),
        (curve.draw_curve, make_curve_points(), {}),
        (bench.draw_bench, make_bench_rows(), {}),
    ],
)
def test_every_picture_can_be_written(draw, value, given, tmp_path):
    style.save_figure(draw(value, title="here it is", **given), tmp_path / "a.svg")
    assert "<!-- here it is -->" in (tmp_path / "a.svg").read_text()


# Violins


def points_of(panel):
    [line] = panel.get_lines()
    return line.get_xdata(), line.get_ydata()


def test_violins_show_every_neuron_of_every_image_above_its_ffn():
    found = make_found()
    figure = violins.draw_violins(found, {2: "church", 0: "tench"})
    for panel, index in zip(figure.axes, (2, 0), strict=True):
        x, y = points_of(panel)
        for layer in range(4):
            expected = found.neurons[found.labels == index, layer].flatten().tolist()
            assert sorted(y[np.round(x) == layer]) == sorted(expected)
    assert [panel.get_title() for panel in figure.axes] == ["church (6 images)", "tench (7 images)"]


def test_violins_need_five_images():
    figure = violins.draw_violins(make_found(counts=(7, 4, 1)), {0: "a", 1: "b", 2: "c"})
    num_bodies = [sum(isinstance(each, PolyCollection) for each in a.collections) for a in figure.axes]
    assert num_bodies == [4, 0, 0]
    assert [len(points_of(panel)[0]) for panel in figure.axes] == [7 * 8, 4 * 8, 8]


def test_violins_mark_the_path_of_the_class():
    found = make_found()
    panel = violins.draw_violins(found, {0: "tench"}).axes[0]
    [marks] = [each for each in panel.collections if isinstance(each, LineCollection)]
    drawn = {(round(float(ends[:, 0].mean())), ends[0, 1]) for ends in marks.get_segments()}
    path_LK = vitprune.class_paths(found)[0]
    assert drawn == {(layer, float(neuron)) for layer, of in enumerate(path_LK) for neuron in of}


def test_violins_of_a_class_without_images_are_refused():
    with pytest.raises(vitprune.VitpruneError, match=r"class 7 \(gas pump\) has no image"):
        violins.draw_violins(make_found(), {7: "gas pump"})


# Similarity


def test_the_heat_map_is_the_matrix_in_the_order_of_the_tree():
    matrix, tree = make_similarity(9)
    heat = similarity.draw_similarity(matrix, tree, names=list("abcdefghi")).axes[1]
    order = leaves_list(tree)
    expected = matrix[np.ix_(order, order)]
    shown = heat.images[0].get_array()
    off = ~np.eye(9, dtype=bool)
    assert np.array_equal(np.asarray(shown)[off], expected[off])
    assert [label.get_text() for label in heat.get_yticklabels()] == ["abcdefghi"[place] for place in order]
    texts = {text.get_position(): text.get_text() for text in heat.texts}
    assert texts == {(c, r): "1" if r == c else f"{expected[r, c]:.2f}" for r in range(9) for c in range(9)}


def test_a_diagonal_that_says_something_is_shown():
    matrix, tree = make_similarity(4)
    np.fill_diagonal(matrix, 0.5)
    heat = similarity.draw_similarity(matrix, tree, names=list("abcd")).axes[1]
    assert np.diag(heat.images[0].get_array()).tolist() == [0.5] * 4


@pytest.mark.parametrize("num_classes", [2, 3, 12, 50])
def test_the_tree_is_the_one_scipy_draws(num_classes):
    matrix, tree = make_similarity(num_classes)
    axes = similarity.draw_similarity(matrix, tree, names=["a"] * num_classes).axes[0]
    drawn = {tuple(np.round(branch, 9).ravel()) for branch in axes.collections[0].get_segments()}
    known = dendrogram(tree, no_plot=True)
    # SciPy's leaves stand at 5, 15, 25, ..
    branches = zip((np.array(known["icoord"]) - 5) / 10, known["dcoord"], strict=True)
    assert drawn == {tuple(np.round(np.stack(branch, 1), 9).ravel()) for branch in branches}


def test_a_chain_of_a_thousand_classes_can_be_drawn():
    chain = np.array([[max(0, 998 + step), step + 1, 1 + step, step + 2] for step in range(999)], dtype=float)
    chain[0, 0], chain[1:, 0] = 0, 1000 + np.arange(998)
    figure = similarity.draw_similarity(np.eye(1000) + 0.1, chain, names=[str(place) for place in range(1000)])
    lay_out(figure)
    assert len(figure.axes[0].collections[0].get_segments()) == 999
    assert [label.get_text() for label in figure.axes[1].get_yticklabels()] == [str(n) for n in range(0, 1000, 21)]
    assert figure.axes[1].get_xlabel() == "1,000 classes, one in 21 is named"
    assert not figure.axes[1].texts


@pytest.mark.parametrize("num_classes", [2, 30, 48, 49, 200])
def test_names_of_classes_do_not_overlap(num_classes):
    heat = similarity.draw_similarity(*make_similarity(num_classes), names=[LONG] * num_classes).axes[1]
    lay_out(heat.get_figure())
    boxes = [label.get_window_extent() for label in heat.get_yticklabels()]
    assert all(low.y1 <= high.y0 + 1 for high, low in pairwise(boxes))


@pytest.mark.parametrize("names", [["a"], ["a", "b", "c"]])
def test_a_matrix_that_does_not_fit_its_names_is_refused(names):
    with pytest.raises(vitprune.VitpruneError, match="similarity needs"):
        similarity.draw_similarity(*make_similarity(2), names=names)


def test_a_linkage_of_other_classes_is_refused():
    with pytest.raises(vitprune.VitpruneError, match="no clustering of 3 classes"):
        similarity.draw_similarity(make_similarity(3)[0], make_similarity(4)[1], names=list("abc"))


# Utilisation and kept width


def test_utilisation_is_in_percent_of_each_ffns_neurons():
    drawn = {"num_used": [4, 8, 2, 40], "effective": [3.5, 7, 2, 30]}
    axes = utilisation.draw_utilisation(FFNS, [40, 40, 80, 80], **drawn).axes[0]
    assert [bar.get_height() for bar in axes.patches] == [10, 20, 2.5, 50]
    assert axes.get_lines()[0].get_ydata().tolist() == [8.75, 17.5, 2.5, 37.5]
    assert axes.get_ylabel() == "share of neurons (%)"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1", "2", "3"]


def test_utilisation_counts_neurons_where_all_ffns_are_alike():
    def counts(widths):
        figure = utilisation.draw_utilisation(FFNS, widths, num_used=[1] * 4, effective=[1] * 4)
        return [each.get_ylabel() for each in figure.axes[0].child_axes]

    assert counts([40] * 4) == ["neurons (of 40)"]
    assert counts([40, 40, 40, 80]) == []


def test_more_neurons_than_there_are_is_refused():
    with pytest.raises(vitprune.VitpruneError, match="blocks.1.mlp has 40 neurons, fewer than are used"):
        utilisation.draw_utilisation(FFNS, [40] * 4, num_used=[4, 41, 2, 4], effective=[1] * 4)


def test_kept_widths_are_bars_below_the_dense_models():
    figure = widths.draw_widths(PLANS)
    dense, *bars = figure.axes[0].patches
    assert dense.get_data().values == pytest.approx([40] * 4)
    assert [bar.get_height() for bar in bars] == [10, 20, 0, 40, 20, 20, 20, 20]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["dense", "obs (keeps 43.8%)", f"{LONG} (keeps 50.0%)"]


def test_kept_widths_of_many_plans_are_lines():
    axes = widths.draw_widths({f"plan {number}": PLANS["obs"] for number in range(4)}).axes[0]
    assert [line.get_ydata().tolist() for line in axes.get_lines()] == [[10, 20, 0, 40]] * 4
    assert len({(line.get_color(), line.get_marker()) for line in axes.get_lines()}) == 4


def test_plans_of_different_models_are_refused():
    with pytest.raises(vitprune.VitpruneError, match="plans 'a' and 'b' are not of the same dense model"):
        widths.draw_widths({"a": {"blocks.0.mlp": (1, 40)}, "b": {"blocks.0.mlp": (1, 48)}})
    with pytest.raises(vitprune.VitpruneError, match="'a' keeps 41 of 40 in blocks.0.mlp"):
        widths.draw_widths({"a": {"blocks.0.mlp": (41, 40)}})


# Deviations and joint scores


def test_deviations_have_a_row_per_scope_and_a_column_per_factor():
    figure = deviations.draw_deviations(DEVIATIONS)
    scopes, ways = ("class token", "every token"), ("removed", "doubled")
    titles = [f"path neurons {way}, {scope}" for scope in scopes for way in ways]
    assert [panel.get_title() for panel in figure.axes] == titles
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["jas", "activation", "random"]
    assert figure.axes[-1].get_xlabel() == "change of the probability of the true class (%)"


def test_deviations_are_boxes_in_percent_at_their_method():
    panel = deviations.draw_deviations(DEVIATIONS).axes[1]
    medians = {}
    for line in panel.get_lines():
        (x, *others), y = line.get_xdata(), line.get_ydata()
        if len(y) == 2 and others == [x] and y[1] - y[0] == pytest.approx(0.6):
            medians[round(float(np.mean(y)))] = x
    expected = [100 * np.median(DEVIATIONS["cls"][method, 2]) for method in ("jas", "activation", "random")]
    assert [medians[place] for place in range(3)] == pytest.approx(expected)
    assert len([patch for patch in panel.patches if isinstance(patch, PathPatch)]) == 3


def test_a_method_has_one_colour_in_all_pictures():
    box = deviations.draw_deviations({"cls": {("random", 0): [0.1, 0.2]}}).axes[0].patches[0]
    score = joint_scores.draw_joint_scores(SCORES).axes[0].patches[1]
    assert box.get_facecolor() == score.get_facecolor() == to_rgba(style.method_colours(["random"])["random"], 0.35)


@pytest.mark.parametrize("values", [[-0.2] * 6, [0.0] * 6, [0.4]])
def test_deviations_that_are_all_equal_can_be_drawn(values):
    figure = deviations.draw_deviations({"patch": {("jas", 0): values}})
    lay_out(figure)
    low, high = figure.axes[0].get_xlim()
    assert low < 0 < high or values[0] != 0
    assert low <= 100 * values[0] <= high


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"cls": {("jas", 0): [0.1, float("inf")]}}, "deviations of jas, removed: 1 of 2 values are not finite"),
        ({"cls": {("jas", 3): [0.1]}}, "factor must be 0"),
        ({"class": {("jas", 0): [0.1]}}, "tokens must be one of cls"),
        ({"cls": {("jas", 0): []}}, "deviations of jas, removed: nothing to draw"),
    ],
)
def test_deviations_refuse(given, message):
    with pytest.raises(vitprune.VitpruneError, match=message):
        deviations.draw_deviations(given)


def test_joint_scores_show_mean_and_interval_of_each_method():
    axes = joint_scores.draw_joint_scores(SCORES).axes[0]
    means = [line.get_xdata()[0] for line in axes.get_lines() if line.get_marker() == "D"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["jas", "random", LONG]
    assert means == pytest.approx([np.mean(SCORES[method]) for method in ("jas", "random", LONG)])
    intervals = [line.get_xdata() for line in axes.get_lines() if line.get_linewidth() == 1.8]
    for method, interval in zip(("jas", "random"), intervals[:2], strict=True):
        scale = np.std(SCORES[method], ddof=1) / 30**0.5
        assert interval == pytest.approx(student.interval(0.95, 29, np.mean(SCORES[method]), scale))
    assert len(intervals) == 2  # one value has none


def test_other_intervals_are_marked_where_they_are_given():
    given = {method: Interval(1.0, None, None) for method in SCORES} | {"jas": Interval(3.0, 2.5, 3.5)}
    axes = joint_scores.draw_joint_scores(SCORES, intervals=given).axes[0]
    means = [line.get_xdata()[0] for line in axes.get_lines() if line.get_marker() == "D"]
    assert means == [3.0, 1.0, 1.0]
    assert [list(line.get_xdata()) for line in axes.get_lines() if line.get_linewidth() == 1.8] == [[2.5, 3.5]]
    with pytest.raises(vitprune.VitpruneError, match="no interval for random"):
        joint_scores.draw_joint_scores(SCORES, intervals={method: given[method] for method in ("jas", LONG)})


@pytest.mark.parametrize(
    ("random", "scale"),
    [
        ([0.5, 0.4, 0.45], "linear"),
        ([5e-4, 4e-4, 4.5e-4], "log"),
        ([-5e-4, 4e-4, 4.5e-4], "linear"),
        ([1e-4, 9e-4, 1e-6], "linear"),  # the interval reaches below zero
        ([0.0, 0.0], "linear"),
    ],
)
def test_the_scale_follows_the_spread_of_the_methods(random, scale):
    axes = joint_scores.draw_joint_scores({"jas": [2.0, 3.0, 2.5], "random": random}).axes[0]
    assert axes.get_xscale() == scale
    assert ("logarithmic" in axes.get_xlabel()) == (scale == "log")


@pytest.mark.parametrize(("largest", "scale"), [(4.9, "linear"), (80.0, "symlog")])
def test_a_class_that_grows_without_measure_does_not_hide_the_others(largest, scale):
    figure = deviations.draw_deviations({"cls": {("jas", 0): [-0.5, -0.1], ("jas", 2): [0.3, 0.2, largest]}})
    assert [panel.get_xscale() for panel in figure.axes] == ["linear", scale]
    assert ("logarithmic beyond 100" in figure.axes[1].get_xlabel()) == (scale == "symlog")


# Top-K masks


def test_topk_bars_stand_where_their_row_says():
    rows = make_rows()
    figure = topk_mask.draw_topk_mask(rows)
    assert len(figure.axes) == 4
    panels = iter(figure.axes)
    for tokens in ("cls", "all"):
        for kind in (ORACLE, ONE_PLAN):
            bars = sorted(next(panels).patches, key=lambda bar: bar.get_x())
            expected = {
                (row.top_k, row.mask_share): row.probability for row in rows if (row.mask, row.tokens) == (kind, tokens)
            }
            assert [bar.get_height() for bar in bars] == pytest.approx(
                [100 * expected[key] for key in sorted(expected)]
            )


def test_topk_draws_the_clean_model_and_names_shares():
    figure = topk_mask.draw_topk_mask(make_rows())
    assert {panel.get_lines()[0].get_ydata()[0] for panel in figure.axes} == {60}
    legend = figure.legends[0]
    assert [text.get_text() for text in legend.get_texts()] == ["50%", "100%", "clean model"]
    assert "oracle" in figure.axes[0].get_title()
    assert "one mask for all" in figure.axes[1].get_title()
    assert figure.axes[2].get_ylabel() == "mean probability\nof the true class (%)"


# Fronts


@pytest.mark.parametrize("higher_is_better", [True, False])
def test_the_front_is_what_nothing_beats(higher_is_better):
    points = [FrontPoint("", top1, 0, 1, value) for top1, value in GENERATOR.integers(0, 6, (25, 2)).tolist()]
    sign = 1 if higher_is_better else -1

    def beats(one, other):
        gains = (one.top1 - other.top1, sign * (one.value - other.value))
        return min(gains) >= 0 and max(gains) > 0

    unbeaten = {(p.top1, p.value) for p in points if not any(beats(other, p) for other in points)}
    front = [points[place] for place in fronts.pareto_front(points, higher_is_better=higher_is_better)]
    assert {(point.top1, point.value) for point in front} == unbeaten
    assert [point.value for point in front] == sorted({value for _top1, value in unbeaten})


@pytest.mark.parametrize(("quantity", "scale"), [("speedup", 1), ("num_parameters", 1e-6)])
def test_the_line_is_the_best_accuracy_to_be_had(quantity, scale):
    points = make_points(15)
    line = fronts.draw_front(points, quantity=quantity).axes[0].get_lines()[0]
    x, y = line.get_xdata(), line.get_ydata()
    assert len(x) > 5 or quantity != "speedup"
    for left, right, height in zip(x[:-1], x[1:], y[1:], strict=True):
        if right > left:
            middle = (left + right) / 2 / scale
            within = [p.top1 for p in points if (p.value >= middle if quantity == "speedup" else p.value <= middle)]
            assert height == pytest.approx(100 * max(within))


def test_points_of_the_front_are_filled_and_all_are_named():
    points = make_points(10)
    axes = fronts.draw_front(points, quantity="median_ms").axes[0]
    filled, hollow = (line for line in axes.get_lines() if line.get_marker() == "o")
    front = fronts.pareto_front(points, higher_is_better=False)
    assert filled.get_xdata().tolist() == [points[place].value for place in front]
    assert len(hollow.get_xdata()) == len(points) - len(front)
    assert {text.get_text() for text in axes.texts} == {point.name for point in points}
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("latency (ms)", "top-1 accuracy (%)")


@pytest.mark.parametrize("seed", range(5))
def test_names_of_points_do_not_overlap(seed):
    figure = fronts.draw_front(make_points(22, seed=seed), quantity="speedup")
    axes = figure.axes[0]
    lay_out(figure)
    # An annotation's window extent holds its line as well.
    boxes = [Text.get_window_extent(text) for text in axes.texts if isinstance(text, Annotation)]
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
    inside = axes.get_window_extent().padded(1)
    assert all(inside.contains(*corner) for box in boxes for corner in (box.min, box.max))


def test_fronts_refuse():
    with pytest.raises(vitprune.VitpruneError, match="quantity must be one of speedup"):
        fronts.draw_front(make_points(2), quantity="speed")
    with pytest.raises(vitprune.VitpruneError, match="an interval of 'a' does not hold its value"):
        fronts.draw_front([FrontPoint("a", 0.5, 0.6, 0.7, 1.0)], quantity="speedup")
    sure = FrontPoint("a", 1.0, 0.9, 1.0 - 1e-16, 1.0)
    assert fronts.draw_front([sure], quantity="speedup").axes


# Paths


def random_paths(num_classes, *, num_ffns=12, top_k=1, num_neurons=9, seed=0):
    generator = np.random.default_rng(seed)
    return {
        f"class {index}": np.stack([generator.permutation(num_neurons)[:top_k] for _ in range(num_ffns)])
        for index in range(num_classes)
    }


@pytest.mark.parametrize(("num_classes", "top_k"), [(2, 1), (10, 1), (6, 3)])
def test_shared_neurons_are_named_once_and_others_are_not(num_classes, top_k):
    paths = random_paths(num_classes, top_k=top_k)
    ffns = [f"blocks.{index}.mlp" for index in range(12)]
    axes = path_picture.draw_paths(ffns, paths).axes[0]
    named = sorted((round(text.get_position()[0]), int(text.get_text())) for text in axes.texts)
    counts = {}
    for path in paths.values():
        for layer, of in enumerate(path):
            for neuron in of:
                counts[layer, neuron] = counts.get((layer, neuron), 0) + 1
    assert named == sorted(place for place, count in counts.items() if count > 1)
    alone = sum(len(line.get_xdata()) for line in axes.get_lines())
    assert alone == sum(count == 1 for count in counts.values())


@pytest.mark.parametrize("top_k", [1, 4])
def test_no_two_neurons_of_an_ffn_stand_in_one_place(top_k):
    for seed in range(10):
        paths = list(random_paths(10, top_k=top_k, seed=seed).values())
        nodes, _rows = path_picture.place_neurons(paths, slot=0.2)
        assert len({(node.layer, round(node.height, 6)) for node in nodes.values()}) == len(nodes)
        assert all(
            of.classes == tuple(row for row, path in enumerate(paths) if key[1] in path[key[0]])
            for key, of in nodes.items()
        )


def test_a_shared_neuron_stands_in_the_middle_of_its_classes():
    nodes, rows = path_picture.place_neurons([[[3]], [[5]], [[3]], [[4]], [[3]]], slot=0.2)
    assert nodes[0, 3].height == rows[2][0]
    assert nodes[0, 3].classes == (0, 2, 4)


@pytest.mark.parametrize("num_ffns", [12, 24])
def test_names_of_neurons_do_not_overlap(num_ffns):
    paths = {name: path + 4090 for name, path in random_paths(10, num_ffns=num_ffns).items()}
    figure = path_picture.draw_paths([f"blocks.{index}.mlp" for index in range(num_ffns)], paths)
    lay_out(figure)
    boxes = [text.get_bbox_patch().get_window_extent() for text in figure.axes[0].texts]
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))


def test_names_of_nodes_of_both_kinds_do_not_overlap():
    paths = random_paths(10, num_ffns=24, num_neurons=192)
    layers = [f"blocks.{block}.{kind}" for block in range(12) for kind in ("attn", "mlp")]
    figure = path_picture.draw_paths(
        layers, paths, name_node=lambda layer, node: f"h{node // 64}.{node % 64}" if "attn" in layer else str(node)
    )
    lay_out(figure)
    axes = figure.axes[0]
    boxes = [text.get_bbox_patch().get_window_extent() for text in axes.texts]
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
    assert any(text.get_text().startswith("h") for text in axes.texts)
    assert axes.get_xlabel() == "block (a: its attention)"


def test_neurons_that_are_not_sure_are_hollow():
    paths = {"a": [[1], [2], [3]], "b": [[1], [4], [3]]}
    sure = {"a": [[True], [False], [False]], "b": [[False], [True], [False]]}
    axes = path_picture.draw_paths([f"blocks.{n}.mlp" for n in range(3)], paths, sure=sure).axes[0]
    drawn = [line for line in axes.get_lines() if len(line.get_xdata())]
    assert [(line.get_xdata()[0], line.get_markerfacecolor() == "white") for line in drawn] == [(1, True), (1, False)]
    frames = {text.get_text(): text.get_bbox_patch().get_linestyle() for text in axes.texts}
    assert frames["1"] in ("-", "solid")  # sure for one of its classes
    assert frames["3"] not in ("-", "solid")


def test_the_line_of_a_class_passes_its_neurons():
    figure = path_picture.draw_paths(FFNS, PATHS)
    axes = figure.axes[0]
    height_of = {(round(t.get_position()[0]), t.get_text()): t.get_position()[1] for t in axes.texts}
    colour = to_rgba(style.COLOURS[0])
    ends = [patch.get_path().vertices[-1] for patch in axes.patches if patch.get_edgecolor() == colour]
    heights = {round(x): y for x, y in ends}
    assert heights[0] == pytest.approx(height_of[0, "1"], abs=0.05)
    assert heights[2] == pytest.approx(height_of[2, "7"], abs=0.05)
    row = dict(zip([t.get_text() for t in axes.get_yticklabels()], axes.get_yticks(), strict=True))["tench"]
    assert heights[1] == heights[3] == pytest.approx(row)


def test_classes_that_share_neurons_are_neighbours():
    same, other = [[1], [2], [3]], [[4], [5], [6]]
    order = path_picture.order_classes({"a": same, "b": other, "c": same, "d": other})
    assert sorted(map(sorted, (order[:2], order[2:]))) == [["a", "c"], ["b", "d"]]


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ({"a": [[1]] * 4}, "needs 2 to 10 classes"),
        (dict.fromkeys("abcdefghijk", [[1]] * 4), "needs 2 to 10 classes, to tell them apart, got 11"),
        ({"a": [[1]] * 4, "b": [[1]] * 3}, "the path of 'b' covers 3 layers, not 4"),
        ({"a": [[1]] * 4, "b": [[1], [], [1], [1]]}, "the path of 'b' has no neuron in an FFN"),
        ({"a": [[1]] * 4, "b": [[1, 1]] * 4}, "names a neuron twice"),
    ],
)
def test_paths_refuse(paths, message):
    with pytest.raises(vitprune.VitpruneError, match=message):
        path_picture.draw_paths(FFNS, paths)


# Top images


@pytest.mark.parametrize("count", [1, 5, 8])
def test_top_images_stand_in_order_with_their_values(count):
    images = [(np.full((20, 30, 3), 10 * place, np.uint8), f"class {place}", 1 - place) for place in range(count)]
    figure = top_images.draw_top_images(images)
    panels = [panel for panel in figure.axes if panel.images]
    assert [int(panel.images[0].get_array()[0, 0, 0]) for panel in panels] == [10 * place for place in range(count)]
    captions = [panel.texts[0].get_text().replace("−", "-") for panel in panels]
    assert captions == [f"class {place}\nactivation {1 - place}" for place in range(count)]
    assert not any(panel.axison for panel in figure.axes)


def test_photos_become_thumbnails():
    picture = Image.new("L", (4000, 1000), 200)
    shown = top_images.draw_top_images([(picture, "a", 1.0)]).axes[0].images[0].get_array()
    assert shown.shape == (80, 320)
    assert picture.size == (4000, 1000)


# Curves


def test_curves_are_in_percent_and_in_order():
    axes = curve.draw_curve(make_curve_points(), max_drop=0.1).axes[0]
    dense, budget, obs, random = axes.get_lines()
    assert dense.get_ydata() == pytest.approx([80, 80])
    assert budget.get_ydata() == pytest.approx([70, 70])
    assert obs.get_xdata() == pytest.approx([30, 50])
    assert obs.get_ydata() == pytest.approx([70, 60])
    assert (obs.get_color(), obs.get_marker()) != (random.get_color(), random.get_marker())
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("FFN neurons removed (%)", "top-1 accuracy (%)")


def test_bench_bars_are_the_rows():
    speed, ratio = bench.draw_bench(make_bench_rows()).axes
    assert [bar.get_width() for bar in speed.patches] == [100, 140]
    assert [bar.get_width() for bar in ratio.patches] == [1.0, 1.4]
    assert [text.get_text().strip() for text in speed.texts] == ["100", "140"]
    assert ratio.get_xlabel().startswith("speed-up over dense (×)")


# Axes


def test_axes_of_many_ffns_leave_names_out():
    many = [f"blocks.{index}.mlp" for index in range(200)]
    figure = utilisation.draw_utilisation(many, [40] * 200, num_used=[1] * 200, effective=[1] * 200)
    lay_out(figure)
    boxes = [label.get_window_extent() for label in figure.axes[0].get_xticklabels()]
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))
