"""Stage: a model package behind HTTP: images in, `predict`'s tables out, and a page to drop files on. Knows no network, keeps nothing."""

import json
import shutil
import socket
import tempfile
import threading
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitmodel import __version__
from vitmodel.config import ServeConfig
from vitmodel.errors import RequestRefusedError, UsageError, VitmodelError
from vitmodel.releases.inputs import read_inputs
from vitmodel.reports.page import render_page
from vitmodel.scoring.predictor import Predictor
from vitmodel.utils import NOT_A_MEDICAL_DEVICE

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.datastructures import UploadFile


def serve(config: ServeConfig) -> None:
    """Answer requests until interrupted. Raises UsageError where the extra is not installed or the port cannot be had."""
    try:
        import uvicorn

        app = create_app(config)
    except ImportError as error:
        raise UsageError(
            f"serve: needs the extra `serve` ({error.name} is missing): pip install 'vitmodel[serve]'"
        ) from None
    try:
        listening = socket.create_server((config.host, config.port))
    except OSError as error:
        raise UsageError(
            f"port: cannot listen at {config.host}:{config.port}: {error.strerror}; choose another with --port"
        ) from error
    host, port = listening.getsockname()[:2]
    print(f"vitmodel answers at http://{host}:{port}; Ctrl-C ends it\n{NOT_A_MEDICAL_DEVICE}", flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listening])


def too_large(what: str, limit: int) -> RequestRefusedError:
    """Return the error for an upload larger than `limit` bytes."""
    return RequestRefusedError(
        413, f"{what} larger than {limit // 1_000_000} MB; send fewer images, or start with a larger --upload-limit"
    )


def create_app(config: ServeConfig) -> "FastAPI":
    """`GET /` the page, `GET /model` what answers, `POST /scores` (multipart, field `files`: images or zips of them) the scores.

    Requests are scored one after the other; each may use all cores.
    """
    from fastapi import FastAPI, Request
    from fastapi.responses import HTMLResponse, JSONResponse
    from starlette.concurrency import run_in_threadpool

    predictor = Predictor(config)
    limit, in_turn = config.upload_limit * 1_000_000, threading.Lock()
    app = FastAPI(
        title="vitmodel", version=__version__, description=NOT_A_MEDICAL_DEVICE, docs_url=None, redoc_url=None
    )
    described = describe_model(predictor)
    page = render_page(
        "scores.html.j2", title="vitmodel", subtitle="Breast cancer scores from mammograms", model=described
    )

    @app.exception_handler(RequestRefusedError)
    async def say_refused(_: Request, refused: RequestRefusedError) -> JSONResponse:
        return JSONResponse({"error": refused.message, "notice": NOT_A_MEDICAL_DEVICE}, refused.http_status)

    @app.get("/", response_class=HTMLResponse)
    async def show_page() -> str:
        return page

    @app.get("/model")
    async def tell_model() -> dict[str, Any]:
        return described

    @app.post("/scores")
    async def score_upload(request: Request) -> dict[str, Any]:
        length = request.headers.get("content-length", "")
        if not length.isdecimal():
            raise RequestRefusedError(411, "the request does not say its length (Content-Length)")
        if int(length) > limit:
            raise too_large("the upload is", limit)
        async with request.form(max_files=10_000) as form:
            files = [value for value in form.getlist("files") if not isinstance(value, str)]
            return await run_in_threadpool(score_uploads, files, predictor, limit, in_turn)

    return app


def describe_model(predictor: Predictor) -> dict[str, Any]:
    """Which model answers, and how."""
    config = predictor.config
    return {
        "label": predictor.ensemble.package["label"],
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
    files: Sequence["UploadFile"], predictor: Predictor, limit: int, in_turn: threading.Lock
) -> dict[str, Any]:
    """The tables of `predict` for what was uploaded, which is deleted again. Raises RequestRefusedError where there is nothing to score."""
    with tempfile.TemporaryDirectory(prefix="vitmodel-") as name:
        folder = Path(name)
        kept = [save_upload(file, number, folder, limit) for number, file in enumerate(files)]
        if not kept:
            raise RequestRefusedError(422, "no file was sent; the field `files` holds images or zips of them")
        try:
            table = read_inputs([str(path) for path in kept], "dicom_folder", folder / ".unpacked")
            with in_turn:
                scores = predictor.score(table)
        except VitmodelError as error:
            raise RequestRefusedError(
                422 if isinstance(error, UsageError) else 507, strip_path(folder, str(error))
            ) from error
        tables = scores._asdict()
        rows = {
            level: json.loads(strip_path(folder, table.to_json(orient="records"))) for level, table in tables.items()
        }
        return rows | {"notice": NOT_A_MEDICAL_DEVICE}


def save_upload(file: "UploadFile", number: int, folder: Path, limit: int) -> Path:
    """Write the uploaded file into `folder` under its own name and return its path.

    Raises RequestRefusedError for a table or DICOMDIR, which could make the server read its own files, and for a zip that is too large.
    """
    name = Path((file.filename or "").replace("\\", "/")).name or "image"
    if name.lower().endswith(".csv") or name.upper() == "DICOMDIR":
        raise RequestRefusedError(
            415, f"{name} names files instead of holding an image; send the images themselves, or a zip of them"
        )
    path = folder / name
    while path.exists():
        path = path.with_name(f"{number}-{path.name}")
    with path.open("wb") as kept:
        shutil.copyfileobj(file.file, kept)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > limit:
                raise too_large(f"{name} is, once unpacked,", limit)
    return path


def strip_path(folder: Path, text: str) -> str:
    """`text` without the place where the upload lay for a moment, as it is and as JSON spells it."""
    return text.replace(f"{folder}/", "").replace(f"{folder}/".replace("/", "\\/"), "")
