"""An archive and a viewer as hospitals have them, for tests: Orthanc with DICOMweb, and OHIF as the node serves it."""

from __future__ import annotations

import contextlib
import http.client
import json
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vitmodel.node.ohif import find_viewer

PLUGINS = Path("/usr/share/orthanc/plugins")
FLAGS = ["--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
"""Arguments of Chromium: WebGL without a graphics card."""
SHARE_SERVICES = """
let kept;
Object.defineProperty(window, "config", {
  get: () => kept,
  set(config) {
    const [extension] = config.extensions;
    const register = extension.preRegistration;
    extension.preRegistration = (manager) => {
      window.services = manager.servicesManager.services;
      register(manager);
    };
    kept = config;
  },
});
"""
"""Script that makes the viewer's services known to the test."""


def installed() -> str:
    """Return what is missing to run the archive and the viewer; empty if nothing is."""
    missing = [name for name in ("Orthanc", "chromium", "storescu") if shutil.which(name) is None]
    if not list(PLUGINS.glob("libOrthancDicomWeb*")):
        missing.append("orthanc-dicomweb")
    if find_viewer() is None:
        missing.append("vitmodel-viewer")
    return ", ".join(missing)


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


@contextlib.contextmanager
def running_viewer(archive_port: int, folder: Path) -> Iterator[str]:
    """Serve the pages of a node without studies, with `folder` for its files; yield their address."""
    import uvicorn

    from vitmodel.node.audit import Audit
    from vitmodel.node.database import Database
    from vitmodel.node.inbox import Inbox
    from vitmodel.node.jobs import Queue
    from vitmodel.node.pages import Site, create_app

    database = Database.in_folder(folder)
    site = Site(
        inbox=Inbox(database, folder, 0),
        queue=Queue(database),
        audit=Audit(database),
        web_root=f"http://127.0.0.1:{archive_port}/dicom-web",
    )
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(create_app(site), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield f"http://localhost:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        database.close()


def watch(page: Any, address: str) -> list[str]:
    """Return a list to which the page adds each error of its console and each request to another server."""
    problems: list[str] = []

    def check(request: Any) -> None:
        if not request.url.startswith((f"{address}/", "data:", f"blob:{address}/")):
            problems.append(request.url)

    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", check)
    return problems


def wait_for_images(page: Any, count: int) -> None:
    """Wait until the viewer has loaded `count` series or images, and has shown those that hang."""
    known = f"() => window.services?.displaySetService.getActiveDisplaySets().length >= {count}"
    page.wait_for_function(known, timeout=60_000)
    page.wait_for_timeout(6000)
