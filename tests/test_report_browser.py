"""The report in a real browser: Debian's chromium, headless, by file://."""

from __future__ import annotations

import io
import os
import re
import shutil

import pytest
from PIL import Image

from vitprune.report.page import write_report

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (pip install '.[test]')")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SHOWN = ("pruned", "evaluation", "run", "curve", "bench", "alone", "analysis")
PATIENCE_MS = 120_000  # of a machine that does other things at the same time
DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser():
    program = os.environ.get("VITPRUNE_BROWSER") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip(f"needs a browser ({', '.join(BROWSERS)}, or VITPRUNE_BROWSER)")
    with playwright.sync_playwright() as started:
        running = started.chromium.launch(executable_path=program)
        yield running
        running.close()


@pytest.fixture(scope="module")
def address(shown_folders, tmp_path_factory):
    path = tmp_path_factory.mktemp("browser") / "report.html"
    write_report([shown_folders[name] for name in SHOWN], path)
    return path.as_uri()


@pytest.fixture
def visit(browser, address):
    """Open the report; on leaving, nothing may have been fetched, said or thrown."""
    contexts = []

    def open_page(viewport, fragment="", **settings):
        context = browser.new_context(viewport=viewport, **settings)
        context.set_default_timeout(PATIENCE_MS)
        page = context.new_page()
        heard = []
        page.on("console", lambda message: heard.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: heard.append(str(error)))
        page.on("request", lambda asked: heard.append(asked.url) if not asked.url.startswith("data:") else None)
        page.goto(address + fragment)
        contexts.append((context, heard))
        return page

    yield open_page
    for context, heard in contexts:
        context.close()
        assert heard == [address]


def pixels_of(locator):
    locator.scroll_into_view_if_needed()
    image = Image.open(io.BytesIO(locator.screenshot())).convert("RGB")
    colours = image.getcolors(maxcolors=image.width * image.height)
    return len(colours), max(count for count, _colour in colours) / (image.width * image.height)


def test_figures_are_drawn(visit):
    page = visit(DESKTOP)
    figures = page.locator(".picture img")
    assert figures.count() >= 7
    for place in range(figures.count()):
        figure = figures.nth(place)
        assert figure.evaluate("image => image.complete && image.naturalWidth > 0 && image.naturalHeight > 0")
        num_colours, largest_share = pixels_of(figure)
        assert num_colours > 20, figure.get_attribute("alt")
        assert largest_share < 0.995, figure.get_attribute("alt")


def test_thumbnails_are_drawn(visit):
    page = visit(DESKTOP)
    shots = page.locator(".shot:visible .thumb")
    assert shots.count() > 0
    # They are decoded when they come near the screen.
    shots.first.scroll_into_view_if_needed()
    shots.first.evaluate("image => image.decode()")
    assert pixels_of(shots.first)[0] > 50


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_the_screen_and_the_words_can_be_read(viewport, scheme, visit):
    page = visit(viewport, color_scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    # Whatever is wider scrolls in a box of its own.
    beyond = page.evaluate(
        """() => [...document.querySelectorAll('main *')]
            .filter((one) => one.getBoundingClientRect().right > innerWidth + 1)
            .filter((one) => !one.closest('.scroll, .paper, pre'))
            .map((one) => one.outerHTML.slice(0, 80))"""
    )
    assert beyond == []
    ink, paper = (page.evaluate(f"getComputedStyle(document.body).{name}") for name in ("color", "backgroundColor"))
    light, dark = (
        sum(map(int, colour[4:-1].split(", "))) for colour in ((paper, ink) if scheme == "light" else (ink, paper))
    )
    assert light - dark > 3 * 150


def test_tables_are_sorted_by_click_and_by_key(visit):
    page = visit(DESKTOP)
    grid = page.locator("#evaluation-1-classes")

    def column(place):
        return [float(value) for value in grid.locator(f"tbody tr > :nth-child({place})").evaluate_all(
            "cells => cells.map(cell => cell.dataset.order)"
        )]  # fmt: skip

    heading = grid.locator("thead th", has_text="change")
    assert heading.get_attribute("aria-sort") == "ascending"
    assert column(2) == sorted(column(2))
    heading.get_by_role("button").click()
    assert heading.get_attribute("aria-sort") == "descending"
    assert column(2) == sorted(column(2), reverse=True)
    images = grid.locator("thead th", has_text="now")
    images.get_by_role("button").focus()
    page.keyboard.press("Enter")
    assert images.get_attribute("aria-sort") == "descending"
    assert heading.get_attribute("aria-sort") is None
    assert column(4) == sorted(column(4), reverse=True)
    page.keyboard.press("Space")
    assert column(4) == sorted(column(4))


def test_rows_without_a_value_stay_last(visit):
    """The dense model is not compared with itself: its row has no p."""
    page = visit(DESKTOP)
    column = page.locator("#curve-1-points thead th").all_inner_texts().index("p") + 1
    cells = page.locator(f"#curve-1-points tbody td:nth-child({column})")
    for _ in range(2):
        page.locator("#curve-1-points thead th", has_text="p").last.get_by_role("button").click()
        values = cells.all_inner_texts()
        assert values[-1] == ""
        assert all(values[:-1])


def test_links_land(visit):
    page = visit(DESKTOP)
    for part in page.locator("nav a").all():
        part.click()
        target = page.locator(part.get_attribute("href"))
        assert target.evaluate("one => one.getBoundingClientRect().top >= 0")
        assert target.evaluate("one => one.getBoundingClientRect().top < innerHeight")
    page.locator("#evaluation-1 .eyebrow a").click()
    page.locator("#evaluation-1-card[open] dl").wait_for(state="visible")


def test_a_class_leads_to_its_images_and_no_others(visit):
    page = visit(DESKTOP)
    link = page.locator("#evaluation-1-classes tbody td:nth-child(5) a").first
    wanted, name = int(link.inner_text()), link.locator("xpath=ancestor::tr/th").inner_text()
    link.click()
    output = page.locator("#evaluation-1-flipped output")
    playwright.expect(output).to_have_text(re.compile(rf"^{wanted} of \d+$"))
    shown = page.locator("#evaluation-1-flipped .shot:visible")
    assert shown.count() == wanted
    assert {shot.get_attribute("data-class") for shot in shown.all()} == {name}
    page.get_by_role("button", name="Clear").click()
    playwright.expect(output).to_have_text(re.compile(r"^\d+ images$"))
    assert shown.count() > wanted


def test_images_are_filtered_by_what_is_typed(visit):
    page = visit(DESKTOP)
    gallery = page.locator("#evaluation-1-flipped")
    total = int(gallery.locator("output").inner_text().split()[0])
    file = gallery.locator(".file").first.text_content()
    gallery.get_by_role("searchbox").fill(file.upper())
    assert gallery.locator("output").inner_text() == f"1 of {total}"
    assert gallery.locator(".shot:visible").count() == 1
    gallery.get_by_role("searchbox").fill("no such thing")
    assert gallery.locator("output").inner_text() == f"0 of {total}"


def test_an_address_with_a_fragment_opens_there(visit):
    page = visit(PHONE, fragment="#run-1-card")
    assert page.locator("#run-1-card").get_attribute("open") is not None
    playwright.expect(page.locator("#run-1-card > summary")).to_be_in_viewport()


def test_names_of_classes_do_not_run(visit):
    page = visit(DESKTOP)
    page.wait_for_timeout(200)
    assert page.title() != "broken"


def test_paper_shows_cards_unfolded_and_nothing_to_click(visit):
    page = visit(DESKTOP)
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("#run-1-card dl").is_visible()
    assert not page.locator("nav").is_visible()
    assert not page.locator(".filter").first.is_visible()
