"""The whole node as a process: from the modality to the PACS, also when it is killed."""

from __future__ import annotations

import itertools
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from peers import (
    Clock,
    MakeStudy,
    Orthanc,
    RunningNode,
    StartOrthanc,
    free_port,
    send_files,
    start_node_process,
    to_bytes,
    tool,
    wait_until,
)
from pydicom import Dataset, dcmread
from pynetdicom import AE, _config, evt
from pynetdicom.sop_class import StorageCommitmentPushModel  # type: ignore[attr-defined]

from vitmodel.cli import main


@contextmanager
def running(folder: Path, package: Path, port: int, *flags: object) -> Iterator[RunningNode]:
    node = start_node_process(folder, package, port, *flags)
    try:
        yield node
    finally:
        node.kill()


QUIET = 4
DELIVERY = 10
"""Seconds after the quiet time within which results are in the PACS."""


@pytest.mark.slow
def test_studies_of_storescu_and_dcmsend_have_valid_results_in_the_same_study_of_orthanc(
    run: Path, start_orthanc: StartOrthanc, make_study: MakeStudy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    port = free_port()
    four, two = make_study(), make_study((("L", "CC"), ("R", "CC")), patient="P2")
    with start_orthanc(port) as orthanc:
        orthanc.upload([*four, *two])

        def own(study: str) -> set[str]:
            return {item["SOPInstanceUID"] for item in orthanc.instances(study) if item["Manufacturer"] == "vitmodel"}

        flags = ("--destination", f"dicom://{orthanc.aet}@127.0.0.1:{orthanc.dicom_port}", "--quiet-seconds", QUIET)
        with running(tmp_path / "node", run / "package", port, *flags, "--dicom", "sr,sc,gsps") as node:
            wait_until(lambda: node.query("SELECT ready FROM workers WHERE role = 'score'") == [(1,)], 120)
            peer = ["-aec", "VITMODEL", "127.0.0.1", str(port)]
            assert subprocess.run([tool("echoscu"), *peer]).returncode == 0
            for number, (images, program) in enumerate(((four, "storescu"), (two, "dcmsend"))):
                study = str(images[0].StudyInstanceUID)
                assert send_files(port, images, tmp_path / program, program) == 0
                start = time.monotonic()
                expected: set[str] = set()
                while not expected or own(study) != expected:
                    rows = node.query(f"SELECT sop_uid FROM results WHERE job_id = {number + 1}")
                    expected = {uid for (uid,) in rows}
                    assert time.monotonic() - start < QUIET + DELIVERY, node.stages()
                    time.sleep(0.1)
                ((last, scored),) = node.query(
                    "SELECT last_arrival, jobs.created_at FROM studies JOIN jobs USING (study_uid) "
                    f"WHERE study_uid = '{study}'"
                )
                assert (scored - last >= QUIET) == (images is two), "four views need not wait"
                assert len(orthanc.instances(study)) == len(images) + len(expected)
            wait_until(lambda: node.stages() == ["sent", "sent"], 60, "the confirmation")
            identifiers = orthanc.post("/tools/find", b'{"Level": "Instance", "Query": {"Manufacturer": "vitmodel"}}')
            assert isinstance(identifiers, list)
            kinds = {check_with_dciodvfy(orthanc, identifier, tmp_path / "result.dcm") for identifier in identifiers}
            assert kinds == {"SR", "OT", "PR"}
            # the PACS routes the results back to us: no new job
            for identifier in identifiers:
                assert orthanc.post("/modalities/node/store", str(identifier).encode())
            count = [(len(identifiers),)]
            wait_until(lambda: node.query("SELECT count(*) FROM instances WHERE ignored != ''") == count)
            time.sleep(QUIET + 1)
            assert node.stages() == ["sent", "sent"]
            options = ["--folder", str(tmp_path / "node")]
            capsys.readouterr()
            assert main(["node", "status", *options]) == 0
            assert "sent 2" in capsys.readouterr().out
            assert node.stop() == 0
        assert "Doe" not in (tmp_path / "node" / "stderr.txt").read_text()


def check_with_dciodvfy(orthanc: Orthanc, identifier: object, path: Path) -> str:
    """Fetch an object from Orthanc, check it, and return its modality."""
    if shutil.which("dciodvfy") is None:
        pytest.skip("dciodvfy (Debian package dicom3tools) is not installed")
    path.write_bytes(orthanc.get_bytes(f"/instances/{identifier}/file"))
    process = subprocess.run(["dciodvfy", str(path)], capture_output=True, text=True)
    assert not [line for line in process.stderr.splitlines() if line.startswith("Error")], process.stderr
    assert process.returncode == 0
    return str(dcmread(path).Modality)


@pytest.mark.slow
def test_a_node_that_only_polls_scores_each_study_once(
    run: Path, start_orthanc: StartOrthanc, make_study: MakeStudy, tmp_path: Path
) -> None:
    port = free_port()
    # with two more views than the standard ones: the study is complete when all have been fetched
    views = (("L", "CC"), ("L", "MLO"), ("R", "CC"), ("R", "MLO"), ("L", "CC"), ("R", "CC"))
    images = make_study(views)
    for image in images:
        image.StudyDate = time.strftime("%Y%m%d")
    with start_orthanc(port) as orthanc:
        orthanc.upload(images)
        pacs = f"dicom://{orthanc.aet}@127.0.0.1:{orthanc.dicom_port}"
        flags = ("--destination", pacs, "--find", pacs, "--find-seconds", 1, "--quiet-seconds", 2)
        with running(tmp_path / "node", run / "package", port, *flags) as node:
            wait_until(lambda: node.stages() == ["sent"], 120, "the delivery")
            time.sleep(6)  # several looks at the study, which now has the results
            assert node.stages() == ["sent"]
            assert node.query("SELECT count(*), max(repeats) FROM instances") == [(len(images), 0)]
            assert node.query("SELECT origin, length(images) - length(replace(images, ' ', '')) FROM jobs") == [
                ("ready", len(images) - 1)
            ]
            assert node.query("SELECT failures FROM found_studies") == [(0,)]
            assert node.stop() == 0


@pytest.fixture
def slow_pacs(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, list[str]]]:
    """Start a PACS that needs a moment for each object; return its port and the UIDs of what it has."""
    monkeypatch.setattr(_config, "UNRESTRICTED_STORAGE_SERVICE", True)
    received: list[str] = []

    def store(event: evt.Event) -> int:
        time.sleep(0.2)
        received.append(str(event.request.AffectedSOPInstanceUID))
        return 0

    def commit(event: evt.Event) -> tuple[int, None]:
        report = Dataset()
        report.TransactionUID = event.action_information.TransactionUID
        report.ReferencedSOPSequence = event.action_information.ReferencedSOPSequence
        import threading

        words = (report, 1, StorageCommitmentPushModel, "1.2.840.10008.1.20.1.1")
        threading.Timer(0.1, lambda: event.assoc.send_n_event_report(*words)).start()
        return 0, None

    ae = AE("PACS")
    ae.add_supported_context(StorageCommitmentPushModel)
    handlers = [(evt.EVT_C_STORE, store), (evt.EVT_N_ACTION, commit)]
    server = ae.start_server(("127.0.0.1", 0), block=False, evt_handlers=handlers)
    assert server is not None
    yield server.server_address[1], received
    server.shutdown()


ROUNDS = 5
STAGES = {
    "received": "SELECT count(*) FROM instances WHERE study_uid = '{study}'",
    "leased": "SELECT count(*) FROM jobs WHERE study_uid = '{study}' AND attempts + (stage != 'score') > 0",
    "scored": "SELECT count(*) FROM jobs WHERE study_uid = '{study}' AND stage != 'score'",
    "half sent": "SELECT count(*) FROM results WHERE state != 'pending' AND job_id IN "
    "(SELECT id FROM jobs WHERE study_uid = '{study}')",
}
"""Queries that find something once a study has reached a stage."""


def has_reached(node: RunningNode, stage: str, study: str) -> bool:
    return bool(node.query(STAGES[stage].format(study=study))[0][0])


@pytest.mark.nightly
def test_a_node_that_is_killed_at_any_stage_loses_nothing_and_sends_one_set_of_results(
    run: Path, slow_pacs: tuple[int, list[str]], make_study: MakeStudy, tmp_path: Path
) -> None:
    """`kill -9` twenty times: at each of the four stages, five times."""
    pacs, received = slow_pacs
    flags = ("--destination", f"dicom://PACS@127.0.0.1:{pacs}", "--lease-seconds", 2, "--first-wait", 0.5)
    flags += ("--attempts", 50, "--identity", "image")
    port = free_port()
    folder = tmp_path / "node"
    kills = 0
    studies = ROUNDS * len(STAGES)
    node = start_node_process(folder, run / "package", port, *flags)
    try:
        for number, stage in itertools.product(range(ROUNDS), STAGES):
            images = make_study(patient=f"P{number}")
            assert send_files(port, images, tmp_path / f"sent-{number}-{stage}") == 0
            wait_until(partial(has_reached, node, stage, str(images[0].StudyInstanceUID)), 120, stage)
            node.kill()
            kills += 1
            node = start_node_process(folder, run / "package", port, *flags)
        wait_until(lambda: node.stages() == ["sent"] * studies, 300, "the delivery of all")
        assert kills == studies
        assert node.query("SELECT count(*) FROM instances") == [(4 * studies,)]
        results = [uid for (uid,) in node.query("SELECT sop_uid FROM results")]
        per_job = {count for (count,) in node.query("SELECT count(*) FROM results GROUP BY job_id")}
        assert len(per_job) == 1, "each study has the same number of results"
        assert len(results) == len(set(results)) == studies * per_job.pop()
        assert set(received) == set(results)
        assert {state for (state,) in node.query("SELECT state FROM results")} == {"confirmed"}
    finally:
        node.kill()


@pytest.mark.slow
def test_a_pacs_that_is_down_gets_the_results_later(
    run: Path, start_orthanc: StartOrthanc, make_study: MakeStudy, tmp_path: Path
) -> None:
    port, pacs = free_port(), free_port()
    images = make_study((("L", "CC"), ("R", "CC")))
    flags = ("--destination", f"dicom://ORTHANC@127.0.0.1:{pacs}", "--quiet-seconds", 1, "--longest-wait", 5)
    with running(tmp_path / "node", run / "package", port, *flags) as node:
        assert send_files(port, images, tmp_path / "sent") == 0
        wait_until(lambda: node.query("SELECT count(*) FROM jobs WHERE error_code = 'unreachable'") == [(1,)], 120)
        with start_orthanc(port, pacs) as orthanc:
            wait_until(lambda: node.stages() == ["sent"], 60)
            assert len(orthanc.instances(str(images[0].StudyInstanceUID))) == len(
                node.query("SELECT sop_uid FROM results")
            )


def test_drain_scores_what_has_arrived_and_status_shows_it(
    run: Path, make_study: MakeStudy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from vitmodel.node.database import Database
    from vitmodel.node.inbox import Inbox

    folder = tmp_path / "node"
    database = Database.in_folder(folder)
    for image in make_study((("L", "CC"),)):
        Inbox(database, folder, 0).store(to_bytes(image), "TEST")
    recipe = tmp_path / "node.yaml"
    recipe.write_text(f"folder: {folder}\npackage: {run / 'package'}\ndevice: cpu\nroles: [gather, score, send]\n")
    assert main(["node", "status", "--config", str(recipe)]) == 0
    assert "not complete yet: 1" in capsys.readouterr().out
    assert main(["node", "drain", "--config", str(recipe)]) == 0
    out = capsys.readouterr().out
    assert "kept 1" in out
    assert "not a medical device" in out
    assert main(["node", "retry", "--config", str(recipe)]) == 0
    assert main(["node", "retry", "--config", str(recipe), "--job", "99"]) == 2
    database.close()


def test_received_objects_are_deleted_only_after_their_retention(
    run: Path, make_study: MakeStudy, tmp_path: Path
) -> None:

    from vitmodel.node.database import Database
    from vitmodel.node.gathering import GatheringRules
    from vitmodel.node.inbox import Inbox
    from vitmodel.node.jobs import Queue
    from vitmodel.node.models import Job
    from vitmodel.node.retention import delete_old_objects

    clock = Clock()
    database = Database.in_folder(tmp_path)
    inbox, queue = Inbox(database, tmp_path, 0, clock), Queue(database, clock=clock)
    for image in make_study():
        inbox.store(to_bytes(image), "TEST")
    queue.gather(GatheringRules(), "f")
    assert delete_old_objects(database, inbox, 1e9) == 0, "the job is not finished"
    with database.write() as session:
        session.get(Job, 1).stage = "sent"  # type: ignore[union-attr]
    assert delete_old_objects(database, inbox, 999) == 0, "not yet"
    assert delete_old_objects(database, inbox, 1e9) == 1
    assert not list((tmp_path / "inbox").rglob("*.dcm"))
    with database.read() as session:
        assert session.get(Job, 1) is not None
    database.close()


@pytest.mark.slow
def test_the_demo_shows_scored_studies_in_the_worklist_and_in_the_pacs(
    run: Path, make_study: MakeStudy, tmp_path: Path
) -> None:
    import httpx

    from vitmodel.config import NodeConfig
    from vitmodel.node.demo import STUDIES, running_demo

    if shutil.which("Orthanc") is None:
        pytest.skip("Orthanc is not installed")
    folder = tmp_path / "demo"
    for number in range(STUDIES):
        patient = folder / "release" / "train_images" / str(number)
        patient.mkdir(parents=True)
        for view, image in enumerate(make_study(patient=f"P{number}")):
            (patient / f"{view}.dcm").write_bytes(to_bytes(image))
    config = NodeConfig(
        action="demo", package=run / "package", folder=folder, dicom_port=0, port=0, device="cpu", workers=1
    )
    with running_demo(config) as (node, orthanc):
        wait_until(lambda: node.queue.counts()["sent"] == STUDIES, 120, "the delivery")
        page = httpx.get(f"http://localhost:{node.web_port}/worklist").text
        assert page.count("/studies/") == STUDIES
        assert " %" in page
        series = httpx.get(f"{orthanc.url}/series?expand").json()
        assert sum(item["MainDicomTags"].get("Manufacturer") == "vitmodel" for item in series) >= STUDIES


@pytest.mark.nightly
def test_the_demo_goes_from_nothing_to_results_in_the_pacs_and_leaves_no_process(tmp_path: Path) -> None:
    if shutil.which("Orthanc") is None:
        pytest.skip("Orthanc is not installed")
    command = [sys.executable, "-m", "vitmodel.cli", "node", "--demo"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    assert process.stdout is not None
    lines = list(itertools.takewhile(lambda line: not line.startswith("study 3 of 3"), process.stdout))
    process.terminate()
    assert process.wait(60) == 0
    assert sum("its results are in the PACS" in line for line in lines) == 2
    assert any("/worklist" in line for line in lines)
    left = [path for path in Path("/proc").glob("[0-9]*/cwd") if os.path.realpath(path) == str(tmp_path)]
    assert not left


def test_a_port_in_use_is_replaced_in_the_demo() -> None:
    from vitmodel.node.demo import usable_port

    wanted = free_port()
    assert usable_port(wanted) == wanted
    with socket.create_server(("127.0.0.1", wanted)):
        assert usable_port(wanted) not in (wanted, 0)


def test_what_an_interrupted_run_has_left_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vitmodel.node import demo

    def run_step(*words: str) -> None:
        Path(words[-1]).mkdir(parents=True)

    monkeypatch.setattr(demo, "run_step", run_step)
    (tmp_path / "model.part" / "half").mkdir(parents=True)
    for _ in range(2):
        demo.make_once(tmp_path / "model", ("etl {out}", "train {out}/run"))
        assert [path.name for path in (tmp_path / "model").iterdir()] == ["run"]


def test_the_demo_says_what_to_install(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    assert main(["node", "--demo"]) == 2
    assert "apt install orthanc orthanc-dicomweb" in capsys.readouterr().err
