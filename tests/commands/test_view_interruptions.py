"""Readings that are interrupted, in Chromium: closed pages, lost answers, edits while sending, several readers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vitmodel.cli import main
from vitmodel.config import ViewConfig
from vitmodel.viewer.exams import Exam
from vitmodel.viewer.readings import Reading, ReadingStore
from vitmodel.viewer.scores_folder import read_scores_folder

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: make test-browser installs it")
pytestmark = pytest.mark.browser
Page = Any
Room = tuple[str, Path]
"""Address and file of the readings."""


@pytest.fixture(scope="module")
def scores(run: Path, release: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("interrupted") / "scores"
    assert main(["predict", str(run / "package"), str(release), str(out)]) == 1
    return out


@pytest.fixture(scope="module")
def exams(scores: Path) -> list[Exam]:
    return [exam for exam in read_scores_folder(scores) if exam.status == "ok" and len(exam.breasts) == 2]


@pytest.fixture
def room(scores: Path, serve: Callable[[ViewConfig], str], tmp_path: Path) -> Room:
    file = tmp_path / "readings.jsonl"
    return serve(ViewConfig(scores=scores, readings=file)), file


def stored(room: Room) -> list[Reading]:
    return ReadingStore(room[1]).all()


def name_reader(page: Page, room: Room, name: str) -> None:
    page.goto(room[0])
    page.fill("input[name=name]", name)
    page.keyboard.press("Enter")
    sync_api.expect(page.locator("header")).to_contain_text(f"Reader: {name}")


def open_exam(page: Page, room: Room, exam: Exam) -> None:
    page.goto(f"{room[0]}/exams/{exam.key}")
    page.wait_for_selector("figure[data-place]")


def fill_in(page: Page, right: str, left: str, note: str = "") -> None:
    page.select_option("fieldset[data-side=R] .birads", right)
    page.select_option("fieldset[data-side=L] .birads", left)
    page.fill("textarea", note)


def expect_text(page: Page, selector: str, text: str) -> None:
    sync_api.expect(page.locator(selector)).to_contain_text(text, timeout=10_000)


def crash(page: Page) -> Page:
    """Close a page without asking it, and return a new one of the same browser."""
    context = page.context
    page.close()
    return context.new_page()


def wait_until_sent(page: Page) -> None:
    """Wait until the browser keeps no reading."""
    for _ in range(100):
        if page.evaluate("localStorage.length") == 0:
            return
        page.wait_for_timeout(100)
    raise AssertionError("a reading was not sent")


def draw_box(page: Page) -> None:
    page.locator("figure").first.focus()
    page.keyboard.press("x")
    box = page.locator("figure", has_text="L-CC").bounding_box()
    page.mouse.move(box["x"] + 20, box["y"] + 60)
    page.mouse.down()
    page.mouse.move(box["x"] + 60, box["y"] + 120, steps=3)
    page.mouse.up()


def test_a_reading_that_was_not_stored_survives_a_closed_page(
    open_page: Callable[..., Page], room: Room, exams: list[Exam]
) -> None:
    page = open_page()
    name_reader(page, room, "Ann")
    open_exam(page, room, exams[0])
    fill_in(page, "2", "4B", "<b>mass</b>")
    page.select_option("fieldset[data-side=L] .agreement", "no")
    draw_box(page)
    page.wait_for_timeout(100)
    page = crash(page)
    open_exam(page, room, exams[0])
    expect_text(page, "#reading-state", "Not stored yet; this browser kept it.")
    assert page.locator("fieldset[data-side=L] .birads").input_value() == "4B"
    assert page.locator("textarea").input_value() == "<b>mass</b>"
    assert not stored(room)
    page.click("#store")
    expect_text(page, "#reading-state", "Stored at")
    (reading,) = stored(room)
    assert (reading.note, reading.breasts["L"].agrees, len(reading.boxes)) == ("<b>mass</b>", False, 1)
    assert (reading.seconds or 0) >= (reading.active_seconds or 0) > 0
    page = crash(page)
    open_exam(page, room, exams[0])
    expect_text(page, "#reading-state", "Stored at")
    assert page.evaluate("localStorage.length") == 0, "a stored reading stays in the browser"


def test_a_kept_reading_can_be_discarded(open_page: Callable[..., Page], room: Room, exams: list[Exam]) -> None:
    page = open_page()
    name_reader(page, room, "Ann")
    open_exam(page, room, exams[0])
    fill_in(page, "5", "5")
    page = crash(page)
    open_exam(page, room, exams[0])
    page.click("#reading-state button")
    assert page.locator("fieldset[data-side=R] .birads").input_value() == ""
    page = crash(page)
    open_exam(page, room, exams[0])
    assert page.locator("#reading-state").inner_text() == ""


@pytest.mark.parametrize("next_page", ["its exam", "another exam", "the worklist"])
def test_a_reading_that_was_stored_without_a_connection_is_sent_by_the_next_page(
    open_page: Callable[..., Page], room: Room, exams: list[Exam], next_page: str
) -> None:
    page = open_page()
    name_reader(page, room, "Ann")
    open_exam(page, room, exams[0])
    fill_in(page, "1", "3")
    page.context.route("**/readings", lambda route: route.abort())
    page.click("#store")
    expect_text(page, "#state", "connection")
    page.context.set_offline(True)
    page.context.unroute("**/readings")
    page = crash(page)
    page.context.set_offline(False)
    address = {"its exam": f"/exams/{exams[0].key}", "another exam": f"/exams/{exams[1].key}", "the worklist": "/"}
    page.goto(room[0] + address[next_page])
    wait_until_sent(page)
    (reading,) = stored(room)
    assert (reading.reader, reading.exam, reading.breasts["L"].birads) == ("Ann", exams[0].ids, "3")


def test_a_reading_whose_answer_was_lost_is_stored_once(
    open_page: Callable[..., Page], room: Room, exams: list[Exam]
) -> None:
    page = open_page()
    name_reader(page, room, "Ann")
    open_exam(page, room, exams[0])
    fill_in(page, "1", "1")

    def lose_answer(route: Any) -> None:
        route.fetch()
        route.abort()

    page.context.route("**/readings", lose_answer)
    page.click("#store")
    expect_text(page, "#state", "connection")
    assert len(stored(room)) == 1
    page.context.unroute("**/readings")
    page = crash(page)
    open_exam(page, room, exams[0])
    expect_text(page, "#reading-state", "Stored at")
    assert page.evaluate("localStorage.length") == 0
    assert len(stored(room)) == 1


def test_what_is_entered_while_a_reading_is_sent_stays(
    open_page: Callable[..., Page], room: Room, exams: list[Exam]
) -> None:
    page = open_page()
    name_reader(page, room, "Ann")
    open_exam(page, room, exams[0])
    fill_in(page, "1", "1", "first")
    page.route("**/readings", lambda route: route.abort())
    page.click("#store")
    expect_text(page, "#state", "connection")
    page.fill("textarea", "second thoughts")
    page.unroute("**/readings")
    sync_api.expect(page.locator("#state")).to_be_empty(timeout=10_000)
    expect_text(page, "#reading-state", "Not stored yet.")
    assert page.locator("textarea").input_value() == "second thoughts"
    assert [reading.note for reading in stored(room)] == ["first"]
    page = crash(page)
    open_exam(page, room, exams[0])
    assert page.locator("textarea").input_value() == "second thoughts"


def test_a_draft_is_shown_to_its_reader_only(open_page: Callable[..., Page], room: Room, exams: list[Exam]) -> None:
    page = open_page()
    name_reader(page, room, "Ann")
    open_exam(page, room, exams[0])
    fill_in(page, "5", "5", "of Ann")
    page.context.route("**/readings", lambda route: route.abort())
    page.click("#store")
    expect_text(page, "#state", "connection")
    page.context.set_offline(True)
    page.context.unroute("**/readings")
    page = crash(page)
    page.context.set_offline(False)
    page.context.clear_cookies()
    name_reader(page, room, "Bo")
    open_exam(page, room, exams[0])
    page.wait_for_timeout(300)
    assert page.locator("textarea").input_value() == ""
    assert not stored(room), "the reading of one reader was stored under the name of another"
    name_reader(page, room, "Ann")
    wait_until_sent(page)
    assert [reading.reader for reading in stored(room)] == ["Ann"]


def test_a_refused_reading_stays_a_draft_with_the_reason(
    browser: Any, scores: Path, serve: Callable[[ViewConfig], str], tmp_path: Path, exams: list[Exam]
) -> None:
    room = serve(ViewConfig(scores=scores, readings=tmp_path / "gone" / "readings.jsonl", reader="Ann")), tmp_path
    page = browser.new_context().new_page()  # its console may hold the server's error
    open_exam(page, room, exams[0])
    fill_in(page, "1", "1", "kept")
    page.click("#store")
    expect_text(page, "#reading-state", "Not stored: cannot write")
    page = crash(page)
    open_exam(page, room, exams[0])
    assert page.locator("textarea").input_value() == "kept"
    expect_text(page, "#reading-state", "Not stored yet; this browser kept it.")
    page.context.close()
