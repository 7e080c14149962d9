"""The command `serve`: score uploaded images over HTTP, with a page to drop files on.

Uploads are deleted after scoring.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitmodel import __version__
from vitmodel.archives import is_archive, open_archive
from vitmodel.config import ServeConfig
from vitmodel.config.labels import CANCER, target_title
from vitmodel.errors import InputRefusedError, RequestRefusedError, UsageError, VitmodelError
from vitmodel.releases.inputs import read_inputs
from vitmodel.reports.page import render_page
from vitmodel.scoring.predictor import Predictor
from vitmodel.utils import NOT_A_MEDICAL_DEVICE, import_extra

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.datastructures import UploadFile

MAX_NAME = 60
"""Most characters of an upload's name, without its suffix; the ids of its images begin with it."""
MAX_FILES = 10_000
"""Most files of a request, and of an archive in it."""


def serve(config: ServeConfig) -> None:
    """Answer requests until interrupted.

    Raises:
        UsageError: The extra `serve` is not installed, or the port is in use.
    """
    uvicorn = import_extra("uvicorn", "serve", "serve")
    app = create_app(config)
    try:
        listening = socket.create_server((config.host, config.port))
    except OSError as error:
        raise UsageError(
            f"port: cannot listen on {config.host}:{config.port}: {error.strerror}; choose another port with --port"
        ) from error
    host, port = listening.getsockname()[:2]
    print(f"serving on http://{host}:{port}; press Ctrl-C to stop\n{NOT_A_MEDICAL_DEVICE}", flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listening])


def too_large(what: str, limit: int) -> RequestRefusedError:
    """Return the error for an upload larger than `limit` bytes."""
    remedy = "send fewer images, or start the server with a larger --upload-limit"
    return RequestRefusedError(413, f"{what} larger than {limit // 1_000_000} MB; {remedy}")


def create_app(config: ServeConfig) -> FastAPI:
    """Load the packages and return the web application.

    `GET /` returns the page, `GET /model` the facts about the model, and `POST /scores` (multipart, field `files`:
    images, or zips or tars of images) the scores. Requests are scored one after the other, because each may use all
    cores.

    Raises:
        UsageError: The extra `serve` is not installed.
    """
    import_extra("fastapi", "serve", "serve")
    from fastapi import FastAPI, Request
    from fastapi.responses import HTMLResponse, JSONResponse
    from starlette.concurrency import run_in_threadpool

    predictor = Predictor(config)
    limit = config.upload_limit * 1_000_000
    scoring_lock = threading.Lock()
    app = FastAPI(
        title="vitmodel", version=__version__, description=NOT_A_MEDICAL_DEVICE, docs_url=None, redoc_url=None
    )
    model = describe_model(predictor)
    target = "Breast cancer" if model["label"] == CANCER else target_title(model["label"])
    page = render_page("scores.html.j2", title="vitmodel", subtitle=f"{target} scores from mammograms", model=model)

    @app.exception_handler(RequestRefusedError)
    async def answer_refused(_: Request, error: RequestRefusedError) -> JSONResponse:
        return JSONResponse({"error": error.message, "notice": NOT_A_MEDICAL_DEVICE}, error.http_status)

    @app.get("/", response_class=HTMLResponse)
    async def show_page() -> str:
        return page

    @app.get("/model")
    async def show_model() -> dict[str, Any]:
        return model

    async def score_upload(request: Request) -> dict[str, Any]:
        length = request.headers.get("content-length", "")
        if not length.isdecimal():
            raise RequestRefusedError(411, "the request has no length; send the header Content-Length")
        if int(length) > limit:
            raise too_large("the upload is", limit)
        async with request.form(max_files=MAX_FILES) as form:
            files = [value for value in form.getlist("files") if not isinstance(value, str)]
            return await run_in_threadpool(score_uploads, files, predictor, limit, scoring_lock)

    # FastAPI evaluates annotations among the module's names, where the lazily imported Request is missing
    score_upload.__annotations__["request"] = Request
    app.post("/scores")(score_upload)
    return app


def describe_model(predictor: Predictor) -> dict[str, Any]:
    """Return the facts about the model that the page and `GET /model` show."""
    config = predictor.config
    return {
        "label": predictor.ensemble.label,
        "serial": predictor.ensemble.fingerprint()[:16],
        "crop": str(predictor.ensemble.preprocessing.size),
        "threshold": round(predictor.ensemble.threshold, 4),
        "flip_averaging": predictor.ensemble.flip,
        "runtime": config.runtime,
        "precision": config.precision,
        "version": __version__,
        "notice": NOT_A_MEDICAL_DEVICE,
    }


def score_uploads(
    files: Sequence[UploadFile], predictor: Predictor, limit: int, scoring_lock: threading.Lock
) -> dict[str, Any]:
    """Return the tables of `predict` for the uploaded files, and delete the files.

    Args:
        files: Images, or zips or tars of images.
        predictor: The loaded packages.
        limit: Largest size of the unpacked content of an archive in bytes.
        scoring_lock: Held while the images are scored.

    Raises:
        RequestRefusedError: There is no file, or a file cannot be accepted.
    """
    with tempfile.TemporaryDirectory(prefix="vitmodel-") as name:
        folder = Path(name)
        paths = [save_upload(file, number, folder, limit) for number, file in enumerate(files)]
        if not paths:
            raise RequestRefusedError(422, "no file was sent; send images or zips of images in the field `files`")
        try:
            table = read_inputs([str(path) for path in paths], "dicom_folder")
            with scoring_lock:
                scores = predictor.score(table)
        except VitmodelError as error:
            status = 422 if isinstance(error, UsageError) else 507
            raise RequestRefusedError(status, strip_path(folder, str(error))) from error
        answer: dict[str, Any] = {}
        for level, rows in scores._asdict().items():
            answer[level] = json.loads(strip_path(folder, rows.to_json(orient="records")))
        return answer | {"notice": NOT_A_MEDICAL_DEVICE}


def save_upload(file: UploadFile, number: int, folder: Path, limit: int) -> Path:
    """Write the uploaded file into `folder` under its own name and return its path.

    Raises:
        RequestRefusedError: The file is a table or DICOMDIR, which could make the server read its own files, or an
            archive whose content is larger than `limit` bytes or more than `MAX_FILES` files.
    """
    name = upload_name(file.filename or "")
    if name.lower().endswith(".csv") or name.upper() == "DICOMDIR":
        raise RequestRefusedError(
            415, f"{name} names files instead of containing an image; send the images themselves or a zip of them"
        )
    path = folder / name
    while path.exists():
        path = path.with_name(f"{number}-{path.name}")
    with path.open("wb") as target:
        shutil.copyfileobj(file.file, target)
    if is_archive(path):
        with contextlib.suppress(InputRefusedError):  # a damaged archive becomes a refused row
            members = open_archive(path).members.values()
            if sum(member.size for member in members) > limit:
                raise too_large(f"the unpacked content of {name} is", limit)
            if len(members) > MAX_FILES:
                raise RequestRefusedError(413, f"{name} holds more than {MAX_FILES} files; send fewer images")
    return path


def upload_name(name: str) -> str:
    """Return the name of an upload as a file name: without folders and control characters, and not too long."""
    base = Path("".join(character for character in name.replace("\\", "/") if character.isprintable())).name
    stem, suffix = os.path.splitext(base)
    return stem[:MAX_NAME] + suffix[:16] or "image"


def strip_path(folder: Path, text: str) -> str:
    """Return `text` without the path of the temporary folder, both in plain spelling and as JSON escapes it."""
    return text.replace(f"{folder}/", "").replace(f"{folder}/".replace("/", "\\/"), "")
