"""Take the pictures of the reading room and of OHIF: `python docs/figures/reading_room.py demo`, after `vitmodel demo`.

They show the synthetic test patients of the demo. Run it in the folder in which the demo ran. It needs Chromium and
playwright; the picture of OHIF also needs Orthanc and the package vitmodel-viewer, and is left as it is without them.
"""

from __future__ import annotations

import argparse
import io
import socket
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import uvicorn
from PIL import Image
from playwright.sync_api import expect, sync_playwright

from vitmodel.commands.view import create_app
from vitmodel.config import ViewConfig
from vitmodel.node.ohif import make_viewer_link
from vitmodel.viewer.exams import Exam, ImageEntry
from vitmodel.viewer.scores_folder import read_scores_folder

DOCS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(DOCS.parent / "tests"))
from results import ohif  # noqa: E402 (Orthanc and OHIF as the tests run them)

SIZE = {"width": 1280, "height": 800}


@contextmanager
def serving(config: ViewConfig) -> Iterator[str]:
    """Serve the pages of `vitmodel view` during the block; yield their address."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(create_app(config), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield f"http://localhost:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def choose(exams: list[Exam], lesions: Path) -> Exam:
    """Return the exam, with just the four standard views, whose breast with cancer exceeds the other breast most."""
    table = pd.read_csv(lesions, dtype=str)
    table = table[table["cancer"] == "1"]
    ill = set(zip(table["patient_id"], table["laterality"], strict=True))

    def difference(exam: Exam) -> float:
        signs = {side: 1 if (exam.patient_id, side) in ill else -1 for side in "RL"}
        return (
            sum(signs[breast.side] * (breast.probability or 0) for breast in exam.breasts)
            if 1 in signs.values()
            else -1
        )

    four = [exam for exam in exams if len(exam.images) == len(exam.views) == 4 and exam.status == "ok"]
    return max(four, key=difference)


def save(page: Any, name: str) -> None:
    """Write what a page shows to docs/NAME.png, in 256 colours."""
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    picture.quantize(256, dither=Image.Dither.NONE).save(DOCS / f"{name}.png", optimize=True)
    print(f"{name}.png: {(DOCS / f'{name}.png').stat().st_size // 1000} kB")


def take_reading_room(page: Any, address: str, exam: Exam, method: str) -> None:
    """Take the worklist, an exam with heat maps, and the evaluation."""
    page.goto(f"{address}/worklist")
    save(page, "worklist")
    page.goto(f"{address}/exams/{exam.key}")
    page.wait_for_selector("figure[data-place]")
    page.select_option("#method", method)
    expect(page.locator("#state")).to_have_text("", timeout=120_000)
    page.wait_for_load_state("networkidle")
    page.wait_for_timeout(3000)
    save(page, "reading_room")
    page.goto(f"{address}/evaluation")
    page.wait_for_load_state("networkidle")
    save(page, "evaluation_page")


def take_ohif(browser: Any, images: tuple[ImageEntry, ...], folder: Path) -> None:
    """Take the four views of an exam in OHIF, fed from Orthanc."""
    from pydicom import dcmread

    (folder / "orthanc").mkdir()
    with (
        ohif.running_orthanc(folder / "orthanc") as (port, _),
        ohif.running_viewer(port, folder / "node") as address,
    ):
        for image in images:
            body = Path(image.path).read_bytes()
            urllib.request.urlopen(f"http://127.0.0.1:{port}/instances", body).close()
        page = browser.new_page(viewport=SIZE)
        page.add_init_script(ohif.SHARE_SERVICES)
        study = dcmread(images[0].path, stop_before_pixels=True).StudyInstanceUID
        page.goto(f"{address}{make_viewer_link(True)(study)}")
        ohif.wait_for_images(page, len(images))
        save(page, "ohif_viewer")
        page.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("demo", type=Path, help="output folder of `vitmodel demo`")
    parser.add_argument("--method", default="occlusion", help="heat map of the picture of the exam")
    arguments = parser.parse_args()
    demo = arguments.demo
    exam = choose(read_scores_folder(demo / "report"), demo / "release" / "lesions.csv")
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as scratch:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=ohif.FLAGS)
        readings = Path(scratch) / "readings.jsonl"
        config = ViewConfig(
            scores=demo / "report", package=(demo / "run" / "package",), readings=readings, reader="reader"
        )
        with serving(config) as address:
            take_reading_room(browser.new_page(viewport=SIZE), address, exam, arguments.method)
        if missing := ohif.installed():
            print(f"no picture of OHIF without {missing}")
        else:
            take_ohif(browser, exam.images, Path(scratch))
        browser.close()


if __name__ == "__main__":
    main()
