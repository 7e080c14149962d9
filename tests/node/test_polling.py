"""Looking for mammograms in a PACS, by QIDO-RS and WADO-RS or by C-FIND and C-MOVE."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from datetime import date, datetime

import httpx
import pytest
from peers import Clock, MakeStudy, Orthanc, StartOrthanc, free_port, to_bytes
from pydicom import Dataset
from pydicom.uid import JPEG2000Lossless
from pynetdicom import AE, evt
from pynetdicom.sop_class import (  # type: ignore[attr-defined]
    StudyRootQueryRetrieveInformationModelFind,
    StudyRootQueryRetrieveInformationModelMove,
)
from sqlalchemy import delete, select

from vitmodel.config import NodeConfig
from vitmodel.errors import DiskFullError, UnreachableError
from vitmodel.node.audit import Audit
from vitmodel.node.dimse import DicomPeer
from vitmodel.node.inbox import Inbox, open_transfers
from vitmodel.node.models import AuditEntry, FoundStudy, Instance, Job, Result, Study
from vitmodel.node.polling import LOOK_AGAIN_SECONDS, Poller, PollingRules
from vitmodel.node.receiving import Listener, Receiver
from vitmodel.node.sources import (
    Archive,
    DicomSource,
    ListedObject,
    ListedStudy,
    Source,
    WebSource,
    make_source,
)

NOW = datetime(2024, 2, 2, 12).timestamp()
"""Two days after the StudyDate of `make_study`."""


@pytest.fixture
def clock() -> Clock:
    return Clock(NOW)


@pytest.fixture
def node_port(sqlite: Inbox) -> Iterator[int]:
    """Run the receiver to which a PACS sends after C-MOVE; return its port."""
    receiver = Receiver(sqlite, Listener(port=0), Audit(sqlite.database), lambda report: None)
    yield receiver.start()
    receiver.stop()


MakePoller = Callable[[Orthanc], Poller]


@pytest.fixture(params=["dicom", "http"])
def make_poller(request: pytest.FixtureRequest, sqlite: Inbox) -> MakePoller:
    """Return a function that makes a poller of an Orthanc, by DIMSE or by DICOMweb."""

    def make(orthanc: Orthanc) -> Poller:
        dimse = f"dicom://{orthanc.aet}@127.0.0.1:{orthanc.dicom_port}"
        address = dimse if request.param == "dicom" else f"{orthanc.url}/dicom-web"
        config = NodeConfig(action="run", find=(address,))
        return Poller(make_source(config, address, sqlite, Audit(sqlite.database)), sqlite, PollingRules())

    return make


def stored(inbox: Inbox) -> set[str]:
    with inbox.database.read() as session:
        return set(session.scalars(select(Instance.sop_uid)))


def uids(images: list[Dataset]) -> set[str]:
    return {str(image.SOPInstanceUID) for image in images}


def repeats(inbox: Inbox) -> set[int]:
    with inbox.database.read() as session:
        return set(session.scalars(select(Instance.repeats)))


def test_new_mammograms_are_fetched_once_and_our_results_never(
    sqlite: Inbox, start_orthanc: StartOrthanc, make_study: MakeStudy, make_poller: MakePoller, node_port: int
) -> None:
    images = make_study()
    study = str(images[0].StudyInstanceUID)
    (own,) = make_study((("L", "CC"),), study=study)
    (old,) = make_study((("L", "CC"),))
    old.StudyDate = "20240101"
    ultrasound, report = make_study((("L", "CC"), ("R", "CC")), study=study)
    for other, modality in ((ultrasound, "US"), (report, "SR")):
        other.Modality = modality
    with sqlite.database.write() as session:
        session.add(Study(study_uid="1", first_arrival=0, last_arrival=0, pending=False))
        session.flush()
        session.add(Job(key="1", study_uid="1", images="", created_at=0, updated_at=0))
        session.flush()
        session.add(Result(job_id=1, sop_uid=own.SOPInstanceUID, sop_class="1", path="", updated_at=0))
    with start_orthanc(node_port) as orthanc:
        poller = make_poller(orthanc)
        assert poller.turn() == 0
        orthanc.upload([*images[:2], own, old, ultrasound, report])
        assert poller.turn() == 2
        assert stored(sqlite) == uids(images[:2])
        assert poller.turn() == 0
        orthanc.upload(images[2:])
        assert make_poller(orthanc).turn() == 2, "as after a restart"
        assert poller.turn() == 0
    assert stored(sqlite) == uids(images)
    assert repeats(sqlite) == {0}
    with sqlite.database.read() as session:
        assert not open_transfers(session, [study], NOW)
        recorded = session.scalars(select(AuditEntry.action).where(AuditEntry.action.in_(("WADO-RS", "C-STORE"))))
        assert len(list(recorded)) == 4


def test_objects_arrive_in_the_syntax_in_which_the_pacs_has_them(
    sqlite: Inbox, start_orthanc: StartOrthanc, make_study: MakeStudy, make_poller: MakePoller, node_port: int
) -> None:
    (image,) = make_study((("L", "CC"),))
    image.compress(JPEG2000Lossless, encoding_plugin="pylibjpeg", generate_instance_uid=False)
    with start_orthanc(node_port) as orthanc:
        orthanc.upload([image])
        make_poller(orthanc).turn()
    with sqlite.database.read() as session:
        (instance,) = session.scalars(select(Instance))
    assert instance.syntax == JPEG2000Lossless
    assert image.PixelData in (sqlite.folder / instance.path).read_bytes()


def test_a_pacs_that_is_down_or_a_full_disk_only_delays(
    sqlite: Inbox, start_orthanc: StartOrthanc, make_study: MakeStudy, make_poller: MakePoller, node_port: int
) -> None:
    images = make_study()
    port = free_port()
    with pytest.raises(UnreachableError):
        make_poller(Orthanc(port, port)).turn()
    with start_orthanc(node_port, port) as orthanc:
        orthanc.upload(images)
        poller = make_poller(orthanc)
        sqlite.min_free_bytes = 1 << 62
        with pytest.raises(DiskFullError):
            poller.turn()
        sqlite.min_free_bytes = 0
        assert poller.turn() == 4
    assert stored(sqlite) == uids(images)


def test_a_replaced_image_is_found_and_deleted_ones_come_back_only_with_it(
    sqlite: Inbox,
    start_orthanc: StartOrthanc,
    make_study: MakeStudy,
    make_poller: MakePoller,
    node_port: int,
    clock: Clock,
) -> None:
    images = make_study()
    (new,) = make_study((("L", "CC"),), study=str(images[0].StudyInstanceUID))
    with start_orthanc(node_port) as orthanc:
        orthanc.upload(images)
        poller = make_poller(orthanc)
        poller.turn()
        with sqlite.database.write() as session:  # as after the retention
            session.execute(delete(Instance))
        clock.now += LOOK_AGAIN_SECONDS
        assert poller.turn() == 0
        query = b'{"Level": "Instance", "Query": {"SOPInstanceUID": "%s"}}' % str(images[0].SOPInstanceUID).encode()
        (identifier,) = orthanc.post("/tools/find", query)  # type: ignore[misc]
        httpx.delete(f"{orthanc.url}/instances/{identifier}").raise_for_status()
        orthanc.upload([new])
        assert poller.turn() == 0, "the number of objects is the same"
        clock.now += LOOK_AGAIN_SECONDS
        assert poller.turn() == 4
    assert stored(sqlite) == uids([*images[1:], new])


# One way


@pytest.mark.parametrize("has_pages", [True, False])
def test_all_pages_of_an_answer_are_read(sqlite: Inbox, has_pages: bool) -> None:
    """A server may put few matches on a page, or ignore the offset."""
    source = WebSource("http://user:secret@pacs:1/dicom-web/", sqlite, Audit(sqlite.database))
    assert source.name == "http://pacs:1/dicom-web", "no password"
    studies = [
        {"0020000D": {"vr": "UI", "Value": [f"1.{number}"]}, "00201208": {"vr": "IS", "Value": [number]}}
        for number in range(5)
    ]

    def answer(request: httpx.Request) -> httpx.Response:
        offset = int(request.url.params["offset"])
        return httpx.Response(200, json=studies[offset : offset + 2] if has_pages else studies)

    source.web.client = httpx.Client(base_url="http://pacs/", transport=httpx.MockTransport(answer))
    assert source.studies(date(2024, 1, 31)) == [ListedStudy(f"1.{number}", str(number)) for number in range(5)]


@pytest.mark.parametrize(
    "answer", [httpx.Response(404), httpx.Response(200, text="<html>"), httpx.Response(401), httpx.Response(500)]
)
def test_a_wrong_address_is_an_error_and_not_an_empty_answer(sqlite: Inbox, answer: httpx.Response) -> None:
    source = WebSource("http://pacs", sqlite, Audit(sqlite.database))
    source.web.client = httpx.Client(base_url="http://pacs/", transport=httpx.MockTransport(lambda _: answer))
    with pytest.raises(UnreachableError):
        source.studies(date(2024, 1, 31))


def test_a_pacs_that_does_not_know_us_as_a_destination_is_named() -> None:
    ae = AE("PACS")
    for model in (StudyRootQueryRetrieveInformationModelFind, StudyRootQueryRetrieveInformationModelMove):
        ae.add_supported_context(model)

    def move(event: evt.Event) -> Iterator[object]:
        yield (None, None)

    server = ae.start_server(("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_C_MOVE, move)])
    assert server is not None
    try:
        peer = DicomPeer(own_title="VITMODEL", title="PACS", host="127.0.0.1", port=server.server_address[1])
        with DicomSource(peer).connected() as archive, pytest.raises(UnreachableError, match="add this node to it"):
            archive.fetch(ListedObject("1.2", "1.3", "1.4"), "")
    finally:
        server.shutdown()


class FakeArchive:
    """A PACS of one study whose objects may not be fetched."""

    name = "fake"

    def __init__(self, inbox: Inbox, images: list[Dataset], count: str) -> None:
        self.inbox = inbox
        self.images = {str(image.SOPInstanceUID): image for image in images}
        self.study = ListedStudy(str(images[0].StudyInstanceUID), count)
        self.withheld = ""
        self.lists = 0
        self.is_down = False
        self.was_held: list[bool] = []

    @contextlib.contextmanager
    def connected(self) -> Iterator[Archive]:
        yield self

    def studies(self, day: date) -> list[ListedStudy]:
        return [self.study] if day == date(2024, 1, 31) else []

    def objects(self, study_uid: str) -> list[ListedObject]:
        self.lists += 1
        if self.is_down:
            raise UnreachableError("down")
        return [ListedObject(study_uid, "1", sop_uid) for sop_uid in self.images]

    def fetch(self, item: ListedObject, association: str) -> None:
        with self.inbox.database.read() as session:
            self.was_held.append(bool(open_transfers(session, [item.study_uid], self.inbox.clock())))
        if item.sop_uid != self.withheld:
            self.inbox.store(to_bytes(self.images[item.sop_uid]), "fake", association)


@pytest.fixture
def fake(sqlite: Inbox, make_study: MakeStudy) -> FakeArchive:
    return FakeArchive(sqlite, make_study(), "4")


def test_an_object_that_cannot_be_fetched_is_asked_for_less_and_less_often(
    fake: FakeArchive, sqlite: Inbox, clock: Clock
) -> None:
    poller = Poller(fake, sqlite, PollingRules())
    fake.withheld = next(iter(fake.images))
    assert poller.turn() == 3
    assert poller.turn() == 0
    assert len(fake.was_held) == 4
    assert all(fake.was_held), "the study is not complete while its objects are fetched"
    for _ in range(200):
        clock.now += 60
        poller.turn()
    assert 8 < len(fake.was_held) - 4 < 18
    fake.withheld = ""
    clock.now += 3600
    assert poller.turn() == 1
    assert stored(sqlite) == set(fake.images)


@pytest.mark.parametrize(("count", "lists"), [("4", 1), ("", 5)])
def test_a_study_is_looked_into_again_only_where_the_pacs_states_no_number(
    fake: FakeArchive, sqlite: Inbox, count: str, lists: int
) -> None:
    fake.study = ListedStudy(fake.study.uid, count)
    poller = Poller(fake, sqlite, PollingRules())
    for _ in range(5):
        poller.turn()
    assert fake.lists == lists
    assert len(fake.was_held) == 4


def test_a_study_at_which_the_pacs_fails_does_not_stop_the_others(
    fake: FakeArchive, sqlite: Inbox, clock: Clock
) -> None:
    poller = Poller(fake, sqlite, PollingRules())
    fake.is_down = True
    with pytest.raises(UnreachableError):
        poller.turn()
    assert poller.turn() == 0, "it waits"
    fake.is_down = False
    clock.now += 60
    assert poller.turn() == 4


def test_what_is_known_of_old_studies_is_forgotten(fake: FakeArchive, sqlite: Inbox, clock: Clock) -> None:
    poller = Poller(fake, sqlite, PollingRules(days=1))
    assert poller.turn() == 0, "the study is two days old"
    poller = Poller(fake, sqlite, PollingRules(days=2))
    assert poller.turn() == 4
    clock.now += 30 * 86400
    poller.turn()
    with sqlite.database.read() as session:
        assert not session.scalars(select(FoundStudy)).all()


def test_work_goes_on_after_errors_until_it_is_told_to_stop(
    fake: FakeArchive, sqlite: Inbox, caplog: pytest.LogCaptureFixture
) -> None:
    stop = threading.Event()
    turns: list[int] = []

    class Restless(Poller):
        def turn(self, stop: threading.Event | None = None) -> int:
            turns.append(1)
            if len(turns) == 4:
                assert stop is not None
                stop.set()
            if len(turns) < 3:
                raise UnreachableError("the PACS is away")
            return 0

    Restless(fake, sqlite, PollingRules(seconds=0)).work(stop)
    assert [record.message for record in caplog.records] == [
        "finding in fake: the PACS is away",
        "finding in fake: works again",
    ]


def test_sources_have_names_without_passwords(sqlite: Inbox) -> None:
    source: Source = make_source(NodeConfig(action="run"), "dicom://PACS@host:104", sqlite, Audit(sqlite.database))
    assert source.name == "dicom://PACS@host:104"
