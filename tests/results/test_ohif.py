"""DICOM results in OHIF, read from Orthanc: every outline and overlay lies on its own image, by pixels."""

from __future__ import annotations

import subprocess
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pytest
from pydicom import dcmread
from results import ohif

from vitmodel.config import Preprocessing, Size
from vitmodel.node.ohif import make_viewer_link
from vitmodel.pixels.preprocessing import preprocess
from vitmodel.results.evidence import Software
from vitmodel.results.heatmap import HeatMap, breast_outline
from vitmodel.results.image_results import ImageResult, ResultWriter, to_region

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: make test-browser installs it")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(bool(ohif.installed()), reason=f"make test-browser installs {ohif.installed()}"),
]
PREPROCESSING = Preprocessing(size=Size(256, 128))
SOFTWARE = Software(version="1.2.3", model="ViT 3 x 24", serial="0123456789abcdef", parameters=("threshold 0.3",))
VIEWS = ("RCC", "LCC", "RMLO", "LMLO")
SPOTS = {"RCC": (0.3, 0.3), "LCC": (0.7, 0.3), "RMLO": (0.5, 0.5), "LMLO": (0.4, 0.2)}
"""Centre of each view's heat map, as fractions of the crop's height and width."""
CLOSE = 4
"""Largest distance in screen pixels of a line from its place."""


@dataclass(frozen=True, eq=False)
class Shown:
    """One image of the study and what its results show."""

    path: Path
    uid: str
    grey: np.ndarray
    """The picture at half size, `(H, W)`, brighter = denser."""
    lines: list[np.ndarray]
    """The outlines in source pixels, `(K, 2)` as (x, y)."""
    overlay: Path
    capture: str
    """SOP Instance UID of its Secondary Capture."""


def results_of(paths: dict[str, Path], out: Path) -> dict[str, Shown]:
    """Write the results of four views with made-up heat maps, whose maximum lies at a different place in each view."""
    writer = ResultWriter(out, SOFTWARE, PREPROCESSING, 0.3, dicom=("sr", "sc"), secret="")
    shown: dict[str, Shown] = {}
    rows: list[dict[str, Any]] = []
    for view, path in paths.items():
        prepared = preprocess(path, PREPROCESSING)
        tissue = prepared.crop > 0
        y, x = np.mgrid[8:256:16, 8:128:16]
        distance = np.hypot(y - 256 * SPOTS[view][0], x - 128 * SPOTS[view][1])
        air = cv2.resize(tissue.astype(np.float32), (8, 16), interpolation=cv2.INTER_AREA) == 0
        shape = (prepared.header.rows, prepared.header.columns)
        values = np.where(air, np.nan, np.exp(-((distance / 30) ** 2)))
        heat = HeatMap(values=values, tissue=tissue, geometry=prepared.geometry, patch=16, source_shape=shape)
        image = ImageResult(
            name=view, path=path, side=view[0], view=view[1:], probability=0.6, inverted=prepared.breast.inverted
        )
        region, files = writer.write_explanation(image, heat, "log-odds", 0, 1)
        outline = breast_outline(tissue, prepared.geometry)
        assert outline is not None
        rows.append(
            {"path": str(path), "breast_id": view[0], "laterality": view[0], "view": view[1:], "probability": 0.6}
            | {"outline": to_region(outline), "region": region}
        )
        uid = str(dcmread(path, stop_before_pixels=True).SOPInstanceUID)
        grey = heat_free_picture(path, heat, prepared.breast.inverted)
        capture = next(Path(name).stem for name in files if name.endswith(".dcm"))
        lines = [outline, np.array(region)]
        shown[view] = Shown(path, uid, grey, lines, out / "overlays" / f"{view}.png", capture)
    breasts = pd.DataFrame({"breast_id": ["R", "L"], "laterality": ["R", "L"], "probability": 0.317, "decision": 1.0})
    assert writer.report(pd.DataFrame(rows), breasts) == (1, 0)
    return shown


def heat_free_picture(path: Path, heat: HeatMap, inverted: bool) -> np.ndarray:
    from vitmodel.results.overlay import read_display_image

    picture = read_display_image(path, heat, PREPROCESSING, inverted).grey
    return cv2.resize(picture, (heat.source_shape[1] // 2, heat.source_shape[0] // 2), interpolation=cv2.INTER_AREA)


@pytest.fixture(scope="module")
def study(release: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Shown]]:
    """Return the folder of the results and the four views of one patient."""
    out = tmp_path_factory.mktemp("ohif_results")
    for folder in sorted((release / "train_images").iterdir()):
        paths: dict[str, Path] = {}
        for path in sorted(folder.glob("*.dcm")):
            header = dcmread(path, stop_before_pixels=True)
            paths.setdefault(f"{header.ImageLaterality}{header.ViewPosition}", path)
        if set(paths) >= set(VIEWS):
            return out, results_of({view: paths[view] for view in VIEWS}, out)
    raise AssertionError("no patient with four views")


@pytest.fixture(scope="module")
def page(study: tuple[Path, dict[str, Shown]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Return the viewer with the study open, four views side by side; `storescu -R` sends the results."""
    out, shown = study
    first = dcmread(shown["RCC"].path, stop_before_pixels=True)
    with (
        ohif.running_orthanc(tmp_path_factory.mktemp("orthanc")) as (http_port, dicom_port),
        ohif.running_viewer(http_port, tmp_path_factory.mktemp("node")) as address,
        sync_api.sync_playwright() as playwright,
    ):
        for image in shown.values():
            request = urllib.request.Request(
                f"http://127.0.0.1:{http_port}/instances", data=image.path.read_bytes(), method="POST"
            )
            urllib.request.urlopen(request).close()
        files = sorted(map(str, (out / "dicom").iterdir()))
        subprocess.run(["storescu", "-R", "127.0.0.1", str(dicom_port), *files], check=True)
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=ohif.FLAGS)
        page = browser.new_page(viewport={"width": 1600, "height": 900})
        page.add_init_script(ohif.SHARE_SERVICES)
        problems = ohif.watch(page, address)
        page.goto(f"{address}{make_viewer_link(True)(first.StudyInstanceUID)}")
        ohif.wait_for_images(page, 8)
        yield page
        browser.close()
        assert not problems


def hang(page: Any, place: str, condition: str) -> None:
    """Show the display set that fulfils a condition on `d` in the viewport `place`."""
    page.evaluate(
        f"""() => {{
        const d = services.displaySetService.getActiveDisplaySets().find(d => {condition});
        services.viewportGridService.setDisplaySetsForViewport(
            {{viewportId: "{place}", displaySetInstanceUIDs: [d.displaySetInstanceUID]}});
        }}"""
    )
    page.wait_for_timeout(4000)


def screen(page: Any, place: str) -> np.ndarray:
    """Return the pixels of a viewport without text, `(H, W, 3)` uint8, RGB."""
    page.add_style_tag(content="svg text, svg .text {display: none !important}")
    data = page.locator(f'[data-viewportid="{place}"]').first.screenshot()
    return cv2.cvtColor(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def fit(shape: tuple[int, int], canvas: tuple[int, int], edge: float = 0.5) -> np.ndarray:
    """Return the map `(2, 3)` from an image of `shape` to a viewport that shows it whole.

    Args:
        shape: Height and width of the image.
        canvas: Height and width of the viewport.
        edge: Where the image lies: 0 = at the left edge, 0.5 = in the middle, 1 = at the right edge.
    """
    scale = min(canvas[0] / shape[0], canvas[1] / shape[1])
    return np.array([[scale, 0, edge * (canvas[1] - scale * shape[1])], [0, scale, (canvas[0] - scale * shape[0]) / 2]])


def likeness(pixels: np.ndarray, picture: np.ndarray) -> float:
    """Return the correlation of a viewport's pixels with a picture that is shown whole and centred in it."""
    matrix = fit(picture.shape[:2], pixels.shape[:2])
    expected = cv2.warpAffine(picture, matrix, (pixels.shape[1], pixels.shape[0]), flags=cv2.INTER_AREA)
    covered = cv2.warpAffine(np.ones(picture.shape[:2], np.uint8), matrix, (pixels.shape[1], pixels.shape[0])) > 0
    return float(np.corrcoef(expected[covered].ravel(), pixels[covered].ravel())[0, 1])


def green_or_yellow(pixels: np.ndarray) -> np.ndarray:
    """Return the pixels in the colours of OHIF's lines, `(H, W)` bool; its buttons are blue."""
    return pixels[..., 1].astype(int) - pixels[..., 2] > 60


def distance_to(mask: np.ndarray) -> np.ndarray:
    """Return each pixel's distance to the nearest one of a mask."""
    return cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, 5)


def drawn(lines: list[np.ndarray], shape: tuple[int, int], canvas: tuple[int, int]) -> np.ndarray:
    """Return where closed lines, in pixels of an image of `shape`, lie in a viewport, `(H, W)` bool."""
    matrix = fit(shape, canvas)
    page = np.zeros(canvas, np.uint8)
    for line in lines:
        corners = np.column_stack([line + 0.5, np.ones(len(line))]) @ matrix.T
        cv2.polylines(page, [np.rint(corners).astype(np.int32)], True, 255)
    return page > 0


def nearest(pixels: np.ndarray, shown: dict[str, Shown]) -> str:
    """Return the view that a viewport shows."""
    scores = {view: likeness(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), image.grey) for view, image in shown.items()}
    best = max(scores, key=lambda view: scores[view])
    assert scores[best] > 0.85, scores
    return best


def test_each_outline_lies_on_its_own_image(page: Any, study: tuple[Path, dict[str, Shown]]) -> None:
    shown = study[1]
    for view in VIEWS:
        name = f"{view[0]} {view[1:]}:"
        hang(page, "RCC", f"d.SOPClassHandlerId.endsWith('dicom-sr-3d') && d.SeriesDescription.startsWith('{name}')")
        text = page.locator('[data-viewportid="RCC"]').first.text_content()
        assert "Probability of cancer: 31.70 %" in text
        if view == "RCC":
            page.screenshot(path=study[0] / "ohif.png")
        pixels = screen(page, "RCC")
        assert nearest(pixels, shown) == view
        lines = green_or_yellow(pixels)
        rows, columns = shown[view].grey.shape
        expected = drawn(shown[view].lines, (2 * rows, 2 * columns), pixels.shape[:2])
        expected[:, [*range(CLOSE), *range(-CLOSE, 0)]] = False  # below the frame of the viewport
        assert (distance_to(lines)[expected] <= 2 * CLOSE).mean() > 0.95, f"{view}: an outline is missing"
        # The rest are dotted lines from the outlines to their texts.
        assert (distance_to(expected)[lines] <= CLOSE).mean() > 0.7, f"{view}: lines lie elsewhere"


def test_each_overlay_is_shown_as_it_was_written(page: Any, study: tuple[Path, dict[str, Shown]]) -> None:
    out, shown = study
    for view, image in shown.items():
        series = dcmread(out / "dicom" / f"{image.capture}.dcm", stop_before_pixels=True).SeriesInstanceUID
        hang(page, "LMLO", f"d.SeriesInstanceUID === '{series}'")
        position = f"""() => {{
            const d = services.displaySetService.getActiveDisplaySets().find(d => d.SeriesInstanceUID === '{series}');
            const v = services.cornerstoneViewportService.getCornerstoneViewport("LMLO");
            const n = d.instances.findIndex(i => i.SOPInstanceUID === '{image.capture}');
            return v.setImageIdIndex(n).then(() => null);
        }}"""
        page.evaluate(position)
        page.wait_for_timeout(2000)
        pixels = screen(page, "LMLO")
        overlay = cv2.cvtColor(cv2.imread(str(image.overlay)), cv2.COLOR_BGR2RGB)
        alike = {
            name: likeness(pixels, cv2.cvtColor(cv2.imread(str(other.overlay)), cv2.COLOR_BGR2RGB))
            for name, other in shown.items()
        }
        assert max(alike, key=lambda name: alike[name]) == view
        assert likeness(pixels, overlay) > 0.85, alike


def test_the_text_report_is_shown_as_text(page: Any) -> None:
    hang(page, "RMLO", "d.SOPClassHandlerId.endsWith('.dicom-sr')")
    text = page.locator('[data-cy="viewport-grid"]').inner_text()
    for expected in ("Research scores of a mammography study", "Right breast: probability of cancer", "31.7 %"):
        assert expected in text
    assert "not a medical device" in text
