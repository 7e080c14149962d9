"""Run a function in worker processes that may die or hang; only the current item of such a process is lost.

The pools of the standard library and of joblib break when a worker dies, and do not report which item killed it. Here
each calling thread has a process of its own instead of a pool, so a process that dies or hangs belongs to the item of
its thread.
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
"""Most seconds for one item; the slowest codec needs 20 s on an idle core for a hundred million pixels."""


@contextlib.contextmanager
def process_per_thread(
    function: Callable[[Item], Result], on_lost: Callable[[Item, str], Result], time_limit: float = TIME_LIMIT
) -> Iterator[Callable[[Item], Result]]:
    """Provide `function` as a callable that runs in a separate process for each thread that calls it.

    Exceptions of `function` are raised in the calling thread. If a process dies or exceeds the time limit, the next
    item of its thread gets a new process.

    Args:
        function: The function; it must be picklable.
        on_lost: Function of an item and a message that returns the result of an item whose process was lost.
        time_limit: Seconds allowed for one item.

    Raises:
        VitmodelError: A process cannot start.
    """
    local = threading.local()
    lock = threading.Lock()
    workers: set[_Worker] | None = set()

    def call(item: Item) -> Result:
        if not hasattr(local, "worker"):
            with lock:
                if workers is None:
                    raise RuntimeError("the run has ended; call the function inside the `with` block")
                local.worker = _Worker(function)
                workers.add(local.worker)
            local.worker.wait_until_ready()
        try:
            return local.worker.call(item, time_limit)
        except WorkerLostError as error:
            with lock:
                if workers is None:  # the end of the run killed the process, not the item
                    raise
                workers.discard(local.worker)
            del local.worker
            return on_lost(item, str(error))

    try:
        yield call
    finally:
        with lock:
            running = workers or set()
            workers = None
        for worker in running:
            worker.end()


class _Worker:
    """A process and the pipe to it."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would copy locks that other threads hold
        self.pipe, child_end = context.Pipe()
        self.process = context.Process(target=_serve, args=(child_end, function), daemon=True)
        self.process.start()
        child_end.close()

    def wait_until_ready(self) -> None:
        """Wait until the process can take items; raise VitmodelError if it dies before."""
        try:
            self.pipe.recv()
        except (EOFError, ConnectionResetError):
            raise VitmodelError(
                "a worker process cannot start; protect the code of your script with `if __name__ == '__main__':`"
            ) from None

    def call(self, item: Any, time_limit: float) -> Any:
        """Return the result for one item.

        Raises:
            WorkerLostError: The process died or exceeded the time limit.
            Exception: Whatever the function raises.
        """
        try:
            self.pipe.send(item)
            # The time is counted in steps of one second: a run that was suspended for an hour, and its workers with it,
            # must not take them for hung.
            if not any(self.pipe.poll(1) for _ in range(math.ceil(time_limit))):
                self.end()
                raise WorkerLostError(f"processing took more than {time_limit:g} s and was stopped")
            error, result = self.pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self.process.join()
            status = self.process.exitcode or 0
            cause = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
            raise WorkerLostError(f"the worker process died with {cause}") from None
        if error is not None:
            raise error
        return result

    def end(self) -> None:
        """Kill the process at once; a thread that waits for it sees the end of the pipe."""
        self.process.kill()
        self.process.join()


def _serve(pipe: Connection, function: Callable[[Any], Any]) -> None:
    """Receive items and send back their results or exceptions until the parent process is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    threading.Thread(target=die_with_parent, daemon=True).start()
    with contextlib.suppress(EOFError, OSError):  # the parent is gone
        pipe.send("ready")
        while True:
            item = pipe.recv()
            answer: tuple[Exception | None, Any]
            try:
                answer = None, function(item)
            except Exception as error:  # noqa: BLE001 (the parent raises it again)
                answer = error, None
            pipe.send(answer)


def die_with_parent() -> None:
    """Exit when the parent process ends.

    Otherwise a worker of a killed run could write into a folder that another run has locked in the meantime.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None, "this function must run in a worker process"
    wait([parent.sentinel])
    os._exit(1)
