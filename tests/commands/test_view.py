"""The reading room in a real browser and over HTTP: hanging, grey values, heat maps, keys, and what is refused."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from fastapi.testclient import TestClient

from vitmodel.cli import main
from vitmodel.commands.view import create_app
from vitmodel.config import ViewConfig
from vitmodel.data.tables import read_table, write_csv
from vitmodel.errors import UsageError
from vitmodel.pixels.open import open_image
from vitmodel.viewer.exams import BreastEntry, Exam, ImageEntry
from vitmodel.viewer.heat_maps import scored_row
from vitmodel.viewer.pixels import TILE, PixelStore, coarsest_level
from vitmodel.viewer.scores_folder import read_scores_folder
from vitmodel.viewer.source import PAGE, WorklistQuery
from vitmodel.viewer.worklist import Worklist


@pytest.fixture(scope="module")
def scores(run: Path, release: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("view") / "scores"
    assert main(["predict", str(run / "package"), str(release), str(out)]) == 1  # the release has faulty images
    return out


@pytest.fixture(scope="module")
def client(scores: Path, run: Path) -> Iterator[TestClient]:
    app = create_app(ViewConfig(scores=scores, package=(run / "package",)))
    with TestClient(app, base_url="http://localhost") as client:
        yield client


def make_exam(number: int, right: float | None, left: float | None) -> Exam:
    breasts = [
        BreastEntry(side, value, value is not None and value >= 0.5, "ok" if value is not None else "refused", "", "CC")
        for side, value in (("R", right), ("L", left))
    ]
    return Exam(f"patient_{number:05}", "", (), tuple(breasts))


def describe(client: TestClient, exam: Exam) -> dict[str, Any]:
    return client.get(f"/api/exams/{exam.key}").json()


def test_the_worklist_lists_every_exam_with_the_scores_of_the_tables(client: TestClient, scores: Path) -> None:
    breasts = pd.read_csv(scores / "breast_scores.csv", dtype={"patient_id": str})
    page = client.get("/").text
    for patient, group in breasts.groupby("patient_id"):
        assert f">{patient}</a>" in page
        for probability in group["probability"].dropna():
            assert f"{100 * probability:.1f} %" in page
    assert "Research software" in page


def test_ten_thousand_exams_are_sorted_searched_and_paged_in_time() -> None:
    rng = np.random.default_rng(0)
    values = rng.random((10_000, 2))
    worklist = Worklist(make_exam(number, *row) for number, row in enumerate(values.tolist()))
    start = time.perf_counter()
    page = worklist.page(WorklistQuery(sort="probability"))
    assert time.perf_counter() - start < 0.3
    largest = np.sort(values.max(axis=1))[::-1]
    assert [max(row.right or 0, row.left or 0) for row in page.rows] == largest[:PAGE].tolist()
    assert page.pages == 10_000 // PAGE
    assert [row.patient_id for row in worklist.page(WorklistQuery(search="PATIENT_00017")).rows] == ["patient_00017"]
    assert worklist.page(WorklistQuery(search="%")).total == 0, "a wildcard is text"
    assert worklist.page(WorklistQuery(only="positive")).total == (values.max(axis=1) >= 0.5).sum()
    assert worklist.page(WorklistQuery(page=10**6)).page == page.pages


def test_unscored_exams_come_last_and_are_refused() -> None:
    worklist = Worklist([make_exam(0, None, None), make_exam(1, 0.1, None), make_exam(2, 0.2, 0.3)])
    assert [row.patient_id[-1] for row in worklist.page(WorklistQuery(sort="probability")).rows] == ["2", "1", "0"]
    assert [row.patient_id[-1] for row in worklist.page(WorklistQuery(only="refused")).rows] == ["0", "1"]


def test_the_standard_views_hang_first_and_refused_images_last() -> None:
    def image(side: str, view: str, status: str = "ok") -> ImageEntry:
        return ImageEntry(f"{side}{view}{status}", "", side, view, None, status, "", "")  # type: ignore[arg-type]

    images = (
        image("L", "MLO"),
        image("R", "ML"),
        image("R", "CC", "refused"),
        image("L", "CC"),
        image("R", "MLO"),
        image("R", "CC"),
    )
    assert [entry.key for entry in Exam("p", "", images, ()).hanging()] == [
        "RCCok",
        "LCCok",
        "RMLOok",
        "LMLOok",
        "RMLok",
        "RCCrefused",
    ]


@pytest.mark.parametrize(
    ("side", "wall", "mirrored"),
    [
        ("R", "right", False),
        ("R", "left", True),
        ("L", "left", False),
        ("L", "right", True),
        ("", "left", False),
        ("R", "", False),
    ],
)
def test_an_image_is_mirrored_if_its_chest_wall_is_on_the_other_side(side: str, wall: str, mirrored: bool) -> None:
    assert ImageEntry("k", "i", side, "CC", None, "ok", "", "", chest_wall=wall).is_mirrored is mirrored


def test_tiles_put_together_are_the_grey_values_of_the_image(client: TestClient, scores: Path) -> None:
    exam = next(exam for exam in read_scores_folder(scores) if exam.status != "refused")
    image = describe(client, exam)["images"][0]
    rows, columns = image["pixels"]["rows"], image["pixels"]["columns"]
    entry = next(entry for entry in exam.images if entry.key == image["key"])
    whole = np.zeros((rows, columns), np.uint16)
    for row in range(-(-rows // TILE)):
        for column in range(-(-columns // TILE)):
            answer = client.get(f"/api/images/{image['key']}/tiles/0/{row}/{column}")
            tile = np.frombuffer(answer.content, "<u2").reshape(-1, int(answer.headers["X-Width"]))
            whole[row * TILE : (row + 1) * TILE, column * TILE : (column + 1) * TILE] = tile
    assert entry.path
    file = open_image(entry.path)
    expected = np.rint(file.to_grey(file.read_stored()) * np.float32(65535)).astype(np.uint16)
    np.testing.assert_array_equal(whole, expected)
    for wrong in ("0/99/0", "0/0/99", "99/0/0", "0/-1/0"):
        assert client.get(f"/api/images/{image['key']}/tiles/{wrong}").status_code == 404


def test_levels_are_halved_until_one_tile_holds_the_image() -> None:
    assert coarsest_level(512, 100) == 0
    assert coarsest_level(513, 100) == 1
    assert coarsest_level(5928, 4728) == 4


def test_memory_keeps_the_most_recent_images(scores: Path) -> None:
    exam = next(exam for exam in read_scores_folder(scores) if exam.status != "refused")
    store = PixelStore(memory=1)
    for image in exam.images:
        store.level(image, 0)
    assert len(store._kept) == 1


def test_a_refused_image_is_shown_with_its_reason(client: TestClient, scores: Path) -> None:
    refused = [
        image
        for exam in read_scores_folder(scores)
        for image in describe(client, exam)["images"]
        if image["status"] == "refused"
    ]
    assert len(refused) == 6
    for image in refused:
        assert image["remark"]
        assert image["meaning"]
        assert image["probability"] is None
    missing = next(image for image in refused if image["reason"] == "missing_file")
    assert missing["pixels"] is None
    assert "does not exist" in missing["problem"]
    assert client.get(f"/api/images/{missing['key']}/tiles/0/0/0").status_code == 409


def test_a_heat_map_is_computed_once_and_covers_the_breast(client: TestClient, scores: Path) -> None:
    exam = next(exam for exam in read_scores_folder(scores) if exam.status != "refused")
    address = f"/api/images/{exam.images[0].key}/heat-maps/gradient"
    answer = client.get(address)
    while answer.status_code == 202:
        time.sleep(0.05)
        answer = client.get(address)
    heat = answer.json()
    assert answer.status_code == 200
    assert len(heat["outline"]) >= 3
    assert client.get(address).json() == heat
    assert client.get(address.replace("gradient", "unknown")).status_code == 404


@pytest.mark.parametrize(
    "headers", [{"Host": "evil.example"}, {"Host": "localhost", "Origin": "http://evil.example"}, {"Host": "["}]
)
def test_another_site_cannot_read_the_pages(client: TestClient, headers: dict[str, str]) -> None:
    assert client.get("/", headers=headers).status_code == 403


def test_every_answer_forbids_foreign_and_inline_code(client: TestClient) -> None:
    for address in ("/", "/static/exam.js", "/exams/0000"):
        policy = client.get(address).headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
    assert not re.search(r"<script(?![^>]*src)|style=|onclick", client.get("/").text)
    assert client.get("/static/..%2fpages.py").status_code == 404


def test_markup_in_ids_is_text(tmp_path: Path, scores: Path) -> None:
    for name in ("scores.csv", "breast_scores.csv"):
        table = pd.read_csv(scores / name, dtype=str)
        table["patient_id"] = "<script>alert(1)</script>"
        table.to_csv(tmp_path / name, index=False)
    with TestClient(create_app(ViewConfig(scores=tmp_path)), base_url="http://localhost") as client:
        assert "<script>alert" not in client.get("/").text


def test_ids_that_a_spreadsheet_would_run_are_read_as_they_were(tmp_path: Path, scores: Path) -> None:
    for name in ("scores.csv", "breast_scores.csv"):
        write_csv(read_table(scores / name).assign(patient_id="=1+1"), tmp_path / name)
    assert [exam.patient_id for exam in read_scores_folder(tmp_path)] == ["=1+1"]


def test_a_heat_map_is_of_the_image_as_it_was_scored(scores: Path) -> None:
    """The table may correct the side of the header, and the crop is mirrored by it."""
    image = next(exam for exam in read_scores_folder(scores) if exam.status != "refused").images[0]
    corrected = replace(image, side={"R": "L", "L": "R"}[image.side], view="ML")
    assert scored_row(image)[["laterality", "view"]].to_numpy().tolist() == [[image.side, image.view]]
    assert scored_row(corrected)[["laterality", "view"]].to_numpy().tolist() == [[corrected.side, "ML"]]


def test_a_folder_without_scores_and_an_open_address_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no scores\.csv"):
        create_app(ViewConfig(scores=tmp_path))
    with pytest.raises(UsageError, match="host: must be one of"):
        ViewConfig(scores=tmp_path, host="0.0.0.0")
