"""What the pages show: the worklist, sorted and paged in SQL, and one study."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import ColumnElement, and_, func, or_, select

from vitmodel.node.database import Database
from vitmodel.node.models import Instance, Job, Result, Study

PAGE = 50
"""Studies on a page."""
Sort = Literal["probability", "arrival", "patient"]
STAGES = ("all", "gathering", "score", "send", "sent", "incomplete", "kept", "unscored", "dead")


@dataclass(frozen=True, kw_only=True)
class WorklistRow:
    """A study in the worklist, with its last job."""

    study_uid: str
    patient_id: str
    study_date: str
    accession: str
    arrival: float
    state: str
    reason: str
    job_id: int | None
    version: int | None
    stage: str
    """gathering, or the stage of the last job."""
    probability: float | None
    suspicious: bool | None
    error: str


@dataclass(frozen=True)
class WorklistPage:
    """A page of the worklist."""

    rows: list[WorklistRow]
    total: int
    page: int
    pages: int


def worklist(
    database: Database, *, page: int = 1, sort: Sort = "probability", stage: str = "all", search: str = ""
) -> WorklistPage:
    """Return a page of the studies with their last jobs.

    Args:
        database: The node's database.
        page: Number of the page, from 1; a number beyond the last page gives the last one.
        sort: probability = highest first, studies without one last; arrival = newest first; patient = by PatientID.
        stage: One of `STAGES`.
        search: Beginning of a PatientID or accession number.
    """
    last = select(Job.study_uid, func.max(Job.version).label("version")).group_by(Job.study_uid).subquery()
    joined = (
        select(Study, Job)
        .outerjoin(last, last.c.study_uid == Study.study_uid)
        .outerjoin(Job, and_(Job.study_uid == Study.study_uid, Job.version == last.c.version))
    )
    conditions: list[ColumnElement[bool]] = []
    if stage == "gathering":
        conditions.append(Job.id.is_(None))
    elif stage != "all":
        conditions.append(Job.stage == stage)
    if search:
        conditions.append(
            or_(
                Study.patient_id.startswith(search, autoescape=True),
                Study.accession.startswith(search, autoescape=True),
            )
        )
    orders: dict[str, list[Any]] = {
        "probability": [Job.probability.is_(None), Job.probability.desc()],
        "arrival": [],
        "patient": [Study.patient_id],
    }
    joined = joined.where(*conditions)
    with database.read() as session:
        matching = joined.with_only_columns(func.count(), maintain_column_froms=True)
        total = session.scalars(matching).one()
        pages = max(1, -(-total // PAGE))
        page = min(max(1, page), pages)
        ordered = joined.order_by(*orders[sort], Study.last_arrival.desc(), Study.study_uid)
        found = session.execute(ordered.limit(PAGE).offset(PAGE * (page - 1))).all()
    return WorklistPage([_row(study, job) for study, job in found], total, page, pages)


def _row(study: Study, job: Job | None) -> WorklistRow:
    return WorklistRow(
        study_uid=study.study_uid,
        patient_id=study.patient_id,
        study_date=study.study_date,
        accession=study.accession,
        arrival=study.last_arrival,
        state=study.state,
        reason=study.reason,
        job_id=job.id if job else None,
        version=job.version if job else None,
        stage=job.stage if job else "gathering" if study.pending else study.state,
        probability=job.probability if job else None,
        suspicious=job.suspicious if job else None,
        error=job.error if job else "",
    )


def study_details(database: Database, study_uid: str) -> dict[str, Any] | None:
    """Return all that is known of a study: its objects, jobs, scores, results, and the patient's other studies.

    None = the study is unknown.
    """
    with database.read() as session:
        study = session.get(Study, study_uid)
        if study is None:
            return None
        instances = session.scalars(
            select(Instance).where(Instance.study_uid == study_uid).order_by(Instance.laterality, Instance.view)
        ).all()
        jobs = session.scalars(select(Job).where(Job.study_uid == study_uid).order_by(Job.version.desc())).all()
        results: dict[int, list[Result]] = {job.id: [] for job in jobs}
        for result in session.scalars(select(Result).where(Result.job_id.in_(list(results))).order_by(Result.sop_uid)):
            results[result.job_id].append(result)
        same_patient = and_(Study.patient_id == study.patient_id, Study.issuer == study.issuer)
        others = select(Study).where(same_patient, Study.study_uid != study_uid).order_by(Study.study_date.desc())
        priors = session.scalars(others).all() if study.patient_id else []
    return {
        "study_uid": study.study_uid,
        "patient_id": study.patient_id,
        "study_date": study.study_date,
        "accession": study.accession,
        "state": study.state,
        "reason": study.reason,
        "objects": [
            {
                "sop_uid": instance.sop_uid,
                "laterality": instance.laterality,
                "view": instance.view,
                "source": instance.source,
                "ignored": instance.ignored,
            }
            for instance in instances
        ],
        "jobs": [_job(job, results[job.id]) for job in jobs],
        "priors": [{"study_uid": prior.study_uid, "study_date": prior.study_date} for prior in priors],
    }


def _job(job: Job, results: list[Result]) -> dict[str, Any]:
    names = ("id", "version", "previous", "origin", "stage", "attempts", "error", "fingerprint", "software")
    facts: dict[str, Any] = {name: getattr(job, name) for name in (*names, "threshold", "probability", "suspicious")}
    facts |= json.loads(job.scores) if job.scores else {"images": [], "breasts": []}
    columns = ("sop_uid", "sop_class", "state", "status", "message")
    facts["results"] = [{name: getattr(result, name) for name in columns} for result in results]
    return facts


def find_job(database: Database, job_id: int) -> tuple[Job, Study] | None:
    """Return a job and its study; None = there is no such job."""
    with database.read() as session:
        job = session.get(Job, job_id)
        study = session.get(Study, job.study_uid) if job else None
    return (job, study) if job and study else None
