"""Helpers of the tests of the node: phantom studies as files, a clock, and the programs of dcmtk and Orthanc."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pydicom import Dataset

MakeStudy = Callable[..., list[Dataset]]
"""Takes views, a patient and a study UID, all optional; returns the images of a study."""


_given: set[int] = set()


def free_port() -> int:
    """Return a port on which nobody listens; never the same twice, because it is not taken at once."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = int(server.getsockname()[1])
        if port not in _given:
            _given.add(port)
            return port


def wait_until(condition: Callable[[], object], seconds: float = 30, what: str = "the condition") -> None:
    """Wait until `condition` holds; fail after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what} did not hold within {seconds} s"
        time.sleep(0.02)


def to_bytes(dataset: Dataset) -> bytes:
    """Return a data set as a DICOM file."""
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def tool(name: str) -> str:
    """Return the path of a program of dcmtk; skip the test without it."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed (Debian package dcmtk)")
    return path


@dataclass
class Clock:
    """A clock that the test moves."""

    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Orthanc:
    """A running Orthanc."""

    dicom_port: int
    http_port: int
    aet: str = "ORTHANC"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    def get(self, path: str) -> object:
        """Return the answer to a GET request, parsed as JSON."""
        return json.loads(self.get_bytes(path))

    def get_bytes(self, path: str) -> bytes:
        """Return the answer to a GET request."""
        with urllib.request.urlopen(f"{self.url}{path}", timeout=10) as answer:
            return bytes(answer.read())

    def post(self, path: str, body: bytes) -> object:
        """Return the answer to a POST request, parsed as JSON."""
        with urllib.request.urlopen(f"{self.url}{path}", body, timeout=30) as answer:
            return json.loads(answer.read())

    def upload(self, images: list[Dataset]) -> None:
        """Store images by the REST interface."""
        for image in images:
            self.post("/instances", to_bytes(image))

    def instances(self, study_uid: str) -> list[dict[str, str]]:
        """Return the main tags of all objects of a study."""
        body = json.dumps({"Level": "Instance", "Query": {"StudyInstanceUID": study_uid}, "Expand": True})
        found = self.post("/tools/find", body.encode())
        assert isinstance(found, list)
        tags = []
        for item in found:
            simplified = self.get(f"/instances/{item['ID']}/simplified-tags")
            assert isinstance(simplified, dict)
            tags.append(simplified)
        return tags


def answers(peer: Orthanc) -> bool:
    """Return whether Orthanc is up."""
    with contextlib.suppress(OSError):
        return peer.get("/system") is not None
    return False


StartOrthanc = Callable[..., "contextlib.AbstractContextManager[Orthanc]"]


@dataclass
class RunningNode:
    """A process of `vitmodel node run`."""

    process: subprocess.Popen[str]
    port: int
    folder: Path

    def query(self, statement: str) -> list[tuple[Any, ...]]:
        """Return the rows of a query in the node's SQLite database."""
        with contextlib.closing(sqlite3.connect(self.folder / "node.sqlite", timeout=30)) as connection:
            return connection.execute(statement).fetchall()

    def stages(self) -> list[str]:
        """Return the stage of each job."""
        return [stage for (stage,) in self.query("SELECT stage FROM jobs ORDER BY id")]

    def kill(self) -> None:
        """End the process as `kill -9` does."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """End the process as systemd does; return its exit status."""
        self.process.terminate()
        return self.process.wait(60)


def start_node_process(folder: Path, package: Path, port: int, *flags: object) -> RunningNode:
    """Start `vitmodel node run` and wait until it receives."""
    words = ["--folder", folder, "--package", package, "--dicom-port", port, "--min-free-gb", 0, "--device", "cpu"]
    words += ["--workers", 1, "--port", 0, *flags]
    command = [sys.executable, "-m", "vitmodel.cli", "node", "run", *map(str, words)]
    folder.mkdir(exist_ok=True, parents=True)
    with (folder / "stderr.txt").open("a") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("receiving"), line + (folder / "stderr.txt").read_text()
    return RunningNode(process, port, folder)


def send_files(port: int, images: list[Dataset], folder: Path, program: str = "storescu") -> int:
    """Send images with a program of dcmtk; return its exit status."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images):
        (folder / f"{number}.dcm").write_bytes(to_bytes(image))
    command = [tool(program), "-aec", "VITMODEL", "127.0.0.1", str(port), "+sd", str(folder)]
    return subprocess.run(command, capture_output=True).returncode
