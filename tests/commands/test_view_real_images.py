"""The reading room over real mammograms, which lie next to the checkout: grey values of tiles, hanging in Chromium."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from fastapi.testclient import TestClient

from vitmodel.cli import main
from vitmodel.commands.view import create_app
from vitmodel.config import ViewConfig
from vitmodel.data.manifest import write_manifest
from vitmodel.pixels.open import open_image
from vitmodel.releases.inputs import read_inputs
from vitmodel.viewer.exams import Exam, ImageEntry
from vitmodel.viewer.pixels import TILE
from vitmodel.viewer.scores_folder import read_scores_folder

Page = Any
PROBES = 40
"""Number of pixels per image that are compared."""


@pytest.fixture(scope="module")
def scores(run: Path, shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the scores of 5 RSNA images, of which one is MONOCHROME1 with SIGMOID, and of a digitised film."""
    out = tmp_path_factory.mktemp("real") / "scores"
    table = read_inputs([str(shared_data / "rsna_dicom" / "dicom")], "auto")  # headers lack side and view
    inverse = next(path for path in table["path"] if open_image(path).header.rows > 5000)
    views = table.groupby("patient_id")["path"].transform("size") == 4
    write_manifest(table[views | (table["path"] == inverse)], out.parent / "table.csv")
    write_manifest(read_inputs([str(shared_data / "mias_512")], "auto").iloc[:1], out.parent / "film.csv")
    tables = [str(out.parent / name) for name in ("table.csv", "film.csv")]
    command = ["predict", str(run / "package"), *tables, str(out), "--atypical", "0"]
    assert main(command) == 0
    return out


@pytest.fixture(scope="module")
def exams(scores: Path) -> list[Exam]:
    return read_scores_folder(scores)


@pytest.fixture(scope="module")
def client(scores: Path) -> Iterator[TestClient]:
    with TestClient(create_app(ViewConfig(scores=scores)), base_url="http://localhost") as client:
        yield client


def grey_of(image: ImageEntry) -> np.ndarray:
    """Return the grey values that our own decoder and VOI conversion give, `(H, W)` from 0 to 1."""
    assert image.path
    file = open_image(image.path)
    grey = file.to_grey(file.read_stored())
    return 1 - grey if image.is_inverted else grey


def tile_of(client: TestClient, image: ImageEntry, level: int, row: int, column: int) -> np.ndarray:
    answer = client.get(f"/api/images/{image.key}/tiles/{level}/{row}/{column}")
    return np.frombuffer(answer.content, "<u2").reshape(-1, int(answer.headers["X-Width"])) / 65535


def test_tiles_of_real_images_have_the_grey_values_of_our_decoder(client: TestClient, exams: list[Exam]) -> None:
    rng = np.random.default_rng(0)
    images = [image for exam in exams for image in exam.images]
    assert len(images) == 6
    for image in images:
        grey = grey_of(image)
        assert np.ptp(grey) > 0.2, "the image has no contrast"
        tissue = np.argwhere(grey > 0.05)
        for y, x in tissue[rng.integers(len(tissue), size=PROBES // 8)]:
            tile = tile_of(client, image, 0, y // TILE, x // TILE)
            assert tile[y % TILE, x % TILE] == pytest.approx(grey[y, x], abs=1e-4)
        (described,) = [
            entry
            for exam in exams
            if image in exam.images
            for entry in client.get(f"/api/exams/{exam.key}").json()["images"]
            if entry["key"] == image.key
        ]
        level = described["pixels"]["levels"]
        coarse = tile_of(client, image, level, 0, 0)
        expected = cv2.resize(grey.astype(np.float32), coarse.shape[::-1], interpolation=cv2.INTER_AREA)
        assert np.abs(cv2.blur(coarse, (5, 5)) - cv2.blur(expected, (5, 5))).mean() < 0.01


@pytest.fixture(scope="module")
def four_views(exams: list[Exam]) -> Exam:
    return next(exam for exam in exams if exam.views == ["R-CC", "L-CC", "R-MLO", "L-MLO"])


def assert_grey_values(
    shown: np.ndarray, grey: np.ndarray, left: float, top: float, across: float, down: float
) -> None:
    """Compare a canvas with grey values at probe points of the breast; both are averaged over 3x3 screen pixels."""
    size = round(grey.shape[1] * across), round(grey.shape[0] * down)
    expected = cv2.blur(cv2.resize(255 * grey.astype(np.float32), size, interpolation=cv2.INTER_AREA), (3, 3))
    found = cv2.blur(shown, (3, 3))
    tissue = np.argwhere(expected > 13)
    pairs = []
    for y, x in tissue[np.random.default_rng(0).integers(len(tissue), size=PROBES)]:
        row, column = round(top + y), round(left + x)
        if 2 <= row < shown.shape[0] - 2 and 2 <= column < shown.shape[1] - 2:
            pairs.append((found[row, column], expected[y, x]))
    assert len(pairs) > PROBES / 2
    seen, wanted = np.array(pairs).T
    assert np.abs(seen - wanted).mean() < 5
    assert np.corrcoef(seen, wanted)[0, 1] > 0.97


@pytest.mark.browser
@pytest.mark.parametrize("size", [(1280, 800), (4096, 2560)])
def test_real_views_hang_chest_wall_to_chest_wall_with_our_grey_values(
    open_page: Callable[..., Page],
    serve: Callable[[ViewConfig], str],
    scores: Path,
    four_views: Exam,
    size: tuple[int, int],
) -> None:
    page = open_page(*size)
    page.goto(f"{serve(ViewConfig(scores=scores))}/exams/{four_views.key}")
    page.wait_for_selector("figure[data-place]")
    page.wait_for_load_state("networkidle")
    page.wait_for_timeout(1000)
    captions = [caption.split()[0] for caption in page.locator("#views figcaption").all_inner_texts()]
    assert captions == ["R-CC", "L-CC", "R-MLO", "L-MLO"]
    scales = []
    for image in four_views.hanging():
        figure = page.locator(f'figure[data-image="{image.key}"]')
        left, top, across, down = map(float, figure.get_attribute("data-place").split(","))
        script = """key => document.querySelector(`figure[data-image="${key}"] canvas`).toDataURL("image/png")"""
        data = base64.b64decode(page.evaluate(script, image.key).split(",")[1])
        shown = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE).astype(float)
        grey = grey_of(image)
        grey = grey[:, ::-1] if image.is_mirrored else grey
        wall = shown[:, -8:] if image.side == "R" else shown[:, :8]
        outer = shown[:, :8] if image.side == "R" else shown[:, -8:]
        assert (wall > 25).mean() > 0.3, "no tissue at the side at which both breasts meet"
        assert (outer > 25).mean() < 0.05
        assert_grey_values(shown, grey, left, top, across, down)
        spacing = image.spacing or (1.0, 1.0)
        scales += [across / spacing[1], down / spacing[0]]
    assert np.ptp(scales) < 0.01 * max(scales), "the views have different scales"


@pytest.mark.browser
def test_a_film_hangs_with_its_chest_wall_at_the_edge_also_at_full_size(
    open_page: Callable[..., Page], serve: Callable[[ViewConfig], str], scores: Path, exams: list[Exam]
) -> None:
    film = next(exam for exam in exams if "mias" in str(exam.images[0].path))
    (image,) = film.images
    assert image.wall_margin > 20, "the film has no border behind the chest wall"
    page = open_page()
    page.goto(f"{serve(ViewConfig(scores=scores))}/exams/{film.key}")
    page.wait_for_selector("figure[data-place]")
    for key in ("0", "1"):
        page.keyboard.press(key)
        page.wait_for_load_state("networkidle")
        page.wait_for_timeout(500)
        figure = page.locator("#views figure")
        left, _, across, _ = map(float, figure.get_attribute("data-place").split(","))
        width = figure.bounding_box()["width"]
        places = {"R": (left + ((image.columns or 0) - image.wall_margin) * across, width)}
        wall, edge = places.get(image.side, (left + image.wall_margin * across, 0))
        assert wall == pytest.approx(edge, abs=1)
