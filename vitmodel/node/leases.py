"""Keep the lease of a job while it is worked on."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from vitmodel.node.jobs import Queue
from vitmodel.node.models import Job


@contextlib.contextmanager
def kept_lease(queue: Queue, job: Job, owner: str) -> Iterator[None]:
    """Extend the lease of a job until the end of the block."""
    done = threading.Event()

    def beat() -> None:
        while not done.wait(queue.rules.lease_seconds / 3):
            with contextlib.suppress(Exception):  # the database may be away for a moment; then the lease ends
                queue.heartbeat(job.id, owner)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
