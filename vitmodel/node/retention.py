"""Delete received objects that are no longer needed."""

from __future__ import annotations

import shutil

from sqlalchemy import delete, select

from vitmodel.node.database import Database
from vitmodel.node.inbox import Inbox
from vitmodel.node.jobs import END_STAGES
from vitmodel.node.models import Instance, Job, Study


def delete_old_objects(database: Database, inbox: Inbox, before: float) -> int:
    """Delete the received objects of studies that were finished before a time; return the number of studies.

    The rows of the studies, jobs and results are kept.
    """
    with database.read() as session:
        old = [
            study_uid
            for study_uid in session.scalars(select(Study.study_uid).where(~Study.pending, Study.last_arrival < before))
            if all(
                job.stage in END_STAGES and job.stage != "dead" and job.updated_at < before
                for job in session.scalars(select(Job).where(Job.study_uid == study_uid))
            )
        ]
    deleted = 0
    for study_uid in old:
        folder = inbox.folder / "inbox" / study_uid
        if folder.is_dir():
            shutil.rmtree(folder)
            deleted += 1
        with database.write() as session:
            session.execute(delete(Instance).where(Instance.study_uid == study_uid))
    return deleted
