"""The server gives the scores of `predict`; a request cannot fill the disk or read other files."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import threading
import time
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
    log: Path
    """What it writes to standard error."""


@contextlib.contextmanager
def running(package: Path, folder: Path, *options: str) -> Iterator[tuple[Server, subprocess.Popen[str]]]:
    """Run `vitmodel serve` in a separate process."""
    scratch, log = folder / "scratch", folder / "log"
    scratch.mkdir()
    command = [sys.executable, "-m", "vitmodel.cli", "serve", str(package), "--port", "0", *options]
    environment = os.environ | {"TMPDIR": str(scratch)}
    with (
        log.open("w") as stderr,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment) as process,
    ):
        assert process.stdout
        address = re.search(r"http://\S+?(?=;)", process.stdout.readline())
        assert address
        try:
            yield Server(address[0], scratch, package, log), process
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def server(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Run a server with ONNX."""
    folder = tmp_path_factory.mktemp("serve")
    with running(exported, folder, "--runtime", "onnx", "--upload-limit", "1") as (server, _):
        yield server


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
        ([("train.XLSX", b"PK")], 415, "train.XLSX names files"),
        ([("train.tsv", b"path\n/etc/passwd\n")], 415, "train.tsv names files"),
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


def test_health_metrics_and_the_log_hold_no_names(server: Server, release: Path) -> None:
    source = next(iter(sorted((release / "train_images").rglob("*.dcm"))))
    answer = post(server, ("Jane_Doe.dcm", source.read_bytes()), ("Jane_Doe.txt", b"none")).json()
    patient = answer["images"][0]["patient_id"]
    httpx.get(f"{server.url}/Jane_Doe")
    assert httpx.get(f"{server.url}/healthz").json() == {"status": "ok"}
    assert httpx.get(f"{server.url}/readyz").json() == {"scoring": True}
    metrics = httpx.get(f"{server.url}/metrics").text
    assert re.search(r'vitmodel_requests_total{method="POST",route="/scores",status="200"} \d', metrics)
    assert 'route="other"' in metrics
    log = server.log.read_text()
    entries = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    assert {"images": 2, "refused": 1}.items() <= [entry for entry in entries if "images" in entry][-1].items()
    assert all(entry["who"] == "anyone" for entry in entries)
    assert patient
    for secret in ("Doe", f'"{patient}"', str(server.scratch), "%|", "image/s"):
        assert secret not in metrics + log, secret


def test_another_site_and_another_name_are_refused_and_answers_are_protected(server: Server) -> None:
    assert httpx.get(server.url, headers={"Origin": "http://evil.example"}).status_code == 403
    assert httpx.get(server.url, headers={"Host": "evil.example"}).status_code == 403
    page = httpx.get(server.url)
    assert "unsafe" not in page.headers["Content-Security-Policy"]
    assert "script-src 'sha256-" in page.headers["Content-Security-Policy"]
    assert page.headers["X-Content-Type-Options"] == "nosniff"


def test_a_server_for_others_needs_keys(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(exported), "--host", "0.0.0.0"]) == 2
    assert "--api-key-file" in capsys.readouterr().err
    assert main(["serve", str(exported), "--insecure"]) == 2
    assert "--insecure" in capsys.readouterr().err


def test_clients_that_hang_up_and_a_signal_leave_nothing_behind(exported: Path, release: Path, tmp_path: Path) -> None:
    images = [path.read_bytes() for path in sorted((release / "train_images").rglob("*.dcm"))[:10]]
    large = [(f"{number}.dcm", images[number % 10]) for number in range(300)]
    with running(exported, tmp_path, "--shutdown-timeout", "5") as (server, process):
        for timeout in (1, 1):
            with pytest.raises(httpx.TimeoutException):
                httpx.post(f"{server.url}/scores", files=[("files", file) for file in large], timeout=timeout)
        deadline = time.monotonic() + 20
        while (waiting := open_work(server)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert waiting == 0
        assert not list(server.scratch.glob("vitmodel-*/*"))
        client = threading.Thread(target=lambda: post_quietly(server, large), daemon=True)
        client.start()
        time.sleep(1.5)
        start = time.monotonic()
        process.terminate()
        assert process.wait(15) == 0
        assert time.monotonic() - start < 6.5
        assert not list(server.scratch.iterdir())


def post_quietly(server: Server, files: list[tuple[str, bytes]]) -> None:
    with contextlib.suppress(httpx.HTTPError):
        post(server, *files)


def open_work(server: Server) -> float:
    """Return the number of uploads and images that the server still works on."""
    metrics = httpx.get(f"{server.url}/metrics").text
    return sum(float(value) for value in re.findall(r"^vitmodel_(?:uploads|waiting_images) (\S+)", metrics, re.M))


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
