"""Uploads that are kept for a while can be looked at, and are gone afterwards."""

from __future__ import annotations

import io
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from fastapi.testclient import TestClient

from vitmodel.cli import main
from vitmodel.commands.serve import create_app
from vitmodel.config import ServeConfig
from vitmodel.data.tables import read_table
from vitmodel.viewer import uploads
from vitmodel.viewer.uploads import KeptUploads
from vitmodel.web.scratch import Scratch

Sent = dict[str, Any]


@pytest.fixture(scope="module")
def exam(release: Path) -> list[Path]:
    """Return the images of one patient of the release."""
    folders = sorted(path for path in (release / "train_images").iterdir() if path.is_dir())
    return next(files for files in (sorted(folder.glob("*.dcm")) for folder in folders) if len(files) == 4)


@pytest.fixture
def scratch() -> Iterator[Scratch]:
    made = Scratch()
    yield made
    made.remove()


@pytest.fixture
def client(run: Path, scratch: Scratch) -> Iterator[TestClient]:
    config = ServeConfig(package=run / "package", keep_minutes=1, device="cpu", workers=1)
    with TestClient(create_app(config, scratch), base_url="http://localhost") as client:
        yield client


def send(client: TestClient, files: list[tuple[str, bytes]], address: str = "/scores?keep") -> Sent:
    answer = client.post(address, files=[("files", file) for file in files])
    assert answer.status_code == 200
    return dict(answer.json())


def as_files(paths: list[Path]) -> list[tuple[str, bytes]]:
    return [(path.name, path.read_bytes()) for path in paths]


def base_of(answer: Sent) -> str:
    return str(answer["pages"]).removesuffix("/worklist")


def only_exam(client: TestClient, answer: Sent) -> dict[str, Any]:
    """Return the only exam of an upload, found through its worklist as a reader does."""
    page = client.get(answer["pages"]).text
    (start,) = {part.split('"')[0] for part in page.split(f'href="{base_of(answer)}/exams/')[1:]}
    return dict(client.get(f"{base_of(answer)}/api/exams/{start}").json())


def test_a_kept_upload_is_shown_with_the_scores_that_were_answered(client: TestClient, exam: list[Path]) -> None:
    answer = send(client, as_files(exam))
    shown = only_exam(client, answer)
    expected = {row["laterality"]: row["probability"] for row in answer["breasts"]}
    assert {breast["side"]: breast["probability"] for breast in shown["breasts"]} == pytest.approx(expected, abs=1e-6)
    assert all(image["pixels"] for image in shown["images"])
    page = client.get(f"{base_of(answer)}/exams/{shown['key']}").text
    assert f'data-base="{base_of(answer)}"' in page
    assert "Research software" in page
    image = shown["images"][0]["key"]
    assert client.get(f"{base_of(answer)}/api/images/{image}/tiles/0/0/0").status_code == 200
    heat_map = f"{base_of(answer)}/api/images/{image}/heat-maps/gradient"
    end = time.monotonic() + 60
    while (reply := client.get(heat_map)).status_code == 202:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert reply.json()["outline"]


def test_images_in_a_zip_are_shown(client: TestClient, exam: list[Path]) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as file:
        for path in exam[:2]:
            file.write(path, f"folder/{path.name}")
    shown = only_exam(client, send(client, [("exam.zip", packed.getvalue())]))
    assert [bool(image["pixels"]) for image in shown["images"]] == [True, True]


def test_readings_of_an_upload_are_stored_and_exported(client: TestClient, exam: list[Path]) -> None:
    answer = send(client, as_files(exam))
    shown = only_exam(client, answer)
    client.cookies.set("reader", "anna")
    reading = {"id": "one", "breasts": {"R": {"birads": "2"}}}
    stored = client.post(f"{base_of(answer)}/api/exams/{shown['key']}/readings", json=reading)
    assert stored.status_code == 200
    labels = pd.read_csv(io.StringIO(client.get(f"{base_of(answer)}/readings.csv").text), dtype=str)
    assert set(labels["birads"]) == {"2"}


def test_only_uploads_that_ask_for_it_are_kept(client: TestClient, scratch: Scratch, exam: list[Path]) -> None:
    assert "pages" not in send(client, as_files(exam[:1]), "/scores")
    assert not list(scratch.folder.iterdir())
    send(client, as_files(exam[:1]))
    assert len(list(scratch.folder.iterdir())) == 1
    assert client.get("/uploads/guess/worklist").status_code == 404
    assert client.get("/uploads/guess/api/exams/1").status_code == 404


def test_without_the_option_nothing_is_kept(run: Path, scratch: Scratch, exam: list[Path]) -> None:
    config = ServeConfig(package=run / "package", device="cpu", workers=1)
    with TestClient(create_app(config, scratch), base_url="http://localhost") as client:
        assert "pages" not in send(client, as_files(exam[:1]))
        assert not list(scratch.folder.iterdir())
        assert "deleted after scoring" in client.get("/").text


def test_uploads_are_deleted_after_their_time_and_above_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Path, exam: list[Path]
) -> None:
    out = tmp_path / "scores"
    assert main(["predict", str(run / "package"), str(exam[0].parent), str(out)]) == 0
    images, breasts = (read_table(out / name) for name in ("scores.csv", "breast_scores.csv"))
    deleted: list[Path] = []
    now = time.monotonic()
    monkeypatch.setattr(uploads.time, "monotonic", lambda: now)
    monkeypatch.setattr(uploads, "MAX_KEPT", 2)
    kept = KeptUploads(60, deleted.append, uploads.Model)
    for name in "abc":
        (tmp_path / name).mkdir()
        (tmp_path / name / "image.dcm").write_bytes(bytes(100))
        kept.keep(tmp_path / name, images, breasts, [{}] * len(images))
    assert [path.name for path in deleted] == ["a"]
    monkeypatch.setattr(uploads, "MAX_BYTES", 50)
    kept.expire()
    assert [path.name for path in deleted] == ["a", "b"], "the last one stays, however large it is"
    now += 61
    kept.expire()
    assert [path.name for path in deleted] == ["a", "b", "c"]
