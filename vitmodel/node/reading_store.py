"""The readings of a node, in its database."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from sqlalchemy import Select, select

from vitmodel.node.database import Database
from vitmodel.node.models import StoredReading
from vitmodel.viewer.exams import Exam
from vitmodel.viewer.readings import Reading


class StudyReadings:
    """The readings of all studies; the exam id of a reading is the Study Instance UID.

    Args:
        database: The node's database.
    """

    def __init__(self, database: Database) -> None:
        self.database = database

    def add(self, reading: Reading) -> Reading:
        """Store a reading, and return it or the one with the same id that was stored before."""
        query = select(StoredReading).where(StoredReading.id == reading.id, StoredReading.reader == reading.reader)
        with self.database.write() as session:
            stored = session.scalars(query).first()
            if stored is not None:
                return _read(stored)
            content = json.dumps(asdict(reading))
            row = {"id": reading.id, "study_uid": reading.exam_id, "reader": reading.reader, "content": content}
            session.add(StoredReading(**row))
        return reading

    def all(self, reader: str = "") -> list[Reading]:
        """Return the readings in the order of storing; `reader` limits them to one reader."""
        return self._find(select(StoredReading), reader)

    def of(self, exam: Exam, reader: str = "") -> list[Reading]:
        """Return the readings of a study in the order of storing; `reader` limits them to one reader."""
        return self._find(select(StoredReading).where(StoredReading.study_uid == exam.exam_id), reader)

    def _find(self, query: Select[Any], reader: str) -> list[Reading]:
        query = query.where(StoredReading.reader == reader) if reader else query
        with self.database.read() as session:
            return [_read(row) for row in session.scalars(query.order_by(StoredReading.number))]


def _read(row: StoredReading) -> Reading:
    return Reading.from_dict(json.loads(row.content))
