"""Map a function over items in parallel, in order and with progress: threads, processes or a dask cluster."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import joblib

from vitmodel.errors import UsageError, VitmodelError
from vitmodel.jobs.workers import TIME_LIMIT, process_per_thread
from vitmodel.utils import import_extra, progress

Item = TypeVar("Item")
Result = TypeVar("Result")

CLUSTER_TIMEOUT = 2 * TIME_LIMIT
"""Seconds after which a cluster that has not returned the next item is given up."""


def _no_result(item: object, message: str) -> Any:
    """Raise VitmodelError for an item whose worker process was lost."""
    raise VitmodelError(f"an item could not be processed: {message}; run the same command again")


def parallel_map(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    what: str,
    jobs: int = 0,
    backend: str = "threads",
    scheduler: str = "",
    unit: str = "image",
    on_lost: Callable[[Item, str], Result] = _no_result,
) -> Iterator[Result]:
    """Yield the result of `function` for each item in order, while workers run ahead by a bounded number of items.

    Args:
        function: The function. It must be picklable for processes and dask.
        items: The items.
        what: Title of the progress bar.
        jobs: Number of workers; 0 = one per core.
        backend: threads, processes or dask.
        scheduler: Address of the dask scheduler; '' starts a local cluster.
        unit: Unit of the items in the progress bar.
        on_lost: Function of an item and a message that returns the result of an item whose process died or hung. Only
            the backend `processes` calls it; such a process costs this item only.

    Yields:
        The results in the order of the items.

    Raises:
        UsageError: The backend does not exist, dask is not installed, or the scheduler does not answer.
        VitmodelError: The cluster gives no result, or a process was lost and `on_lost` is not given.
    """
    if backend not in ("threads", "processes", "dask"):
        raise UsageError(f"backend: {backend!r} is not a choice; choose from threads, processes, dask")
    jobs = jobs or os.cpu_count() or 1
    if not items:
        return
    with contextlib.ExitStack() as stack:
        results: Iterable[Result]
        if backend == "dask":
            stack.enter_context(_cluster(jobs, scheduler))
            tasks = (joblib.delayed(function)(item) for item in items)
            options: dict[str, Any] = {
                "return_as": "generator",
                "pre_dispatch": "2*n_jobs",
                "batch_size": 1,
                "timeout": CLUSTER_TIMEOUT,
            }
            results = joblib.Parallel(n_jobs=jobs, **options)(tasks)
        else:
            if backend == "processes":
                function = stack.enter_context(process_per_thread(function, on_lost))
            results = stack.enter_context(contextlib.closing(_in_threads(function, items, jobs)))
        yield from progress(results, what, total=len(items), unit=unit)


def _in_threads(function: Callable[[Item], Result], items: Iterable[Item], jobs: int) -> Generator[Result, None, None]:
    """Yield the results in order.

    At most 2 x `jobs` items are in progress or wait for the reader. joblib's generator would keep all finished results.
    """
    pool = ThreadPoolExecutor(jobs)
    try:
        pending: deque[Future[Result]] = deque()
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) == 2 * jobs:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _cluster(jobs: int, scheduler: str) -> Iterator[None]:
    """Select joblib's dask backend: the cluster at `scheduler`, or `jobs` local worker processes if it is empty."""
    dask = import_extra("dask", "cluster", "backend")
    distributed = import_extra("distributed", "cluster", "backend")
    with contextlib.ExitStack() as stack:
        if not scheduler:
            # Without this, distributed would leave OMP_NUM_THREADS=1 in the environment of this process, and processes
            # that it starts later would compute with other numbers of threads.
            stack.enter_context(dask.config.set({"distributed.nanny.pre-spawn-environ": {}}))
            scheduler = stack.enter_context(
                distributed.LocalCluster(n_workers=jobs, threads_per_worker=1, dashboard_address=None)
            ).scheduler_address
        try:
            stack.enter_context(distributed.Client(scheduler, timeout=10))
        except OSError as error:
            raise UsageError(
                f"scheduler: no dask scheduler answers at {scheduler} ({error}); start it or correct its address"
            ) from None
        stack.enter_context(joblib.parallel_config(backend="dask"))
        try:
            yield
        # dask has given up on the item, but joblib's dask backend does not report it.
        except multiprocessing.TimeoutError as error:
            raise VitmodelError(
                f"the cluster gave no result for {CLUSTER_TIMEOUT:g} s: its workers are gone, or one file kills them; "
                "run the same command again or, if that fails too, with --backend processes, which refuses such a file"
            ) from error
