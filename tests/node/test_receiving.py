"""Receiving objects from dcmtk and pynetdicom."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
from peers import MakeStudy, to_bytes, tool, wait_until
from pydicom import Dataset, dcmread
from pynetdicom import AE
from sqlalchemy import func, select

from vitmodel.errors import DiskFullError, UsageError, VitmodelError
from vitmodel.node.audit import Audit, hash_uid
from vitmodel.node.database import Database
from vitmodel.node.facts import InvalidObjectError, is_uid
from vitmodel.node.gathering import GatheringRules
from vitmodel.node.inbox import Inbox
from vitmodel.node.jobs import Queue
from vitmodel.node.models import AuditEntry, Instance, Job, Study, Transfer
from vitmodel.node.receiving import Listener, Receiver

PRIVATE_CLASS = "1.2.826.0.1.3680043.9.9999.1"


class Node(NamedTuple):
    """A running receiver."""

    port: int
    inbox: Inbox
    receiver: Receiver


StartNode = Callable[..., Node]


@pytest.fixture
def start_node(tmp_path: Path) -> Iterator[StartNode]:
    """Return a function that starts a receiver with an SQLite database."""
    started: list[Node] = []

    def start(min_free: int = 0, **settings: object) -> Node:
        database = Database.in_folder(tmp_path / "node")
        inbox = Inbox(database, tmp_path / "node", min_free)
        listener = Listener(port=0, **settings)  # type: ignore[arg-type]
        receiver = Receiver(inbox, listener, Audit(database), lambda report: None)
        node = Node(receiver.start(), inbox, receiver)
        started.append(node)
        return node

    yield start
    for node in started:
        node.receiver.stop()
        node.inbox.database.close()


def run(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=60)


def write(folder: Path, images: list[Dataset]) -> list[Path]:
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{number}.dcm" for number in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        path.write_bytes(to_bytes(image))
    return paths


def stored(node: Node) -> list[Instance]:
    with node.inbox.database.read() as session:
        return list(session.scalars(select(Instance).order_by(Instance.received_at)))


def transfers(node: Node) -> list[Transfer]:
    with node.inbox.database.read() as session:
        return list(session.scalars(select(Transfer)))


def send(node: Node, *words: object, title: str = "VITMODEL") -> subprocess.CompletedProcess[str]:
    return run(tool("storescu"), "-aet", "MODALITY", "-aec", title, *words[:-1], "127.0.0.1", node.port, words[-1])


def test_echoscu_and_storescu_are_answered(start_node: StartNode, make_study: MakeStudy, tmp_path: Path) -> None:
    node = start_node()
    assert run(tool("echoscu"), "-aec", "VITMODEL", "127.0.0.1", node.port).returncode == 0
    image = make_study()[0]
    (path,) = write(tmp_path / "sent", [image])
    assert send(node, path).returncode == 0
    (instance,) = stored(node)
    received = dcmread(node.inbox.folder / instance.path)
    assert received.PixelData == image.PixelData
    assert (instance.laterality, instance.view, instance.source) == ("L", "CC", "MODALITY")
    with node.inbox.database.read() as session:
        subjects = dict(session.execute(select(AuditEntry.action, AuditEntry.subject)).all())
    wait_until(lambda: not transfers(node))
    assert subjects == {"C-ECHO": "", "C-STORE": hash_uid(image.SOPInstanceUID)}


def test_every_transfer_syntax_is_stored_as_it_was_sent(start_node: StartNode, release: Path, tmp_path: Path) -> None:
    """dcmsend proposes the syntax of each file; the release holds JPEG Lossless, JPEG 2000 and RLE."""
    node = start_node()
    files: dict[str, Path] = {}
    for path in sorted(release.rglob("*.dcm")):
        try:
            files.setdefault(str(dcmread(path).file_meta.TransferSyntaxUID), path)
        except Exception:  # noqa: BLE001 (faulty files of the release)
            continue
    words = [tool("dcmsend"), "-aec", "VITMODEL", "127.0.0.1", node.port, *files.values()]
    assert run(*words).returncode == 0
    by_uid = {instance.sop_uid: instance for instance in stored(node)}
    assert len(files) >= 3
    for syntax, path in files.items():
        sent = dcmread(path)
        instance = by_uid[str(sent.SOPInstanceUID)]
        assert instance.syntax == syntax
        got = dcmread(node.inbox.folder / instance.path)
        assert got.file_meta.TransferSyntaxUID == syntax
        if "PixelData" in sent:
            assert got.PixelData == sent.PixelData


def test_a_study_sent_over_four_associations_and_again_is_one_job(
    start_node: StartNode, make_study: MakeStudy, tmp_path: Path
) -> None:
    node = start_node()
    queue = Queue(node.inbox.database)
    paths = write(tmp_path / "sent", make_study())
    words = [tool("storescu"), "-aec", "VITMODEL", "127.0.0.1", str(node.port)]
    for _ in range(2):
        senders = [subprocess.Popen([*words, str(path)]) for path in paths]
        assert [sender.wait(60) for sender in senders] == [0] * 4
        wait_until(lambda: not transfers(node))
        queue.gather(GatheringRules(quiet_seconds=0), "fingerprint")
    assert [instance.repeats for instance in stored(node)] == [1] * 4
    with node.inbox.database.read() as session:
        (job,) = session.scalars(select(Job))
    assert len(job.images.split()) == 4


def test_unknown_and_private_classes_are_stored_and_ignored(start_node: StartNode, make_study: MakeStudy) -> None:
    node = start_node()
    (image,) = make_study((("L", "CC"),))
    image.SOPClassUID = image.file_meta.MediaStorageSOPClassUID = PRIVATE_CLASS
    image.Modality = "OT"
    client = AE("CLIENT")
    client.add_requested_context(PRIVATE_CLASS, [image.file_meta.TransferSyntaxUID])
    association = client.associate("127.0.0.1", node.port, ae_title="VITMODEL")
    assert association.send_c_store(image).Status == 0
    association.release()
    assert [instance.ignored for instance in stored(node)] == ["modality OT"]


def test_titles_that_are_not_allowed_are_rejected(start_node: StartNode, make_study: MakeStudy, tmp_path: Path) -> None:
    node = start_node(calling=("MODALITY",))
    (path,) = write(tmp_path / "sent", make_study((("L", "CC"),)))
    assert send(node, path, title="OTHER").returncode != 0
    assert run(tool("echoscu"), "-aet", "INTRUDER", "-aec", "VITMODEL", "127.0.0.1", node.port).returncode != 0
    assert stored(node) == []
    assert send(node, path).returncode == 0


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("keyword", ["SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"])
def test_uids_never_become_paths_unchecked(inbox: Inbox, make_study: MakeStudy, keyword: str) -> None:
    for value in ("../../etc/passwd", "1.2/3", "", "1" * 65, "1.2.", "a"):
        (image,) = make_study((("L", "CC"),))
        image.add_new(keyword, "LO", value)
        content = to_bytes_unchecked(image)
        with pytest.raises(InvalidObjectError, match=keyword):
            inbox.store(content, "TEST")
    assert not list(inbox.folder.rglob("*.dcm"))


def to_bytes_unchecked(image: Dataset) -> bytes:
    """Return a data set as a file although its meta information does not agree with it."""
    import io

    from pydicom import dcmwrite

    image.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    buffer = io.BytesIO()
    dcmwrite(buffer, image, enforce_file_format=True)
    return buffer.getvalue()


def test_uids_are_recognised() -> None:
    assert all(map(is_uid, ["1", "1.2.840", "2.25." + "9" * 30]))
    assert not any(map(is_uid, ["", ".", "..", "1..2", "1.2\n", "1.2 ", "/1", "１.2"]))


def test_a_full_disk_refuses_objects_until_there_is_space(
    start_node: StartNode, make_study: MakeStudy, tmp_path: Path
) -> None:
    node = start_node(min_free=shutil.disk_usage(tmp_path).total * 2)
    (path,) = write(tmp_path / "sent", make_study((("L", "CC"),)))
    refused = send(node, "-v", path)
    assert "A700" in refused.stdout + refused.stderr or "OutOfResources" in refused.stdout + refused.stderr
    assert stored(node) == []
    assert not list((node.inbox.folder / "inbox").rglob("*.*"))
    node.inbox.min_free_bytes = 0
    assert send(node, path).returncode == 0
    assert len(stored(node)) == 1


def test_a_failing_write_is_refused_and_leaves_no_file(
    inbox: Inbox, make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    (image,) = make_study((("L", "CC"),))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(DiskFullError):
            inbox.store(to_bytes(image), "TEST")
    assert not [path for path in inbox.folder.rglob("*") if path.suffix in (".dcm", ".part")]
    inbox.store(to_bytes(image), "TEST")


def test_an_object_that_was_stored_and_not_registered_is_adopted(inbox: Inbox, make_study: MakeStudy) -> None:
    """A receiver may be killed between the two."""
    first, second = make_study((("L", "CC"), ("R", "CC")))
    facts = inbox.store(to_bytes(first), "TEST")
    lost = inbox.path_of(facts).with_name(f"{second.SOPInstanceUID}.dcm")
    lost.write_bytes(to_bytes(second))
    part = lost.with_name(".x.part")
    part.write_bytes(b"half")
    os.utime(part, (0, 0))
    lost.with_name("note.dcm").write_bytes(b"no DICOM")
    inbox.clock.now = time.time()  # type: ignore[attr-defined]
    assert inbox.adopt() == 1
    assert inbox.adopt() == 0
    assert not part.exists()
    with inbox.database.read() as session:
        assert session.scalars(select(func.count()).select_from(Instance)).one() == 2


@pytest.mark.parametrize("objects", [1, 4])
def test_an_object_sent_again_with_other_content_leaves_the_first(
    inbox: Inbox, make_study: MakeStudy, objects: int
) -> None:
    images = make_study()[:objects]
    for image in images:
        inbox.store(to_bytes(image), "TEST")
    before = {path: path.read_bytes() for path in inbox.folder.rglob("*.dcm")}
    for image in images:
        image.PatientID = "corrected"
        inbox.store(to_bytes(image), "TEST")
    assert {path: path.read_bytes() for path in inbox.folder.rglob("*.dcm")} == before


def test_what_is_no_view_for_reading_is_ignored_with_its_reason(inbox: Inbox, make_study: MakeStudy) -> None:
    plain, own, quality, raw, other = make_study(tuple((side, "CC") for side in "LLLLL"))
    own.Manufacturer = "vitmodel"
    quality.QualityControlImage = "YES"
    raw.PresentationIntentType = "FOR PROCESSING"
    other.Modality, other.SOPClassUID = "US", "1.2.840.10008.5.1.4.1.1.6.1"
    other.file_meta.MediaStorageSOPClassUID = other.SOPClassUID
    reasons = [inbox.store(to_bytes(image), "TEST").ignored for image in (plain, own, quality, raw, other)]
    assert reasons == ["", "own result", "quality control", "for processing", "modality US"]
    with inbox.database.read() as session:
        assert session.scalars(select(Study.patient_id)).all() == ["P1"]


# TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a certificate for 127.0.0.1 and its key."""
    folder = tmp_path_factory.mktemp("tls")
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    command = [tool_or_skip("openssl"), "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=node"]
    done = run(*command, "-keyout", key, "-out", certificate, "-days", "1")
    assert done.returncode == 0, done.stderr
    return certificate, key


def tool_or_skip(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def test_echoscu_connects_by_tls_and_not_without(start_node: StartNode, certificate: tuple[Path, Path]) -> None:
    node = start_node(tls_certificate=certificate[0], tls_key=certificate[1])
    echo = [tool("echoscu"), "-aec", "VITMODEL", "-to", "5", "-ta", "5"]
    silent = socket.create_connection(("127.0.0.1", node.port))  # it must not block the others
    with silent:
        secure = run(*echo, "+tla", "+cf", certificate[0], "127.0.0.1", node.port)
        assert secure.returncode == 0, secure.stderr
    assert run(*echo, "127.0.0.1", node.port).returncode != 0


def test_a_client_without_certificate_is_rejected_where_one_is_asked_for(
    start_node: StartNode, certificate: tuple[Path, Path]
) -> None:
    path, key = certificate
    node = start_node(tls_certificate=path, tls_key=key, tls_ca=path)
    echo = [tool("echoscu"), "-aec", "VITMODEL", "-to", "5", "-ta", "5"]
    assert run(*echo, "+tla", "+cf", path, "127.0.0.1", node.port).returncode != 0
    known = run(*echo, "+tls", key, path, "+cf", path, "127.0.0.1", node.port)
    assert known.returncode == 0, known.stderr


def test_files_that_are_no_certificates_are_refused(start_node: StartNode, tmp_path: Path) -> None:
    (tmp_path / "key.pem").write_text("no key")
    with pytest.raises(UsageError, match="PEM"):
        start_node(tls_certificate=tmp_path / "key.pem", tls_key=tmp_path / "key.pem")


def test_a_port_in_use_is_refused(start_node: StartNode) -> None:
    node = start_node()
    second = Receiver(
        node.inbox, replace(node.receiver.listener, port=node.port), node.receiver.audit, lambda report: None
    )
    with pytest.raises(VitmodelError, match="dicom_port"):
        second.start()


# Load


def resident_megabytes() -> float:
    text = Path("/proc/self/status").read_text()
    return int(text.split("VmRSS:")[1].split()[0]) / 1024


@pytest.mark.nightly
def test_ten_thousand_bare_connections_leave_memory_and_threads_flat(start_node: StartNode) -> None:
    """Load balancers connect and hang up once a second."""
    node = start_node()

    def knock(times: int) -> None:
        for _ in range(times):
            socket.create_connection(("127.0.0.1", node.port)).close()
            wait_until(lambda: threading.active_count() < 100)

    knock(2000)
    wait_until(lambda: threading.active_count() < 10)
    before = resident_megabytes()
    knock(8000)
    wait_until(lambda: threading.active_count() < 10)
    assert resident_megabytes() - before < 8
    assert run(tool("echoscu"), "-aec", "VITMODEL", "127.0.0.1", node.port).returncode == 0
