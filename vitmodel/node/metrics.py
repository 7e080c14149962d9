"""Health and metrics of a node, computed from the database when they are asked for."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from prometheus_client.core import GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector
from sqlalchemy import func, select

from vitmodel.node.jobs import WORKING_STAGES, Queue
from vitmodel.node.models import Instance, Job, Result

STUCK_LEASES = 10
"""The queue is stuck if its oldest runnable job has not been touched for this many lease times."""


class NodeCollector(Collector):
    """The metrics of a node; no label holds an id.

    Args:
        queue: The queue.
        folder: The node's folder.
    """

    def __init__(self, queue: Queue, folder: Path) -> None:
        self.queue = queue
        self.folder = folder

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics."""
        counts = self.queue.counts()
        jobs = GaugeMetricFamily("vitmodel_node_jobs", "Number of jobs by stage.", labels=["stage"])
        for stage, count in counts.items():
            jobs.add_metric([stage], count)
        yield jobs
        yield GaugeMetricFamily(
            "vitmodel_node_waiting_studies", "Studies that are not complete.", self.queue.waiting_studies()
        )
        yield GaugeMetricFamily(
            "vitmodel_node_oldest_job_seconds", "Age of the oldest unfinished job.", self.queue.oldest() or 0
        )
        workers = GaugeMetricFamily("vitmodel_node_ready_workers", "Workers that are ready.", labels=["role"])
        for role in ("score", "send"):
            workers.add_metric([role], self.queue.ready_workers(role))
        yield workers
        free = shutil.disk_usage(self.folder).free
        yield GaugeMetricFamily("vitmodel_node_free_bytes", "Free space of the node's folder.", free)
        yield from self._from_tables()

    def _from_tables(self) -> Iterator[Metric]:
        with self.queue.database.read() as session:
            seconds = SummaryMetricFamily(
                "vitmodel_node_stage_seconds", "Duration of finished stages.", labels=["stage"]
            )
            for stage, column in (("score", Job.score_seconds), ("send", Job.send_seconds)):
                count, total = session.execute(select(func.count(column), func.sum(column))).one()
                seconds.add_metric([stage], count, total or 0)
            yield seconds
            failures = GaugeMetricFamily(
                "vitmodel_node_failing_jobs", "Jobs whose last attempt failed, by reason.", labels=["reason"]
            )
            failing = select(Job.error_code, func.count()).where(Job.error_code != "").group_by(Job.error_code)
            for reason, count in session.execute(failing):
                failures.add_metric([reason], count)
            yield failures
            objects = GaugeMetricFamily(
                "vitmodel_node_objects", "Received objects by what becomes of them.", labels=["use"]
            )
            ignored = session.scalars(select(func.count()).select_from(Instance).where(Instance.ignored != "")).one()
            total = session.scalars(select(func.count()).select_from(Instance)).one()
            objects.add_metric(["scored"], total - ignored)
            objects.add_metric(["ignored"], ignored)
            yield objects
            results = GaugeMetricFamily("vitmodel_node_results", "Results by state.", labels=["state"])
            for state, count in session.execute(select(Result.state, func.count()).group_by(Result.state)):
                results.add_metric([state], count)
            yield results


def has_ready_workers(queue: Queue) -> bool:
    """Return whether a worker has loaded the model."""
    return queue.ready_workers("score") > 0


def is_moving(queue: Queue) -> bool:
    """Return whether no runnable job has waited for a worker for too long."""
    now = queue.clock()
    untouched = now - STUCK_LEASES * queue.rules.lease_seconds
    runnable = (Job.not_before <= now, Job.lease_until <= now, Job.updated_at < untouched)
    with queue.database.read() as session:
        query = select(func.count()).select_from(Job).where(Job.stage.in_(WORKING_STAGES), *runnable)
        return session.scalars(query).one() == 0
