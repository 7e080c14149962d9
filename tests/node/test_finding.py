"""Fetching new objects from an Orthanc."""

from __future__ import annotations

import pytest
from peers import MakeStudy, StartOrthanc
from sqlalchemy import select

from vitmodel.errors import DiskFullError
from vitmodel.node.audit import Audit
from vitmodel.node.finding import OrthancFinder
from vitmodel.node.inbox import Inbox
from vitmodel.node.models import Cursor, Instance, Job, Result, Study


def stored(inbox: Inbox) -> list[str]:
    with inbox.database.read() as session:
        return sorted(session.scalars(select(Instance.sop_uid)))


def read_all(finder: OrthancFinder) -> None:
    while finder.turn():
        pass


def test_new_objects_are_fetched_once_and_our_results_never(
    sqlite: Inbox, start_orthanc: StartOrthanc, make_study: MakeStudy
) -> None:
    images = make_study()
    (own,) = make_study((("L", "CC"),), study=images[0].StudyInstanceUID)
    with sqlite.database.write() as session:
        session.add(Study(study_uid="1", first_arrival=0, last_arrival=0, pending=False))
        session.flush()
        session.add(Job(key="1", study_uid="1", images="", created_at=0, updated_at=0))
        session.flush()
        session.add(Result(job_id=1, sop_uid=own.SOPInstanceUID, sop_class="1", path="", updated_at=0))
    with start_orthanc() as orthanc:
        finder = OrthancFinder(orthanc.url, sqlite, Audit(sqlite.database))
        read_all(finder)
        assert stored(sqlite) == []
        orthanc.upload([*images[:2], own])
        read_all(finder)
        assert stored(sqlite) == sorted(str(image.SOPInstanceUID) for image in images[:2])
        orthanc.upload(images[2:])
        again = OrthancFinder(orthanc.url, sqlite, Audit(sqlite.database))  # as after a restart
        read_all(again)
    assert stored(sqlite) == sorted(str(image.SOPInstanceUID) for image in images)
    with sqlite.database.read() as session:
        assert set(session.scalars(select(Instance.repeats))) == {0}


def test_an_object_that_cannot_be_stored_is_fetched_again(
    sqlite: Inbox, start_orthanc: StartOrthanc, make_study: MakeStudy
) -> None:
    with start_orthanc() as orthanc:
        orthanc.upload(make_study((("L", "CC"),)))
        finder = OrthancFinder(orthanc.url, sqlite, Audit(sqlite.database))
        sqlite.min_free_bytes = 1 << 62
        with pytest.raises(DiskFullError):
            read_all(finder)
        sqlite.min_free_bytes = 0
        read_all(finder)
    assert len(stored(sqlite)) == 1


def test_the_cursor_holds_no_password(sqlite: Inbox) -> None:
    finder = OrthancFinder("http://user:secret@localhost:8042/orthanc", sqlite, Audit(sqlite.database))
    finder._move(5)
    with sqlite.database.read() as session:
        (cursor,) = session.scalars(select(Cursor)).all()
    assert "secret" not in cursor.name
    assert finder._cursor() == 5
