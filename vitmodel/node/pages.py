"""The web pages and interfaces of a node: reading room, studies, DICOMweb, FHIR, health and metrics."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool

from vitmodel import __version__
from vitmodel.errors import RequestRefusedError
from vitmodel.node.audit import Audit
from vitmodel.node.facts import is_uid
from vitmodel.node.fhir import diagnostic_report
from vitmodel.node.inbox import Inbox
from vitmodel.node.jobs import Queue
from vitmodel.node.metrics import NodeCollector, has_ready_workers, is_moving
from vitmodel.node.ohif import make_viewer_link, make_viewer_router
from vitmodel.node.queries import find_job, study_details
from vitmodel.node.reading_store import StudyReadings
from vitmodel.node.stow import read_parts, store_parts
from vitmodel.node.study_source import StudySource
from vitmodel.utils import NOT_A_MEDICAL_DEVICE
from vitmodel.viewer.exams import Exam
from vitmodel.viewer.pages import OWN_PATHS, make_environment, make_router, make_static_router
from vitmodel.viewer.room import Model, ReadingMode, ReadingRoom, Results
from vitmodel.web import observing
from vitmodel.web.observing import RequestLog, RequestMetrics, note
from vitmodel.web.security import AccessPolicy, Guard

FOLDER = Path(__file__).parent
OPEN_PATHS = ("/healthz", "/readyz")
"""Paths that need no API key: they reveal nothing but whether the node works."""
FORWARDED = ("accept", "accept-charset", "range")
"""Headers of a request that the DICOMweb proxy passes on; never cookies or logins."""
RETURNED = ("content-type", "content-range", "etag", "last-modified")


@dataclass(frozen=True, kw_only=True)
class Site:
    """What the pages show."""

    inbox: Inbox
    queue: Queue
    audit: Audit
    web_root: str = ""
    """DICOMweb root of the PACS; '' = there is no proxy."""
    max_body: int = 2_000_000_000
    """Largest request to STOW-RS in bytes."""
    policy: AccessPolicy = field(default_factory=AccessPolicy)
    """Who may ask."""
    load_model: Callable[[], Model] = Model
    """Function that returns the model for the facts and heat maps of the reading room."""
    fingerprint: str = ""
    """Fingerprint of that model; empty = unknown."""


def needed_scope(method: str, path: str) -> str:
    """Return the scope that a request needs: score to store images, none for health, read for the rest."""
    if path in OPEN_PATHS:
        return ""
    if path.endswith(OWN_PATHS):
        return "read"
    return "read" if method in ("GET", "HEAD") else "score"


def who(request: Request) -> str:
    """Return who asks, as the access check found it."""
    return str(request.scope["state"]["who"])


def create_app(site: Site) -> FastAPI:
    """Return the web application of a node."""

    app = FastAPI(
        title="vitmodel node", version=__version__, description=NOT_A_MEDICAL_DEVICE, docs_url=None, redoc_url=None
    )
    metrics = RequestMetrics()
    metrics.registry.register(NodeCollector(site.queue, site.inbox.folder))
    checks = {"model": lambda: has_ready_workers(site.queue), "queue": lambda: is_moving(site.queue)}
    app.add_middleware(Guard, policy=site.policy)
    app.add_middleware(RequestLog, metrics=metrics)  # the last one is the outermost
    app.include_router(observing.make_router(metrics, checks))

    @app.exception_handler(RequestRefusedError)
    async def answer_refused(_: Request, error: RequestRefusedError) -> JSONResponse:
        return JSONResponse({"error": error.message, "notice": NOT_A_MEDICAL_DEVICE}, error.http_status)

    _add_reading_room(app, site)
    _add_pages(app, site)
    _add_stow(app, site)
    app.include_router(make_viewer_router(bool(site.web_root)))
    if site.web_root:
        _add_proxy(app, site.web_root, site.audit)
    return app


def _add_reading_room(app: FastAPI, site: Site) -> None:
    """Add the worklist, the exams and the readings."""
    database = site.queue.database
    source = StudySource(database, site.inbox.folder, site.fingerprint)
    room = ReadingRoom(source, Results("vitmodel node"), ReadingMode(StudyReadings(database)), site.load_model)

    def record(request: Request, action: str, exam: Exam | None) -> None:
        site.audit.record(who(request), action, exam.key if exam else "")

    viewer_link = make_viewer_link(bool(site.web_root))
    app.include_router(make_router(lambda _: room, record=record, viewer_link=viewer_link))
    app.include_router(make_static_router())


def _add_pages(app: FastAPI, site: Site) -> None:
    """Add the studies and the FHIR reports."""
    environment = make_environment(FOLDER / "templates", viewer_link=make_viewer_link(bool(site.web_root)))
    template = environment.get_template("study.html.j2")
    database = site.queue.database

    @app.get("/studies/{study_uid}", response_model=None)
    def show_study(study_uid: str, request: Request) -> Response:
        """Show a study: its objects, jobs, scores and results, as HTML to browsers and as JSON to others."""
        details = study_details(database, study_uid) if is_uid(study_uid) else None
        site.audit.record(who(request), "GET /studies", study_uid, "200" if details else "404")
        if details is None:
            raise RequestRefusedError(404, "there is no such study; /worklist lists all")
        if "text/html" in request.headers.get("accept", ""):
            return HTMLResponse(template.render(base="", study=details))
        return JSONResponse(details | {"notice": NOT_A_MEDICAL_DEVICE})

    @app.get("/fhir/DiagnosticReport/{job_id}", response_model=None)
    def show_report(job_id: int, request: Request) -> JSONResponse:
        """Return the scores of a job as a FHIR R4 DiagnosticReport."""
        found = find_job(database, job_id)
        if found is None or not found[0].scores:
            raise RequestRefusedError(404, "there is no scored job of this number; `vitmodel node status` lists them")
        site.audit.record(who(request), "GET /fhir/DiagnosticReport", found[1].study_uid)
        return JSONResponse(diagnostic_report(*found), media_type="application/fhir+json")


def _add_stow(app: FastAPI, site: Site) -> None:
    """Add STOW-RS onto the inbox; its DICOMweb root is /inbox."""

    @app.post("/inbox/studies", response_model=None)
    async def store(request: Request) -> JSONResponse:
        """Store DICOM objects (STOW-RS)."""
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > site.max_body:
                raise RequestRefusedError(
                    413, f"the request is larger than {site.max_body // 1_000_000} MB; send fewer objects"
                )
        parts = read_parts(bytes(body), request.headers.get("content-type", ""))
        status, answer, stored = await run_in_threadpool(store_parts, site.inbox, parts, "STOW-RS")
        note(request, objects=len(stored))
        for facts in stored:
            await run_in_threadpool(site.audit.record, who(request), "STOW-RS", facts.sop_uid, str(status))
        return JSONResponse(answer, status, media_type="application/dicom+json")


def _add_proxy(app: FastAPI, root: str, audit: Audit) -> None:
    """Add a read-only view of the PACS's DICOMweb under our own origin, so that viewers need no CORS."""

    client = httpx.AsyncClient(base_url=root + "/", timeout=60, follow_redirects=False)
    shown_root = re.sub(r"//[^/@]*@", "//", root).encode()  # without a login

    @app.get("/dicom-web/{path:path}", response_model=None)
    async def forward(path: str, request: Request) -> Response:
        """Return what the PACS answers to a query or retrieval (QIDO-RS, WADO-RS)."""
        segments = path.split("/")
        if segments[0] != "studies" or any(segment in ("", ".", "..") or "%" in segment for segment in segments):
            raise RequestRefusedError(404, "only /dicom-web/studies... is served")
        headers = {name: request.headers[name] for name in FORWARDED if name in request.headers}
        asked = client.build_request("GET", path, params=list(request.query_params.multi_items()), headers=headers)
        try:
            answer = await client.send(asked, stream=True)
        except httpx.HTTPError as error:
            raise RequestRefusedError(502, f"the PACS does not answer ({type(error).__name__})") from error
        study_uid = segments[1] if len(segments) > 1 else ""
        await run_in_threadpool(audit.record, who(request), "GET /dicom-web", study_uid, str(answer.status_code))
        returned = {name: answer.headers[name] for name in RETURNED if name in answer.headers}
        if "json" in returned.get("content-type", ""):
            # A viewer must follow the links to large values through this server: it may reach no other one.
            body = (await answer.aread()).replace(shown_root, b"/dicom-web")
            return Response(body, answer.status_code, returned)
        return StreamingResponse(
            answer.aiter_bytes(), answer.status_code, returned, background=BackgroundTask(answer.aclose)
        )
