"""The studies of a node as a source of exams for the reading room: sorted, filtered and paged in its database."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from sqlalchemy import ColumnElement, and_, func, or_, select, tuple_
from sqlalchemy.orm import Session, aliased

from vitmodel.node.database import Database
from vitmodel.node.exams import image_place, scored_exam, summarize, unscored_exam
from vitmodel.node.jobs import END_STAGES, WORKING_STAGES
from vitmodel.node.models import Instance, Job, StoredReading, Study
from vitmodel.viewer.exams import Exam, format_date
from vitmodel.viewer.room import describe_age
from vitmodel.viewer.source import PAGE, WorklistPage, WorklistQuery, WorklistRow

LAST, SCORED = aliased(Job), aliased(Job)
"""The last job of a study, and the last one that was scored."""
STAGES = ("gathering", *WORKING_STAGES, *END_STAGES)
ORDERS = {
    "order": "newest first",
    "patient": "by patient",
    "probability": "by probability (steers reading)",
}
KEPT_EXAMS = 64
"""Exams of jobs that are kept in memory: their files do not change."""
MAX_OTHERS = 20
"""Most other exams of a patient that are shown."""


@dataclass(frozen=True)
class StudyJobs:
    """A study with its last job and its last job that was scored; None = there is none."""

    study: Study
    last: Job | None
    scored: Job | None

    @property
    def stage(self) -> str:
        """Return gathering, the stage of the last job, or the decision that there is none."""
        if self.last is not None:
            return self.last.stage
        return "gathering" if self.study.pending else self.study.state

    @property
    def is_waiting(self) -> bool:
        """Return whether the study may get scores without anybody's doing."""
        return self.study.pending or (self.last is not None and self.last.stage in WORKING_STAGES)


class StudySource:
    """The studies of a node; each page asks the database anew.

    Args:
        database: The node's database.
        folder: The node's folder.
        fingerprint: Fingerprint of the package that heat maps are computed with; empty = any.
    """

    orders: Mapping[str, str] = ORDERS
    stages: Sequence[str] = STAGES

    def __init__(self, database: Database, folder: Path, fingerprint: str = "") -> None:
        self.database = database
        self.folder = folder
        self.fingerprint = fingerprint
        self._read = lru_cache(KEPT_EXAMS)(self._read_job)

    @property
    def machines(self) -> list[str]:
        """The imaging devices of all scored studies."""
        with self.database.read() as session:
            found = session.scalars(select(Job.machines).distinct()).all()
        return sorted({name for names in found for name in names.split(";") if name})

    def exam(self, key: str) -> Exam | None:
        """Return the exam of a study: of its last job that was scored or, before that, its objects."""
        with self.database.read() as session:
            found = _find(session, key)
            if found is None:
                return None
            if found.scored is None:
                images = _images_of(session, [key])
                exam = unscored_exam(found.study, images, self.folder, is_waiting=found.is_waiting)
            else:
                exam = self._read(found.scored.id)
        return replace(
            exam,
            patient_id=found.study.patient_id,
            note=_note(found, exam.is_explainable),
            link=f"/studies/{key}",
        )

    def exam_of_image(self, key: str) -> Exam | None:
        """Return the exam that has the image of a key, in the version that the key names."""
        job_id, sop_uid = image_place(key)
        if job_id is not None:
            with contextlib.suppress(LookupError):
                return self._read(job_id)
            return None
        with self.database.read() as session:
            instance = session.get(Instance, sop_uid) if sop_uid else None
            if instance is None or instance.ignored:
                return None
            study = session.get_one(Study, instance.study_uid)
            return unscored_exam(study, [instance], self.folder)

    def _read_job(self, job_id: int) -> Exam:
        """Return the exam of a scored job; raise LookupError, which is not kept, if it does not exist."""
        with self.database.read() as session:
            job = session.get(Job, job_id)
            study = session.get(Study, job.study_uid) if job else None
        if job is None or study is None or not job.scores:
            raise LookupError(job_id)
        is_own = self.fingerprint in ("", job.fingerprint)
        return replace(scored_exam(study, job, self.folder), is_explainable=is_own)

    def page(self, query: WorklistQuery) -> WorklistPage:
        """Return one page of the studies with their last jobs."""
        conditions = _conditions(query)
        joined = _joined().where(*conditions)
        counted = joined.with_only_columns(func.count())
        with self.database.read() as session:
            total = session.scalars(counted if conditions else select(func.count()).select_from(Study)).one()
            pages = max(1, -(-total // PAGE))
            number = min(max(1, query.page), pages)
            ordered = joined.order_by(*_order(query.sort), Study.last_arrival.desc(), Study.study_uid)
            found = session.execute(ordered.limit(PAGE).offset(PAGE * (number - 1))).all()
            studies = [StudyJobs(*row) for row in found]
            read = _read_studies(session, [each.study.study_uid for each in studies], query.reader)
            images = _images_of(session, [each.study.study_uid for each in studies if each.scored is None])
        rows = [self._row(each, images, each.study.study_uid in read) for each in studies]
        return WorklistPage(rows, total, number, pages)

    def _row(self, found: StudyJobs, images: Sequence[Instance], is_read: bool) -> WorklistRow:
        """Return the row of a study; `images` has those of all unscored ones on the page."""
        study, job = found.study, found.scored
        if job:
            exam = summarize(study, job)
        else:
            own = [image for image in images if image.study_uid == study.study_uid]
            exam = unscored_exam(study, own, self.folder, is_waiting=found.is_waiting)
        right, left = (exam.breast(side) for side in "RL")
        return WorklistRow(
            key=study.study_uid,
            patient_id=study.patient_id,
            exam_id=study.accession,
            views=" ".join(exam.views),
            right=right.probability if right else None,
            left=left.probability if left else None,
            other_right=None,
            other_left=None,
            positive=int(exam.is_positive),
            status=exam.status,
            reasons=" ".join(exam.reasons) if job else study.reason,
            images=len(exam.images),
            machine=job.machines if job else "",
            date=format_date(study.study_date),
            is_read=int(is_read),
            stage=found.stage,
            age=describe_age(time.time() - job.scored_at) if job and job.scored_at else "",
            link=f"/studies/{study.study_uid}",
            right_interval=right.interval if right else None,
            left_interval=left.interval if left else None,
        )

    def neighbours(self, key: str, query: WorklistQuery) -> tuple[str | None, str | None]:
        """Return the studies that arrived just after and just before a study: the newest comes first."""
        place = (Study.last_arrival, Study.study_uid)
        with self.database.read() as session:
            study = session.get(Study, key)
            if study is None:
                return None, None
            here = tuple_(study.last_arrival, study.study_uid)
            newer = select(Study.study_uid).where(tuple_(*place) > here).order_by(*place)
            older = select(Study.study_uid).where(tuple_(*place) < here).order_by(*(column.desc() for column in place))
            before, after = (session.scalars(query.limit(1)).first() for query in (newer, older))
        return before, after

    def other_exams(self, exam: Exam) -> list[Exam]:
        """Return the other studies of the patient, the latest first."""
        with self.database.read() as session:
            study = session.get(Study, exam.key)
            if study is None or not study.patient_id:
                return []
            same = and_(Study.patient_id == study.patient_id, Study.issuer == study.issuer)
            query = select(Study.study_uid).where(same, Study.study_uid != exam.key)
            keys = session.scalars(query.order_by(Study.study_date.desc()).limit(MAX_OTHERS)).all()
        return [other for key in keys if (other := self.exam(key)) is not None]

    def date(self, key: str) -> str:
        """Return the study date, `YYYY-MM-DD`; empty if it is unknown."""
        with self.database.read() as session:
            study = session.get(Study, key)
        return format_date(study.study_date) if study else ""

    def is_read(self, key: str, reader: str) -> bool:
        """Return whether a reader has stored a reading of a study."""
        with self.database.read() as session:
            return key in _read_studies(session, [key], reader)

    def mark_read(self, key: str, reader: str) -> None:
        """Do nothing: the readings are in the same database."""

    def exams_named(self, ids: Iterable[tuple[str, str]]) -> list[Exam]:
        """Return the exams of these patients and studies."""
        return [exam for _, key in sorted(ids) if (exam := self.exam(key)) is not None]


def _joined() -> Any:
    """Return the `Select` of studies, each with its last job and its last scored job."""
    is_last = and_(LAST.study_uid == Study.study_uid, LAST.version == _newest_version())
    is_scored = and_(SCORED.study_uid == Study.study_uid, SCORED.version == _newest_version(Job.scores != ""))
    return select(Study, LAST, SCORED).select_from(Study).outerjoin(LAST, is_last).outerjoin(SCORED, is_scored)


def _newest_version(*conditions: ColumnElement[bool]) -> Any:
    """Return the version of a study's last job, looked up for each study: a page needs few of them."""
    return select(func.max(Job.version)).where(Job.study_uid == Study.study_uid, *conditions).scalar_subquery()


def _find(session: Session, study_uid: str) -> StudyJobs | None:
    row = session.execute(_joined().where(Study.study_uid == study_uid)).first()
    return StudyJobs(*row) if row else None


def _order(sort: str) -> list[Any]:
    """Return the columns of an order; within it, the newest comes first."""
    if sort == "probability":
        return [SCORED.probability.is_(None), SCORED.probability.desc()]
    return [Study.patient_id] if sort == "patient" else []


def _conditions(query: WorklistQuery) -> list[ColumnElement[bool]]:
    """Return what the studies of a query fulfil."""
    read = select(StoredReading.id).where(StoredReading.study_uid == Study.study_uid)
    if query.reader:
        read = read.where(StoredReading.reader == query.reader)
    is_waiting = or_(Study.pending, func.coalesce(LAST.stage, "").in_(WORKING_STAGES))  # as `StudyJobs.is_waiting`
    only: dict[str, list[ColumnElement[bool]]] = {
        "all": [],
        "unread": [~read.exists()],
        "positive": [SCORED.suspicious.is_(True)],
        "refused": [or_(SCORED.status == "refused", and_(SCORED.id.is_(None), ~is_waiting))],
        "warned": [SCORED.status == "warned"],
    }
    conditions = list(only[query.only])
    if query.stage == "gathering":
        conditions.append(LAST.id.is_(None))
    elif query.stage:
        conditions.append(LAST.stage == query.stage)
    if query.search:
        columns = (Study.patient_id, Study.accession, Study.study_uid)
        conditions.append(or_(*(column.icontains(query.search, autoescape=True) for column in columns)))
    if query.machine:
        conditions.append((";" + SCORED.machines + ";").contains(f";{query.machine};", autoescape=True))
    return conditions


def _images_of(session: Session, study_uids: Sequence[str]) -> Sequence[Instance]:
    """Return the objects of studies."""
    query = select(Instance).where(Instance.study_uid.in_(study_uids)).order_by(Instance.sop_uid)
    return session.scalars(query).all()


def _read_studies(session: Session, keys: Sequence[str], reader: str) -> set[str]:
    """Return which of these studies a reader or, without one, anybody has read."""
    query = select(StoredReading.study_uid).where(StoredReading.study_uid.in_(keys))
    return set(session.scalars(query.where(StoredReading.reader == reader) if reader else query))


def _note(found: StudyJobs, is_explainable: bool) -> str:
    """Return what else a reader has to know of the scores."""
    last, scored = found.last, found.scored
    notes = []
    if last is None:
        state = found.study.reason or "objects may still arrive"
        notes.append(f"{found.stage}: {state}")
    elif last.stage == "dead":
        notes.append(f"this study failed in the stage {last.failed_stage}; see its status")
    elif scored is None or last.id != scored.id:
        earlier = "" if scored is None else f"; shown are the scores of version {scored.version}, without later images"
        notes.append(f"being scored{earlier}")
    if scored is not None and not is_explainable:
        notes.append("scored with another package or other options than the node has now, so no heat map is computed")
    return ". ".join(notes)
