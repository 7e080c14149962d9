"""Reading in Chromium: form and boxes, blinded reading, layouts, comparison, moved threshold, accessibility."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from vitmodel.cli import main
from vitmodel.config import ViewConfig
from vitmodel.viewer.evaluated import EvaluatedScores, read_evaluation
from vitmodel.viewer.exams import Exam
from vitmodel.viewer.readings import ReadingStore
from vitmodel.viewer.scores_folder import read_scores_folder

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: make test-browser installs it")
pytestmark = pytest.mark.browser
Page = Any
OpenPage = Callable[..., Page]
Evaluation = tuple[str, EvaluatedScores]
STANDARD = ["R-CC", "L-CC", "R-MLO", "L-MLO"]


@pytest.fixture(scope="module")
def scores(run: Path, release: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return scores of a release, of which two exams are of one patient."""
    out = tmp_path_factory.mktemp("reading") / "scores"
    assert main(["predict", str(run / "package"), str(release), str(out)]) == 1
    first, second = [exam for exam in read_scores_folder(out) if exam.views == STANDARD and exam.status != "refused"][
        :2
    ]
    for name in ("scores.csv", "breast_scores.csv"):
        table = pd.read_csv(out / name, dtype=str)
        table["exam_id"] = table["patient_id"].map({first.patient_id: "E1", second.patient_id: "E2"}).fillna("")
        table["patient_id"] = table["patient_id"].replace(second.patient_id, first.patient_id)
        table.to_csv(out / name, index=False)
    return out


@pytest.fixture(scope="module")
def exam(scores: Path) -> Exam:
    return next(exam for exam in read_scores_folder(scores) if exam.exam_id == "E1")


@pytest.fixture(scope="module")
def address(scores: Path, run: Path, serve: Callable[[ViewConfig], str]) -> str:
    return serve(ViewConfig(scores=scores, package=(run / "package",)))


def open_exam(page: Page, address: str, exam: Exam) -> None:
    page.goto(f"{address}/exams/{exam.key}")
    page.wait_for_selector("figure[data-place]")
    page.wait_for_load_state("networkidle")
    page.wait_for_timeout(200)


def expect_text(page: Page, selector: str, text: str) -> None:
    sync_api.expect(page.locator(selector)).to_contain_text(text, timeout=10_000)


def fill_in(page: Page, right: str, left: str) -> None:
    page.select_option("fieldset[data-side=R] .birads", right)
    page.select_option("fieldset[data-side=L] .birads", left)


def captions(page: Page) -> list[str]:
    return [caption.split()[0] for caption in page.locator("figcaption").all_inner_texts()]


def test_a_reading_with_a_box_is_stored_and_shown_again(
    open_page: OpenPage, scores: Path, exam: Exam, serve: Callable[[ViewConfig], str], tmp_path: Path
) -> None:
    address = serve(ViewConfig(scores=scores, readings=tmp_path / "readings.jsonl"))
    page = open_page()
    open_exam(page, address, exam)
    fill_in(page, "2", "4B")
    page.select_option("fieldset[data-side=L] .agreement", "no")
    page.fill("textarea", "<b>mass</b>")
    page.fill("#reader-name", "Ann")
    page.locator("figure").first.focus()
    page.keyboard.press("x")
    figure = page.locator("figure", has_text="L-CC")
    box = figure.bounding_box()
    left, top, across, down = map(float, figure.get_attribute("data-place").split(","))
    corners = (left + 40 * across, top + 90 * down, left + 80 * across, top + 150 * down)
    page.mouse.move(box["x"] + corners[0], box["y"] + corners[1])
    page.mouse.down()
    page.mouse.move(box["x"] + corners[2], box["y"] + corners[3], steps=3)
    page.mouse.up()
    page.keyboard.press("s")
    expect_text(page, "#reading-state", "Stored at")
    (stored,) = ReadingStore(tmp_path / "readings.jsonl").all()
    assert (stored.reader, stored.note) == ("Ann", "<b>mass</b>")
    assert (stored.breasts["L"].birads, stored.breasts["L"].agrees) == ("4B", False)
    image = next(image for image in exam.images if (image.side, image.view) == ("L", "CC"))
    (drawn,) = stored.boxes
    assert image.columns
    xs = (image.columns - 80, image.columns - 40) if image.is_mirrored else (40, 80)
    assert drawn.image_id == image.image_id
    assert drawn.box == pytest.approx((xs[0], 90, xs[1], 150), abs=1 / min(across, down))
    assert stored.seconds
    assert 0 < (stored.active_seconds or 0) <= stored.seconds
    open_exam(page, address, exam)
    assert page.locator("fieldset[data-side=L] .birads").input_value() == "4B"
    assert page.locator("#boxes li").count() == 1
    page.goto(f"{address}/?only=unread")
    assert page.locator(f"a[href='/exams/{exam.key}']").count() == 0


def test_a_reading_survives_a_lost_connection(
    open_page: OpenPage, scores: Path, exam: Exam, serve: Callable[[ViewConfig], str], tmp_path: Path
) -> None:
    address = serve(ViewConfig(scores=scores, readings=tmp_path / "readings.jsonl", reader="Ann"))
    page = open_page()
    open_exam(page, address, exam)
    fill_in(page, "1", "1")
    page.route("**/readings", lambda route: route.abort())
    page.click("#store")
    expect_text(page, "#state", "connection")
    page.unroute("**/readings")
    expect_text(page, "#reading-state", "Stored at")
    assert len(ReadingStore(tmp_path / "readings.jsonl").all()) == 1


def test_a_blinded_reader_sees_scores_only_after_storing(
    open_page: OpenPage, scores: Path, run: Path, exam: Exam, serve: Callable[[ViewConfig], str], tmp_path: Path
) -> None:
    config = ViewConfig(scores=scores, package=(run / "package",), readings=tmp_path / "readings.jsonl", blind=True)
    address = serve(config)
    page = open_page()
    received: list[str] = []
    page.on("response", lambda answer: received.append(answer.text()) if "/api/exams/" in answer.url else None)
    page.goto(address)
    page.fill("input[name=name]", "Ann")
    page.keyboard.press("Enter")
    expect_text(page, "header", "Reader: Ann")
    assert page.locator("tbody .bar").count() == 0
    open_exam(page, address, exam)
    assert "%" not in page.locator("#breasts").inner_text() + "".join(page.locator("figcaption").all_inner_texts())
    assert page.locator("#heat-tools").is_hidden()
    assert page.locator(".agreement").count() == 0
    probabilities = [breast.probability for breast in exam.breasts]
    assert not any(str(value) in received[-1] for value in probabilities)
    fill_in(page, "1", "5")
    page.click("#store")
    expect_text(page, "#reading-state", "Stored at")
    expect_text(page, "#breasts", f"{100 * (probabilities[0] or 0):.1f} %")
    assert page.locator("#heat-tools").is_visible()
    (stored,) = ReadingStore(tmp_path / "readings.jsonl").all()
    assert stored.is_blinded


def test_layouts_show_their_views_and_stay_from_exam_to_exam(
    open_page: OpenPage, address: str, exam: Exam, scores: Path
) -> None:
    page = open_page(4096, 2560)  # two portrait screens of 5 megapixels
    open_exam(page, address, exam)
    page.keyboard.press("t")
    page.keyboard.press("4")
    page.wait_for_timeout(300)
    boxes = [page.locator("#views figure").nth(number).bounding_box() for number in range(4)]
    assert captions(page) == STANDARD
    assert len({box["y"] for box in boxes}) == 1
    assert boxes[2]["x"] == pytest.approx(2048, abs=4), "the MLO views begin on the second screen"
    for key, expected in (("5", ["R-CC", "L-CC"]), ("6", ["R-MLO", "L-MLO"]), ("7", ["R-CC", "R-MLO"])):
        page.keyboard.press(key)
        page.wait_for_timeout(200)
        assert captions(page) == expected
    other = next(other for other in read_scores_folder(scores) if other.exam_id == "E2")
    open_exam(page, address, other)
    assert captions(page) == ["R-CC", "R-MLO"]
    assert page.locator("aside").is_hidden()


def test_a_window_with_a_part_of_the_exam_follows_the_other_window(
    open_page: OpenPage, address: str, exam: Exam, scores: Path
) -> None:
    first = open_page()
    open_exam(first, address, exam)
    second = first.context.new_page()
    open_exam(second, address, exam)
    second.keyboard.press("6")
    first.keyboard.press("5")
    first.select_option("#preset", "0.25,0.75")
    first.locator("figure").first.focus()
    first.keyboard.press("1")
    second.wait_for_timeout(500)
    scales = [
        page.locator("figure").first.get_attribute("data-place").split(",")[2]
        for page in (first, second)  # pixels
    ]
    assert scales[0] == scales[1], "the windows do not zoom together"
    first.keyboard.press("2")
    other = next(other for other in read_scores_folder(scores) if other.exam_id == "E2")
    open_exam(first, address, other)
    second.wait_for_url(f"{address}/exams/{other.key}")
    second.wait_for_selector("figure[data-place]")
    assert captions(second) == ["R-MLO", "L-MLO"]
    assert captions(first) == STANDARD


def test_another_exam_of_the_patient_is_shown_below(open_page: OpenPage, address: str, exam: Exam) -> None:
    page = open_page()
    open_exam(page, address, exam)
    page.keyboard.press("9")
    page.wait_for_selector("figure:nth-of-type(8)[data-place]")
    assert captions(page) == STANDARD * 2
    boxes = [page.locator("#views figure").nth(number).bounding_box() for number in (0, 4)]
    assert boxes[0]["y"] < boxes[1]["y"]
    assert boxes[0]["x"] == boxes[1]["x"]
    page.click("#others a")
    page.wait_for_url(re.compile(r"/exams/(?!" + exam.key + ")"))


def test_an_image_is_shown_without_and_with_its_heat_map(open_page: OpenPage, address: str, exam: Exam) -> None:
    page = open_page()
    open_exam(page, address, exam)
    page.locator("figure", has_text="L-CC").focus()
    page.keyboard.press("3")
    page.wait_for_selector("figure:nth-of-type(2)[data-place]")
    page.locator("#lowest").evaluate("node => { node.value = 0; node.dispatchEvent(new Event('input')); }")
    page.wait_for_load_state("networkidle")
    page.wait_for_timeout(800)
    assert captions(page) == ["L-CC", "L-CC"]
    count = """figure => { const canvas = figure.querySelector("canvas"), pixels =
        canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data; let found = 0;
        for (let i = 0; i < pixels.length; i += 4) found += pixels[i] !== pixels[i + 1] || pixels[i] !== pixels[i + 2];
        return found; }"""
    plain, coloured = (page.locator("figure").nth(number).evaluate(count) for number in range(2))
    assert plain == 0
    assert coloured > 1000


@pytest.fixture(scope="module")
def evaluation(run: Path, serve: Callable[[ViewConfig], str], tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    folder = tmp_path_factory.mktemp("evaluation")
    shutil.copytree(run / "package", folder / "package")
    command = ["evaluate", str(folder / "package"), str(run / "manifest.csv"), str(folder / "scores"), "--split", "all"]
    assert main([*command, "--no-audit", "--no-card", "--replicates", "100"]) == 0
    scores = read_evaluation(folder / "scores", read_scores_folder(folder / "scores"))
    return serve(ViewConfig(scores=folder / "scores")), scores


def test_the_threshold_of_an_evaluation_moves(open_page: OpenPage, evaluation: Evaluation) -> None:
    address, evaluated = evaluation
    page = open_page()
    page.goto(address + "/evaluation")
    for place, sensitivity in (("End", "100.0 %"), ("Home", None)):
        page.locator("#mover").focus()
        page.keyboard.press(place)
        page.wait_for_timeout(600)
        threshold = float(page.locator("#threshold").input_value())
        expect_text(page, "caption", f"{threshold:.4f}")
        value = evaluated.at(threshold)[1]["sensitivity"].value
        expect_text(page, "#metrics tbody tr:first-child", f"{100 * value:.1f} %")
        assert sensitivity in (None, f"{100 * value:.1f} %")
        assert page.locator("#errors a").count() == len(evaluated.errors(threshold))
    box = page.locator("#roc").bounding_box()
    page.mouse.click(box["x"] + box["width"] - 2, box["y"] + 2)
    page.wait_for_timeout(600)
    expect_text(page, "#metrics tbody tr:first-child", "100.0 %")
    page.locator("#errors a").first.click()
    page.wait_for_selector("figure[data-place]")


def test_a_point_of_the_strip_opens_its_exam(open_page: OpenPage, evaluation: Evaluation) -> None:
    address, scores = evaluation
    points = scores.figures.strip
    page = open_page()
    page.goto(address + "/evaluation")
    last = page.locator("#breasts a").nth(len(points) - 1)
    last.click()
    page.wait_for_url(f"{address}/exams/{points[-1].key}")
    page.go_back()
    page.locator("#breasts a").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowLeft")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == points[1].name
    assert page.locator("#breasts a[tabindex='-1']").count() == len(points) - 1, "more than one point is a tab stop"
    page.keyboard.press("Enter")
    page.wait_for_url(f"{address}/exams/{points[1].key}")


def test_a_click_on_the_precision_recall_curve_sets_the_threshold_everywhere(
    open_page: OpenPage, evaluation: Evaluation
) -> None:
    address, scores = evaluation
    points = scores.figures.points

    def distance(one: Sequence[float], other: Sequence[float]) -> float:
        return math.dist(one[1:], other[1:])

    alone = max(points, key=lambda point: min(distance(point, other) for other in points if other != point))
    threshold, recall, precision = alone
    page = open_page()
    page.goto(address + "/evaluation")
    box = page.locator("#precision-recall").bounding_box()
    across, down = (min(max(2, 300 * part), 298) for part in (recall, 1 - precision))  # not on the edge
    page.mouse.click(box["x"] + across, box["y"] + down)
    expect_text(page, "caption", f"{threshold:.4f}")
    for figure, width in (("#calibration", 300), ("#breasts", 640)):
        mark = float(page.locator(f"{figure} .threshold").get_attribute("x1"))
        assert mark == pytest.approx(width * threshold)
    point = page.locator("#precision-recall .point")
    assert float(point.get_attribute("cx")) == pytest.approx(300 * recall)
    assert float(point.get_attribute("cy")) == pytest.approx(300 * (1 - precision))


def test_the_metrics_of_an_evaluation_are_readable_on_a_phone(open_page: OpenPage, evaluation: Evaluation) -> None:
    page = open_page(360, 800)
    page.goto(evaluation[0] + "/evaluation")
    assert page.locator("#metrics tbody td").first.is_visible()
    assert page.evaluate("document.scrollingElement.scrollWidth") <= 360


def axe() -> str:
    """Return the source of axe-core from AXE_CORE or from npm's global folder; skip the test without it."""
    places = [Path(os.environ["AXE_CORE"])] if "AXE_CORE" in os.environ else []
    if npm := shutil.which("npm"):
        found = subprocess.run([npm, "root", "-g"], capture_output=True, text=True, check=True).stdout.strip()
        places.append(Path(found) / "axe-core" / "axe.min.js")
    for path in places:
        if path.is_file():
            return path.read_text()
    pytest.skip("axe-core is not installed: npm install -g axe-core, or set AXE_CORE to its axe.min.js")


@pytest.mark.parametrize("width", [390, 1280])
def test_axe_has_no_serious_finding(
    open_page: OpenPage, address: str, exam: Exam, evaluation: Evaluation, width: int
) -> None:
    source = axe()
    page = open_page(width, 800)
    for place in (f"{address}/", f"{address}/exams/{exam.key}", f"{evaluation[0]}/evaluation"):
        page.goto(place)
        page.wait_for_load_state("networkidle")
        page.wait_for_timeout(300)
        page.evaluate(source)
        result = page.evaluate("axe.run()")
        assert len(result["passes"]) > 10, "axe checked nothing"
        serious = [
            (found["id"], [node["html"] for node in found["nodes"]])
            for found in result["violations"]
            if found["impact"] in ("serious", "critical")
        ]
        assert not serious, json.dumps(serious, indent=1)
