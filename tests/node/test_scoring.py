"""Scoring the jobs of the queue."""

from __future__ import annotations

import csv
import json
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peers import Clock, MakeStudy, to_bytes
from pydicom import Dataset, dcmread
from sqlalchemy import select

from vitmodel import __version__
from vitmodel.cli import main
from vitmodel.config import NodeConfig
from vitmodel.errors import DiskFullError, VitmodelError
from vitmodel.node.fingerprint import PACKAGE_FILES, package_fingerprint
from vitmodel.node.gathering import GatheringRules
from vitmodel.node.inbox import Inbox
from vitmodel.node.jobs import Queue, QueueRules
from vitmodel.node.models import Job, Result
from vitmodel.node.scoring import Scorer, share_cores

Submit = Callable[[list[Dataset]], Job]


@pytest.fixture
def config(run: Path, tmp_path: Path) -> NodeConfig:
    return NodeConfig(action="run", package=run / "package", folder=tmp_path / "node", device="cpu", workers=1)


@pytest.fixture
def queue(sqlite: Inbox, clock: Clock) -> Queue:
    return Queue(sqlite.database, QueueRules(), clock)


@pytest.fixture
def scorer(config: NodeConfig, queue: Queue) -> Scorer:
    return Scorer(config, queue, "worker")


@pytest.fixture
def submit(sqlite: Inbox, queue: Queue, config: NodeConfig) -> Submit:
    def submit(images: list[Dataset]) -> Job:
        for image in images:
            sqlite.store(to_bytes(image), "TEST")
        queue.gather(GatheringRules(), package_fingerprint(config), force=True)
        return jobs_of(queue)[-1]

    return submit


def jobs_of(queue: Queue) -> list[Job]:
    with queue.database.read() as session:
        return list(session.scalars(select(Job).order_by(Job.id)))


def results_of(queue: Queue) -> list[Result]:
    with queue.database.read() as session:
        return list(session.scalars(select(Result).order_by(Result.job_id, Result.sop_uid)))


def test_a_job_has_the_scores_of_predict_and_keeps_its_images(
    scorer: Scorer, submit: Submit, queue: Queue, make_study: MakeStudy, config: NodeConfig, tmp_path: Path
) -> None:
    job = submit(make_study())
    before = {path: path.read_bytes() for path in (config.folder / "inbox").rglob("*.dcm")}
    assert scorer.score_next()
    assert not scorer.score_next()
    (job,) = jobs_of(queue)
    assert job.stage == "kept", "there is no destination"
    assert main(["predict", str(config.package), str(config.folder / "inbox"), str(tmp_path / "out")]) == 0
    with (tmp_path / "out" / "breast_scores.csv").open() as file:
        expected = {row["laterality"]: float(row["probability"]) for row in csv.DictReader(file)}
    scores = json.loads(job.scores)
    assert {row["laterality"]: row["probability"] for row in scores["breasts"]} == pytest.approx(expected, abs=1e-6)
    assert job.probability == pytest.approx(max(expected.values()), abs=1e-6)
    assert (job.fingerprint, job.software) == (package_fingerprint(config), __version__)
    assert job.threshold == pytest.approx(scorer.predictor.ensemble.threshold)
    assert len(scores["images"]) == 4
    results = results_of(queue)
    assert len(results) >= 5, "reports and four pictures"
    for result in results:
        assert dcmread(config.folder / result.path).SOPInstanceUID == result.sop_uid
    assert {path: path.read_bytes() for path in (config.folder / "inbox").rglob("*.dcm")} == before


def test_the_same_study_and_package_give_the_same_results(
    scorer: Scorer, submit: Submit, queue: Queue, make_study: MakeStudy, tmp_path: Path, config: NodeConfig
) -> None:
    submit(make_study((("L", "CC"),)))
    scorer.score_next()
    first = {result.sop_uid for result in results_of(queue)}
    (job,) = jobs_of(queue)
    with queue.database.write() as session:
        session.get(Job, job.id).stage = "score"  # type: ignore[union-attr]
    scorer.score_next()
    assert {result.sop_uid for result in results_of(queue)} == first


def test_a_study_whose_images_are_all_refused_ends_unscored_with_reasons(
    scorer: Scorer, submit: Submit, queue: Queue, make_study: MakeStudy
) -> None:
    (image,) = make_study((("L", "CC"),))
    image.PixelData = bytes(len(image.PixelData))
    submit([image])
    scorer.score_next()
    (job,) = jobs_of(queue)
    assert (job.stage, job.probability) == ("unscored", None)
    assert json.loads(job.scores)["images"][0]["status"] == "refused"
    assert results_of(queue) == []


def test_an_error_is_recorded_without_values_of_the_header(
    scorer: Scorer, submit: Submit, queue: Queue, make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ValueError("Doe^Jane has no pixels")

    submit(make_study())
    monkeypatch.setattr("vitmodel.node.scoring.score_sources", fail)
    scorer.score_next()
    (job,) = jobs_of(queue)
    assert (job.stage, job.error, job.error_code) == ("score", "ValueError", "ValueError")
    assert job.not_before > 0


def test_a_worker_that_lost_its_lease_changes_nothing(
    scorer: Scorer, submit: Submit, queue: Queue, make_study: MakeStudy, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit(make_study((("L", "CC"),)))
    finish = queue.finish

    def too_late(*arguments: object, **values: object) -> bool:
        clock.now += 1000
        assert queue.claim("score", "another worker")
        return finish(*arguments, **values)  # type: ignore[arg-type]

    monkeypatch.setattr(queue, "finish", too_late)
    scorer.score_next()
    assert results_of(queue) == []
    assert jobs_of(queue)[0].lease_owner == "another worker"


def test_work_ends_when_it_is_told_to(scorer: Scorer, queue: Queue) -> None:
    stop = threading.Event()
    thread = threading.Thread(target=scorer.work, args=(stop,))
    thread.start()
    stop.set()
    thread.join(10)
    assert not thread.is_alive()


def test_a_worker_survives_a_database_that_cannot_be_written(
    scorer: Scorer, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = threading.Event()
    calls: list[str] = []

    def sign_on(name: str, role: str, ready: bool) -> None:
        calls.append(name)
        if len(calls) < 3:
            raise DiskFullError("disk: the database cannot be written")
        stop.set()

    monkeypatch.setattr("vitmodel.node.scoring.DATABASE_SECONDS", 0)
    monkeypatch.setattr(queue, "sign_on", sign_on)
    scorer.work(stop)
    assert len(calls) == 3


def test_the_fingerprint_depends_on_the_package_and_on_what_changes_results(run: Path, tmp_path: Path) -> None:
    one = NodeConfig(action="run", package=run / "package")
    same = NodeConfig(action="run", package=run / "package", processes=3)
    assert package_fingerprint(one) == package_fingerprint(same)
    other = NodeConfig(action="run", package=run / "package", explain="rollout")
    assert package_fingerprint(one) != package_fingerprint(other)
    with pytest.raises(VitmodelError, match="package"):
        package_fingerprint(NodeConfig(action="run", package=tmp_path / "none"))


def test_the_fingerprint_covers_the_files_that_a_package_is_made_of() -> None:
    from vitmodel.model.package import CONFIG_FILE, TENSORS_FILE

    assert set(PACKAGE_FILES) == {CONFIG_FILE, TENSORS_FILE}


@pytest.mark.parametrize(("cores", "processes", "expected"), [(8, 2, 4), (3, 2, 1), (2, 5, 1), (4, 1, 4)])
def test_scoring_processes_share_the_cores(
    cores: int, processes: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    share_cores(processes)
    assert used == [expected]


def test_results_name_the_networks_in_memory_after_the_package_was_replaced(
    config: NodeConfig, queue: Queue, tmp_path: Path
) -> None:
    package = Path(shutil.copytree(config.package, tmp_path / "package"))
    replaced = Scorer(replace(config, package=package), queue, "worker")
    (package / "model.safetensors").write_bytes(b"another model")
    kept = Scorer(config, queue, "other")
    assert replaced.predictor.ensemble.fingerprint() == kept.predictor.ensemble.fingerprint()
