"""The exam page in Chromium: hanging, window against our grey values, overlays, keys, phone, lost connection."""

from __future__ import annotations

import base64
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from vitmodel.cli import main
from vitmodel.config import ViewConfig
from vitmodel.viewer.exams import Exam, ImageEntry
from vitmodel.viewer.pixels import PixelStore
from vitmodel.viewer.scores_folder import read_scores_folder

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: make test-browser installs it")
pytestmark = pytest.mark.browser
Page = Any
ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "vitmodel" / "viewer" / "static"


@pytest.fixture(scope="module")
def scores(run: Path, release: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("browser") / "scores"
    assert main(["predict", str(run / "package"), str(release), str(out)]) == 1
    return out


@pytest.fixture(scope="module")
def address(scores: Path, run: Path, serve: Callable[[ViewConfig], str]) -> str:
    return serve(ViewConfig(scores=scores, package=(run / "package",)))


@pytest.fixture
def page(open_page: Callable[[], Page]) -> Page:
    """Return a page of a laptop."""
    return open_page()


@pytest.fixture(scope="module")
def exam(scores: Path) -> Exam:
    """Return an exam with the four standard views, without refused images."""
    wanted = ["R-CC", "L-CC", "R-MLO", "L-MLO"]
    return next(exam for exam in read_scores_folder(scores) if exam.views == wanted and exam.status != "refused")


def open_exam(page: Page, address: str, exam: Exam) -> None:
    page.goto(f"{address}/exams/{exam.key}")
    page.wait_for_selector("figure[data-place]")
    page.wait_for_load_state("networkidle")
    page.wait_for_timeout(200)


def picture(page: Page, selector: str) -> np.ndarray:
    """Return what an element shows, `(H, W, 3)` uint8."""
    return decode(page.locator(selector).screenshot())


def decode(data: bytes) -> np.ndarray:
    """Return a PNG as RGB, `(H, W, 3)` uint8."""
    return cv2.cvtColor(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def canvas(page: Page, image: ImageEntry) -> np.ndarray:
    """Return the pixels of an image's canvas without its caption, `(H, W, 3)` uint8."""
    script = """key => document.querySelector(`figure[data-image="${key}"] canvas`).toDataURL("image/png")"""
    return decode(base64.b64decode(page.evaluate(script, image.key).split(",")[1]))


def wait_for_state(page: Page, text: str) -> None:
    """Wait until the status line contains `text` or, for an empty text, until it is empty."""
    pattern = re.compile(re.escape(text)) if text else re.compile("^$")
    sync_api.expect(page.locator("#state")).to_have_text(pattern, timeout=20_000)


def place_of(page: Page, image: ImageEntry) -> list[float]:
    """Return left and top edge of an image on its canvas, and its scale across and down."""
    text = page.locator(f'figure[data-image="{image.key}"]').get_attribute("data-place")
    return [float(part) for part in text.split(",")]


def test_chest_walls_meet_with_the_right_breast_at_the_left(page: Page, address: str, exam: Exam) -> None:
    open_exam(page, address, exam)
    shown = picture(page, "#views").max(axis=2)
    middle = shown.shape[1] // 2
    for half in (shown[: shown.shape[0] // 2 - 2], shown[shown.shape[0] // 2 + 2 :]):
        tissue = (half > 20).mean(axis=0)
        assert tissue[middle - 12 : middle - 4].min() > 0.3, "the right breast does not reach the middle"
        assert tissue[middle + 4 : middle + 12].min() > 0.3, "the left breast does not reach the middle"
        assert tissue[:8].max() < 0.1
        assert tissue[-8:].max() < 0.1
    captions = page.locator("figcaption").all_inner_texts()
    assert [caption.split()[0] for caption in captions] == ["R-CC", "L-CC", "R-MLO", "L-MLO"]
    boxes = [page.locator("#views figure").nth(number).bounding_box() for number in range(4)]
    assert boxes[0]["x"] < boxes[1]["x"]
    assert boxes[0]["y"] < boxes[2]["y"]


def test_all_views_have_the_same_scale_in_millimetres(page: Page, address: str, exam: Exam) -> None:
    open_exam(page, address, exam)
    scales = []
    for image in exam.images:
        assert image.spacing
        _, _, across, down = place_of(page, image)
        scales += [across / image.spacing[1], down / image.spacing[0]]
    assert np.ptp(scales) < 1e-6 * max(scales)


@pytest.mark.parametrize("window", [(0.0, 1.0), (0.25, 0.75)])
def test_the_canvas_shows_our_grey_values_through_the_window(
    page: Page, address: str, exam: Exam, window: tuple[float, float]
) -> None:
    open_exam(page, address, exam)
    page.select_option("#preset", f"{window[0]:g},{window[1]:g}")
    page.wait_for_timeout(200)
    store = PixelStore()
    for image in exam.images:
        shown = canvas(page, image)[..., 0].astype(float)
        left, top, across, down = place_of(page, image)
        grey = store.level(image, 0) / 65535
        grey = grey[:, ::-1] if image.is_mirrored else grey
        size = max(1, round(grey.shape[1] * across)), max(1, round(grey.shape[0] * down))
        expected = 255 * np.clip(
            (cv2.resize(grey, size, interpolation=cv2.INTER_AREA) - window[0]) / (window[1] - window[0]), 0, 1
        )
        x, y = round(max(0, left)), round(max(0, top))
        part = shown[y : y + size[1], x : x + size[0]]
        smooth = cv2.blur(expected, (9, 9))[: part.shape[0], : part.shape[1]]
        assert np.abs(cv2.blur(part, (9, 9)) - smooth).mean() < 4
        assert np.corrcoef(part.ravel(), smooth.ravel())[0, 1] > 0.97


def test_a_heat_map_lies_on_the_breast_of_its_own_image(page: Page, address: str, exam: Exam) -> None:
    open_exam(page, address, exam)
    page.select_option("#method", "gradient")
    page.locator("#lowest").evaluate("node => { node.value = 0; node.dispatchEvent(new Event('input')); }")
    wait_for_state(page, "")
    page.wait_for_load_state("networkidle")
    page.wait_for_timeout(500)
    for image in exam.images:
        coloured = np.ptp(canvas(page, image).astype(int), axis=2) > 30
        left, top, across, down = place_of(page, image)
        rows, columns = np.nonzero(coloured)
        assert len(rows) > 1000, "the heat map is missing"
        x, y = (columns - left) / across, (rows - top) / down
        if image.is_mirrored:
            assert image.columns
            x = image.columns - x
        assert image.box
        x0, y0, x1, y1 = image.box
        margin = 4
        assert x0 - margin <= x.min() <= x.max() <= x1 + margin
        assert y0 - margin <= y.min() <= y.max() <= y1 + margin
    page.keyboard.press("Tab")
    page.locator("figure").first.focus()
    page.keyboard.press("h")
    page.wait_for_timeout(200)
    assert np.ptp(canvas(page, exam.images[0]).astype(int), axis=2).max() == 0, "flicker did not hide the map"


def test_inversion_turns_black_to_white(page: Page, address: str, exam: Exam) -> None:
    open_exam(page, address, exam)
    before = canvas(page, exam.images[0])
    page.locator("figure").first.focus()
    page.keyboard.press("i")
    page.wait_for_timeout(200)
    left, top, across, down = place_of(page, exam.images[0])
    inside = (
        slice(int(max(0, top)) + 2, int(top + 200 * down)),
        slice(int(max(0, left)) + 2, int(left + 150 * across)),
    )
    np.testing.assert_allclose(255 - canvas(page, exam.images[0])[inside].astype(int), before[inside], atol=3)


def test_the_keyboard_leads_through_ten_exams_and_back(page: Page, address: str, scores: Path) -> None:
    exams = read_scores_folder(scores)
    page.goto(f"{address}/")
    page.keyboard.press("j")
    page.keyboard.press("Enter")
    for number in range(min(10, len(exams))):
        page.wait_for_url(f"{address}/exams/{exams[number].key}")
        wait_for_state(page, "")
        if number + 1 < min(10, len(exams)):
            page.keyboard.press("n")
    page.keyboard.press("w")
    page.wait_for_url(f"{address}/worklist")


def test_a_measured_line_has_the_length_of_its_pixels(page: Page, address: str, exam: Exam) -> None:
    open_exam(page, address, exam)
    page.click("#measure")
    box = page.locator("figure").first.bounding_box()
    page.mouse.move(box["x"] + 100, box["y"] + 100)
    page.mouse.down()
    page.mouse.move(box["x"] + 200, box["y"] + 100)
    page.mouse.up()
    page.wait_for_timeout(200)
    before = canvas(page, exam.hanging()[0])
    assert (np.ptp(before[100, 100:200].astype(int), axis=1) > 30).mean() > 0.9, "the line is missing"


@pytest.mark.parametrize("width", [360, 1280])
def test_no_page_is_wider_than_the_screen(browser: Any, address: str, exam: Exam, width: int) -> None:
    page = browser.new_page(viewport={"width": width, "height": 800})
    for place in ("/", f"/exams/{exam.key}"):
        page.goto(address + place)
        page.wait_for_timeout(300)
        assert page.evaluate("document.scrollingElement.scrollWidth") <= width
    for number in range(4):
        shown = page.locator("#views figure").nth(number).bounding_box()
        assert min(shown["width"], shown["height"]) > 100
    page.close()


def test_a_lost_connection_is_reported_and_nothing_is_lost(page: Page, address: str, exam: Exam) -> None:
    page.route("**/tiles/**", lambda route: route.abort())
    page.goto(f"{address}/exams/{exam.key}")
    wait_for_state(page, "connection")
    page.unroute("**/tiles/**")
    wait_for_state(page, "")
    page.wait_for_load_state("networkidle")
    page.wait_for_timeout(300)
    assert canvas(page, exam.images[0]).max() > 50


def test_refused_images_are_shown_with_their_reason(page: Page, address: str, scores: Path) -> None:
    exams = read_scores_folder(scores)
    exam = next(exam for exam in exams if any("missing_file" in image.reason for image in exam.images))
    page.goto(f"{address}/exams/{exam.key}")
    page.wait_for_selector("#images dl")
    assert "does not exist" in page.locator("aside").inner_text()


def test_the_scripts_of_the_pages_are_built_from_their_source(tmp_path: Path) -> None:
    compiler = shutil.which("tsc") or ROOT / "dev" / "typescript" / "node_modules" / ".bin" / "tsc"
    if not Path(compiler).exists():
        pytest.skip("the TypeScript compiler is not installed: make pages installs it")
    subprocess.run([compiler, "-p", ROOT / "dev" / "typescript", "--outDir", tmp_path], check=True)
    for path in tmp_path.iterdir():
        assert path.read_text() == (PAGES / path.name).read_text(), "run `make pages`"
