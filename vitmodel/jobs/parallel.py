"""An ordered parallel map with progress: threads, processes, or a dask cluster. Knows nothing of what it maps."""

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
"""Seconds that a cluster may take for the item that comes next."""


def _no_result(item: object, message: str) -> Any:
    raise VitmodelError(f"a worker process was lost: {message}")


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
    """Yield function(item) for each item, in order, while `jobs` workers (0 = one per core) go ahead by a bounded number of items.

    `backend` is threads, processes or dask (the cluster at `scheduler`, or a local one). Of processes, one that dies or hangs costs
    its item only: `lost` makes a result of the item and a sentence on what happened. Raises UsageError where dask is not installed
    or its scheduler does not answer.
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
    """The results in order. At most 2 `jobs` items are under way or wait to be taken: joblib's generator would hold all that are done."""
    pool = ThreadPoolExecutor(jobs)
    try:
        ahead: deque[Future[Result]] = deque()
        for item in items:
            ahead.append(pool.submit(function, item))
            if len(ahead) == 2 * jobs:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _cluster(jobs: int, scheduler: str) -> Iterator[None]:
    """joblib's dask backend on the cluster at `scheduler`, or on `jobs` local worker processes where that is empty."""
    dask = import_extra("dask", "cluster", "backend")
    distributed = import_extra("distributed", "cluster", "backend")
    with contextlib.ExitStack() as stack:
        if not scheduler:
            # distributed would leave OMP_NUM_THREADS=1 in this process's environment, and what it starts later would compute otherwise
            stack.enter_context(dask.config.set({"distributed.nanny.pre-spawn-environ": {}}))
            scheduler = stack.enter_context(
                distributed.LocalCluster(n_workers=jobs, threads_per_worker=1, dashboard_address=None)
            ).scheduler_address
        try:
            stack.enter_context(distributed.Client(scheduler, timeout=10))
        except OSError as error:
            raise UsageError(f"scheduler: no dask scheduler answers at {scheduler}: {error}") from None
        stack.enter_context(joblib.parallel_config(backend="dask"))
        try:
            yield
        except (
            multiprocessing.TimeoutError
        ) as error:  # dask has given up on the item, which joblib's dask backend does not tell
            remedy = "run the same command again or, if that ends alike, with --backend processes, which refuses the file that does it"
            raise VitmodelError(
                f"the cluster gave no result for {CLUSTER_TIMEOUT:g} s: its workers are gone, or died of one file; {remedy}"
            ) from error
