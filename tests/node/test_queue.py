"""The database and the queue, on SQLite and on PostgreSQL."""

from __future__ import annotations

import json
import random
import threading
from pathlib import Path

import pytest
from peers import Clock, MakeStudy, to_bytes
from pydicom import Dataset
from sqlalchemy import inspect, select, text

from vitmodel.errors import UsageError, VitmodelError
from vitmodel.node import database as database_module
from vitmodel.node.database import MIGRATIONS, Database
from vitmodel.node.gathering import GatheringRules
from vitmodel.node.inbox import Inbox
from vitmodel.node.jobs import Queue, QueueRules
from vitmodel.node.models import Instance, Job, Result, Study
from vitmodel.node.queueing import back_off, job_key

RULES = GatheringRules(quiet_seconds=60, max_seconds=600)


@pytest.fixture
def queue(database: Database, clock: Clock) -> Queue:
    return Queue(database, QueueRules(lease_seconds=10, max_failures=3, first_wait=4, longest_wait=60), clock)


def jobs_of(queue: Queue) -> list[Job]:
    with queue.database.read() as session:
        return list(session.scalars(select(Job).order_by(Job.id)))


def receive(inbox: Inbox, images: list[Dataset], association: str = "") -> None:
    for image in images:
        inbox.store(to_bytes(image), "TEST", association)


# Keys and waits


def test_the_key_depends_on_the_set_of_images_and_on_the_package() -> None:
    assert job_key(["2", "1"], "a") == job_key(["1", "2", "1"], "a")
    assert len({job_key(["1", "2"], "a"), job_key(["1"], "a"), job_key(["1", "2"], "b"), job_key(["12"], "a")}) == 4


def test_waits_double_up_to_the_longest_and_are_spread() -> None:
    rng = random.Random(0)
    for attempt in range(1, 2000):
        full = min(600, 5 * 2 ** (attempt - 1))
        assert full / 2 <= back_off(attempt, 5, 600, rng) <= full
    assert len({back_off(3, 5, 600, rng) for _ in range(10)}) == 10


# Schema


def test_tables_are_created_once_and_opened_again(database: Database) -> None:
    database.migrate()
    with database.read() as session:
        assert session.execute(text("SELECT version FROM schema_version")).all() == [(1 + len(MIGRATIONS),)]


def test_an_older_schema_is_migrated_with_its_rows(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    with database.write() as session:
        session.add(Study(study_uid="1.2", first_arrival=0, last_arrival=0))

    def add_column(connection: object) -> None:
        connection.execute(text("ALTER TABLE studies ADD COLUMN note VARCHAR(8) DEFAULT 'none'"))  # type: ignore[attr-defined]

    monkeypatch.setattr(database_module, "MIGRATIONS", (*MIGRATIONS, add_column))
    database.migrate()
    database.migrate()
    with database.read() as session:
        assert session.execute(text("SELECT study_uid, note FROM studies")).all() == [("1.2", "none")]
        assert session.execute(text("SELECT version FROM schema_version")).all() == [(2 + len(MIGRATIONS),)]


def describe_schema(database: Database) -> dict[str, tuple[set[str], set[str | None]]]:
    """Return the names of the columns and indexes of each table."""
    found = inspect(database.engine)
    return {
        table: (
            {column["name"] for column in found.get_columns(table)},
            {one["name"] for one in found.get_indexes(table)},
        )
        for table in found.get_table_names()
    }


def test_a_database_of_the_first_version_becomes_like_a_new_one(queue: Queue) -> None:
    database = queue.database
    new = describe_schema(database)
    scores = {"images": [{"status": "ok"}, {"status": "warned"}], "breasts": [{"status": "ok"}]}
    with database.write() as session:
        session.add(Study(study_uid="1.2", first_arrival=0, last_arrival=0))
        session.flush()
        for key, text_ in (("a", json.dumps(scores)), ("b", "")):
            session.add(Job(key=key, study_uid="1.2", images="1", created_at=1, updated_at=7, scores=text_))
    with database.engine.begin() as connection:
        indexes = ("ix_jobs_study_version", "ix_jobs_machines", "ix_studies_arrival")
        for statement in (
            *(f"DROP INDEX {name}" for name in indexes),
            *(f"ALTER TABLE jobs DROP COLUMN {name}" for name in ("scored_at", "status", "machines")),
            *("DROP TABLE readings", "UPDATE schema_version SET version = 1"),
        ):
            connection.execute(text(statement))
    assert describe_schema(database) != new
    database.migrate()
    assert describe_schema(database) == new
    assert [(job.status, job.scored_at, job.machines) for job in jobs_of(queue)] == [("warned", 7, ""), ("", None, "")]


def test_a_migration_that_fails_leaves_the_tables_as_they_were(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(connection: object) -> None:
        connection.execute(text("ALTER TABLE studies ADD COLUMN note VARCHAR(8)"))  # type: ignore[attr-defined]
        raise RuntimeError("power cut")

    monkeypatch.setattr(database_module, "MIGRATIONS", (*MIGRATIONS, fail))
    with pytest.raises(RuntimeError):
        database.migrate()
    names = {column["name"] for column in inspect(database.engine).get_columns("studies")}
    assert "note" not in names


def test_a_newer_schema_is_refused(database: Database) -> None:
    with database.write() as session:
        session.execute(text("UPDATE schema_version SET version = 99"))
    with pytest.raises(VitmodelError, match=r"version 99.*install the newer"):
        database.migrate()


def test_wrong_urls_are_refused_without_their_password(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no URL"):
        Database("node")
    with pytest.raises(VitmodelError) as error:
        Database("postgresql://user:secret@127.0.0.1:1/none")
    assert "secret" not in str(error.value)


# Gathering


def test_four_views_become_one_job_once_the_associations_are_closed(
    inbox: Inbox, queue: Queue, make_study: MakeStudy
) -> None:
    images = make_study()
    for number, image in enumerate(images):
        receive(inbox, [image], f"association {number}")
    assert queue.gather(RULES, "f") == []
    for number in range(4):
        inbox.end_transfer(f"association {number}")
    assert [decision.verdict for decision in queue.gather(RULES, "f")] == ["ready"]
    receive(inbox, images, "again")  # the whole study again
    inbox.end_transfer("again")
    queue.clock.now += 1000  # type: ignore[attr-defined]
    assert queue.gather(RULES, "f") == []
    (job,) = jobs_of(queue)
    assert job.images.split() == sorted(str(image.SOPInstanceUID) for image in images)
    with queue.database.read() as session:
        assert session.scalars(select(Instance.repeats)).all() == [1, 1, 1, 1]


def test_associations_that_store_at_the_same_time_lose_nothing(
    inbox: Inbox, queue: Queue, make_study: MakeStudy
) -> None:
    images = make_study()
    threads = [threading.Thread(target=receive, args=(inbox, [image, *images])) for image in images]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    queue.gather(RULES, "f")
    (job,) = jobs_of(queue)
    assert len(job.images.split()) == 4


def test_a_late_image_makes_a_version_that_names_the_previous_one(
    inbox: Inbox, queue: Queue, clock: Clock, make_study: MakeStudy
) -> None:
    images = make_study()
    receive(inbox, images)
    queue.gather(RULES, "f")
    receive(inbox, make_study((("L", "ML"),), study=images[0].StudyInstanceUID))
    assert queue.gather(RULES, "f") == []
    clock.now += 60
    assert [decision.verdict for decision in queue.gather(RULES, "f")] == ["late"]
    first, second = jobs_of(queue)
    assert (second.version, second.previous, second.origin) == (2, first.id, "late")
    assert set(first.images.split()) < set(second.images.split())


def test_results_that_are_returned_to_us_make_no_job(
    inbox: Inbox, queue: Queue, clock: Clock, make_study: MakeStudy
) -> None:
    images = make_study()
    receive(inbox, images)
    queue.gather(RULES, "f")
    by_maker, by_uid = make_study((("L", "CC"), ("R", "CC")), study=images[0].StudyInstanceUID)
    by_maker.Manufacturer = "vitmodel"
    (job,) = jobs_of(queue)
    with queue.database.write() as session:
        session.add(Result(sop_uid=by_uid.SOPInstanceUID, job_id=job.id, sop_class="1", path="x", updated_at=0))
    for _ in range(4):
        receive(inbox, [by_maker, by_uid])
        clock.now += 61
        queue.gather(RULES, "f")
    assert len(jobs_of(queue)) == 1
    with queue.database.read() as session:
        reasons = session.scalars(select(Instance.ignored).where(Instance.ignored != "")).all()
        assert session.scalars(select(Study.state)).all() == ["ready"]
    assert reasons == ["own result", "own result"]


def test_a_new_package_scores_a_study_that_is_sent_again_with_a_new_image(
    inbox: Inbox, queue: Queue, clock: Clock, make_study: MakeStudy
) -> None:
    images = make_study()
    receive(inbox, images[:3])
    queue.gather(RULES, "old", force=True)
    receive(inbox, images[3:])
    queue.gather(RULES, "new", force=True)
    assert [job.fingerprint for job in jobs_of(queue)] == ["old", "new"]


# Leases


@pytest.fixture
def one_job(inbox: Inbox, queue: Queue, make_study: MakeStudy) -> Job:
    receive(inbox, make_study())
    queue.gather(RULES, "f")
    return jobs_of(queue)[0]


def test_a_job_is_leased_to_one_owner_until_the_lease_ends(queue: Queue, clock: Clock, one_job: Job) -> None:
    assert queue.claim("score", "a")
    assert queue.claim("score", "b") is None
    clock.now += 9
    assert queue.heartbeat(one_job.id, "a")
    clock.now += 9
    assert queue.claim("score", "b") is None
    clock.now += 1
    assert queue.claim("score", "b")
    assert not queue.heartbeat(one_job.id, "a")
    assert not queue.finish(one_job.id, "a", "send"), "the first owner was too late"
    assert queue.finish(one_job.id, "b", "send")
    assert not queue.finish(one_job.id, "b", "send"), "a stage is finished once"
    assert queue.claim("score", "b") is None
    assert queue.claim("send", "b")


def test_failed_attempts_wait_and_end_as_dead_letters_that_can_be_retried(
    queue: Queue, clock: Clock, one_job: Job
) -> None:
    for attempt in range(1, 4):
        assert queue.claim("score", "a")
        queue.fail(one_job.id, "a", "no", "broken")
        assert queue.claim("score", "a") is None
        clock.now += 4 * 2 ** (attempt - 1)
    (job,) = jobs_of(queue)
    assert (job.stage, job.failed_stage, job.error, job.error_code) == ("dead", "score", "no", "broken")
    assert queue.counts()["dead"] == 1
    assert queue.retry() == 1
    assert queue.claim("score", "a")


def test_a_destination_that_is_down_kills_no_job(queue: Queue, clock: Clock, one_job: Job) -> None:
    for _ in range(20):
        assert queue.claim("score", "a")
        queue.fail(one_job.id, "a", "down", "unreachable", counts=False)
        clock.now += 60
    assert jobs_of(queue)[0].stage == "score"


def test_a_study_that_kills_its_worker_is_dead_in_the_end(queue: Queue, clock: Clock, one_job: Job) -> None:
    for _ in range(3):
        assert queue.claim("score", "a")
        clock.now += 10
    assert queue.claim("score", "a") is None
    assert (jobs_of(queue)[0].stage, jobs_of(queue)[0].error_code) == ("dead", "worker_lost")


def test_an_orderly_stop_is_no_failure(queue: Queue, one_job: Job) -> None:
    for _ in range(5):
        assert queue.claim("score", "a")
        queue.release("a")
    assert jobs_of(queue)[0].failures == 0


def test_urgent_jobs_come_first(inbox: Inbox, queue: Queue, make_study: MakeStudy) -> None:
    for _ in range(3):
        receive(inbox, make_study())
    queue.gather(RULES, "f")
    with queue.database.write() as session:
        session.get(Job, jobs_of(queue)[2].id).priority = 5  # type: ignore[union-attr]
    ids = [job.id for job in jobs_of(queue)]
    claimed = [queue.claim("score", "a") for _ in range(3)]
    assert [job and job.id for job in claimed] == [ids[2], ids[0], ids[1]]


def test_workers_that_claim_at_the_same_time_get_different_jobs(
    inbox: Inbox, queue: Queue, make_study: MakeStudy
) -> None:
    for _ in range(12):
        receive(inbox, make_study((("L", "CC"),)))
    queue.gather(RULES, "f", force=True)
    claimed: list[int] = []

    def work(owner: str) -> None:
        while job := queue.claim("score", owner):
            claimed.append(job.id)

    threads = [threading.Thread(target=work, args=(str(number),)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claimed) == [job.id for job in jobs_of(queue)]
    assert len(claimed) == 12
