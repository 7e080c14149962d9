"""What the page of a study shows: its objects, jobs, scores and results."""

from __future__ import annotations

import json
from typing import Any

from sqlalchemy import and_, select

from vitmodel.node.database import Database
from vitmodel.node.models import Instance, Job, Result, Study


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
