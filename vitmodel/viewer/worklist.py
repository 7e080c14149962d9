"""The worklist: exams in an SQL table, sorted, filtered and paged there."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from vitmodel.errors import UsageError
from vitmodel.viewer.exams import Exam

PAGE = 50
"""Exams per page."""
SORTS = {
    "order": "number",
    "patient": "patient_id COLLATE NOCASE, number",
    "probability": "probability IS NULL, probability DESC, number",
}
FILTERS = {
    "all": "1",
    "positive": "positive",
    "refused": "status = 'refused'",
    "warned": "status = 'warned'",
}
Sort = Literal["order", "patient", "probability"]
Filter = Literal["all", "positive", "refused", "warned"]
TABLE = """CREATE TABLE exams (number INTEGER PRIMARY KEY, key TEXT UNIQUE, patient_id TEXT, exam_id TEXT, views TEXT,
 right REAL, left REAL, probability REAL, positive INTEGER, status TEXT, reasons TEXT, images INTEGER)"""


@dataclass(frozen=True)
class WorklistRow:
    """One line of the worklist."""

    key: str
    patient_id: str
    exam_id: str
    views: str
    right: float | None
    """Probability of the right breast."""
    left: float | None
    positive: int
    """1 if a breast is at or above the threshold."""
    status: str
    reasons: str
    images: int


@dataclass(frozen=True)
class WorklistPage:
    """One page of the worklist."""

    rows: list[WorklistRow]
    total: int
    """Number of exams on all pages."""
    page: int
    """Number of this page, from 1."""
    pages: int


class Worklist:
    """An index of exams in memory, which several threads may ask.

    Args:
        exams: The exams in their order.
    """

    def __init__(self, exams: Iterable[Exam]) -> None:
        self._lock = threading.Lock()
        self._database = sqlite3.connect(":memory:", check_same_thread=False)
        self._database.execute(TABLE)
        self._database.executemany(
            f"INSERT INTO exams VALUES ({', '.join('?' * 12)})",
            (_values(number, exam) for number, exam in enumerate(exams)),
        )
        self._database.execute("CREATE INDEX by_probability ON exams (probability)")
        self._database.commit()

    def page(self, number: int = 1, sort: Sort = "order", only: Filter = "all", search: str = "") -> WorklistPage:
        """Return one page of the exams.

        Args:
            number: Number of the page, from 1; a number beyond the last one gives the last page.
            sort: Order of the source, patient, or falling probability with unscored exams last.
            only: Which exams to list.
            search: Text that the patient or exam id contains, in upper or lower case.

        Raises:
            UsageError: `sort` or `only` is not a choice.
        """
        where, values = self._where(only, search)
        if sort not in SORTS:
            raise UsageError(f"sort: {sort!r} is not a choice; choose from {', '.join(SORTS)}")
        (total,) = self._ask(f"SELECT COUNT(*) FROM exams WHERE {where}", values)[0]
        pages = max(1, -(-total // PAGE))
        number = min(max(1, number), pages)
        columns = 'key, patient_id, exam_id, views, "right", "left", positive, status, reasons, images'
        query = f"SELECT {columns} FROM exams WHERE {where} ORDER BY {SORTS[sort]} LIMIT ? OFFSET ?"
        rows = [WorklistRow(*row) for row in self._ask(query, [*values, PAGE, PAGE * (number - 1)])]
        return WorklistPage(rows, total, number, pages)

    def neighbours(self, key: str) -> tuple[str | None, str | None]:
        """Return the keys of the exams before and after an exam, in their order."""
        here = "(SELECT number FROM exams WHERE key = ?)"
        before = self._ask(f"SELECT key FROM exams WHERE number < {here} ORDER BY number DESC LIMIT 1", [key])
        after = self._ask(f"SELECT key FROM exams WHERE number > {here} ORDER BY number LIMIT 1", [key])
        return (before[0][0] if before else None), (after[0][0] if after else None)

    def _where(self, only: str, search: str) -> tuple[str, list[str]]:
        if only not in FILTERS:
            raise UsageError(f"only: {only!r} is not a choice; choose from {', '.join(FILTERS)}")
        if not search:
            return FILTERS[only], []
        escaped = search.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
        like = "LIKE ? ESCAPE '\\'"
        return f"{FILTERS[only]} AND (patient_id {like} OR exam_id {like})", [f"%{escaped}%"] * 2

    def _ask(self, query: str, values: Sequence[str | int]) -> list[tuple]:
        with self._lock:
            return self._database.execute(query, values).fetchall()


def _values(number: int, exam: Exam) -> tuple:
    """Return the row of an exam in the table."""
    sides = [breast.probability if (breast := exam.breast(side)) else None for side in "RL"]
    return (
        number, exam.key, exam.patient_id, exam.exam_id, " ".join(exam.views), *sides, exam.probability,
        int(exam.is_positive), exam.status, " ".join(exam.reasons), len(exam.images),
    )  # fmt: skip
