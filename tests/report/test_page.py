"""The page of a report in headless Chromium: it loads whole and alone, sorts, fits a phone, and prints."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cat_rs.report import write_report

from .browser import Page, browser_page, find_browser
from .conftest import NO_TRIGGER, SEEDS, make_evaluation, scored, write_evaluation, write_front, write_training
from .test_html import HOSTILE, hostile

MANY = tuple(f"a sks cat on background {number}" for number in range(9))
PROGRAM = find_browser()
PHONE = 360

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no chromium or google-chrome on PATH")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with everything that a page can hold, some of it hostile."""
    folder = tmp_path_factory.mktemp("report")
    evaluation = write_evaluation(
        folder / "evaluation", hostile(scored(make_evaluation(HOSTILE, "CAT", "third", trigger=MANY)))
    )
    training = write_training(folder / "CAT", steps=50)
    write_front(training, scored(make_evaluation("x", pictures=False)), [0.5, 0.6, 0.55], best=20)
    write_report([evaluation, training], folder / "report", title=f"A report {HOSTILE}")
    return folder / "report" / "report.html"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser_page(str(PROGRAM), tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def page(browser: Page, file: Path) -> Page:
    """The page on a wide screen, freshly loaded."""
    browser.open(file, width=1280)
    return browser


def complaints(page: Page) -> list[Any]:
    """Errors and warnings of the console, and exceptions."""
    found = []
    for method, event in page.events:
        if (
            method == "Runtime.exceptionThrown"
            or (method == "Runtime.consoleAPICalled" and event["type"] in ("error", "warning", "assert"))
            or (method == "Log.entryAdded" and event["entry"]["level"] in ("error", "warning"))
        ):
            found.append(event)
    return found


def column(page: Page, table: str, number: int) -> list[str]:
    """The values of one column, from top to bottom."""
    rows = f"[...document.querySelector({json.dumps(table)}).tBodies[0].rows]"
    values: list[str] = page.evaluate(f"{rows}.map((row) => row.cells[{number}].dataset.value)")
    return values


def directions(page: Page, table: str) -> list[str]:
    """What each heading says of the order."""
    headings = f"[...document.querySelectorAll({json.dumps(table + ' th[aria-sort]')})]"
    values: list[str] = page.evaluate(f"{headings}.map((heading) => heading.ariaSort)")
    return values


def click(page: Page, selector: str) -> None:
    page.evaluate(f"document.querySelector({json.dumps(selector)}).click()")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, 1280])
def test_nothing_goes_wrong_while_it_loads(browser: Page, file: Path, width: int, dark: bool) -> None:
    browser.open(file, width=width, dark=dark)
    assert browser.evaluate("document.readyState") == "complete"
    assert complaints(browser) == []
    requested = {event["request"]["url"] for method, event in browser.events if method == "Network.requestWillBeSent"}
    assert {url for url in requested if not url.startswith("data:")} == {file.as_uri()}


def test_nothing_from_the_files_runs(page: Page) -> None:
    assert page.evaluate("typeof window.hacked") == "undefined"
    assert page.evaluate("document.title") == f"A report {HOSTILE}"
    assert HOSTILE in page.evaluate("document.querySelector('#pictures').textContent")


def test_every_picture_loads(page: Page) -> None:
    widths = page.evaluate("[...document.images].map((image) => image.naturalWidth)")
    assert len(widths) == 2 + 4 * len(SEEDS) * (len(MANY) + len(NO_TRIGGER))
    assert set(widths) == {16}


def test_charts_have_a_size_and_the_pages_colours(page: Page) -> None:
    boxes = page.evaluate(
        "[...document.querySelectorAll('svg')].map((chart) => [chart.clientWidth, chart.clientHeight])"
    )
    assert len(boxes) == 6
    assert all(width > 200 and height > 100 for width, height in boxes)
    colours = "[...document.querySelectorAll('svg path')].map((path) => getComputedStyle(path).stroke)"
    assert "rgb(29, 78, 216)" in page.evaluate(colours)


def test_a_heading_sorts_by_number(page: Page) -> None:
    table = "#scores table"
    heading = f"{table} th[data-column='3'] button"
    assert set(directions(page, table)) == {"none"}
    click(page, heading)
    values = column(page, table, 3)
    known = [float(value) for value in values if value]
    # As text, "9e-05" would come after "0.2".
    assert known == sorted(known)
    assert len(known) > 4
    assert not any(values[len(known) :]), "what has no value is last"
    assert directions(page, table).count("ascending") == 1
    click(page, heading)
    values = column(page, table, 3)
    assert [float(value) for value in values if value] == sorted(known, reverse=True)
    assert not any(values[len(known) :])
    assert page.evaluate(f"document.querySelector({json.dumps(heading)}).parentElement.ariaSort") == "descending"
    assert directions(page, table).count("none") == len(directions(page, table)) - 1


def test_numbers_are_not_sorted_as_text(page: Page) -> None:
    table = "#scores table"
    cells = f"[...document.querySelectorAll({json.dumps(table + ' tbody tr')})].map((row) => row.cells[3])"
    page.evaluate(f"{cells}.forEach((cell, index) => {{ cell.dataset.value = [10, 9, -1, 2e-5, 100][index % 5]; }})")
    click(page, f"{table} th[data-column='3'] button")
    values = [float(value) for value in column(page, table, 3)]
    assert values == sorted(values)


def test_rows_stay_whole(page: Page) -> None:
    table = "#prompts table"
    before = page.evaluate(f"[...document.querySelector('{table}').tBodies[0].rows].map((row) => row.textContent)")
    click(page, f"{table} th[data-column='0'] button")
    names = column(page, table, 0)
    after = page.evaluate(f"[...document.querySelector('{table}').tBodies[0].rows].map((row) => row.textContent)")
    assert names == page.evaluate(
        f"{json.dumps(names)}.sort((a, b) => a.localeCompare(b, undefined, {{ numeric: true }}))"
    )
    assert sorted(before) == sorted(after)
    assert before != after


def test_headings_are_reached_by_keyboard(page: Page) -> None:
    table = "#prompts table"
    assert directions(page, table).index("ascending") == 2
    page.evaluate(f"document.querySelector(\"{table} th[data-column='3'] button\").focus()")
    page.press("Enter", 13)
    assert directions(page, table).index("ascending") == 3
    page.press("Tab", 9)
    assert page.evaluate("document.activeElement.parentElement.dataset.column") == "4"


@pytest.mark.parametrize(
    ("folding", "items", "few", "many"),
    [
        ("#pictures .half:first-child .folding", "tbody", 4, len(MANY)),
        ("#prompts article:first-of-type .folding", "tbody tr", 10, len(MANY) + len(NO_TRIGGER)),
    ],
    ids=["pictures", "rows"],
)
def test_long_lists_unfold(page: Page, folding: str, items: str, few: int, many: int) -> None:
    found = f"[...document.querySelectorAll('{folding} {items}')].filter((item) => item.offsetHeight > 0).length"
    button = f"document.querySelector('{folding} .unfold')"
    assert page.evaluate(found) == few
    assert page.evaluate(f"{button}.textContent") == f"Show all {many} prompts"
    assert page.evaluate(f"{button}.ariaExpanded") == "false"
    page.evaluate(f"{button}.click()")
    assert page.evaluate(found) == many
    assert page.evaluate(f"{button}.ariaExpanded") == "true"
    page.evaluate(f"{button}.click()")
    assert page.evaluate(found) == few


def test_it_fits_a_phone(browser: Page, file: Path) -> None:
    browser.open(file, width=PHONE)
    assert browser.evaluate("document.documentElement.scrollWidth") <= PHONE
    wide = "[...document.querySelectorAll('img, svg')].filter((each) => each.getBoundingClientRect().width > 360)"
    assert browser.evaluate(f"{wide}.length") == 0
    # Tables are wider than the phone, and scroll in boxes of their own.
    scroll = "[...document.querySelectorAll('div.scroll')].map((box) => box.scrollWidth > box.clientWidth)"
    assert any(browser.evaluate(scroll))


def test_it_prints(page: Page) -> None:
    printed = base64.b64decode(page.call("Page.printToPDF", printBackground=True)["data"])
    assert printed.startswith(b"%PDF-")
    page.call("Emulation.setEmulatedMedia", media="print")
    sticky = "[...document.querySelectorAll('*')].filter((each) => getComputedStyle(each).position === 'sticky')"
    assert page.evaluate(f"{sticky}.length") == 0
    assert page.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
    page.call("Emulation.setEmulatedMedia", media="")
