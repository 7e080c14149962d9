"""Make the score tables of several requests at once; the time of a table hardly depends on its number of rows."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from vitmodel.data.cropping import ProvenanceRecord
from vitmodel.errors import VitmodelError
from vitmodel.scoring.predictor import Predictor
from vitmodel.scoring.tables import ScoreTables
from vitmodel.utils import describe_failure

logger = logging.getLogger(__name__)

MAX_ROWS = 256
"""Number of rows at which no further request is added."""
SEPARATOR = "\x1f"
"""Between the number of a request and a patient's id; no id of a file holds this control character at its start."""


@dataclass(frozen=True, eq=False)
class ScoredRequest:
    """The rows of a request with the results of scoring them."""

    table: pd.DataFrame
    """The manifest's N rows."""
    records: Sequence[ProvenanceRecord]
    logits: np.ndarray
    """`(N, L + A, M)`."""
    future: Future[ScoreTables] = field(default_factory=Future)


def make_tables(predictor: Predictor, requests: Sequence[ScoredRequest]) -> list[ScoreTables]:
    """Return the tables of each request, as `Predictor.tables` makes them alone.

    Patients of several requests stay apart, because their ids get the number of the request for the time being.
    """
    if len(requests) == 1:
        (request,) = requests
        return [predictor.tables(request.table, request.records, request.logits)]
    numbered = [
        request.table.assign(patient_id=f"{number}{SEPARATOR}" + request.table["patient_id"])
        for number, request in enumerate(requests)
    ]
    records = [record for request in requests for record in request.records]
    logits = np.concatenate([request.logits for request in requests])
    together = predictor.tables(pd.concat(numbered, ignore_index=True), records, logits)
    return [_part(together, number, request.table) for number, request in enumerate(requests)]


def _part(together: ScoreTables, number: int, table: pd.DataFrame) -> ScoreTables:
    """Return the rows of one request, with the patients' own ids."""
    prefix = f"{number}{SEPARATOR}"
    has_exams = bool((table["exam_id"] != "").any())
    parts = []
    for rows in together:
        part = rows[rows["patient_id"].str.startswith(prefix)].reset_index(drop=True)
        for column in ("patient_id", "prediction_id"):
            if column in part:
                part[column] = part[column].str.removeprefix(prefix)
        parts.append(part if has_exams else part.drop(columns="exam_id", errors="ignore"))
    return ScoreTables(*parts)


class TableMaker:
    """A thread that makes the tables of all requests that wait for theirs.

    Args:
        predictor: The loaded packages.
    """

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor
        self._waiting: queue.SimpleQueue[ScoredRequest] = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True, name="tables").start()

    def submit(
        self, table: pd.DataFrame, records: Sequence[ProvenanceRecord], logits: np.ndarray
    ) -> Future[ScoreTables]:
        """Return what will hold the tables of a request; see `Predictor.tables`."""
        request = ScoredRequest(table, records, logits)
        self._waiting.put(request)
        return request.future

    def _work(self) -> None:
        while True:
            batch = [self._waiting.get()]
            while not self._waiting.empty() and sum(len(request.table) for request in batch) < MAX_ROWS:
                batch.append(self._waiting.get())
            wanted = [request for request in batch if request.future.set_running_or_notify_cancel()]
            if wanted:
                self._answer(wanted)

    def _answer(self, requests: Sequence[ScoredRequest]) -> None:
        """Set the result of each request; an error of one is not that of the others."""
        try:
            results = make_tables(self.predictor, requests)
        except Exception as error:  # noqa: BLE001 (the thread must go on with other requests)
            if len(requests) > 1:
                for request in requests:
                    self._answer([request])
                return
            logger.error("tables could not be made: %s", describe_failure(error))
            requests[0].future.set_exception(VitmodelError("the tables could not be made; see the server's log"))
            return
        for request, tables in zip(requests, results, strict=True):
            request.future.set_result(tables)
