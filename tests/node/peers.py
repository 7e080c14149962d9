"""Helpers of the tests of the node: phantom studies as files, a clock, and the programs of dcmtk and Orthanc."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import socket
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from pydicom import Dataset

MakeStudy = Callable[..., list[Dataset]]
"""Takes views, a patient and a study UID, all optional; returns the images of a study."""


def free_port() -> int:
    """Return a port on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


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
        with urllib.request.urlopen(f"{self.url}{path}", timeout=10) as answer:
            return json.loads(answer.read())

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
