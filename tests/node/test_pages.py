"""The pages and web interfaces of the node."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from peers import Clock, MakeStudy, StartOrthanc, to_bytes
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import insert, select

from vitmodel.cli import main
from vitmodel.node.audit import Audit, hash_uid
from vitmodel.node.gathering import GatheringRules
from vitmodel.node.inbox import Inbox
from vitmodel.node.jobs import Queue
from vitmodel.node.models import AuditEntry, Instance, Job, Result, Study
from vitmodel.node.pages import Site, create_app, needed_scope
from vitmodel.node.study_source import StudySource
from vitmodel.utils import NOT_A_MEDICAL_DEVICE
from vitmodel.viewer.source import PAGE, WorklistPage, WorklistQuery
from vitmodel.web.keys import ApiKeys, add_key
from vitmodel.web.security import AccessPolicy

SCORES = {
    "images": [{"laterality": "L", "view": "CC", "probability": 0.8, "status": "ok", "reason": None}],
    "breasts": [
        {"laterality": "L", "probability": 0.8, "decision": 1, "n_images": 2, "status": "ok", "reason": None},
        {
            "laterality": "R",
            "probability": None,
            "decision": None,
            "n_images": 0,
            "status": "refused",
            "reason": "blank",
        },
    ],
}
MakeClient = Callable[..., TestClient]


@pytest.fixture
def queue(sqlite: Inbox, clock: Clock) -> Queue:
    return Queue(sqlite.database, clock=clock)


@pytest.fixture
def make_client(sqlite: Inbox, queue: Queue) -> Iterator[MakeClient]:
    clients: list[TestClient] = []

    def make(web_root: str = "", keys: ApiKeys | None = None) -> TestClient:
        policy = AccessPolicy(keys=keys, scope_of=needed_scope)
        site = Site(inbox=sqlite, queue=queue, audit=Audit(sqlite.database), web_root=web_root, policy=policy)
        clients.append(TestClient(create_app(site), base_url="http://localhost"))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


@pytest.fixture
def client(make_client: MakeClient) -> TestClient:
    return make_client()


def add_study(queue: Queue, number: int, probability: float | None, stage: str = "sent") -> None:
    """Add a study that has been scored."""
    uid = f"1.2.{number}"
    with queue.database.write() as session:
        session.add(
            Study(
                study_uid=uid, patient_id=f"P{number:03d}", study_date="20240131", accession=f"A{number}",
                first_arrival=number, last_arrival=number, pending=False, state="ready", reason="quiet", version=1,
            )
        )  # fmt: skip
        session.flush()
        session.add(
            Job(
                key=uid, study_uid=uid, images="1.2.3", stage=stage, created_at=1, updated_at=1, fingerprint="f" * 64,
                software="1", threshold=0.5, probability=probability,
                suspicious=None if probability is None else probability >= 0.5,
                scores=json.dumps(SCORES) if probability is not None else "", machines="M1;M2",
                status="" if probability is None else "refused", scored_at=1,
            )
        )  # fmt: skip


def page(queue: Queue, **query: Any) -> WorklistPage:
    return StudySource(queue.database, Path("nowhere")).page(WorklistQuery(**query))


def audited(queue: Queue) -> list[tuple[str, str, str]]:
    with queue.database.read() as session:
        rows = session.execute(select(AuditEntry.who, AuditEntry.action, AuditEntry.subject).order_by(AuditEntry.id))
        return [tuple(row) for row in rows]


# Worklist


def test_the_worklist_is_sorted_filtered_and_paged_in_the_database(queue: Queue) -> None:
    for number in range(PAGE + 5):
        add_study(queue, number, None if number % 10 == 0 else number / 100, "dead" if number == 7 else "sent")
    first, last = page(queue, sort="probability"), page(queue, sort="probability", page=99)
    assert (first.total, first.pages, len(first.rows), len(last.rows)) == (PAGE + 5, 2, PAGE, 5)
    shown = [int(row.patient_id[1:]) for row in first.rows + last.rows]
    scored = [number for number in shown if number % 10]
    assert scored == sorted(scored, reverse=True)
    assert [number % 10 for number in shown[len(scored) :]] == [0] * 6, "studies without a score come last"
    assert [row.patient_id for row in page(queue, sort="patient").rows[:2]] == ["P000", "P001"]
    assert page(queue).rows[0].patient_id == f"P{PAGE + 4:03d}", "the newest study comes first"
    assert [row.patient_id for row in page(queue, stage="dead").rows] == ["P007"]
    assert page(queue, only="positive").total == sum(number >= 50 for number in scored)
    assert page(queue, machine="M2").total == len(scored)
    assert page(queue, only="refused").total == PAGE + 5, "those without a score wait for nothing"
    assert page(queue, only="warned").total == page(queue, machine="M").total == 0
    assert page(queue, search="p00").total == 10
    assert page(queue, search="%").rows == []


def test_the_worklist_shows_the_last_version_and_the_scores_of_the_one_before(queue: Queue) -> None:
    add_study(queue, 1, 0.1)
    with queue.database.write() as session:
        session.add(
            Job(key="2", study_uid="1.2.1", version=2, images="1", stage="score", created_at=1, updated_at=1)
        )  # fmt: skip
    (row,) = page(queue).rows
    assert (row.stage, row.left) == ("score", 0.8)
    exam = StudySource(queue.database, Path("nowhere")).exam("1.2.1")
    assert exam is not None
    assert "version 1" in exam.note


def test_ten_thousand_studies_are_paged_in_time(queue: Queue) -> None:
    with queue.database.write() as session:
        study = {"first_arrival": 0, "pending": False, "state": "ready"}
        session.execute(
            insert(Study),
            [{"study_uid": f"1.{n}", "patient_id": f"P{n}", "last_arrival": n, **study} for n in range(10_000)],
        )
        job = {"images": "1", "created_at": 1, "updated_at": 1, "scores": json.dumps(SCORES), "status": "refused"}
        session.execute(
            insert(Job),
            [{"key": str(n), "study_uid": f"1.{n}", "probability": n / 1e4, **job} for n in range(10_000)],
        )
    start = time.perf_counter()
    found = page(queue, sort="probability")
    assert time.perf_counter() - start < 0.3
    assert (found.total, found.rows[0].patient_id) == (10_000, "P9999")


def test_pages_carry_the_notice_and_escape_what_a_header_holds(client: TestClient, queue: Queue) -> None:
    add_study(queue, 1, 0.8)
    with queue.database.write() as session:
        session.get(Study, "1.2.1").patient_id = "<script>alert(1)</script>"  # type: ignore[union-attr]
    browser = {"accept": "text/html"}
    for path in ("/worklist", "/worklist?sort=patient&stage=sent&search=%3Cscr", "/studies/1.2.1", "/exams/1.2.1"):
        answer = client.get(path, headers=browser)
        assert answer.status_code == 200, path
        assert NOT_A_MEDICAL_DEVICE in answer.text
        assert "<script>" not in answer.text
        assert "80.0 %" in answer.text or path.startswith("/exams")
        assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert client.get("/static/reading.css").status_code == 200
    assert client.get("/worklist?sort=nothing").status_code == 422


def test_a_study_is_json_for_programs(client: TestClient, queue: Queue) -> None:
    add_study(queue, 1, 0.8)
    with queue.database.write() as session:
        session.add(
            Result(job_id=1, sop_uid="1.9", sop_class="1", path="x", state="refused", status="0xA900", updated_at=0)
        )
        session.add(Study(study_uid="1.3", patient_id="P001", first_arrival=0, last_arrival=0))
    study = client.get("/studies/1.2.1").json()
    assert study["notice"] == NOT_A_MEDICAL_DEVICE
    (job,) = study["jobs"]
    assert job["breasts"] == SCORES["breasts"]
    assert job["results"][0]["status"] == "0xA900"
    assert [prior["study_uid"] for prior in study["priors"]] == ["1.3"]
    for unknown in ("/studies/1.99", "/studies/..%2f..%2fetc", "/studies/abc"):
        assert client.get(unknown).status_code == 404
    assert ("anyone", "GET /studies", hash_uid("1.2.1")) in audited(queue)
    assert not any("P001" in text or "1.2.1" in text for entry in audited(queue) for text in entry)


def test_the_fhir_report_holds_the_scored_breasts(client: TestClient, queue: Queue) -> None:
    add_study(queue, 1, 0.8)
    add_study(queue, 2, None, "score")
    answer = client.get("/fhir/DiagnosticReport/1")
    report = answer.json()
    assert answer.headers["content-type"] == "application/fhir+json"
    assert (report["resourceType"], report["status"], report["effectiveDateTime"]) == (
        "DiagnosticReport", "preliminary", "2024-01-31",
    )  # fmt: skip
    (observation,) = report["contained"]
    assert observation["valueQuantity"]["value"] == 80
    assert report["result"] == [{"reference": f"#{observation['id']}"}]
    assert NOT_A_MEDICAL_DEVICE in report["conclusion"]
    assert client.get("/fhir/DiagnosticReport/2").status_code == 404
    assert client.get("/fhir/DiagnosticReport/9").status_code == 404


# Health


def test_readiness_needs_a_loaded_model_and_a_queue_that_moves(client: TestClient, queue: Queue, clock: Clock) -> None:
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/readyz").status_code == 503
    queue.sign_on("w", "score", False)
    assert client.get("/readyz").json() == {"model": False, "queue": True}
    queue.sign_on("w", "score", True)
    assert client.get("/readyz").status_code == 200
    add_study(queue, 1, None, "score")
    clock.now = 10_000
    queue.sign_on("w", "score", True)
    assert client.get("/readyz").json() == {"model": True, "queue": False}
    clock.now += 1000
    assert not client.get("/readyz").json()["model"], "a worker that is silent is no worker"


def test_metrics_are_read_by_prometheus_and_hold_no_ids(
    client: TestClient, queue: Queue, sqlite: Inbox, make_study: MakeStudy, clock: Clock
) -> None:
    for image in make_study():
        sqlite.store(to_bytes(image), "TEST")
    queue.gather(GatheringRules(), "f")
    job = queue.claim("score", "a")
    assert job
    clock.now += 7
    queue.finish(job.id, "a", "send")
    add_study(queue, 1, None, "dead")
    text = client.get("/metrics").text
    values = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert values["vitmodel_node_jobs", "send"] == values["vitmodel_node_jobs", "dead"] == 1
    assert values["vitmodel_node_stage_seconds_sum", "score"] == 7
    assert values["vitmodel_node_stage_seconds_count", "score"] == 1
    assert values["vitmodel_node_objects", "scored"] == 4
    assert values["vitmodel_node_oldest_job_seconds",] == 7
    assert "P1" not in text
    assert str(image.StudyInstanceUID) not in text


# Other sites


@pytest.mark.parametrize(
    "headers", [{"host": "evil.example"}, {"origin": "http://evil.example"}, {"host": "localhost.evil.example"}]
)
def test_pages_of_other_sites_do_not_reach_the_node(client: TestClient, headers: dict[str, str]) -> None:
    for method, path in (("GET", "/worklist"), ("POST", "/inbox/studies"), ("GET", "/metrics")):
        assert client.request(method, path, headers=headers).status_code == 403


def test_keys_open_what_their_scopes_allow_and_are_named_in_the_audit_log(
    make_client: MakeClient, queue: Queue, tmp_path: Path
) -> None:
    file = tmp_path / "keys"
    reader, scorer = add_key(file, "reader", ("read",)), add_key(file, "modality", ("score",))
    client = make_client(keys=ApiKeys(file))
    add_study(queue, 1, 0.8)

    def status(method: str, path: str, **headers: str) -> int:
        return int(client.request(method, path, headers=headers).status_code)

    bearer = {"authorization": f"Bearer {reader}"}
    assert status("GET", "/healthz") == 200
    for path in ("/worklist", "/studies/1.2.1", "/metrics", "/openapi.json", "/fhir/DiagnosticReport/1"):
        assert status("GET", path) == 401, path
        assert status("GET", path, authorization="Bearer wrong") == 401
        assert status("GET", path, **{"x-forwarded-user": "admin", "x-remote-user": "admin"}) == 401, "forged"
        assert status("GET", path, authorization=f"Bearer {scorer}") == 403
        assert status("GET", path, **bearer) == 200
    assert status("POST", "/inbox/studies", **bearer) == 403
    assert status("POST", "/inbox/studies", authorization=f"Bearer {scorer}") == 415, "allowed, but it holds nothing"
    assert ("key:reader", "GET /studies", hash_uid("1.2.1")) in audited(queue)


def test_pages_for_other_machines_need_keys(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    options = ["--folder", str(tmp_path), "--package", str(run / "package"), "--host", "0.0.0.0"]
    assert main(["node", "run", *options]) == 2
    assert "--api-key-file" in capsys.readouterr().err


def test_the_interface_is_described_by_openapi(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert {"/worklist", "/studies/{study_uid}", "/inbox/studies", "/readyz", "/metrics"} <= paths.keys()


# DICOMweb


def test_an_independent_client_stores_objects_in_the_inbox(
    make_client: MakeClient, sqlite: Inbox, make_study: MakeStudy
) -> None:
    import uvicorn
    from dicomweb_client import DICOMwebClient

    site = Site(inbox=sqlite, queue=Queue(sqlite.database), audit=Audit(sqlite.database))
    server = uvicorn.Server(uvicorn.Config(create_app(site), port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
        port = server.servers[0].sockets[0].getsockname()[1]
        images = make_study()
        answer = DICOMwebClient(f"http://127.0.0.1:{port}/inbox").store_instances(images)
        assert len(answer.ReferencedSOPSequence) == 4
    finally:
        server.should_exit = True
        thread.join()
    with sqlite.database.read() as session:
        stored = set(session.scalars(select(Instance.sop_uid)))
    assert stored == {str(image.SOPInstanceUID) for image in images}


def post(client: TestClient, body: bytes, kind: str = 'multipart/related; type="application/dicom"; boundary=b') -> int:
    return int(client.post("/inbox/studies", content=body, headers={"content-type": kind}).status_code)


def part(content: bytes) -> bytes:
    return b"--b\r\nContent-Type: application/dicom\r\n\r\n" + content + b"\r\n"


def test_requests_that_store_nothing_or_a_part_say_so(client: TestClient, sqlite: Inbox, make_study: MakeStudy) -> None:
    first, second = (to_bytes(image) for image in make_study((("L", "CC"), ("R", "CC"))))
    assert post(client, part(first) + b"--b--") == 200
    assert post(client, part(second) + part(b"no DICOM") + b"--b--") == 202
    assert post(client, part(b"no DICOM") + b"--b--") == 409
    assert post(client, part(first)) == 400, "it ends too early"
    assert post(client, first, "application/dicom") == 415
    sqlite.min_free_bytes = 1 << 62
    assert post(client, part(first) + b"--b--") == 503
    with sqlite.database.read() as session:
        assert len(session.scalars(select(Instance)).all()) == 2


def test_the_proxy_shows_the_pacs_and_changes_nothing_there(
    make_client: MakeClient, start_orthanc: StartOrthanc, make_study: MakeStudy, queue: Queue
) -> None:
    images = make_study((("L", "CC"),))
    uid = str(images[0].StudyInstanceUID)
    with start_orthanc() as orthanc:
        orthanc.upload(images)
        client = make_client(f"{orthanc.url}/dicom-web")
        with client:
            json_only = {"accept": "application/dicom+json"}
            found = client.get(f"/dicom-web/studies?StudyInstanceUID={uid}", headers=json_only)
            assert found.json()[0]["0020000D"]["Value"] == [uid]
            metadata = client.get(f"/dicom-web/studies/{uid}/metadata", headers=json_only).json()[0]
            link = metadata["7FE00010"]["BulkDataURI"]
            assert link.startswith("/dicom-web/"), "links lead to this server"
            assert client.get(link).status_code == 200
            pixels = client.get(
                f"/dicom-web/studies/{uid}", headers={"accept": "multipart/related; type=application/dicom"}
            )
            assert images[0].PixelData[:1000] in pixels.content
            for path in ("/dicom-web/../instances", "/dicom-web/servers", "/dicom-web/studies/..%2f..%2finstances"):
                assert client.get(path, headers=json_only).status_code == 404, path
            for method in ("POST", "PUT", "DELETE"):
                assert client.request(method, f"/dicom-web/studies/{uid}").status_code == 405
    assert ("anyone", "GET /dicom-web", hash_uid(uid)) in audited(queue)


def test_a_pacs_that_is_down_is_a_bad_gateway(make_client: MakeClient) -> None:
    with make_client("http://127.0.0.1:9/dicom-web") as client:
        assert client.get("/dicom-web/studies").status_code == 502


def test_there_is_no_proxy_without_a_pacs(client: TestClient, tmp_path: Path) -> None:
    assert client.get("/dicom-web/studies").status_code == 404
