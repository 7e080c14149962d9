"""The server gives the scores of `predict`; a request cannot fill the disk or read other files."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest

from vitmodel.cli import main
from vitmodel.config import PredictorConfig
from vitmodel.releases.inputs import read_inputs
from vitmodel.scoring.predictor import Predictor
from vitmodel.scoring.uploads import upload_name
from vitmodel.utils import NOT_A_MEDICAL_DEVICE

for module in ("fastapi", "uvicorn", "python_multipart", "onnxruntime"):
    pytest.importorskip(module, reason="needs the extras `serve` and `export`")
httpx = pytest.importorskip("httpx", reason="these tests need an HTTP client")


class Server(NamedTuple):
    """A running server."""

    url: str
    scratch: Path
    """Its folder for temporary files."""
    package: Path


@pytest.fixture(scope="module")
def server(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Run `vitmodel serve` with ONNX in a separate process."""
    folder = tmp_path_factory.mktemp("serve")
    scratch = folder / "scratch"
    scratch.mkdir()
    options = ["--port", "0", "--runtime", "onnx", "--upload-limit", "1"]
    command = [sys.executable, "-m", "vitmodel.cli", "serve", str(exported), *options]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | {"TMPDIR": str(scratch)}
    ) as process:
        assert process.stdout
        address = re.search(r"http://\S+?(?=;)", process.stdout.readline())
        assert address
        yield Server(address[0], scratch, exported)
        process.terminate()


def post(server: Server, *files: tuple[str, bytes]) -> Any:
    """Upload files, given as name and content, and return the response."""
    return httpx.post(f"{server.url}/scores", files=[("files", file) for file in files], timeout=60)


def test_served_scores_equal_those_of_predict(server: Server, release: Path) -> None:
    sources = sorted((release / "train_images").rglob("*.dcm"))[:5]
    answer = post(server, *((path.name, path.read_bytes()) for path in sources), ("notes.txt", b"none")).json()
    predictor = Predictor(PredictorConfig(package=server.package, jobs=1))
    images = predictor.score_images(read_inputs([str(path) for path in sources], "dicom_folder"))
    served = pd.DataFrame(answer["images"])
    columns = ["image_id", "patient_id", "laterality", "view", "status", "reason", "remark"]
    assert served[columns].head(5).fillna("").to_dict() == images[columns].fillna("").to_dict()
    for level, expected in (("images", images), ("breasts", predictor.score_breasts(images))):
        scores = pd.DataFrame(answer[level])["probability"].astype(float)
        np.testing.assert_allclose(scores[: len(expected)], expected["probability"], atol=1e-5)
    assert served.iloc[5][["image_id", "status", "reason"]].tolist() == ["notes.txt", "refused", "not_an_image"]
    assert served["probability"].isna()[5]
    assert answer["notice"] == NOT_A_MEDICAL_DEVICE
    assert not list(server.scratch.glob("vitmodel-*/*"))


def archive(name: str, content: bytes) -> bytes:
    """Return a zip with one file."""
    with zipfile.ZipFile(file := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as zipped:
        zipped.writestr(name, content)
    return file.getvalue()


def test_a_zip_and_files_of_one_name_are_scored(server: Server, crops: Path) -> None:
    first, second = (path.read_bytes() for path in sorted((crops / "images").rglob("*.png"))[:2])
    answer = post(server, ("a.png", first), ("a.png", second), ("b.zip", archive("c.png", second)))
    scores = {image["image_id"]: image["probability"] for image in answer.json()["images"]}
    assert scores["c"] == scores["1-a"] != scores["a"]
    assert str(server.scratch) not in answer.text


@pytest.mark.parametrize(
    ("files", "status", "named"),
    [
        ([], 422, "no file was sent"),
        ([("train.csv", b"path\n/etc/passwd\n")], 415, "train.csv names files"),
        ([("x/DICOMDIR", b"")], 415, "DICOMDIR names files"),
        ([("a.png", bytes(1_100_000))], 413, "larger than 1 MB"),
        ([("a.zip", archive("a.png", bytes(1_100_000)))], 413, "the unpacked content of a.zip is larger than 1 MB"),
        ([("../../a.png", b"")], 200, '"image_id":"a"'),
    ],
)
def test_a_request_that_is_too_large_or_names_files_is_refused(
    files: list[tuple[str, bytes]], status: int, named: str, server: Server
) -> None:
    answer = post(server, *files)
    assert answer.status_code == status
    assert named in answer.text
    assert NOT_A_MEDICAL_DEVICE in answer.text
    assert not list(server.scratch.glob("vitmodel-*/*"))


def test_the_page_shows_the_warning_and_the_model(server: Server) -> None:
    page, model = httpx.get(server.url).text, httpx.get(f"{server.url}/model").json()
    assert NOT_A_MEDICAL_DEVICE in page
    assert model["serial"] in page
    assert (model["runtime"], model["precision"]) == ("onnx", "fp32")


def test_a_port_in_use_is_named(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    port = server.url.rpartition(":")[2]
    assert main(["serve", str(server.package), "--port", port]) == 2
    assert f"127.0.0.1:{port}: Address already in use" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a" * 300 + ".png", "a" * 60 + ".png"),
        ("a\0b\n.png", "ab.png"),
        ("C:\\scans\\a.dcm", "a.dcm"),
        ("../../etc/passwd", "passwd"),
        ("\0", "image"),
        ("", "image"),
    ],
)
def test_the_name_of_an_upload_becomes_a_valid_file_name(name: str, expected: str) -> None:
    assert upload_name(name) == expected
