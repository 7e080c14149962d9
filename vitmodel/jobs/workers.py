"""Worker processes that may die or hang: it costs the item that they were at, and nothing else. Knows nothing of what they work on.

The pools of the standard library and of joblib break when a worker dies, and do not tell which item killed it. Here each thread
that maps has a process of its own, so the two need no pool: the death or the silence of a process is its thread's item's.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from vitmodel.errors import VitmodelError, WorkerLostError

Item = TypeVar("Item")
Result = TypeVar("Result")

TIME_LIMIT = 300.0
"""Seconds for one item: a hundred million pixels take the slowest codec 20 s of an idle core."""


@contextlib.contextmanager
def process_per_thread(
    function: Callable[[Item], Result], on_lost: Callable[[Item, str], Result], time_limit: float = TIME_LIMIT
) -> Iterator[Callable[[Item], Result]]:
    """`function` run in processes, one for each thread that calls it; what it raises is raised there.

    Where the process dies, or needs more than `time_limit` seconds, the result is lost(item, what happened), and the next item gets a
    new process. Raises VitmodelError where processes cannot even start.
    """
    here, lock = threading.local(), threading.Lock()
    workers: set[_Worker] | None = set()

    def call(item: Item) -> Result:
        if not hasattr(here, "worker"):
            with lock:
                if workers is None:
                    raise RuntimeError("the run has ended")
                here.worker = _Worker(function)
                workers.add(here.worker)
            here.worker.wait_until_ready()
        try:
            return here.worker.call(item, time_limit)
        except WorkerLostError as loss:
            with lock:
                if workers is None:  # the end of the run killed it, not the item
                    raise
                workers.discard(here.worker)
            del here.worker
            return on_lost(item, str(loss))

    try:
        yield call
    finally:
        with lock:
            ending, workers = workers or set(), None
        for worker in ending:
            worker.end()


class _Worker:
    """One process and the pipe to it."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would copy locks that other threads hold
        self.pipe, far_end = context.Pipe()
        self.process = context.Process(target=_serve, args=(far_end, function), daemon=True)
        self.process.start()
        far_end.close()

    def wait_until_ready(self) -> None:
        """Raises VitmodelError where the process dies before it has seen an item."""
        try:
            self.pipe.recv()
        except (EOFError, ConnectionResetError):
            raise VitmodelError(
                "a worker process cannot start; a script that is run needs `if __name__ == '__main__':`"
            ) from None

    def call(self, item: Any, time_limit: float) -> Any:
        """The result for one item. Raises what the function raises, and WorkerLostError."""
        try:
            self.pipe.send(item)
            if not any(
                self.pipe.poll(1) for _ in range(math.ceil(time_limit))
            ):  # by the second: a run that was stopped for an hour
                self.end()  # must not take its workers, which were stopped as well, for hung
                raise WorkerLostError(f"it took more than {time_limit:g} s and was ended")
            error, result = self.pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self.process.join()
            code = self.process.exitcode or 0
            raise WorkerLostError(
                f"its process died of {signal.Signals(-code).name if code < 0 else f'exit {code}'}"
            ) from None
        if error is not None:
            raise error
        return result

    def end(self) -> None:
        """Kill the process, whatever it is at; a thread that waits for it sees the end of the pipe."""
        self.process.kill()
        self.process.join()


def _serve(pipe: Connection, function: Callable[[Any], Any]) -> None:
    """The worker's life: an item in, its result or exception out, until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    threading.Thread(target=_die_with_parent, daemon=True).start()
    with contextlib.suppress(EOFError, OSError):  # the parent is gone
        pipe.send("ready")
        while True:
            item = pipe.recv()
            answer: tuple[Exception | None, Any]
            try:
                answer = None, function(item)
            except Exception as error:  # noqa: BLE001 - it is raised anew in the parent
                answer = error, None
            pipe.send(answer)


def _die_with_parent() -> None:
    """A killed run leaves nobody behind who would write into a folder that another run holds by then."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
