"""An archive and a viewer as hospitals have them, for tests: Orthanc with DICOMweb, and OHIF that reads from it."""

from __future__ import annotations

import contextlib
import functools
import http.client
import http.server
import json
import os
import shutil
import socket
import subprocess
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

VERSION = "3.12.10"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vitmodel" / f"ohif-{VERSION}"
PLUGINS = Path("/usr/share/orthanc/plugins")
CONFIG = Path(__file__).with_name("ohif_config.js")
"""The viewer's configuration: one DICOMweb source, and the four views side by side."""
COPIED_HEADERS = ("content-type", "accept")


def installed() -> str:
    """Return what is missing to run the archive and the viewer; empty if nothing is."""
    missing = [name for name in ("Orthanc", "chromium", "storescu") if shutil.which(name) is None]
    if not list(PLUGINS.glob("libOrthancDicomWeb*")):
        missing.append("orthanc-dicomweb")
    if not (CACHE / "package" / "dist" / "index.html").exists():
        missing.append(f"@ohif/app {VERSION}")
    return ", ".join(missing)


def install() -> None:
    """Download the viewer from npm and unpack it into the cache, unless it is there."""
    if (CACHE / "package" / "dist" / "index.html").exists():
        return
    CACHE.mkdir(parents=True, exist_ok=True)
    subprocess.run(["npm", "pack", "--silent", f"@ohif/app@{VERSION}"], cwd=CACHE, check=True)
    (archive,) = CACHE.glob("*.tgz")
    with tarfile.open(archive) as file:
        file.extractall(CACHE, filter="data")
    archive.unlink()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@contextlib.contextmanager
def running_orthanc(folder: Path) -> Iterator[tuple[int, int]]:
    """Run an empty archive below `folder`; yield its HTTP and its DICOM port."""
    http_port, dicom_port = free_port(), free_port()
    settings = {
        "Name": "test", "StorageDirectory": str(folder / "storage"), "IndexDirectory": str(folder / "storage"),
        "HttpPort": http_port, "DicomPort": dicom_port, "DicomAet": "ORTHANC", "DicomAlwaysAllowStore": True,
        "RemoteAccessAllowed": False, "AuthenticationEnabled": False, "Plugins": [str(PLUGINS)],
        "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
    }  # fmt: skip
    (folder / "orthanc.json").write_text(json.dumps(settings))
    with open(folder / "orthanc.log", "w") as log:
        process = subprocess.Popen(["Orthanc", str(folder / "orthanc.json")], stdout=log, stderr=subprocess.STDOUT)
        try:
            _wait_until_it_answers(http_port, process, folder / "orthanc.log")
            yield http_port, dicom_port
        finally:
            process.terminate()
            process.wait(30)


def _wait_until_it_answers(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(300):
        if process.poll() is not None:
            raise RuntimeError(f"Orthanc ended: {log.read_text()[-2000:]}")
        with contextlib.suppress(OSError):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/dicom-web/studies")
            if connection.getresponse().status == 200:
                return
        time.sleep(0.1)
    raise RuntimeError("Orthanc does not answer")


class _Viewer(http.server.SimpleHTTPRequestHandler):
    """The files of the viewer, and the archive's DICOMweb below /dicom-web."""

    archive_port: int

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/dicom-web/"):
            self._forward()
        elif path == "/app-config.js":
            self._send(200, "text/javascript", CONFIG.read_bytes())
        else:
            if not (Path(self.directory) / path.lstrip("/")).is_file():
                self.path = "/index.html"  # a page of the application
            super().do_GET()

    def _forward(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.archive_port, timeout=60)
        headers = {name: self.headers[name] for name in COPIED_HEADERS if name in self.headers}
        # Orthanc writes its own address into BulkDataURIs; this makes it the viewer's.
        headers["Host"] = self.headers["Host"]
        connection.request("GET", self.path, headers=headers)
        answer = connection.getresponse()
        self._send(answer.status, answer.getheader("Content-Type", "application/json"), answer.read())

    def _send(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def running_viewer(archive_port: int) -> Iterator[str]:
    """Serve the viewer for an archive; yield its address."""
    handler = type("Viewer", (_Viewer,), {"archive_port": archive_port})
    folder = str(CACHE / "package" / "dist")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=folder))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()


if __name__ == "__main__":
    install()
