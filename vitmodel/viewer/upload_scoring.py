"""Score the uploads of requests: save, read, score together with other requests, and make the tables."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitmodel.config import ServeConfig
from vitmodel.errors import RequestRefusedError, VitmodelError
from vitmodel.scoring.predictor import Predictor
from vitmodel.scoring.scheduler import Results, Scheduler
from vitmodel.scoring.table_maker import TableMaker
from vitmodel.scoring.uploads import MAX_FILES, Upload, as_request_error, read_uploads, save_uploads, tables_as_json
from vitmodel.utils import NOT_A_MEDICAL_DEVICE, progress_bars
from vitmodel.viewer.heat_maps import HeatMapStore
from vitmodel.viewer.model_facts import ModelFacts
from vitmodel.viewer.room import Model
from vitmodel.viewer.uploads import KeptUploads
from vitmodel.web.scratch import Scratch

if TYPE_CHECKING:
    from starlette.requests import Request

READERS = 2
"""Threads that read the headers of uploads; small requests wait for a large one in one of them."""


class UploadScorer:
    """Turn uploads into scores: save, read, score together with other requests, and make the tables.

    Args:
        config: The limits.
        predictor: The loaded packages.
        scratch: Where uploads are written.
    """

    def __init__(self, config: ServeConfig, predictor: Predictor, scratch: Scratch) -> None:
        self.config = config
        self.limit = config.upload_limit * 1_000_000
        self.predictor = predictor
        self.scratch = scratch
        self.scheduler = Scheduler(predictor)
        self.tables = TableMaker(predictor)
        self.readers = ThreadPoolExecutor(READERS, "readers")
        self.open = 0
        self.kept: KeptUploads | None = None
        if config.keep_minutes:
            model = Model(ModelFacts.of(predictor.ensemble, config.package.parent.name), HeatMapStore(predictor))
            self.kept = KeptUploads(60 * config.keep_minutes, scratch.discard, lambda: model)

    def close(self) -> None:
        """Cancel everything that is not done."""
        self.scheduler.close()
        self.readers.shutdown(wait=False, cancel_futures=True)

    async def answer(self, request: Request) -> dict[str, Any]:
        """Return the tables of `predict` for the files of a request.

        Raises:
            RequestRefusedError: The request cannot be accepted or takes too long.
        """
        length = request.headers.get("content-length", "")
        if not length.isdecimal():
            raise RequestRefusedError(411, "the request has no length; send the header Content-Length")
        if int(length) > self.limit:
            remedy = "send fewer images, or start the server with a larger --upload-limit"
            raise RequestRefusedError(413, f"the upload is larger than {self.limit // 1_000_000} MB; {remedy}")
        if self.open >= self.config.requests:
            raise RequestRefusedError(503, f"{self.open} uploads are in progress already; try again later")
        self.open += 1
        try:
            async with asyncio.timeout(self.config.request_timeout):
                return await self._receive(request)
        except asyncio.CancelledError:
            raise RequestRefusedError(503, "the server is being stopped; try again later") from None
        except TimeoutError:
            seconds = self.config.request_timeout
            raise RequestRefusedError(503, f"the images were not scored within {seconds:g} s; send fewer") from None
        finally:
            self.open -= 1

    async def _receive(self, request: Request) -> dict[str, Any]:
        """Read the body of a request and score its files, unless the client hangs up."""
        async with request.form(max_files=MAX_FILES) as form:
            files = [
                Upload(value.filename or "", value.file)
                for value in form.getlist("files")
                if not isinstance(value, str)
            ]
            work = asyncio.create_task(self._score(files, "keep" in request.query_params))
            watch = asyncio.create_task(_hung_up(request))
            try:
                await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
                if not work.done():
                    raise RequestRefusedError(499, "the client hung up")
                return work.result()
            finally:
                watch.cancel()
                work.cancel()
                with contextlib.suppress(asyncio.CancelledError, VitmodelError):
                    await work  # the files of the form are closed only when nobody reads them

    async def _score(self, files: list[Upload], keep: bool) -> dict[str, Any]:
        """Return the tables of the files and, if they are kept, the address of their pages; cancelling it ends all."""
        stopped = threading.Event()
        loop = asyncio.get_running_loop()
        folder = self.scratch.new_folder()
        scores: Future[Results] | None = None
        answer: dict[str, Any] = {}
        reading = self.readers.submit(self._read, files, folder, stopped)
        try:
            with self.scheduler.expected():
                table, rows = await asyncio.shield(asyncio.wrap_future(reading))
                scores = self.scheduler.submit(rows)
            records, logits = await asyncio.wrap_future(scores)
            tables = await asyncio.wrap_future(self.tables.submit(table, records, logits))
            answer = tables_as_json(tables, folder) | {"notice": NOT_A_MEDICAL_DEVICE}
            if keep and self.kept:
                keep_upload = partial(self.kept.keep, folder, tables.images, tables.breasts, records)
                answer["pages"] = await loop.run_in_executor(None, keep_upload)
            return answer
        except VitmodelError as error:
            raise as_request_error(error, folder) from error
        finally:
            stopped.set()
            if scores is not None:
                scores.cancel()
            if not reading.cancel() and not reading.done():
                await asyncio.wait({asyncio.wrap_future(reading)}, timeout=1)
            if "pages" not in answer:
                await loop.run_in_executor(None, self.scratch.discard, folder)

    def _read(self, files: list[Upload], folder: Path, stopped: threading.Event) -> Any:
        """Save the files and return their manifest and its rows."""
        if stopped.is_set():
            raise RequestRefusedError(499, "the client hung up")
        table = read_uploads(save_uploads(files, folder, self.limit), folder)
        with progress_bars(shown=False):
            return table, self.predictor.attach(table)


async def _hung_up(request: Request) -> None:
    """Return when the client of a request whose body was read has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
