"""Sending results: to Orthanc, to storescp, and to PACSs that misbehave."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from peers import Clock, MakeStudy, StartOrthanc, free_port, to_bytes, tool, wait_until
from pydicom import Dataset, dcmread
from pydicom.uid import ImplicitVRLittleEndian, RLELossless
from pynetdicom import AE, _config, evt
from pynetdicom.sop_class import (  # type: ignore[attr-defined]
    Comprehensive3DSRStorage,
    ComprehensiveSRStorage,
    ParametricMapStorage,
    SecondaryCaptureImageStorage,
    StorageCommitmentPushModel,
    StorageCommitmentPushModelInstance,
    StudyRootQueryRetrieveInformationModelFind,
    Verification,
)
from sqlalchemy import select

from vitmodel.config import NodeConfig
from vitmodel.node.audit import Audit
from vitmodel.node.fingerprint import package_fingerprint
from vitmodel.node.gathering import GatheringRules
from vitmodel.node.inbox import Inbox
from vitmodel.node.jobs import Queue, QueueRules
from vitmodel.node.models import Job, Result
from vitmodel.node.pacs import status_of
from vitmodel.node.receiving import Listener, Receiver
from vitmodel.node.scoring import Scorer
from vitmodel.node.sending import Sender, record_report

STUDY = "1.2.826.0.1.3680043.8.498.1"


@pytest.fixture(scope="module")
def scored(run: Path, make_study: MakeStudy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a node that has scored a study of two views."""
    from vitmodel.node.database import Database

    folder = tmp_path_factory.mktemp("scored") / "node"
    config = NodeConfig(
        action="run", package=run / "package", folder=folder, device="cpu", workers=1, dicom=("sr", "sc", "pm")
    )
    database = Database.in_folder(folder)
    inbox, queue = Inbox(database, folder, 0), Queue(database)
    for image in make_study((("L", "CC"), ("R", "CC")), study=STUDY):
        inbox.store(to_bytes(image), "TEST")
    queue.gather(GatheringRules(), package_fingerprint(config), force=True)
    assert Scorer(config, queue, "worker").score_next()
    database.close()
    return folder


@dataclass
class Desk:
    """A node that has results to send."""

    folder: Path
    inbox: Inbox
    queue: Queue
    clock: Clock
    package: Path

    def sender(self, destination: str, **settings: object) -> Sender:
        config = NodeConfig(
            action="run",
            package=self.package,
            folder=self.folder,
            destination=destination,
            **settings,  # type: ignore[arg-type]
        )
        return Sender(config, self.queue, "sender")

    @property
    def job(self) -> Job:
        with self.queue.database.read() as session:
            return session.scalars(select(Job)).one()

    @property
    def results(self) -> list[Result]:
        with self.queue.database.read() as session:
            return list(session.scalars(select(Result).order_by(Result.sop_uid)))

    @property
    def states(self) -> set[str]:
        return {result.state for result in self.results}


@pytest.fixture
def desk(scored: Path, tmp_path: Path, run: Path) -> Iterator[Desk]:
    """Return a copy of the scored study, ready to be sent."""
    from vitmodel.node.database import Database

    folder = tmp_path / "node"
    shutil.copytree(scored, folder)
    database = Database.in_folder(folder)
    clock = Clock()
    queue = Queue(database, QueueRules(max_failures=3, first_wait=1, longest_wait=4), clock)
    with database.write() as session:
        session.scalars(select(Job)).one().stage = "send"
    yield Desk(folder, Inbox(database, folder, 0), queue, clock, run / "package")
    database.close()


@dataclass
class Pacs:
    """A PACS whose answers the test sets."""

    port: int = 0
    statuses: list[int] = field(default_factory=list)
    """Statuses of the next objects; then 0x0000."""
    commit_failures: list[list[str]] = field(default_factory=list)
    """For each commitment request, the UIDs that fail; then none."""
    identity: dict[str, str] = field(default_factory=dict)
    received: list[Dataset] = field(default_factory=list)
    requests: list[list[str]] = field(default_factory=list)
    reply_to: int = 0
    """Port to which commitments are reported; 0 = on the same association."""

    def store(self, event: evt.Event) -> int:
        dataset = event.dataset
        dataset.file_meta = event.file_meta
        status = self.statuses.pop(0) if self.statuses else 0
        if status == 0 or status >> 8 == 0xB0:
            self.received.append(dataset)
        return status

    def find(self, event: evt.Event) -> Iterator[tuple[int, Dataset | None]]:
        if self.identity:
            answer = Dataset()
            answer.QueryRetrieveLevel, answer.StudyInstanceUID = "STUDY", event.identifier.StudyInstanceUID
            answer.SpecificCharacterSet = "ISO_IR 192"
            for keyword, value in self.identity.items():
                setattr(answer, keyword, value)
            yield 0xFF00, answer

    def commit(self, event: evt.Event) -> tuple[int, None]:
        asked = event.action_information
        uids = [str(item.ReferencedSOPInstanceUID) for item in asked.ReferencedSOPSequence]
        self.requests.append(uids)
        failing = self.commit_failures.pop(0) if self.commit_failures else []
        report = Dataset()
        report.TransactionUID = asked.TransactionUID
        report.ReferencedSOPSequence = [
            item for item in asked.ReferencedSOPSequence if item.ReferencedSOPInstanceUID not in failing
        ]
        failed = [item for item in asked.ReferencedSOPSequence if item.ReferencedSOPInstanceUID in failing]
        for item in failed:
            item.FailureReason = 0x0110
        if failed:
            report.FailedSOPSequence = failed
        threading.Thread(target=self.report, args=(event.assoc, report, 2 if failed else 1)).start()
        return 0, None

    def report(self, association: object, report: Dataset, kind: int) -> None:
        words = (report, kind, StorageCommitmentPushModel, StorageCommitmentPushModelInstance)
        if not self.reply_to:
            association.send_n_event_report(*words)  # type: ignore[attr-defined]
            return
        ae = AE("PACS")
        ae.add_requested_context(StorageCommitmentPushModel)
        role = build_role()
        new = ae.associate("127.0.0.1", self.reply_to, ae_title="VITMODEL", ext_neg=[role])
        assert new.is_established
        new.send_n_event_report(*words)
        new.release()


def build_role() -> object:
    from pynetdicom import build_role

    return build_role(StorageCommitmentPushModel, scp_role=True)


StartPacs = Callable[..., Pacs]


@pytest.fixture
def start_pacs(monkeypatch: pytest.MonkeyPatch) -> Iterator[StartPacs]:
    """Return a function that starts a PACS which takes the given classes and syntaxes."""
    monkeypatch.setattr(_config, "UNRESTRICTED_STORAGE_SERVICE", False)
    servers = []

    def start(classes: tuple[str, ...] = (), syntaxes: tuple[str, ...] = (), port: int = 0, **settings: object) -> Pacs:
        pacs = Pacs(**settings)  # type: ignore[arg-type]
        ae = AE("PACS")
        if not classes:
            monkeypatch.setattr(_config, "UNRESTRICTED_STORAGE_SERVICE", True)
        for sop_class in classes:
            ae.add_supported_context(sop_class, list(syntaxes) or None)
        for sop_class in (StorageCommitmentPushModel, StudyRootQueryRetrieveInformationModelFind, Verification):
            ae.add_supported_context(sop_class)
        handlers = [
            (evt.EVT_C_STORE, pacs.store),
            (evt.EVT_C_FIND, pacs.find),
            (evt.EVT_N_ACTION, pacs.commit),
        ]
        server = ae.start_server(("127.0.0.1", port), block=False, evt_handlers=handlers)
        assert server is not None
        servers.append(server)
        pacs.port = server.server_address[1]
        return pacs

    yield start
    for server in servers:
        server.shutdown()


def address(port: int) -> str:
    return f"dicom://PACS@127.0.0.1:{port}"


# Storage commitment


def test_results_are_sent_when_they_are_committed_on_the_same_association(desk: Desk, start_pacs: StartPacs) -> None:
    pacs = start_pacs()
    assert desk.sender(address(pacs.port)).send_next()
    assert (desk.job.stage, desk.states) == ("sent", {"confirmed"})
    assert {str(result.SOPInstanceUID) for result in pacs.received} == {result.sop_uid for result in desk.results}
    assert {str(result.StudyInstanceUID) for result in pacs.received} == {STUDY}
    assert {result.status for result in desk.results} == {"0x0000"}


def test_results_are_sent_when_they_are_committed_on_a_new_association(desk: Desk, start_pacs: StartPacs) -> None:
    receiver = Receiver(
        desk.inbox,
        Listener(port=0),
        Audit(desk.inbox.database),
        lambda report: record_report(desk.queue.database, report, desk.clock()),
    )
    port = receiver.start()
    try:
        pacs = start_pacs(reply_to=port)
        desk.sender(address(pacs.port)).send_next()
        assert (desk.job.stage, desk.states) == ("sent", {"confirmed"})
    finally:
        receiver.stop()


def test_a_result_that_is_not_committed_is_sent_again_alone(desk: Desk, start_pacs: StartPacs) -> None:
    uids = [result.sop_uid for result in desk.results]
    pacs = start_pacs(commit_failures=[[uids[1]]])
    sender = desk.sender(address(pacs.port))
    sender.send_next()
    assert desk.job.stage == "send"
    assert [result.state == "pending" for result in desk.results] == [uid == uids[1] for uid in uids]
    desk.clock.now += 60
    sender.send_next()
    assert (desk.job.stage, desk.states) == ("sent", {"confirmed"})
    assert [str(result.SOPInstanceUID) for result in pacs.received[len(uids) :]] == [uids[1]]
    assert pacs.requests == [uids, [uids[1]]]


def test_nothing_counts_as_sent_without_a_reply_and_the_request_is_repeated(
    desk: Desk, start_pacs: StartPacs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitmodel.node.pacs.REPLY_SECONDS", 0.2)
    pacs = start_pacs()
    monkeypatch.setattr(pacs, "report", lambda *_: None)
    sender = desk.sender(address(pacs.port))
    for _ in range(6):  # more than the attempts after which a job is dead
        sender.send_next()
        assert (desk.job.stage, desk.states) == ("send", {"stored"})
        desk.clock.now += 20
    assert len(pacs.requests) == 2, "one a minute"
    assert len(pacs.received) == len(desk.results), "and no object is sent again"


def test_a_foreign_report_changes_nothing(desk: Desk) -> None:
    report = Dataset()
    report.TransactionUID = "1.2.3"
    item = Dataset()
    item.ReferencedSOPInstanceUID = desk.results[0].sop_uid
    report.ReferencedSOPSequence = [item]
    assert record_report(desk.queue.database, report, 0) == 0
    assert record_report(desk.queue.database, Dataset(), 0) == 0
    assert desk.states == {"pending"}


# Statuses


@pytest.mark.parametrize(
    ("code", "state"),
    [(0x0000, "stored"), (0xB007, "stored"), (0xA700, "pending"), (0x0110, "pending")]
    + [(code, "refused") for code in (0xA900, 0x0122, 0x0124, 0xC000, 0xFE00)],
)
def test_statuses_mean_what_the_standard_says(code: int, state: str) -> None:
    assert status_of(code).state == state


@pytest.mark.parametrize("code", [0xA900, 0x0122, 0xC000])
def test_a_refused_result_is_never_shown_as_sent(desk: Desk, start_pacs: StartPacs, code: int) -> None:
    pacs = start_pacs(statuses=[code])
    sender = desk.sender(address(pacs.port))
    sender.send_next()
    assert (desk.job.stage, desk.job.failed_stage) == ("dead", "send")
    assert sorted((result.state, result.status) for result in desk.results)[-1] == ("refused", f"0x{code:04X}")
    assert desk.states == {"confirmed", "refused"}
    assert desk.queue.retry() == 1
    sender.send_next()
    assert (desk.job.stage, desk.states) == ("sent", {"confirmed"})


def test_a_pacs_without_space_is_tried_again_and_the_job_is_dead_in_the_end(desk: Desk, start_pacs: StartPacs) -> None:
    pacs = start_pacs(statuses=[0xA700] * 100)
    sender = desk.sender(address(pacs.port))
    for _ in range(3):
        assert sender.send_next()
        assert not sender.send_next(), "not before the wait is over"
        desk.clock.now += 60
    assert (desk.job.stage, desk.job.error_code, desk.states) == ("dead", "not_taken", {"pending"})


def test_results_are_delivered_once_the_pacs_is_up_again(desk: Desk, start_pacs: StartPacs) -> None:
    port = free_port()
    sender = desk.sender(address(port))
    for _ in range(5):
        assert sender.send_next()
        assert (desk.job.stage, desk.job.error_code) == ("send", "unreachable")
        desk.clock.now += 60
    pacs = start_pacs(port=port)
    sender.send_next()
    assert desk.job.stage == "sent"
    assert len(pacs.received) == len(desk.results)


# Contexts


@pytest.mark.parametrize(
    "missing", [(ParametricMapStorage,), (ComprehensiveSRStorage, Comprehensive3DSRStorage, ParametricMapStorage)]
)
def test_an_implicit_pacs_without_some_classes_gets_the_rest_and_the_job_is_incomplete(
    desk: Desk, start_pacs: StartPacs, missing: tuple[str, ...]
) -> None:
    classes = {result.sop_class for result in desk.results}
    assert ParametricMapStorage in classes
    pacs = start_pacs(tuple(classes - set(missing)), (ImplicitVRLittleEndian,))
    desk.sender(address(pacs.port)).send_next()
    assert desk.job.stage == "incomplete"
    by_class = {(result.sop_class in missing, result.state) for result in desk.results}
    assert by_class == {(False, "confirmed"), (True, "unsupported")}
    assert SecondaryCaptureImageStorage in {result.SOPClassUID for result in pacs.received}
    for result in pacs.received:
        assert result.file_meta.TransferSyntaxUID == ImplicitVRLittleEndian
        if result.SOPClassUID == SecondaryCaptureImageStorage:
            assert result.pixel_array.shape[-1] == 3


def test_a_compressed_result_is_sent_uncompressed_where_it_must_be(desk: Desk, start_pacs: StartPacs) -> None:
    captures = [result for result in desk.results if result.sop_class == SecondaryCaptureImageStorage]
    expected = {}
    for result in captures:
        path = desk.folder / result.path
        capture = dcmread(path)
        expected[result.sop_uid] = capture.pixel_array
        if not capture.file_meta.TransferSyntaxUID.is_compressed:
            capture.compress(RLELossless, generate_instance_uid=False)
            capture.save_as(path)
    pacs = start_pacs((SecondaryCaptureImageStorage, *{result.sop_class for result in desk.results}), ())
    desk.sender(address(pacs.port)).send_next()
    assert desk.job.stage == "sent"
    for result in pacs.received:
        if result.SOPClassUID == SecondaryCaptureImageStorage:
            assert not result.file_meta.TransferSyntaxUID.is_compressed
            assert (result.pixel_array == expected[str(result.SOPInstanceUID)]).all()


def test_a_pacs_that_takes_nothing_is_noticed_at_once(desk: Desk, start_pacs: StartPacs) -> None:
    pacs = start_pacs(("1.2.840.10008.5.1.4.1.1.2",))
    desk.sender(address(pacs.port)).send_next()
    assert (desk.job.stage, desk.states) == ("dead", {"unsupported"})


def test_storescp_takes_the_results(desk: Desk, tmp_path: Path) -> None:
    port = free_port()
    folder = tmp_path / "storescp"
    folder.mkdir()
    process = subprocess.Popen([tool("storescp"), "-aet", "PACS", "-od", str(folder), str(port)])
    try:
        wait_until(lambda: can_connect(port))
        sender = desk.sender(address(port))
        sender.send_next()
        # storescp offers no commitment: nothing counts as sent
        assert (desk.job.stage, desk.job.error_code, desk.states) == ("send", "unreachable", {"stored"})
        assert len(list(folder.iterdir())) == len(desk.results)
    finally:
        process.terminate()
        process.wait()


def can_connect(port: int) -> bool:
    import socket

    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


# Identity


def test_the_identity_is_that_of_the_pacs_when_results_are_sent(desk: Desk, start_pacs: StartPacs) -> None:
    corrected = {"PatientID": "P2", "PatientName": "Müller-Łódź^Ænn", "PatientBirthDate": "19600101", "PatientSex": "F"}
    pacs = start_pacs(identity=corrected | {"AccessionNumber": "A2"})
    before = {path: path.read_bytes() for path in desk.folder.rglob("*.dcm")}
    desk.sender(address(pacs.port)).send_next()
    assert desk.job.stage == "sent"
    for result in pacs.received:
        assert {keyword: str(result[keyword].value) for keyword in corrected} == corrected
        assert result.AccessionNumber == "A2"
    assert {path: path.read_bytes() for path in desk.folder.rglob("*.dcm")} == before


def test_the_identity_of_the_images_is_used_where_it_is_asked_for(desk: Desk, start_pacs: StartPacs) -> None:
    pacs = start_pacs(identity={"PatientID": "P2"})
    desk.sender(address(pacs.port), identity="image").send_next()
    assert {result.PatientID for result in pacs.received} == {"P1"}


# Orthanc


def test_orthanc_commits_results_and_has_them_in_the_same_study(
    desk: Desk, start_orthanc: StartOrthanc, make_study: MakeStudy
) -> None:
    receiver = Receiver(
        desk.inbox,
        Listener(port=0),
        Audit(desk.inbox.database),
        lambda report: record_report(desk.queue.database, report, desk.clock()),
    )
    port = receiver.start()
    try:
        with start_orthanc(port) as orthanc:
            images = make_study((("L", "CC"), ("R", "CC")), study=STUDY, patient="corrected")
            orthanc.upload(images)
            sender = desk.sender(f"dicom://{orthanc.aet}@127.0.0.1:{orthanc.dicom_port}")
            sender.send_next()
            desk.clock.now += 20
            sender.send_next()
            assert (desk.job.stage, desk.states) == ("sent", {"confirmed"})
            listed = orthanc.instances(STUDY)
            assert len(listed) == len(images) + len(desk.results)
            assert {item["PatientID"] for item in listed} == {"corrected"}
            # by DICOMweb, the same results: nothing new, and they are found by a query
            desk.queue.retry([desk.job.id])
            with desk.queue.database.write() as session:
                job = session.scalars(select(Job)).one()
                job.stage = "send"
                for result in session.scalars(select(Result)):
                    result.state = "pending"
            desk.sender(f"{orthanc.url}/dicom-web").send_next()
            assert (desk.job.stage, desk.states) == ("sent", {"confirmed"}), desk.job.error
            assert {result.status for result in desk.results} == {"HTTP 200"}
            assert len(orthanc.instances(STUDY)) == len(images) + len(desk.results)
    finally:
        receiver.stop()


def test_dicomweb_without_a_server_is_tried_again(desk: Desk) -> None:
    desk.sender(f"http://127.0.0.1:{free_port()}/dicom-web").send_next()
    assert (desk.job.stage, desk.job.error_code, desk.states) == ("send", "unreachable", {"pending"})
