"""Requests scored together: each gets what it gets alone, none waits for all images of another, cancelled work ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

from vitmodel.config import PredictorConfig
from vitmodel.data.rows import ManifestRow
from vitmodel.errors import VitmodelError
from vitmodel.model.packed_batch import ImageMetadata
from vitmodel.releases.inputs import read_inputs
from vitmodel.scoring.predictor import Predictor
from vitmodel.scoring.scheduler import JOB_IMAGES, Scheduler
from vitmodel.scoring.stream import LoadedImage, ScoredImage, Unit
from vitmodel.scoring.table_maker import ScoredRequest, make_tables


@pytest.fixture(scope="module")
def predictor(run: Path) -> Predictor:
    return Predictor(PredictorConfig(package=run / "package", workers=2))


@pytest.fixture(scope="module")
def images(release: Path) -> list[str]:
    return [str(path) for path in sorted((release / "train_images").rglob("*.dcm"))]


@pytest.fixture
def scheduler(predictor: Predictor) -> Iterator[Scheduler]:
    scheduler = Scheduler(predictor)
    yield scheduler
    scheduler.close()


def test_requests_scored_together_get_the_tables_that_they_get_alone(
    predictor: Predictor, scheduler: Scheduler, images: list[str], tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    groups = [images[:1], images[:1], images[:9], [images[2], str(tmp_path / "notes.txt")], [str(tmp_path / "none")]]
    tables = [read_inputs(group, "dicom_folder") for group in groups]
    with scheduler.expected():
        futures = [scheduler.submit(predictor.attach(table)) for table in tables]
    requests = [ScoredRequest(table, *future.result(60)) for table, future in zip(tables, futures, strict=True)]
    assert scheduler.passes < scheduler.images, "a pass holds images of several requests"
    for request, together in zip(requests, make_tables(predictor, requests), strict=True):
        for level, alone in predictor.score(request.table)._asdict().items():
            pd.testing.assert_frame_equal(getattr(together, level), alone, atol=1e-5, check_dtype=False)
    assert scheduler.waiting == 0


def test_a_small_request_does_not_wait_for_a_large_one(
    predictor: Predictor, scheduler: Scheduler, images: list[str]
) -> None:
    table = read_inputs(images[:1], "dicom_folder")
    rows = predictor.attach(table)
    large = scheduler.submit(rows.take([0] * 600))
    time.sleep(0.3)
    small = scheduler.submit(rows)
    small.result(60)
    assert not large.done()
    assert scheduler.images < 600 - JOB_IMAGES
    large.cancel()


def test_cancelled_work_ends_and_holds_nothing(predictor: Predictor, scheduler: Scheduler, images: list[str]) -> None:
    rows = predictor.attach(read_inputs(images[:1], "dicom_folder"))
    future = scheduler.submit(rows.take([0] * 600))
    time.sleep(0.2)
    future.cancel()
    deadline = time.monotonic() + 20
    while scheduler.waiting and time.monotonic() < deadline:
        time.sleep(0.02)
    assert scheduler.waiting == 0
    assert scheduler.images < 600
    assert scheduler.submit(rows).result(60)[1].shape[0] == 1, "it goes on with other requests"


def test_an_error_of_one_request_is_not_that_of_another(
    predictor: Predictor, scheduler: Scheduler, images: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = (predictor.attach(read_inputs([image], "dicom_folder")) for image in images[:2])
    score_group = scheduler.stream.score_group

    def fail_on_one(group: Unit) -> list[tuple[int, ScoredImage]]:
        if any(image.cropped.record.get("source_sha256") == digest for _, image in group):
            raise MemoryError
        return score_group(group)

    digest = predictor.stream.load(bad.rows[0], bad.metadata[0]).cropped.record["source_sha256"]
    monkeypatch.setattr(scheduler.stream, "score_group", fail_on_one)
    with scheduler.expected():
        futures = [scheduler.submit(rows) for rows in (good, bad)]
    assert futures[0].result(60)[1].shape[0] == 1
    with pytest.raises(Exception, match="could not be scored"):
        futures[1].result(60)


def test_an_error_while_loading_ends_one_request_and_no_thread(
    predictor: Predictor, scheduler: Scheduler, images: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    load = predictor.stream.load

    def fail_on_first(row: ManifestRow, metadata: ImageMetadata) -> LoadedImage:
        if row.path == images[0]:
            raise VitmodelError("the disk is gone")
        return load(row, metadata)

    monkeypatch.setattr(predictor.stream, "load", fail_on_first)
    broken = scheduler.submit(predictor.attach(read_inputs(images[:1], "dicom_folder")).take([0] * 40))
    with pytest.raises(VitmodelError, match="the disk is gone"):
        broken.result(60)
    whole = scheduler.submit(predictor.attach(read_inputs(images[1:2], "dicom_folder")))
    assert len(whole.result(60)[0]) == 1
    assert scheduler.is_alive
    deadline = time.monotonic() + 20
    while scheduler.waiting and time.monotonic() < deadline:
        time.sleep(0.02)
    assert scheduler.waiting == 0


def test_a_closed_scheduler_cancels_what_it_has(predictor: Predictor, images: list[str]) -> None:
    scheduler = Scheduler(predictor)
    rows = predictor.attach(read_inputs(images[:1], "dicom_folder"))
    before = threading.active_count()
    future = scheduler.submit(rows.take([0] * 200))
    scheduler.close()
    assert future.cancelled()
    assert not scheduler.is_alive
    assert scheduler.submit(rows).cancelled()
    deadline = time.monotonic() + 10
    while threading.active_count() >= before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert threading.active_count() < before
