"""Exams other than four views in Chromium: one view, missing views, eight views, no sides, refused images, no model."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from vitmodel.cli import main
from vitmodel.config import ViewConfig
from vitmodel.viewer.exams import Exam
from vitmodel.viewer.scores_folder import read_scores_folder

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: make test-browser installs it")
pytestmark = pytest.mark.browser
Page = Any
Change = Callable[[pd.DataFrame], pd.DataFrame]
STANDARD = ["R-CC", "L-CC", "R-MLO", "L-MLO"]


@pytest.fixture(scope="module")
def scores(run: Path, release: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("odd") / "scores"
    assert main(["predict", str(run / "package"), str(release), str(out)]) == 1
    return out


@pytest.fixture(scope="module")
def exams(scores: Path) -> list[Exam]:
    """Return the exams of four views without refused images."""
    return [exam for exam in read_scores_folder(scores) if exam.views == STANDARD and exam.status == "ok"]


@pytest.fixture
def open_exam(
    scores: Path, exams: list[Exam], tmp_path: Path, serve: Callable[[ViewConfig], str], open_page: Callable[..., Page]
) -> Callable[..., Page]:
    """Return a function that opens the first exam of `exams`, after its tables were changed."""

    def open_exam(change_images: Change, change_breasts: Change = lambda table: table, patient: str = "") -> Page:
        folder = Path(shutil.copytree(scores, tmp_path / "scores"))
        for name, change in (("scores.csv", change_images), ("breast_scores.csv", change_breasts)):
            change(pd.read_csv(folder / name, dtype=str)).to_csv(folder / name, index=False)
        wanted = patient or exams[0].patient_id
        exam = next(exam for exam in read_scores_folder(folder) if exam.patient_id == wanted)
        page = open_page()
        page.goto(f"{serve(ViewConfig(scores=folder, reader='Ann'))}/exams/{exam.key}")
        page.wait_for_selector("#views figure")
        page.wait_for_load_state("networkidle")
        page.wait_for_timeout(300)
        return page

    return open_exam


def without(exam: Exam, *views: str) -> Change:
    """Return a change that removes views of an exam."""

    def change(table: pd.DataFrame) -> pd.DataFrame:
        return table[
            ~((table["patient_id"] == exam.patient_id) & (table["laterality"] + "-" + table["view"]).isin(views))
        ]

    return change


def captions(page: Page) -> list[str]:
    return [caption.split()[0] for caption in page.locator("#views figcaption").all_inner_texts()]


def brightest(page: Page, number: int) -> int:
    """Return the brightest grey value of a figure's canvas."""
    script = """figure => { const canvas = figure.querySelector("canvas");
        return canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data
            .reduce((most, value, index) => index % 4 < 3 ? Math.max(most, value) : most, 0); }"""
    return page.locator("#views figure").nth(number).evaluate(script)


def test_a_single_view_has_the_whole_window(open_exam: Callable[..., Page], exams: list[Exam]) -> None:
    page = open_exam(without(exams[0], "L-CC", "R-MLO", "L-MLO"))
    assert captions(page) == ["R-CC"]
    figure, views = (page.locator(place).bounding_box() for place in ("#views figure", "#views"))
    assert figure["width"] == pytest.approx(views["width"], abs=4)
    assert brightest(page, 0) > 50


def test_the_place_of_a_missing_view_stays_empty_so_that_chest_walls_meet(
    open_exam: Callable[..., Page], exams: list[Exam]
) -> None:
    page = open_exam(without(exams[0], "R-CC", "L-MLO"))
    assert captions(page) == STANDARD
    assert page.locator("#views figure.empty figcaption").all_inner_texts() == ["R-CC none", "L-MLO none"]
    views = page.locator("#views").bounding_box()
    left, right = (page.locator("#views figure").nth(number).bounding_box() for number in (1, 2))
    assert left["x"] == pytest.approx(views["x"] + views["width"] / 2, abs=4)
    assert right["x"] == pytest.approx(views["x"], abs=4)
    page.keyboard.press("5")
    page.wait_for_timeout(200)
    assert captions(page) == ["L-CC"], "a side without any image needs no empty place"


def test_another_view_of_the_side_takes_the_place_of_a_missing_one(
    open_exam: Callable[..., Page], exams: list[Exam]
) -> None:
    def rename(table: pd.DataFrame) -> pd.DataFrame:
        rows = (table["patient_id"] == exams[0].patient_id) & (table["view"] == "MLO") & (table["laterality"] == "L")
        return table.assign(view=table["view"].mask(rows, "ML"))

    assert captions(open_exam(rename)) == ["R-CC", "L-CC", "R-MLO", "L-ML"]


def with_further_views(exams: list[Exam]) -> tuple[Change, Change]:
    """Return changes of images and breasts that give the first exam the images of the second as further views."""
    first, second = (exam.patient_id for exam in exams[:2])
    others = {"CC": "XCCL", "MLO": "LM"}

    def join(table: pd.DataFrame) -> pd.DataFrame:
        rows = table["patient_id"] == second
        patients = table["patient_id"].replace(second, first)
        return table.assign(view=table["view"].mask(rows, table["view"].map(others)), patient_id=patients)

    return join, lambda table: table[table["patient_id"] != second]


def test_of_eight_views_the_standard_ones_hang_and_the_others_wait_with_a_thumbnail(
    open_exam: Callable[..., Page], exams: list[Exam]
) -> None:
    page = open_exam(*with_further_views(exams))
    assert captions(page) == STANDARD
    buttons = page.locator("#strip button")
    assert sorted(text.strip() for text in buttons.all_inner_texts()) == ["L-LM", "L-XCCL", "R-LM", "R-XCCL"]
    sync_api.expect(page.locator("#strip canvas")).to_have_count(4)
    wanted = buttons.first.inner_text().strip()
    page.locator("#views figure").nth(2).focus()
    buttons.first.click()
    page.wait_for_load_state("networkidle")
    page.wait_for_timeout(300)
    assert captions(page) == ["R-CC", "L-CC", wanted, "L-MLO"]
    assert buttons.first.inner_text().strip() == "R-MLO"
    assert brightest(page, 2) > 50


def test_an_exam_without_sides_is_shown_and_read(open_exam: Callable[..., Page], exams: list[Exam]) -> None:
    def forget(table: pd.DataFrame) -> pd.DataFrame:
        return table.assign(laterality=table["laterality"].mask(table["patient_id"] == exams[0].patient_id, ""))

    def one_breast(table: pd.DataFrame) -> pd.DataFrame:
        return forget(table).drop_duplicates(["patient_id", "laterality"])

    page = open_exam(forget, one_breast)
    assert sorted(captions(page)) == ["?-CC", "?-CC", "?-MLO", "?-MLO"]
    assert min(brightest(page, number) for number in range(4)) > 50
    assert "Breast of unknown side" in page.locator("#breasts").inner_text()
    page.select_option("fieldset[data-side=''] .birads", "2")
    page.click("#store")
    sync_api.expect(page.locator("#reading-state")).to_contain_text("Stored at", timeout=10_000)


def test_a_refused_image_with_pixels_has_a_thumbnail_and_can_be_looked_at(
    open_exam: Callable[..., Page], exams: list[Exam]
) -> None:
    join, drop = with_further_views(exams)

    def refuse(table: pd.DataFrame) -> pd.DataFrame:
        table = join(table)
        rows = (table["view"] == "LM") & (table["laterality"] == "R") & (table["patient_id"] == exams[0].patient_id)
        known = {"status": "refused", "reason": "rotated", "remark": "it lies on its side", "probability": None}
        return table.assign(**{name: table[name].mask(rows, value) for name, value in known.items()})

    page = open_exam(refuse, drop)
    button = page.locator("#strip button", has_text="refused")
    assert button.inner_text().strip() == "R-LM refused"
    assert button.locator("canvas").count() == 1
    assert "it lies on its side" in page.locator("#images").inner_text()
    page.locator("#views figure").nth(0).focus()
    button.click()
    page.wait_for_load_state("networkidle")
    page.wait_for_timeout(300)
    assert page.locator("#views figcaption").first.inner_text() == "R-LM refused"
    assert brightest(page, 0) > 50


def test_refused_files_of_another_exam_are_named_with_their_reason(
    open_exam: Callable[..., Page], scores: Path
) -> None:
    refused = [exam for exam in read_scores_folder(scores) if any(image.status == "refused" for image in exam.images)]
    assert refused
    exam = max(refused, key=lambda exam: sum(image.status == "refused" for image in exam.images))
    page = open_exam(lambda table: table, patient=exam.patient_id)
    text = page.locator("#images").inner_text()
    for image in exam.images:
        if image.status == "refused":
            assert image.remark[:30] in text
            assert "refused: " in text


def test_without_its_package_an_exam_shows_scores_and_says_what_is_missing(
    open_exam: Callable[..., Page], exams: list[Exam]
) -> None:
    page = open_exam(lambda table: table)
    breast = page.locator("#breasts section").first
    assert f"{100 * (exams[0].breasts[0].probability or 0):.1f} %" in page.locator("#breasts").inner_text()
    assert "Calibration interval" in breast.inner_text()
    assert "Prevalence of the calibration unknown" in breast.inner_text()
    assert breast.locator("svg .band").count() == 1
    assert page.locator("#heat-tools").is_hidden()


def test_an_exam_is_shown_by_a_browser_without_webgl(
    open_page: Callable[..., Page], scores: Path, exams: list[Exam], serve: Callable[[ViewConfig], str]
) -> None:
    page = open_page()
    page.add_init_script(
        """for (const kind of [HTMLCanvasElement, OffscreenCanvas]) { const get = kind.prototype.getContext;
        kind.prototype.getContext = function (name, ...rest) {
            return name === "2d" ? get.call(this, name, ...rest) : null; }; }"""
    )
    page.goto(f"{serve(ViewConfig(scores=scores))}/exams/{exams[0].key}")
    page.wait_for_selector("figure[data-place]")
    page.wait_for_load_state("networkidle")
    page.wait_for_timeout(300)
    assert page.evaluate("document.createElement('canvas').getContext('webgl2')") is None
    assert min(brightest(page, number) for number in range(4)) > 50


def test_the_calibration_interval_of_a_breast_is_a_band_on_its_bar(
    open_page: Callable[..., Page], scores: Path, run: Path, exams: list[Exam], serve: Callable[[ViewConfig], str]
) -> None:
    address = serve(ViewConfig(scores=scores, package=(run / "package",)))
    page = open_page()
    page.goto(f"{address}/exams/{exams[0].key}")
    page.wait_for_selector("#breasts section")
    breast = exams[0].breast("R")
    assert breast
    assert breast.interval
    low, high = breast.interval
    assert low < (breast.probability or 0) < high
    text = page.locator("#breasts section").first.inner_text().replace("\xa0", " ")
    assert f"Calibration interval {100 * low:.1f} % to {100 * high:.1f} %" in text
    assert "Calibrated where" in text
    band = page.locator("#breasts section").first.locator(".band")
    assert float(band.get_attribute("x")) == pytest.approx(200 * low)
    assert float(band.get_attribute("width")) == pytest.approx(200 * (high - low))
    page.goto(address)
    bar = page.locator("tr", has_text=exams[0].patient_id).locator("svg").first
    assert f"calibration interval {100 * low:.1f} to {100 * high:.1f} %" in bar.get_attribute("aria-label")
    assert float(bar.locator(".band").get_attribute("x")) == pytest.approx(112 * low)
