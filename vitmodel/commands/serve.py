"""The command `serve`: score uploaded images over HTTP, with a page to drop files on.

Uploads are deleted after scoring.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from vitmodel import __version__
from vitmodel.config import ServeConfig
from vitmodel.config.labels import CANCER, target_title
from vitmodel.errors import RequestRefusedError
from vitmodel.reports.page import render_page
from vitmodel.scoring.predictor import Predictor
from vitmodel.utils import NOT_A_MEDICAL_DEVICE, import_extra
from vitmodel.viewer import pages, uploads
from vitmodel.viewer.upload_scoring import UploadScorer
from vitmodel.viewer.uploads import KeptUploads
from vitmodel.web.observing import RequestLog, RequestMetrics, keep_names_out_of_logs, make_router, note
from vitmodel.web.scratch import Scratch
from vitmodel.web.security import AccessPolicy, Guard, check_exposure, policy_for_page

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.requests import Request

    from vitmodel.web.connections import ConnectionLimits

EXPIRY_SECONDS = 10
"""Pause between two looks for uploads to delete."""
RETRY_SECONDS = 10
"""What a client that is turned away is asked to wait."""
OPEN_PATHS = ("/healthz", "/readyz")
"""Paths that need no API key: they reveal nothing but whether the server works."""


def serve(config: ServeConfig) -> None:
    """Answer requests until interrupted.

    The process ends with the server.

    Raises:
        UsageError: The extra `serve` is not installed, the port is in use, or the server would be open to others.
    """
    import_extra("uvicorn", "serve", "serve")
    check_exposure(config.host, config.api_key_file or config.trusted_proxy, config.insecure)
    from vitmodel.web.connections import ConnectionLimits, raise_file_limit
    from vitmodel.web.server import open_socket, run_server

    allowed = raise_file_limit(config.connections)
    limits = ConnectionLimits(allowed, config.header_timeout, config.body_timeout)
    scratch = Scratch()
    try:
        app = create_app(config, scratch, limits)
        listening = open_socket(config.host, config.port)
        host, port = listening.getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        print(f"serving on http://{host}:{port}; press Ctrl-C to stop\n{NOT_A_MEDICAL_DEVICE}", flush=True)
        keep_names_out_of_logs()
        run_server(app, listening, limits, config.shutdown_timeout, scratch.remove)
    finally:
        scratch.remove()
    sys.stdout.flush()
    os._exit(0)  # threads may be decoding an image for nobody; the interpreter would wait for them


def needed_scope(method: str, path: str) -> str:
    """Return the scope that a request needs: score for images, none for health, read for the rest."""
    if path in OPEN_PATHS:
        return ""
    return "score" if path == "/scores" else "read"


def create_app(config: ServeConfig, scratch: Scratch, limits: ConnectionLimits | None = None) -> FastAPI:
    """Load the packages and return the web application.

    `GET /` returns the page, `GET /model` the facts about the model, and `POST /scores` (multipart, field `files`:
    images, or zips or tars of images) the scores. Images of several requests are scored together, in turns.

    Args:
        config: The options.
        scratch: Where uploads are written.
        limits: Limits on connections, for the metrics.

    Raises:
        UsageError: The extra `serve` is not installed, or the key file is not valid.
    """
    import_extra("fastapi", "serve", "serve")
    from fastapi import FastAPI, Request
    from fastapi.responses import HTMLResponse, JSONResponse

    policy = AccessPolicy.of(config, needed_scope)
    metrics = RequestMetrics()
    predictor = Predictor(config)
    scorer = UploadScorer(config, predictor, scratch)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        expiry = asyncio.create_task(expire_forever(scorer.kept)) if scorer.kept else None
        yield
        if expiry:
            expiry.cancel()
        scorer.close()

    app = FastAPI(
        title="vitmodel",
        version=__version__,
        description=NOT_A_MEDICAL_DEVICE,
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    app.add_middleware(Guard, policy=policy)
    app.add_middleware(RequestLog, metrics=metrics)  # the last one is the outermost
    app.include_router(make_router(metrics, {"scoring": lambda: scorer.scheduler.is_alive}))
    if scorer.kept:
        app.include_router(pages.make_router(scorer.kept.find_room, uploads.BASE))
        app.include_router(pages.make_static_router())
    add_metrics(metrics, scorer, limits)
    model = describe_model(predictor)
    target = "Breast cancer" if model["label"] == CANCER else target_title(model["label"])
    page = render_page(
        "scores.html.j2",
        title="vitmodel",
        subtitle=f"{target} scores from mammograms",
        model=model,
        keep_minutes=config.keep_minutes,
    )
    page_headers = {"Content-Security-Policy": policy_for_page(page)}
    images = metrics.counter("images", "Images of answered uploads.", "status")

    @app.exception_handler(RequestRefusedError)
    async def answer_refused(_: Request, error: RequestRefusedError) -> JSONResponse:
        headers = {"Retry-After": str(RETRY_SECONDS)} if error.http_status == 503 else None
        return JSONResponse({"error": error.message, "notice": NOT_A_MEDICAL_DEVICE}, error.http_status, headers)

    @app.get("/")
    async def show_page() -> HTMLResponse:
        return HTMLResponse(page, headers=page_headers)

    @app.get("/model")
    async def show_model() -> dict[str, Any]:
        return model

    async def score_upload(request: Request) -> JSONResponse:
        answer = await scorer.answer(request)
        statuses = [row["status"] for row in answer["images"]]
        for status in set(statuses):
            images.labels(status).inc(statuses.count(status))
        note(request, images=len(statuses), refused=statuses.count("refused"))
        return JSONResponse(answer)

    # FastAPI evaluates annotations among the module's names, where the lazily imported classes are missing
    score_upload.__annotations__.update({"request": Request, "return": JSONResponse})
    show_page.__annotations__["return"] = HTMLResponse
    app.post("/scores")(score_upload)
    return app


async def expire_forever(kept: KeptUploads) -> None:
    """Delete uploads whose time is over."""
    while True:
        await asyncio.sleep(EXPIRY_SECONDS)
        await asyncio.get_running_loop().run_in_executor(None, kept.expire)


def add_metrics(metrics: RequestMetrics, scorer: UploadScorer, limits: ConnectionLimits | None) -> None:
    """Add the metrics of scoring and of the connections."""
    scheduler = scorer.scheduler
    metrics.gauge("waiting_images", "Images that are not scored yet.", lambda: scheduler.waiting)
    metrics.gauge("uploads", "Uploads that are received, waiting or scored.", lambda: scorer.open)
    metrics.gauge("passes_total", "Forward passes so far.", lambda: scheduler.passes)
    metrics.gauge("scored_images_total", "Images in these passes.", lambda: scheduler.images)
    if limits is not None:
        metrics.gauge("turned_away_total", "Connections that got status 503.", lambda: limits.turned_away)
        metrics.gauge("closed_total", "Connections closed because they were too slow.", lambda: limits.closed)


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
