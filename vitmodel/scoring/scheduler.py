"""Score the images of several requests at once: in turns, so that a large one does not hold up a small one.

Threads load images, one unit (an image or, with exam fusion, an exam) of each waiting request after the other. The
network's thread packs loaded units of several requests into one forward pass.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np

from vitmodel.data.cropping import ProvenanceRecord
from vitmodel.errors import VitmodelError
from vitmodel.scoring.predictor import Predictor
from vitmodel.scoring.stream import GROUP_IMAGES, LoadedImage, ScoringRows, Unit
from vitmodel.utils import describe_failure, release_freed_memory

logger = logging.getLogger(__name__)

PASS_SECONDS = 0.15
"""Longest forward pass aimed at: a new request waits for the end of the current one."""
FIRST_TOKENS = 2048
"""Number of tokens of the first passes."""
GATHER_SECONDS = 0.15
"""Longest time that a loaded image waits for others which are being read, so that they share its forward pass."""
LOADED_IMAGES = 8 * GROUP_IMAGES
"""Largest number of images that are loaded and not scored, but for those of a large exam."""
JOB_IMAGES = 2 * GROUP_IMAGES
"""The same for a single request, so that there is room for others."""

Results = tuple[list[ProvenanceRecord], np.ndarray]
"""Verdicts on N rows and their logits `(N, L + A, M)`."""


@dataclass(eq=False)
class Job:
    """The images of one request."""

    rows: ScoringRows
    future: Future[Results] = field(default_factory=Future)
    """Its result; cancelling it stops the work on the job."""
    units: deque[list[int]] = field(default_factory=deque)
    """Positions of the images of each unit that is not started."""
    ready: deque[Unit] = field(default_factory=deque)
    """Units that are loaded and not scored."""
    scored: dict[int, tuple[ProvenanceRecord, np.ndarray]] = field(default_factory=dict)
    """Verdict and logits of the images that are done; their crops are not kept."""
    held: int = 0
    """Number of images that are being loaded, or loaded and not scored."""

    @property
    def is_over(self) -> bool:
        return self.future.done()


@dataclass(eq=False)
class _Loading:
    """A unit that is being loaded."""

    job: Job
    positions: list[int]
    images: dict[int, LoadedImage] = field(default_factory=dict)


class Scheduler:
    """Score the rows of several requests at once.

    Args:
        predictor: The loaded packages.
        pass_seconds: Longest forward pass aimed at.
    """

    def __init__(self, predictor: Predictor, pass_seconds: float = PASS_SECONDS) -> None:
        self.predictor = predictor
        self.stream = predictor.stream
        self.pass_seconds = pass_seconds
        self._changed = threading.Condition()
        self._starting: deque[Job] = deque()
        """Jobs with units that are not started, in the order of their turns."""
        self._scoring: deque[Job] = deque()
        """Jobs with loaded units, in the order of their turns."""
        self._items: deque[tuple[_Loading, int]] = deque()
        self._held = 0
        self._expected = 0
        self._ready_since = 0.0
        self._next_exam = 0
        self._budget = float(min(self.stream.tokens, FIRST_TOKENS))
        self._closed = False
        self.passes = 0
        self.images = 0
        workers = self.stream.workers or os.cpu_count() or 1
        targets = [self._load] * workers + [self._score]
        self._threads = [threading.Thread(target=target, daemon=True, name="scheduler") for target in targets]
        for thread in self._threads:
            thread.start()

    @contextmanager
    def expected(self) -> Iterator[None]:
        """Announce that rows are read in this block and submitted at its end: loaded images may wait for them."""
        with self._changed:
            self._expected += 1
        try:
            yield
        finally:
            with self._changed:
                self._expected -= 1
                self._changed.notify_all()

    def submit(self, rows: ScoringRows) -> Future[Results]:
        """Queue rows and return what will hold their verdicts and logits. Cancel it when nobody waits for them."""
        with self._changed:
            job = Job(self._with_own_exams(rows))
            job.units.extend(job.rows.exams())
            if self._closed:
                job.future.cancel()
            elif job.units:
                self._starting.append(job)
                self._changed.notify_all()
            else:
                self._finish(job)
        job.future.add_done_callback(lambda _: self._drop(job))
        return job.future

    @property
    def waiting(self) -> int:
        """Number of images that are not scored."""
        with self._changed:
            return self._held + sum(len(unit) for job in self._starting for unit in job.units)

    @property
    def is_alive(self) -> bool:
        """Whether all threads run."""
        return not self._closed and all(thread.is_alive() for thread in self._threads)

    def close(self) -> None:
        """Cancel all jobs and end the threads after what they are doing."""
        with self._changed:
            self._closed = True
            jobs = {*self._starting, *self._scoring, *(loading.job for loading, _ in self._items)}
            self._changed.notify_all()
        for job in jobs:
            job.future.cancel()

    def _with_own_exams(self, rows: ScoringRows) -> ScoringRows:
        """Return the rows with numbers of exams and breasts that no other job has; equal ones would be fused."""
        first = self._next_exam
        self._next_exam += 1 + max((max(row.exam, row.breast) for row in rows.metadata), default=-1)
        if not self.stream.ensemble.fused:
            return rows

        def shifted(number: int) -> int:
            return number if number < 0 else number + first

        metadata = [replace(row, exam=shifted(row.exam), breast=shifted(row.breast)) for row in rows.metadata]
        return replace(rows, metadata=metadata)

    def _drop(self, job: Job) -> None:
        """Forget the work of a job that is over."""
        with self._changed:
            if job in self._starting:
                self._starting.remove(job)
            if job in self._scoring:
                self._scoring.remove(job)
            self._release(job, sum(len(unit) for unit in job.ready))
            job.units.clear()
            job.ready.clear()

    def _release(self, job: Job, images: int) -> None:
        job.held -= images
        self._held -= images
        self._changed.notify_all()

    def _load(self) -> None:
        """Load images until the scheduler is closed."""
        while (item := self._next_item()) is not None:
            loading, position = item
            job = loading.job
            image = None
            if not job.is_over:
                try:
                    image = self.stream.load(job.rows.rows[position], job.rows.metadata[position])
                except Exception as error:  # noqa: BLE001 (the thread must go on with other jobs)
                    self._fail(job, error)
            with self._changed:
                if image is not None:
                    loading.images[position] = image
                if job.is_over:  # the images of a unit that is not complete are held by nobody else
                    self._abandon(loading)
                elif len(loading.images) == len(loading.positions):
                    unit = [(place, loading.images[place]) for place in loading.positions]
                    job.ready.append(self.stream.complete_unit(unit, job.rows.metadata))
                    if not self._scoring:
                        self._ready_since = time.monotonic()
                    if job not in self._scoring:
                        self._scoring.append(job)
                self._changed.notify_all()

    def _abandon(self, loading: _Loading) -> None:
        """Release a unit whose job is over, once."""
        if loading.positions:
            self._release(loading.job, len(loading.positions))
            loading.positions = []

    def _next_item(self) -> tuple[_Loading, int] | None:
        """Return the next image to load, as soon as there is room for it; None = the scheduler is closed."""
        with self._changed:
            while not self._closed:
                if self._items:
                    return self._items.popleft()
                if not self._start_unit():
                    self._changed.wait()
            return None

    def _start_unit(self) -> bool:
        """Queue the images of the next unit of the next job that has room; return whether there was one."""
        for _ in range(len(self._starting)):
            job = self._starting.popleft()
            size = len(job.units[0])
            has_turn = not job.held or job.held + size <= JOB_IMAGES
            if has_turn and self._held + min(size, JOB_IMAGES) <= LOADED_IMAGES:
                positions = job.units.popleft()
                job.held += size
                self._held += size
                loading = _Loading(job, positions)
                self._items.extend((loading, position) for position in positions)
                if job.units:
                    self._starting.append(job)
                self._changed.notify_all()
                return True
            self._starting.append(job)
        return False

    def _score(self) -> None:
        """Score loaded units until the scheduler is closed."""
        since_cleanup = 0
        while (group := self._next_group()) is not None:
            start = time.perf_counter()
            self._score_units(group)
            tokens = sum(self.stream.unit_tokens(unit) for _, unit in group)
            self._adapt(tokens, time.perf_counter() - start)
            with self._changed:
                for job, unit in group:
                    self._release(job, len(unit))
            images = sum(len(unit) for _, unit in group)
            self.passes += 1
            self.images += images
            since_cleanup += images
            del group
            if since_cleanup >= GROUP_IMAGES:
                release_freed_memory()
                since_cleanup = 0

    def _adapt(self, tokens: int, seconds: float) -> None:
        """Set the tokens of the next pass by the time of the last one, which has a fixed part and one per token."""
        if seconds > self.pass_seconds:
            # a single slow pass on a busy machine means little, so that the budget is at most halved
            self._budget = max(1.0, self._budget / 2, tokens * self.pass_seconds / seconds)
        elif tokens > 0.7 * self._budget:
            self._budget = min(self.stream.tokens, 1.5 * self._budget)

    def _next_group(self) -> list[tuple[Job, Unit]] | None:
        """Return the units of the next pass, taken from the jobs in turns, at least one; None = closed."""
        with self._changed:
            while not self._closed:
                group, is_full = self._plan_group()
                wait = self._ready_since + GATHER_SECONDS - time.monotonic()
                comes = self._expected or self._held > sum(len(unit) for job in self._scoring for unit in job.ready)
                if group and (is_full or not comes or wait <= 0):
                    self._ready_since = time.monotonic()
                    return self._take(group)
                self._changed.wait(wait if group else None)
            return None

    def _plan_group(self) -> tuple[list[Job], bool]:
        """Return the job of each unit of the next pass, in their turns, and whether there is no room for another."""
        group: list[Job] = []
        images = tokens = 0
        turns = deque((job, 0) for job in self._scoring)
        while turns:
            job, number = turns.popleft()
            unit = job.ready[number]
            images += len(unit)
            tokens += self.stream.unit_tokens(unit)
            if group and (images > GROUP_IMAGES or tokens > self._budget):
                return group, True
            group.append(job)
            if number + 1 < len(job.ready):
                turns.append((job, number + 1))
        return group, images >= GROUP_IMAGES or tokens >= self._budget

    def _take(self, group: list[Job]) -> list[tuple[Job, Unit]]:
        """Remove the planned units from their jobs; each job that has more goes to the end of the turns."""
        taken = [(job, job.ready.popleft()) for job in group]
        for job in dict.fromkeys(group):
            self._scoring.remove(job)
            if job.ready:
                self._scoring.append(job)
        return taken

    def _score_units(self, group: list[tuple[Job, Unit]]) -> None:
        """Score units in one pass and hand the results to their jobs; an error of one job is not that of the others."""
        places = [(job, position) for job, unit in group for position, _ in unit]
        images = [image for _, unit in group for _, image in unit]
        try:
            for number, image in self.stream.score_group(list(enumerate(images))):
                job, position = places[number]
                job.scored[position] = image.loaded.cropped.record, image.logits
        except Exception as error:  # noqa: BLE001 (the thread must go on with other jobs)
            jobs = {job for job, _ in group}
            if len(jobs) > 1:
                for job in jobs:
                    self._score_units([(owner, unit) for owner, unit in group if owner is job])
                return
            self._fail(group[0][0], error)
        for job in {job for job, _ in group}:
            if len(job.scored) == len(job.rows):
                self._finish(job)

    def _fail(self, job: Job, error: Exception) -> None:
        if not isinstance(error, VitmodelError):
            logger.error("scoring failed: %s", describe_failure(error))
            error = VitmodelError("the images could not be scored; the server's log has the cause")
        with self._changed:  # several threads may fail on images of one job
            if not job.is_over and job.future.set_running_or_notify_cancel():
                job.future.set_exception(error)

    def _finish(self, job: Job) -> None:
        ensemble = self.stream.ensemble
        images = [job.scored[position] for position in range(len(job.rows))]
        shape = (len(images), ensemble.outputs, len(ensemble.packages))
        logits = np.reshape(np.asarray([values for _, values in images], dtype=float), shape)
        records = [record for record, _ in images]
        if job.future.set_running_or_notify_cancel():
            job.future.set_result((records, logits))
