"""The report as a file: nothing from outside, nothing that runs, every link lands, and the numbers are the folders'."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_folders import CLASSES, NUM_PER_CLASS

import vitprune
from vitprune.cli import main
from vitprune.evaluation.front import Front, FrontRow, save_front
from vitprune.files import open_resumable
from vitprune.report.artefacts import KINDS
from vitprune.report.page import write_report
from vitprune.report.page_blocks import Cell, Column, Grid, Row, grid_of, without_empty
from vitprune.report.sections import evaluation_section as evaluation_module
from vitprune.report.text import percent
from vitprune.seal import seal
from vitprune.table import Table

ROOT = Path(__file__).resolve().parents[1]
SHOWN = ("pruned", "evaluation", "run", "curve", "bench", "alone", "analysis")


class Page(HTMLParser):
    """Every element with its attributes, and the text between them."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.text = [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text.append(data)

    def values(self, name, tag=None):
        return [found[name] for each, found in self.elements if name in found and tag in (None, each)]


@pytest.fixture
def folders(shown_folders):
    return shown_folders


@pytest.fixture(scope="module")
def html(shown_folders, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    assert main(["report", *(str(shown_folders[name]) for name in SHOWN), "-o", str(path)]) == 0
    return path.read_text()


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


def test_every_link_lands_on_one_place(page):
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    targets = {link.removeprefix("#") for link in page.values("href", "a")}
    assert targets <= set(ids)
    # The class's path, its accuracy, its images, and the card of every folder.
    for kind in ("run-1-class-4", "evaluation-1-class-4", "evaluation-1-lost-", "pruned-1-card", "analysis-1-card"):
        assert any(target.startswith(kind) for target in targets), kind


def test_nothing_is_fetched_and_nothing_of_a_user_runs(page, html):
    for name in ("src", "href", "data", "action", "poster", "srcset"):
        assert all(re.match(r"data:|#", value) for value in page.values(name)), name
    for _tag, found in page.elements:
        assert not [name for name in found if name.startswith("on") or name == "style"]
    assert [tag for tag, _found in page.elements if tag in ("script", "style")] == ["style", "script"]
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org)", re.sub(r"data:[^\"]+", "", html))


def test_the_policy_allows_its_own_script_and_style_alone(page, html):
    (policy,) = [
        found["content"] for tag, found in page.elements if found.get("http-equiv") == "Content-Security-Policy"
    ]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "data:"
    for tag, rule in (("style", "style-src"), ("script", "script-src")):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert rules[rule] == f"'sha256-{digest}'"


def test_names_are_shown_as_they_are(page):
    assert {name for name in CLASSES if name in page.text} == set(CLASSES)
    assert not [found for tag, found in page.elements if tag == "img" and "onerror" in found]


def test_the_numbers_are_those_of_the_evaluation(page, folders):
    measured = json.loads((folders["evaluation"] / "evaluation.json").read_text())
    text = " ".join(page.text)
    for share in (measured["top1"], measured["against"]["top1"]):
        assert percent(share) in text
    flips = len(measured["against"]["lost_images"]) + len(measured["against"]["gained_images"])
    assert flips > 0
    assert page.values("class", "li").count("shot lost") == len(measured["against"]["lost_images"])
    assert page.values("class", "li").count("shot gained") == len(measured["against"]["gained_images"])
    for name in measured["against"]["lost_images"]:
        assert name in page.text


def test_cards_tell_where_everything_comes_from(page, folders):
    text = "\n".join(page.text)
    run, evaluation = (json.loads((folders[name] / f"{name}.json").read_text()) for name in ("run", "evaluation"))
    assert re.search(rf"vitprune discover \S+ --data .*{re.escape(str(folders['run']))}", text)
    for told in (run["weights_sha256"], run["images_sha256"], evaluation["images_sha256"], str(folders["val"])):
        assert told in page.text
    assert text.count("vitprune 0.") == len(SHOWN)
    assert f"{5 * NUM_PER_CLASS} images" in text


def test_a_folder_without_a_card_is_said_to_have_none(folders, tmp_path):
    shutil.copytree(folders["bench"], tmp_path / "bench")
    (tmp_path / "bench" / "card.json").unlink()
    write_report([tmp_path / "bench"], tmp_path / "r.html")
    assert "not recorded: a program wrote this folder" in (tmp_path / "r.html").read_text()


def test_an_analysis_is_shown_of_the_first_run_whatever_the_order_in_the_file(page, folders):
    """Names in the file are sorted, so that activation stands before jas, which alone has similarities of classes."""
    content = json.loads((folders["analysis"] / "analysis.json").read_text())
    assert [*content["similarity"]] == ["activation", "jas"] == sorted(run["method"] for run in content["runs"])
    stems = {path.stem for path in (folders["analysis"] / "figures").iterdir()}
    shown = {found.removeprefix("analysis-1-") for found in page.values("id", "figure") if found.startswith("analysis")}
    assert "class_similarity_visits" in shown
    # What the run's own part shows is not shown twice.
    assert shown == stems - {"utilisation", "violins", "class_paths"}
    shares = content["similarity"]["jas"]["images"]
    assert f"share {percent(shares['intra'])} of their path neurons" in " ".join(page.text)


def test_figures_have_a_size_and_say_what_they_show(page):
    figures = [found for tag, found in page.elements if tag == "img" and found["src"].startswith("data:image/svg")]
    assert len(figures) >= 7
    for found in figures:
        assert found["alt"]
        assert int(found["width"]) > 100 < int(found["height"])
        assert b"<svg" in base64.b64decode(found["src"].partition(",")[2])


def test_the_same_folders_give_the_same_bytes(folders, html, tmp_path):
    write_report([folders[name] for name in SHOWN], tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text() == html


def test_images_that_are_gone_are_said_to_be(folders, tmp_path):
    evaluation = tmp_path / "evaluation"
    shutil.copytree(folders["evaluation"], evaluation)
    content = json.loads((evaluation / "evaluation.json").read_text())
    (evaluation / "evaluation.json").write_text(json.dumps(seal({**content, "data": str(tmp_path / "gone")})))
    written = write_report([evaluation], tmp_path / "r.html")
    flips = len(content["against"]["lost_images"]) + len(content["against"]["gained_images"])
    assert (written.num_absent, written.num_thumbnails) == (flips, 0)
    text = " ".join(Page((tmp_path / "r.html").read_text()).text)
    assert f"no longer there ({tmp_path / 'gone'})" in text


def test_only_so_many_images_are_shown_and_every_class_has_some(folders, tmp_path, monkeypatch):
    measured = json.loads((folders["evaluation"] / "evaluation.json").read_text())["against"]
    lost, gained = measured["lost_images"], measured["gained_images"]
    classes = {name.split("/")[0] for name in lost}
    room = len(classes) + 1
    assert len(lost) > room
    monkeypatch.setattr(evaluation_module, "MOST_FLIPPED", round(room * (len(lost) + len(gained)) / len(lost)))
    written = write_report([folders["evaluation"]], tmp_path / "r.html")
    page = Page((tmp_path / "r.html").read_text())
    assert written.num_thumbnails < len(lost) + len(gained)
    assert f"{written.num_thumbnails} of {len(lost) + len(gained)} are shown" in " ".join(page.text)
    shown = [found["data-class"] for tag, found in page.elements if found.get("class") == "shot lost"]
    assert set(shown) == classes


@pytest.mark.parametrize("name", SHOWN)
def test_every_kind_makes_a_page_of_its_own(name, folders, tmp_path):
    written = write_report([folders[name]], tmp_path / "r.html")
    page = Page((tmp_path / "r.html").read_text())
    assert {link.removeprefix("#") for link in page.values("href", "a")} <= set(page.values("id"))
    assert written.artefacts[0][1] == folders[name].name
    assert written.size_bytes == (tmp_path / "r.html").stat().st_size < 3e6


def test_path_neurons_that_were_removed_are_struck_through(page, folders):
    plan, run = vitprune.read_plan(folders["pruned"]), vitprune.load_run(folders["run"])
    expected = sum(
        not plan.keep[ffn][int(path[layer, 0])]
        for path in vitprune.class_paths(run.found).values()
        for layer, ffn in enumerate(run.found.layers)
    )
    assert sum("removed" in found.split() for found in page.values("class", "td")) == expected > 0


def test_other_folders_are_refused(folders, tmp_path, capsys, saved_vit):
    cases = (
        (
            [folders["train"]],
            "nothing that a report shows; it takes folders of these kinds: evaluation (evaluation.json)",
        ),
        ([saved_vit], "nothing that a report shows"),
        ([tmp_path / "absent"], "no such folder"),
        ([folders["run"], folders["run"]], "is named twice"),
    )
    for given, message in cases:
        assert main(["report", *map(str, given), "-o", str(tmp_path / "r.html")]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert message in line
        assert not (tmp_path / "r.html").exists()
    assert main(["report", str(folders["run"]), "-o", str(tmp_path / "r.pdf")]) == 2
    assert "end the output in .html" in capsys.readouterr().err
    (tmp_path / "r.html").write_text("mine")
    assert main(["report", str(folders["run"]), "-o", str(tmp_path / "r.html")]) == 2
    assert "add --overwrite" in capsys.readouterr().err


def test_a_front_says_which_speed_is_had_by_what(folders, tmp_path):
    """Of made-up rows: the sentences name the cheapest of each kind that is as fast, and the table has all."""
    request = json.loads((folders["curve"] / "request.json").read_text())["request"]
    request |= {"speedups": [1.5, 2.0, 3.0], "parts": ["ffn", "tokens"]}
    shared = {"speedup_low": 0.9, "speedup_high": 4.0, "macs_share": 0.5, "top1_low": 0.6, "top1_high": 0.9}
    shared |= {"backend": "onnxruntime-cpu", "drop_bound": 0.1}
    made = [
        ("dense", "", "float32", 1.0, 0.86, "on"),
        ("budget", "1.5x", "float32", 1.52, 0.85, "on"),
        ("budget", "2x", "int8", 1.99, 0.83, "on"),
        ("pixels", "160 x 160", "float32", 2.2, 0.70, "below"),
        ("merging", "39, 39, 39", "int8", 2.5, 0.84, "above"),
    ]
    rows = tuple(
        FrontRow(lever=lever, name=name, precision=precision, speedup=speedup, predicted_speedup=None, top1=top1,
                 drop=0.86 - top1, place=place, **shared)
        for lever, name, precision, speedup, top1, place in made
    )  # fmt: skip
    folder = open_resumable(tmp_path / "front", request, owned=frozenset(), overwrite=False)
    save_front(Front(rows, {"4x, int8": "beyond what parts give"}, {}, (1, 8), 100, request), folder)
    assert main(["report", str(folder), "-o", str(tmp_path / "r.html")]) == 0
    page = Page((tmp_path / "r.html").read_text())
    text = " ".join(" ".join(page.text).split())
    assert "at many speeds" in text
    assert "At 2.00 ×: as fast as asked for, 3.0 points less (int8); without a budget, at best 2.0 points less" in text
    assert "At 3.00 ×: nothing was pruned for it; without a budget, nothing is as fast." in text
    assert "Above the front: tokens merged in equal steps (39, 39, 39), int8 (2.50 ×)." in text
    assert "4x, int8: not measured (beyond what parts give)." in text
    assert not re.search(r"https?://(?!www\.w3\.org)", (tmp_path / "r.html").read_text())


def test_a_figure_that_is_missing_is_asked_for(folders, tmp_path):
    shutil.copytree(folders["curve"], tmp_path / "curve")
    (tmp_path / "curve" / "curve.svg").unlink()
    with pytest.raises(vitprune.VitpruneError, match="has no curve.svg; write it again"):
        write_report([tmp_path / "curve"], tmp_path / "r.html")


def test_folders_of_one_name_are_told_apart(folders, tmp_path):
    shutil.copytree(folders["run"], tmp_path / "other" / "run")
    written = write_report([folders["run"], tmp_path / "other" / "run"], tmp_path / "r.html")
    assert [name for _kind, name, _folder in written.artefacts] == [f"{folders['run'].parent.name}/run", "other/run"]


def test_tables_keep_what_is_absent_apart():
    table = Table("t", ("name", "value", "count"), (("a", 0.5, 1200), ("b", None, 3)), "note")
    grid = grid_of(table, id="g")
    assert [column.numeric for column in grid.columns] == [False, True, True]
    assert [cell.text for cell in grid.rows[0].cells] == ["a", "0.5", "1,200"]
    assert grid.rows[1].cells[1] == Cell("")
    empty = Grid(
        "g", "t", (Column("a"), Column("b"), Column("c")), (Row((Cell("1"), Cell(""), Cell("2"))),), "", (2, True)
    )
    kept = without_empty(empty)
    assert ([column.title for column in kept.columns], kept.sorted_by) == (["a", "c"], (1, True))


def test_every_file_that_is_no_code_is_packaged():
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    packaged = {
        path
        for package, globs in settings.items()
        for glob in globs
        for path in (ROOT / package.replace(".", "/")).glob(glob)
    }
    others = {path for path in (ROOT / "vitprune").rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert others == packaged
    assert {path.name for path in packaged} >= {"report.html.j2", "report.css", "report.js"}


def test_every_kind_of_folder_is_recognised_by_a_file_of_its_own():
    markers = [kind.marker for kind in KINDS.values()]
    assert len(set(markers)) == len(markers)
