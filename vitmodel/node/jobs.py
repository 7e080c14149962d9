"""The queue of jobs: a table, leases with a heartbeat, repeated attempts and dead letters."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import delete, func, select, update
from sqlalchemy.orm import Session

from vitmodel.node.database import Database
from vitmodel.node.gathering import Decision, GatheringRules, ImageFacts, StudyFacts, decide
from vitmodel.node.inbox import open_transfers
from vitmodel.node.models import Instance, Job, Result, Study, Worker
from vitmodel.node.queueing import back_off, job_key

WORKING_STAGES = ("score", "send")
END_STAGES = ("sent", "incomplete", "kept", "unscored", "dead")
STUDIES_PER_TURN = 200
POLL_SECONDS = 0.5
"""Pause of a worker when there is no job."""


@dataclass(frozen=True, kw_only=True)
class QueueRules:
    """How long a job is leased, and when it is tried again."""

    lease_seconds: float = 120.0
    max_failures: int = 5
    """Attempts at a stage after which a job is dead."""
    first_wait: float = 5.0
    """Longest wait after the first failed attempt in seconds; it doubles with each."""
    longest_wait: float = 600.0


@dataclass
class Queue:
    """The operations on the table of jobs. Each is one transaction.

    Args:
        database: The node's database.
        rules: Leases and repetitions.
        clock: Function that returns the time in seconds; the clocks of machines that share a database must agree.
    """

    database: Database
    rules: QueueRules = field(default_factory=QueueRules)
    clock: Callable[[], float] = time.time
    rng: random.Random = field(default_factory=random.Random)

    def gather(self, rules: GatheringRules, fingerprint: str, *, force: bool = False) -> list[Decision]:
        """Decide on every study with new objects and add the jobs; return the decisions other than wait.

        Args:
            rules: When a study is complete.
            fingerprint: Fingerprint of the package with which the studies are scored.
            force: Take every study as complete now.
        """
        decisions = []
        with self.database.read() as session:
            query = select(Study.study_uid).where(Study.pending).order_by(Study.last_arrival).limit(STUDIES_PER_TURN)
            pending = list(session.scalars(query))
        for study_uid in pending:
            with self.database.write() as session:
                decision = self._decide_on(session, study_uid, rules, fingerprint, force)
            if decision is not None and decision.verdict != "wait":
                decisions.append(decision)
        return decisions

    def _decide_on(
        self, session: Session, study_uid: str, rules: GatheringRules, fingerprint: str, force: bool
    ) -> Decision | None:
        # A receiver that adds an object to the study waits for this row, so none is missed.
        query = select(Study).where(Study.study_uid == study_uid).with_for_update(skip_locked=True)
        study = session.scalars(query).one_or_none()
        if study is None or not study.pending:
            return None
        now = self.clock()
        last = session.scalars(select(Job).where(Job.study_uid == study_uid).order_by(Job.version.desc())).first()
        same_package = last is not None and last.fingerprint == fingerprint
        instances = session.scalars(select(Instance).where(Instance.study_uid == study_uid)).all()
        facts = StudyFacts(
            images=[
                ImageFacts(
                    sop_uid=instance.sop_uid,
                    side=instance.laterality,
                    view=instance.view,
                    patient_id=instance.patient_id,
                    ignored=instance.ignored,
                )
                for instance in instances
            ],
            first_arrival=study.first_arrival,
            last_arrival=float("-inf") if force else study.last_arrival,
            open_transfers=0 if force else open_transfers(session, [study_uid], now).get(study_uid, 0),
            scored=frozenset(last.images.split()) if last is not None and same_package else frozenset(),
        )
        decision = decide(facts, now, rules)
        if decision.verdict == "wait":
            return decision
        study.pending = False
        if decision.verdict != "ignored" or last is None:  # our results that come back leave the study as it was
            study.state, study.reason = decision.verdict, decision.reason
        if decision.images:
            key = job_key(decision.images, fingerprint)
            if session.scalars(select(Job.id).where(Job.key == key)).first() is None:
                study.version += 1
                session.add(
                    Job(
                        key=key,
                        study_uid=study_uid,
                        version=study.version,
                        previous=last.id if last is not None else None,
                        origin=decision.verdict,
                        images=" ".join(decision.images),
                        fingerprint=fingerprint,
                        created_at=now,
                        updated_at=now,
                    )
                )
        return decision

    def claim(self, stage: str, owner: str) -> Job | None:
        """Lease the most urgent job of a stage to `owner`; None = there is none.

        A job whose owner has died is leased again once its lease has run out. Each claim counts as a failed attempt
        until it is finished, so that a study that kills its worker is dead after some attempts, too.
        """
        while True:
            now = self.clock()
            with self.database.write() as session:
                job = session.scalars(
                    select(Job)
                    .where(Job.stage == stage, Job.not_before <= now, Job.lease_until <= now)
                    .order_by(Job.priority.desc(), Job.not_before, Job.id)
                    .limit(1)
                    .with_for_update(skip_locked=True)
                ).one_or_none()
                if job is None:
                    return None
                job.updated_at = now
                if job.failures >= self.rules.max_failures:
                    self._bury(job, job.error or "the process that worked on it ended each time", "worker_lost")
                    continue
                job.lease_owner, job.lease_until = owner, now + self.rules.lease_seconds
                job.claimed_at = now
                job.attempts += 1
                job.failures += 1
                session.flush()
                session.expunge(job)
                return job

    def heartbeat(self, job_id: int, owner: str) -> bool:
        """Extend a lease; return whether `owner` still has it."""
        with self.database.write() as session:
            return self._update(session, job_id, owner, lease_until=self.clock() + self.rules.lease_seconds)

    def finish(self, job_id: int, owner: str, stage: str, results: Sequence[Result] = (), **values: Any) -> bool:
        """Move a job to its next stage, add its results and end the lease, in one transaction.

        Returns:
            Whether `owner` still had the lease; if not, nothing is changed.
        """
        fresh = {"attempts": 0, "failures": 0, "not_before": 0.0, "lease_owner": "", "lease_until": 0.0}
        fresh |= {"error": "", "error_code": ""}
        with self.database.write() as session:
            job = session.get(Job, job_id)
            if job is not None and job.stage in WORKING_STAGES:
                fresh[f"{job.stage}_seconds"] = self.clock() - job.claimed_at
            if not self._update(session, job_id, owner, **(fresh | values), stage=stage):
                return False
            for result in results:
                session.merge(result)
        return True

    def bury(self, job_id: int, owner: str, error: str, code: str) -> bool:
        """Make a job a dead letter at once, because trying again is of no use."""
        with self.database.write() as session:
            job = session.get(Job, job_id, with_for_update=True)
            if job is None or job.lease_owner != owner:
                return False
            job.updated_at = self.clock()
            self._bury(job, error, code)
        return True

    def fail(self, job_id: int, owner: str, error: str, code: str, *, counts: bool = True) -> bool:
        """End a lease after a failed attempt; the job is tried again later, or dead after too many attempts.

        Args:
            job_id: The job.
            owner: Who holds the lease.
            error: What happened; it must not hold patient data.
            code: Short name of the error, for the metrics.
            counts: Whether the attempt counts towards the limit; a destination that is down is no fault of the job.
        """
        with self.database.write() as session:
            job = session.get(Job, job_id, with_for_update=True)
            if job is None or job.lease_owner != owner:
                return False
            now = self.clock()
            job.updated_at, job.error, job.error_code = now, error[:2000], code
            if not counts:
                job.failures -= 1
            if job.failures >= self.rules.max_failures:
                self._bury(job, job.error, code)
                return True
            wait = back_off(job.attempts, self.rules.first_wait, self.rules.longest_wait, self.rng)
            job.not_before, job.lease_owner, job.lease_until = now + wait, "", 0.0
        return True

    def release(self, owner: str) -> None:
        """End all leases of an owner that stops; the interrupted attempts do not count."""
        with self.database.write() as session:
            session.execute(
                update(Job)
                .where(Job.lease_owner == owner, Job.stage.in_(WORKING_STAGES))
                .values(lease_owner="", lease_until=0.0, failures=Job.failures - 1)
            )

    def retry(self, job_ids: Sequence[int] = ()) -> int:
        """Return dead jobs to the stage at which they failed, and let waiting ones start at once.

        Args:
            job_ids: The jobs; empty = all dead ones.

        Returns:
            The number of jobs.
        """
        with self.database.write() as session:
            query = select(Job).where(Job.stage.in_(("dead", "incomplete", *WORKING_STAGES)))
            query = query.where(Job.id.in_(job_ids)) if job_ids else query.where(Job.stage == "dead")
            jobs = session.scalars(query.with_for_update()).all()
            for job in jobs:
                if job.stage in ("dead", "incomplete"):
                    job.stage, job.failed_stage = job.failed_stage or "send", ""
                    job.lease_owner, job.lease_until = "", 0.0
                job.failures = job.attempts = 0
                job.not_before = 0.0
                job.updated_at = self.clock()
                refused = (Result.job_id == job.id, Result.state.in_(("refused", "unsupported")))
                session.execute(update(Result).where(*refused).values(state="pending"))
        return len(jobs)

    def counts(self) -> dict[str, int]:
        """Return the number of jobs by stage."""
        with self.database.read() as session:
            rows = session.execute(select(Job.stage, func.count()).group_by(Job.stage)).all()
        return dict.fromkeys((*WORKING_STAGES, *END_STAGES), 0) | {str(stage): count for stage, count in rows}

    def waiting_studies(self) -> int:
        """Return the number of studies that no decision has been made on."""
        with self.database.read() as session:
            return session.scalars(select(func.count()).select_from(Study).where(Study.pending)).one()

    def oldest(self) -> float | None:
        """Return for how many seconds the oldest unfinished job has existed; None = there is none."""
        with self.database.read() as session:
            created = session.scalars(select(func.min(Job.created_at)).where(Job.stage.in_(WORKING_STAGES))).one()
        return None if created is None else max(0.0, self.clock() - created)

    def sign_on(self, name: str, role: str, ready: bool) -> None:
        """Note that a worker is alive, and whether it can work."""
        with self.database.write() as session:
            session.merge(Worker(name=name, role=role, ready=ready, seen_at=self.clock()))

    def sign_off(self, name: str) -> None:
        """End the leases of a worker that stops."""
        self.release(name)
        with self.database.write() as session:
            session.execute(delete(Worker).where(Worker.name == name))

    def ready_workers(self, role: str) -> int:
        """Return the number of workers of a role that are alive and can work."""
        alive = self.clock() - self.rules.lease_seconds
        query = (
            select(func.count()).select_from(Worker).where(Worker.role == role, Worker.ready, Worker.seen_at > alive)
        )
        with self.database.read() as session:
            return session.scalars(query).one()

    def _update(self, session: Session, job_id: int, owner: str, **values: Any) -> bool:
        done = session.execute(
            update(Job)
            .where(Job.id == job_id, Job.lease_owner == owner, Job.stage.in_(WORKING_STAGES))
            .values(updated_at=self.clock(), **values)
        )
        return bool(done.rowcount)  # type: ignore[attr-defined]

    @staticmethod
    def _bury(job: Job, error: str, code: str) -> None:
        job.failed_stage, job.stage = job.stage, "dead"
        job.lease_owner, job.lease_until = "", 0.0
        job.error, job.error_code = error, code
