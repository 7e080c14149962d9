"""Fixtures of the tests of the node: databases, phantom studies and real peers (dcmtk, Orthanc, PostgreSQL)."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from peers import Clock, MakeStudy, Orthanc, StartOrthanc, answers, free_port, wait_until
from pydicom import Dataset, dcmread
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from vitmodel.node.database import Database
from vitmodel.node.inbox import Inbox

BINARIES = Path("/usr/lib/postgresql")


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Run Debian's PostgreSQL in a temporary folder and return the URL of its server; skip without it."""
    pytest.importorskip("pg8000")
    versions = sorted(BINARIES.glob("*/bin"))
    if not versions:
        pytest.skip("PostgreSQL is not installed (Debian package postgresql)")
    folder = Path("/tmp") / f"vitmodel-postgres-{os.getpid()}"  # a short path: it holds a socket
    folder.mkdir(mode=0o777)
    port = free_port()
    prefix: list[str] = []
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        shutil.chown(folder, "postgres")
        prefix = ["runuser", "-u", "postgres", "--"]
    data = folder / "data"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": "/"}
    binaries = versions[-1]
    subprocess.run([*prefix, binaries / "initdb", "-A", "trust", "-U", "test", "-D", data], check=True, **quiet)
    settings = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
    control = [*prefix, binaries / "pg_ctl", "-D", data, "-w"]
    subprocess.run([*control, "-o", settings, "start"], check=True, **quiet)
    yield f"postgresql+pg8000://test@127.0.0.1:{port}"
    subprocess.run([*control, "-m", "immediate", "stop"], check=False, **quiet)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """Return an empty database of each kind."""
    if request.param == "sqlite":
        opened = Database.in_folder(tmp_path / "node")
        yield opened
        opened.close()
        return
    server = request.getfixturevalue("postgres")
    from sqlalchemy import create_engine, text

    admin = create_engine(f"{server}/postgres", isolation_level="AUTOCOMMIT")
    name = f"t{time.monotonic_ns()}"
    with admin.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    opened = Database(f"{server}/{name}")
    yield opened
    opened.close()
    with admin.connect() as connection:
        connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    admin.dispose()


@pytest.fixture
def clock() -> Clock:
    """Return a clock that the test moves."""
    return Clock()


@pytest.fixture
def inbox(database: Database, tmp_path: Path, clock: Clock) -> Inbox:
    """Return an empty inbox."""
    return Inbox(database, tmp_path / "node", 0, clock)


@pytest.fixture
def sqlite(tmp_path: Path, clock: Clock) -> Iterator[Inbox]:
    """Return an empty inbox with an SQLite database."""
    opened = Database.in_folder(tmp_path / "node")
    yield Inbox(opened, tmp_path / "node", 0, clock)
    opened.close()


@pytest.fixture(scope="session")
def phantom(release: Path) -> Path:
    """Return a good DICOM file of the synthetic release."""
    return next(path for path in sorted(release.rglob("*.dcm")) if _is_mammogram(path))


def _is_mammogram(path: Path) -> bool:
    with contextlib.suppress(Exception):
        return len(dcmread(path).PixelData) > 0 and dcmread(path).pixel_array.std() > 100
    return False


@pytest.fixture(scope="session")
def make_study(phantom: Path) -> MakeStudy:
    """Return a function that makes the images of a study from one phantom: uncompressed, with new UIDs."""

    def make(
        views: tuple[tuple[str, str], ...] = (("L", "CC"), ("L", "MLO"), ("R", "CC"), ("R", "MLO")),
        patient: str = "P1",
        study: str = "",
    ) -> list[Dataset]:
        study_uid = study or str(generate_uid())
        images = []
        for number, (side, view) in enumerate(views):
            image = dcmread(phantom)
            if image.file_meta.TransferSyntaxUID.is_compressed:
                image.decompress(generate_instance_uid=False)
            image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
            image.PatientID, image.PatientName = patient, "Doe^Jane"
            image.StudyInstanceUID, image.SeriesInstanceUID = study_uid, generate_uid()
            image.SOPInstanceUID = image.file_meta.MediaStorageSOPInstanceUID = generate_uid()
            image.ImageLaterality, image.ViewPosition = side, view
            code, meaning = {"CC": ("399162004", "cranio-caudal")}.get(view, ("399368009", "medio-lateral oblique"))
            image.ViewCodeSequence[0].CodeValue, image.ViewCodeSequence[0].CodeMeaning = code, meaning
            image.StudyDate, image.AccessionNumber = "20240131", "A1"
            image.InstanceNumber = number + 1
            images.append(image)
        return images

    return make


@pytest.fixture(scope="session")
def start_orthanc(tmp_path_factory: pytest.TempPathFactory) -> StartOrthanc:
    """Return a context manager that runs Debian's Orthanc; skip without it."""
    program = shutil.which("Orthanc")
    if program is None:
        pytest.skip("Orthanc is not installed (Debian packages orthanc and orthanc-dicomweb)")

    @contextlib.contextmanager
    def start(
        node_port: int = 0, dicom_port: int = 0, folder: Path | None = None, **settings: object
    ) -> Iterator[Orthanc]:
        folder = folder or tmp_path_factory.mktemp("orthanc")
        peer = Orthanc(dicom_port or free_port(), free_port())
        config = {
            "StorageDirectory": str(folder / "storage"),
            "IndexDirectory": str(folder / "storage"),
            "HttpPort": peer.http_port,
            "DicomPort": peer.dicom_port,
            "DicomAet": peer.aet,
            "RemoteAccessAllowed": False,
            "AuthenticationEnabled": False,
            "Plugins": ["/usr/share/orthanc/plugins/libOrthancDicomWeb.so"],
            "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
            "DicomModalities": {"node": ["VITMODEL", "127.0.0.1", node_port]} if node_port else {},
            "DicomAlwaysAllowFind": True,
            "StableAge": 1,
            **settings,
        }
        (folder / "orthanc.json").write_text(json.dumps(config))
        with (folder / "orthanc.log").open("ab") as log:
            process = subprocess.Popen([program, str(folder / "orthanc.json")], stdout=log, stderr=log)
        try:
            wait_until(lambda: process.poll() is not None or answers(peer), what="Orthanc's answer")
            assert process.poll() is None, (folder / "orthanc.log").read_text()
            yield peer
        finally:
            process.terminate()
            process.wait(20)

    return start
