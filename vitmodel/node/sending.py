"""Send the results of a job, and count them as sent only when the PACS has confirmed that it has them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from functools import cached_property

from pydicom import Dataset
from sqlalchemy import select, update

from vitmodel.config import NodeConfig
from vitmodel.errors import UnreachableError
from vitmodel.node.database import Database
from vitmodel.node.dicomweb import WebQueries
from vitmodel.node.identity import apply_identity
from vitmodel.node.jobs import POLL_SECONDS, Queue, kept_lease
from vitmodel.node.models import Job, Result
from vitmodel.node.pacs import (
    CommitmentRequest,
    Destination,
    SendStatus,
    make_destination,
    new_transaction,
    read_result,
)

logger = logging.getLogger(__name__)


def record_report(database: Database, report: Dataset, now: float) -> int:
    """Record the reply to a storage commitment request; return the number of results that it concerns.

    Results that the PACS did not commit become pending: they are sent again. A reply to a request that was repeated
    since, or of somebody else, concerns no result.

    Args:
        database: The node's database.
        report: The event information (PS3.4, table J.3-2).
        now: The time in seconds.
    """
    transaction = str(report.get("TransactionUID", ""))
    if not transaction:
        return 0
    concerned = 0
    committed = {str(item.ReferencedSOPInstanceUID) for item in report.get("ReferencedSOPSequence") or []}
    failed = {
        str(item.ReferencedSOPInstanceUID): int(item.get("FailureReason", 0))
        for item in report.get("FailedSOPSequence") or []
    }
    with database.write() as session:
        rows = session.scalars(
            select(Result).where(Result.transaction == transaction, Result.state == "stored").with_for_update()
        )
        for row in rows:
            if row.sop_uid in failed:
                row.state, row.transaction = "pending", ""
                row.message = f"the PACS did not commit it (0x{failed[row.sop_uid]:04X})"
            elif row.sop_uid in committed:
                row.state, row.message = "confirmed", ""
            else:
                continue
            row.updated_at = now
            concerned += 1
        session.flush()
        jobs = select(Result.job_id).where(Result.sop_uid.in_([*committed, *failed]))
        # the job need not wait any longer
        session.execute(update(Job).where(Job.id.in_(jobs), Job.stage == "send").values(not_before=0.0))
    return concerned


class Sender:
    """A worker that sends.

    Args:
        config: The node's configuration; it has a destination.
        queue: The queue.
        owner: Name of this worker.
    """

    def __init__(self, config: NodeConfig, queue: Queue, owner: str) -> None:
        self.config = config
        self.queue = queue
        self.owner = owner
        self.destination: Destination = make_destination(config)

    @cached_property
    def queries(self) -> WebQueries:
        """The PACS's queries by DICOMweb."""
        return WebQueries(self.config.web_root)

    def work(self, stop: threading.Event) -> None:
        """Send the results of jobs until `stop` is set."""
        while not stop.is_set():
            self.queue.sign_on(self.owner, "send", True)
            if not self.send_next():
                stop.wait(POLL_SECONDS)

    def send_next(self) -> bool:
        """Send the results of the next job; return whether there was one."""
        job = self.queue.claim("send", self.owner)
        if job is None:
            return False
        with kept_lease(self.queue, job, self.owner):
            try:
                self._deliver(job)
            except UnreachableError as error:
                self.queue.fail(job.id, self.owner, str(error), "unreachable", counts=False)
            except Exception as error:  # noqa: BLE001 (the message could hold values of a header)
                logger.error("job %d could not be sent: %s", job.id, type(error).__name__)
                self.queue.fail(job.id, self.owner, type(error).__name__, type(error).__name__)
        return True

    def _deliver(self, job: Job) -> None:
        """Send what is pending, confirm what is stored, and move the job on."""
        pending = self._rows(job, "pending")
        if pending:
            self._send(job, pending)
        stored = self._rows(job, "stored")
        if stored:
            self._confirm(job, stored)
        self._conclude(job)

    def _rows(self, job: Job, *states: str) -> list[Result]:
        with self.queue.database.read() as session:
            query = select(Result).where(Result.job_id == job.id, Result.state.in_(states)).order_by(Result.sop_uid)
            return list(session.scalars(query))

    def _send(self, job: Job, rows: Sequence[Result]) -> None:
        identity = None
        if self.config.identity == "pacs":
            asked = self.queries if self.config.web_root else self.destination
            identity = asked.identity(job.study_uid)
        results = []
        for row in rows:
            result = read_result(self.config.folder / row.path)
            if identity:
                apply_identity(result, identity)
            results.append(result)

        def on_status(sop_uid: str, status: SendStatus) -> None:
            self._record(job, sop_uid, state=status.state, status=status.code, message=status.message, transaction="")

        self.destination.send(results, on_status)

    def _confirm(self, job: Job, rows: Sequence[Result]) -> None:
        if self.config.confirmation == "qido":
            for row in rows:
                if self.queries.stored(job.study_uid, row.sop_uid):
                    self._record(job, row.sop_uid, state="confirmed", message="")
                else:
                    self._record(job, row.sop_uid, state="pending", message="the PACS does not list it")
            return
        now = self.queue.clock()
        due = [row for row in rows if now - row.requested_at >= self.config.commitment_seconds or not row.transaction]
        if not due:
            return
        transaction = new_transaction()
        for row in due:  # before the request: the reply may come at once, by another association
            self._record(job, row.sop_uid, transaction=transaction, requested_at=now)
        request = CommitmentRequest(
            references=[(row.sop_class, row.sop_uid) for row in due],
            transaction=transaction,
            on_report=lambda report: record_report(self.queue.database, report, self.queue.clock()),
            is_answered=lambda: not self._rows(job, "stored"),
        )
        try:
            self.destination.request_commitment(request)
        except UnreachableError:
            for row in due:
                self._record(job, row.sop_uid, transaction="", requested_at=0.0)
            raise

    def _conclude(self, job: Job) -> None:
        """Move a job on according to the states of its results."""
        states = [row.state for row in self._rows(job, "pending", "stored", "confirmed", "refused", "unsupported")]
        count = {state: states.count(state) for state in set(states)}
        if count.get("pending"):
            message = f"the destination did not take {count['pending']} of {len(states)} results"
            self.queue.fail(job.id, self.owner, message, "not_taken")
        elif count.get("stored"):
            message = f"{count['stored']} of {len(states)} results are not confirmed yet"
            self.queue.fail(job.id, self.owner, message, "unconfirmed", counts=False)
        elif count.get("refused") or not count.get("confirmed"):
            message = f"the destination refused {len(states) - count.get('confirmed', 0)} of {len(states)} results"
            self.queue.bury(job.id, self.owner, message, "refused")
        elif count.get("unsupported"):
            message = f"the destination takes no objects of the kind of {count['unsupported']} of {len(states)} results"
            self.queue.finish(job.id, self.owner, "incomplete", error=message, error_code="unsupported")
        else:
            self.queue.finish(job.id, self.owner, "sent")

    def _record(self, job: Job, sop_uid: str, **values: object) -> None:
        """Store what became of a result, at once: what was sent must be known after a crash."""
        with self.queue.database.write() as session:
            session.execute(
                update(Result)
                .where(Result.job_id == job.id, Result.sop_uid == sop_uid)
                .values(updated_at=self.queue.clock(), **values)
            )
