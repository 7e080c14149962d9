"""The command `node`: run a DICOM node, look at its queue, and act on it."""

from __future__ import annotations

import signal
import sys

from sqlalchemy import select

from vitmodel.config import NodeConfig
from vitmodel.errors import UsageError
from vitmodel.utils import NOT_A_MEDICAL_DEVICE, import_extra

MAX_DEAD_SHOWN = 20
"""Number of dead jobs that `status` names."""


def node(config: NodeConfig) -> int:
    """Do what `config.action` says; return 1 if `status` or `drain` finds something that needs attention.

    Raises:
        UsageError: The extra `node` is not installed, or an option is wrong.
        VitmodelError: The database, the package or a port cannot be used.
    """
    for module in ("sqlalchemy", "pynetdicom", "httpx", "highdicom", "prometheus_client"):
        import_extra(module, "node", "node")
    actions = {"run": run, "status": status, "retry": retry, "drain": drain, "demo": demo}
    return actions[config.action](config)


def run(config: NodeConfig) -> int:
    """Run the node until it is interrupted or gets SIGTERM."""
    from vitmodel.node.runner import Node

    running = Node(config)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: running.stop.set())
    with running.running():
        if running.dicom_port:
            print(f"receiving as {config.ae_title} on {config.dicom_host}:{running.dicom_port}", flush=True)
        if running.web_port:
            print(f"worklist: http://localhost:{running.web_port}/worklist", flush=True)
        print(f"results go to {config.destination or config.folder / 'jobs'}\n{NOT_A_MEDICAL_DEVICE}", flush=True)
        running.stop.wait()
        print("stopping; current jobs are finished first", flush=True)
    return 0


def status(config: NodeConfig) -> int:
    """Print the queue; return 1 if there are dead jobs."""
    from vitmodel.node.models import Job
    from vitmodel.node.setup import make_queue, open_database

    database = open_database(config)
    queue = make_queue(config, database)
    print(f"studies that are not complete yet: {queue.waiting_studies()}")
    counts = queue.counts()
    print("jobs by stage: " + ", ".join(f"{stage} {count}" for stage, count in counts.items()))
    oldest = queue.oldest()
    if oldest is not None:
        print(f"the oldest unfinished job is {oldest:.0f} s old")
    print(f"workers that are ready: score {queue.ready_workers('score')}, send {queue.ready_workers('send')}")
    with database.read() as session:
        query = select(Job).where(Job.stage.in_(("dead", "incomplete"))).order_by(Job.id.desc()).limit(MAX_DEAD_SHOWN)
        for job in session.scalars(query):
            print(f"job {job.id}, {job.stage} in the stage {job.failed_stage or 'send'}: {job.error}")
    database.close()
    return 1 if counts["dead"] else 0


def retry(config: NodeConfig) -> int:
    """Try dead jobs again."""
    from vitmodel.node.setup import make_queue, open_database

    database = open_database(config)
    count = make_queue(config, database).retry([] if config.job is None else [config.job])
    database.close()
    if config.job is not None and not count:
        raise UsageError(f"job: {config.job} does not exist or is finished; `vitmodel node status` lists the dead ones")
    print(f"jobs to be tried again: {count}")
    return 0


def drain(config: NodeConfig) -> int:
    """Score and send what has arrived; return 1 if jobs are left."""
    from vitmodel.node.runner import Node
    from vitmodel.node.runner import drain as drain_node

    running = Node(config)
    running.inbox.adopt()
    is_empty = drain_node(running)
    counts = running.queue.counts()
    running.database.close()
    print("jobs by stage: " + ", ".join(f"{stage} {count}" for stage, count in counts.items()))
    if not is_empty:
        print("jobs are left, which must wait; `vitmodel node run` goes on with them", file=sys.stderr)
    print(NOT_A_MEDICAL_DEVICE)
    return 0 if is_empty and not counts["dead"] else 1


def demo(config: NodeConfig) -> int:
    """Run a node and an Orthanc with synthetic studies."""
    from vitmodel.node.demo import run_demo

    return run_demo(config)
