"""The worklist: exams in an SQL table, sorted, filtered and paged there."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from vitmodel.pixels.identity import read_identity
from vitmodel.utils import derive_seed
from vitmodel.viewer.exams import Exam, format_date
from vitmodel.viewer.source import PAGE, WorklistPage, WorklistQuery, WorklistRow

ORDERS = {
    "order": "of the source",
    "patient": "by patient",
    "probability": "by probability (steers reading)",
    "difference": "by difference of the models",
}
"""Order of the exams -> what the page calls it."""
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
TABLES = """CREATE TABLE exams (number INTEGER PRIMARY KEY, key TEXT UNIQUE, patient_id TEXT, exam_id TEXT, views TEXT,
 "right" REAL, "left" REAL, other_right REAL, other_left REAL, probability REAL, difference REAL, positive INTEGER,
 status TEXT, reasons TEXT, images INTEGER, machine TEXT, date TEXT);
CREATE INDEX by_probability ON exams (probability);
CREATE INDEX by_patient ON exams (patient_id);
CREATE TABLE readings (exam TEXT, reader TEXT, PRIMARY KEY (exam, reader)) WITHOUT ROWID"""
COLUMNS = 17


class Worklist:
    """An index of exams in memory, which several threads may ask.

    Args:
        exams: The exams in their order.
        others: The same exams by (patient, exam) with the scores to compare.
        readings: Patient, exam and reader of the readings so far.
    """

    def __init__(
        self,
        exams: Iterable[Exam],
        others: Mapping[tuple[str, str], Exam] | None = None,
        readings: Iterable[tuple[tuple[str, str], str]] = (),
    ) -> None:
        self._lock = threading.Lock()
        self._exams = {exam.key: exam for exam in exams}
        self._of_image = {image.key: exam for exam in self._exams.values() for image in exam.images}
        self.orders = ORDERS if others else {name: text for name, text in ORDERS.items() if name != "difference"}
        self.stages: Sequence[str] = ()
        self._database = sqlite3.connect(":memory:", check_same_thread=False)
        self._database.create_function("place", 2, lambda reader, key: derive_seed(reader, key), deterministic=True)
        self._database.executescript(TABLES)
        self._database.executemany(
            f"INSERT INTO exams VALUES ({', '.join('?' * COLUMNS)})",
            (_values(number, exam, (others or {}).get(exam.ids)) for number, exam in enumerate(self._exams.values())),
        )
        self._database.commit()
        keys = {exam.ids: exam.key for exam in self._exams.values()}
        for ids, reader in readings:
            if ids in keys:
                self.mark_read(keys[ids], reader)
        machines = {name for (names,) in self._ask("SELECT DISTINCT machine FROM exams") for name in names.split(";")}
        self.machines = sorted(machines - {""})

    def exam(self, key: str) -> Exam | None:
        """Return the exam of a key; None if there is none."""
        return self._exams.get(key)

    def exam_of_image(self, key: str) -> Exam | None:
        """Return the exam that has the image of a key; None if there is none."""
        return self._of_image.get(key)

    def exams_named(self, ids: Iterable[tuple[str, str]]) -> list[Exam]:
        """Return the exams of these patients and exam ids, in the order of the source."""
        wanted = set(ids)
        return [exam for exam in self._exams.values() if exam.ids in wanted]

    def page(self, query: WorklistQuery) -> WorklistPage:
        """Return one page of the exams."""
        where, values = _condition(query)
        (total,) = self._ask(f"SELECT COUNT(*) FROM exams WHERE {where}", values)[0]
        pages = max(1, -(-total // PAGE))
        number = min(max(1, query.page), pages)
        columns = (
            'key, patient_id, exam_id, views, "right", "left", other_right, other_left, positive, status, reasons, '
            f"images, machine, date, NOT {FILTERS['unread']}"
        )
        order = f"ORDER BY {_order(query)} LIMIT {PAGE} OFFSET {PAGE * (number - 1)}"
        rows = [WorklistRow(*row) for row in self._ask(f"SELECT {columns} FROM exams WHERE {where} {order}", values)]
        return WorklistPage([self._complete(row) for row in rows], total, number, pages)

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

    def other_exams(self, exam: Exam) -> list[Exam]:
        """Return the other exams of the patient in the order of the source."""
        if not exam.patient_id:
            return []
        query = "SELECT key FROM exams WHERE patient_id = ? AND key != ? ORDER BY number"
        return [self._exams[key] for (key,) in self._ask(query, (exam.patient_id, exam.key))]

    def date(self, key: str) -> str:
        """Return the date in the headers of an exam, `YYYY-MM-DD`, looked up once; empty if it is unknown."""
        known: str | None = self._ask("SELECT date FROM exams WHERE key = ?", (key,))[0][0]
        if known is None:
            known = _find_date(self._exams[key])
            with self._lock:
                self._database.execute("UPDATE exams SET date = ? WHERE key = ?", (known, key))
        return known

    def _complete(self, row: WorklistRow) -> WorklistRow:
        """Return the row with what is looked up for the exams of a page only."""
        breasts = [self._exams[row.key].breast(side) for side in "RL"]
        right, left = (None if breast is None else breast.interval for breast in breasts)
        return replace(row, date=self.date(row.key), right_interval=right, left_interval=left)

    def _ask(self, query: str, values: Sequence[str] | Mapping[str, str] = ()) -> list[tuple]:
        with self._lock:
            return self._database.execute(query, values).fetchall()


def _find_date(exam: Exam) -> str:
    """Return the date in the header of the exam's first readable image; empty if there is none."""
    for image in exam.images:
        date = format_date(read_identity(image.path).exam_date) if image.path else ""
        if date:
            return date
    return ""


def _order(query: WorklistQuery) -> str:
    return RANDOM if query.blind else SORTS[query.sort]


def _condition(query: WorklistQuery) -> tuple[str, dict[str, str]]:
    """Return the SQL condition of a query and its values."""
    escaped = query.search.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
    values = {"reader": query.reader, "search": f"%{escaped}%", "machine": f";{query.machine};"}
    parts = [FILTERS[query.only]]
    if query.search:
        parts.append("(patient_id LIKE :search ESCAPE '\\' OR exam_id LIKE :search ESCAPE '\\')")
    if query.machine:
        parts.append("INSTR(';' || machine || ';', :machine)")
    return " AND ".join(parts), values


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
