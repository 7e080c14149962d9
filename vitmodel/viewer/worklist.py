"""The worklist: exams in an SQL table, sorted, filtered and paged there."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vitmodel.errors import UsageError
from vitmodel.utils import derive_seed
from vitmodel.viewer.exams import Exam

PAGE = 50
"""Exams per page."""
SORTS = {
    "order": "number",
    "patient": "patient_id COLLATE NOCASE, number",
    "probability": "probability IS NULL, probability DESC, number",
    "difference": "difference IS NULL, difference DESC, number",
}
"""Order of the exams -> its SQL."""
RANDOM = "place(:reader, key)"
"""Order of blinded reading: random, another one for each reader, and always the same for one."""
FILTERS = {
    "all": "1",
    "unread": "NOT EXISTS (SELECT 1 FROM readings WHERE exam = key AND :reader IN ('', reader))",
    "positive": "positive",
    "refused": "status = 'refused'",
    "warned": "status = 'warned'",
}
"""Choice of exams -> its SQL."""
SHOWING_SCORES = frozenset(("probability", "difference", "positive"))
"""Orders and choices that reveal scores."""
TABLES = """CREATE TABLE exams (number INTEGER PRIMARY KEY, key TEXT UNIQUE, patient_id TEXT, exam_id TEXT, views TEXT,
 "right" REAL, "left" REAL, other_right REAL, other_left REAL, probability REAL, difference REAL, positive INTEGER,
 status TEXT, reasons TEXT, images INTEGER, machine TEXT, date TEXT);
CREATE INDEX by_probability ON exams (probability);
CREATE INDEX by_patient ON exams (patient_id);
CREATE TABLE readings (exam TEXT, reader TEXT, PRIMARY KEY (exam, reader)) WITHOUT ROWID"""
COLUMNS = 17


@dataclass(frozen=True)
class WorklistQuery:
    """Which exams to list, and in what order.

    Raises:
        UsageError: `sort` or `only` is not a choice, or reveals the scores of a blinded reading.
    """

    page: int = 1
    """Number of the page, from 1; a number beyond the last one gives the last page."""
    sort: str = "order"
    """A key of `SORTS`: order of the source, patient, falling probability or difference; unscored exams last."""
    only: str = "all"
    """A key of `FILTERS`. `unread` means by the reader or, without one, by anybody."""
    search: str = ""
    """Text that the patient or exam id contains, in upper or lower case."""
    machine: str = ""
    """The machine of an image; empty = any."""
    reader: str = ""
    """Who reads."""
    blind: bool = False
    """Whether to list in the random order of the reader, and never by scores."""

    def __post_init__(self) -> None:
        for name, choices in (("sort", SORTS), ("only", FILTERS)):
            value = getattr(self, name)
            if value not in choices:
                raise UsageError(f"{name}: {value!r} is not a choice; choose from {', '.join(choices)}")
            if self.blind and value in SHOWING_SCORES:
                raise UsageError(f"{name}: {value!r} reveals scores, which are hidden until an exam is read")

    @property
    def order(self) -> str:
        return RANDOM if self.blind else SORTS[self.sort]

    def condition(self) -> tuple[str, dict[str, str]]:
        """Return the SQL condition and its values."""
        escaped = self.search.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
        values = {"reader": self.reader, "search": f"%{escaped}%", "machine": f";{self.machine};"}
        parts = [FILTERS[self.only]]
        if self.search:
            parts.append("(patient_id LIKE :search ESCAPE '\\' OR exam_id LIKE :search ESCAPE '\\')")
        if self.machine:
            parts.append("INSTR(';' || machine || ';', :machine)")
        return " AND ".join(parts), values


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
    other_right: float | None
    """Probability of the right breast in the compared scores."""
    other_left: float | None
    positive: int
    """1 if a breast is at or above the threshold."""
    status: str
    reasons: str
    images: int
    machine: str
    """Machines of the images, separated by ';'."""
    date: str | None
    """Date of the exam, YYYY-MM-DD; empty = unknown, None = not looked up yet."""
    is_read: int
    """1 if the reader, or without one anybody, stored a reading."""
    is_hidden: bool = False
    """Whether the scores are hidden from the reader."""

    def without_scores(self) -> WorklistRow:
        """Return the row for a reader who may not see scores."""
        unknown: dict[str, Any] = dict.fromkeys(("right", "left", "other_right", "other_left"))
        return replace(self, **unknown, positive=0, is_hidden=True)


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
        others: The same exams by (patient, exam) with the scores to compare.
        find_date: Returns the date of an exam, `YYYY-MM-DD` or empty. It is asked for the exams of a page only.
    """

    def __init__(
        self,
        exams: Iterable[Exam],
        others: Mapping[tuple[str, str], Exam] | None = None,
        find_date: Callable[[str], str] | None = None,
    ) -> None:
        self._lock = threading.Lock()
        self._find_date = find_date
        self._database = sqlite3.connect(":memory:", check_same_thread=False)
        self._database.create_function("place", 2, lambda reader, key: derive_seed(reader, key), deterministic=True)
        self._database.executescript(TABLES)
        self._database.executemany(
            f"INSERT INTO exams VALUES ({', '.join('?' * COLUMNS)})",
            (_values(number, exam, (others or {}).get(exam.ids)) for number, exam in enumerate(exams)),
        )
        self._database.commit()
        machines = {name for (names,) in self._ask("SELECT DISTINCT machine FROM exams") for name in names.split(";")}
        self.machines = sorted(machines - {""})

    def page(self, query: WorklistQuery) -> WorklistPage:
        """Return one page of the exams."""
        where, values = query.condition()
        (total,) = self._ask(f"SELECT COUNT(*) FROM exams WHERE {where}", values)[0]
        pages = max(1, -(-total // PAGE))
        number = min(max(1, query.page), pages)
        columns = (
            'key, patient_id, exam_id, views, "right", "left", other_right, other_left, positive, status, reasons, '
            f"images, machine, date, NOT {FILTERS['unread']}"
        )
        order = f"ORDER BY {query.order} LIMIT {PAGE} OFFSET {PAGE * (number - 1)}"
        rows = [WorklistRow(*row) for row in self._ask(f"SELECT {columns} FROM exams WHERE {where} {order}", values)]
        return WorklistPage([self._with_date(row) for row in rows], total, number, pages)

    def neighbours(self, key: str, query: WorklistQuery) -> tuple[str | None, str | None]:
        """Return the keys of the exams before and after an exam, in the order of the source or of blinded reading."""
        place = RANDOM if query.blind else "number"
        values = {"reader": query.reader, "key": key}
        here = f"(SELECT {place} FROM exams WHERE key = :key)"
        before = self._ask(f"SELECT key FROM exams WHERE {place} < {here} ORDER BY {place} DESC LIMIT 1", values)
        after = self._ask(f"SELECT key FROM exams WHERE {place} > {here} ORDER BY {place} LIMIT 1", values)
        return (before[0][0] if before else None), (after[0][0] if after else None)

    def mark_read(self, key: str, reader: str) -> None:
        """Note that a reader has stored a reading of an exam."""
        with self._lock:
            self._database.execute("INSERT OR IGNORE INTO readings VALUES (?, ?)", (key, reader))

    def is_read(self, key: str, reader: str) -> bool:
        """Return whether a reader has stored a reading of an exam."""
        return bool(self._ask("SELECT 1 FROM readings WHERE exam = ? AND reader = ?", (key, reader)))

    def exams_of(self, patient_id: str) -> list[str]:
        """Return the keys of a patient's exams in the order of the source."""
        return [
            key for (key,) in self._ask("SELECT key FROM exams WHERE patient_id = ? ORDER BY number", (patient_id,))
        ]

    def date(self, key: str) -> str:
        """Return the date of an exam, `YYYY-MM-DD`, looked up once; empty if it is unknown."""
        known: str | None = self._ask("SELECT date FROM exams WHERE key = ?", (key,))[0][0]
        if known is None:
            known = self._find_date(key) if self._find_date else ""
            with self._lock:
                self._database.execute("UPDATE exams SET date = ? WHERE key = ?", (known, key))
        return known

    def _with_date(self, row: WorklistRow) -> WorklistRow:
        return row if row.date is not None else replace(row, date=self.date(row.key))

    def _ask(self, query: str, values: Sequence[str] | Mapping[str, str] = ()) -> list[tuple]:
        with self._lock:
            return self._database.execute(query, values).fetchall()


def _values(number: int, exam: Exam, other: Exam | None) -> tuple:
    """Return the row of an exam in the table."""
    own, others = ([_probability(one, side) for side in "RL"] for one in (exam, other))
    gaps = [abs(one - two) for one, two in zip(own, others, strict=True) if one is not None and two is not None]
    machines = ";".join(dict.fromkeys(image.machine for image in exam.images if image.machine))
    return (
        number, exam.key, exam.patient_id, exam.exam_id, " ".join(exam.views), *own, *others, exam.probability,
        max(gaps, default=None), int(exam.is_positive), exam.status, " ".join(exam.reasons), len(exam.images), machines,
        None,
    )  # fmt: skip


def _probability(exam: Exam | None, side: str) -> float | None:
    breast = exam.breast(side) if exam else None
    return breast.probability if breast else None
