"""A disk that is really full: a small file system that holds the node's folder, its database included."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from peers import Clock, MakeStudy, free_port, send_files, start_node_process, to_bytes, wait_until
from pydicom import Dataset, dcmread
from pynetdicom import AE
from sqlalchemy import select

from vitmodel.config import NodeConfig
from vitmodel.node.audit import Audit
from vitmodel.node.database import Database
from vitmodel.node.fingerprint import package_fingerprint
from vitmodel.node.gathering import GatheringRules
from vitmodel.node.inbox import Inbox
from vitmodel.node.jobs import Queue, QueueRules
from vitmodel.node.models import Instance, Job, Result
from vitmodel.node.receiving import Listener, Receiver
from vitmodel.node.scoring import Scorer

MEGABYTES = 4


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of a few megabytes; skip where that is not allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    words = ["-t", "tmpfs", "-o", f"size={MEGABYTES}m", "tmpfs", str(folder)]
    if mount is None or os.geteuid() != 0 or subprocess.run([mount, *words], capture_output=True).returncode != 0:
        pytest.skip("a file system cannot be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def receiver(small_disk: Path) -> Iterator[Receiver]:
    """Run a receiver without a watermark, so that writing itself fails."""
    database = Database.in_folder(small_disk / "node")
    inbox = Inbox(database, small_disk / "node", 0)
    receiver = Receiver(inbox, Listener(port=0), Audit(database), lambda report: None)
    receiver.start()
    yield receiver
    receiver.stop()
    database.close()


def send(receiver: Receiver, images: list[Dataset]) -> list[int]:
    """Send images in one association; return the status of each."""
    client = AE("MODALITY")
    client.add_requested_context(images[0].SOPClassUID, images[0].file_meta.TransferSyntaxUID)
    association = client.associate("127.0.0.1", receiver.server.server_address[1], ae_title="VITMODEL")
    statuses = [association.send_c_store(image).Status for image in images]
    association.release()
    return statuses


def fill(folder: Path, spare: int) -> Path:
    """Fill a file system except for some bytes; return the file that fills it."""
    filler = folder / "filler"
    filler.write_bytes(bytes(max(0, shutil.disk_usage(folder).free - spare)))
    return filler


def files(receiver: Receiver) -> set[str]:
    """Return the names of all files in the inbox."""
    return {path.name for path in (receiver.inbox.folder / "inbox").rglob("*") if path.is_file()}


@pytest.mark.parametrize("spare", [0, 4096, 32_768, 200_000], ids=lambda spare: f"{spare} bytes free")
def test_a_full_disk_refuses_objects_and_leaves_nothing_half_written(
    receiver: Receiver, small_disk: Path, make_study: MakeStudy, spare: int
) -> None:
    before, images = make_study(), make_study()
    assert send(receiver, before) == [0] * 4
    filler = fill(small_disk, spare)
    statuses = send(receiver, images)
    assert 0xA700 in statuses
    assert set(statuses) <= {0x0000, 0xA700}
    accepted = {str(image.SOPInstanceUID) for image, status in zip(images, statuses, strict=True) if status == 0}
    with receiver.inbox.database.read() as session:
        rows = {instance.sop_uid: instance.path for instance in session.scalars(select(Instance))}
    assert accepted <= rows.keys(), "what was acknowledged is stored"
    assert not [name for name in files(receiver) if name.endswith(".part")]
    filler.unlink()
    assert send(receiver, images) == [0] * 4
    with receiver.inbox.database.read() as session:
        rows = {instance.sop_uid: instance.path for instance in session.scalars(select(Instance))}
    assert rows.keys() == {str(image.SOPInstanceUID) for image in before + images}
    assert files(receiver) == {f"{sop_uid}.dcm" for sop_uid in rows}
    for image in before + images:
        content = (receiver.inbox.folder / rows[str(image.SOPInstanceUID)]).read_bytes()
        assert image.PixelData in content
        assert len(content) >= len(to_bytes(image)) - 1000


def test_a_job_waits_for_space_for_its_results(
    small_disk: Path, run: Path, make_study: MakeStudy, clock: Clock
) -> None:
    folder = small_disk / "node"
    config = NodeConfig(action="run", package=run / "package", folder=folder, device="cpu", workers=1, attempts=2)
    database = Database.in_folder(small_disk.parent / "elsewhere")
    inbox, queue = Inbox(database, folder, 0, clock), Queue(database, QueueRules(max_failures=2), clock)
    for image in make_study():
        inbox.store(to_bytes(image), "TEST")
    queue.gather(GatheringRules(), package_fingerprint(config), force=True)
    scorer = Scorer(config, queue, "worker")
    filler = fill(small_disk, 0)
    for _ in range(4):  # more than the attempts after which a job is dead
        assert scorer.score_next()
        clock.now += 3600
    with database.read() as session:
        (job,) = session.scalars(select(Job))
    assert (job.stage, job.failures) == ("score", 0), job.error
    assert job.error_code == "disk_full"
    filler.unlink()
    assert scorer.score_next()
    with database.read() as session:
        (job,) = session.scalars(select(Job))
        results = list(session.scalars(select(Result)))
    assert job.stage == "kept"
    assert results
    for result in results:
        assert dcmread(folder / result.path).SOPInstanceUID == result.sop_uid
    database.close()


@pytest.mark.nightly
def test_a_node_on_a_full_disk_refuses_a_study_and_scores_it_when_there_is_space(
    small_disk: Path, run: Path, make_study: MakeStudy, tmp_path: Path
) -> None:
    images = make_study()
    port = free_port()
    node = start_node_process(small_disk / "node", run / "package", port)
    try:
        wait_until(lambda: node.query("SELECT ready FROM workers WHERE role = 'score'") == [(1,)], 120)
        filler = fill(small_disk, 0)
        assert send_files(port, images, tmp_path / "sent") != 0
        time.sleep(3)
        assert node.process.poll() is None
        assert node.query("SELECT count(*) FROM instances") == [(0,)]
        filler.unlink()
        assert send_files(port, images, tmp_path / "sent") == 0
        wait_until(lambda: node.stages() == ["kept"], 60, "the scores")
        assert node.stop() == 0
    finally:
        node.kill()
