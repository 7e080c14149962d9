"""The pages of the reading room and the data behind them, as routes that an application includes."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote, urlencode

from vitmodel import __version__
from vitmodel.errors import ImageRefusedError, UsageError, VitmodelError
from vitmodel.utils import NOT_A_MEDICAL_DEVICE, import_extra
from vitmodel.viewer.exams import Exam, ImageEntry
from vitmodel.viewer.exports import add_exports
from vitmodel.viewer.readings import check_name
from vitmodel.viewer.room import ReadingRoom
from vitmodel.viewer.source import WorklistQuery

if TYPE_CHECKING:
    from fastapi import APIRouter, HTTPException
    from starlette.requests import Request

FOLDER = Path(__file__).parent
FAILED = 500
HIDDEN = "the scores of this exam are hidden until you have stored a reading"
YEAR = 365 * 86400
OWN_PATHS = ("/reader", "/readings")
"""Ends of the paths to which readers post what they wrote; it needs no right to send images."""


@dataclass(frozen=True)
class Desk:
    """One request to a reading room."""

    room: ReadingRoom
    request: Request
    base: str
    """Path below which the room's pages are."""
    record: Callable[[Request, str, Exam | None], object]

    @property
    def account(self) -> str:
        """Name of the API key or user that the access check found; empty without a login."""
        return str(self.request.scope.get("state", {}).get("who", "")).partition(":")[2]

    @property
    def reader(self) -> str:
        """Who reads: the room's only reader, the account, or else the name that was typed."""
        return self.room.mode.reader or self.account or unquote(self.request.cookies.get("reader", ""))

    @property
    def types_name(self) -> bool:
        """Whether readers type their names."""
        return not (self.room.mode.reader or self.account)

    def exam(self, key: str, action: str) -> Exam:
        """Return an exam, and record that it is shown or read.

        Raises:
            HTTPException: There is none.
        """
        exam = self.room.source.exam(key)
        if exam is None:
            raise _http_error(404, "there is no such exam; the worklist has all")
        self.record(self.request, action, exam)
        return exam

    def image(self, key: str) -> tuple[ImageEntry, Exam]:
        """Return an image and its exam.

        Raises:
            HTTPException: There is none.
        """
        exam = self.room.source.exam_of_image(key)
        image = next((image for image in exam.images if image.key == key), None) if exam else None
        if exam is None or image is None:
            raise _http_error(404, "there is no such image")
        return image, exam


def make_router(
    find_room: Callable[[Request], ReadingRoom],
    base: str = "",
    record: Callable[[Request, str, Exam | None], object] = lambda request, action, exam: None,
    viewer_link: Callable[[str], str] = lambda key: "",
) -> APIRouter:
    """Return the routes of reading rooms.

    `GET BASE/worklist` and `BASE/` are the worklist and `GET BASE/exams/KEY` an exam; `BASE/api` holds their data.

    Args:
        find_room: Function that returns the room of a request.
        base: Path below which the pages are; it may hold parameters, such as `/uploads/{upload}`.
        record: Called with the request, the action and the exam, or None for the worklist, when somebody looks.
        viewer_link: Function from the key of an exam to its address in another viewer; empty = there is none.

    Raises:
        UsageError: The extra `serve` is not installed.
    """
    import_extra("fastapi", "serve", "view")
    from fastapi import APIRouter, Depends, Request

    def make_desk(request: Request) -> Desk:
        return Desk(find_room(request), request, base.format(**request.path_params), record)

    make_desk.__annotations__["request"] = Request  # FastAPI looks the name up in the module, where it is missing
    router = APIRouter(prefix=base)
    _add_pages(router, Depends(make_desk), make_environment(viewer_link=viewer_link))
    _add_exams(router, Depends(make_desk))
    _add_images(router, Depends(make_desk))
    add_exports(router, Depends(make_desk))
    return router


def make_static_router() -> APIRouter:
    """Return the route of scripts and styles, which all rooms share."""
    from fastapi import APIRouter
    from fastapi.responses import FileResponse

    router = APIRouter()

    @router.get("/static/{name}", include_in_schema=False, response_model=None)
    def send_static(name: str) -> FileResponse:
        path = FOLDER / "static" / name
        if path.parent != FOLDER / "static" or not path.is_file():
            raise _http_error(404, "not found")
        return FileResponse(path)

    return router


def _add_pages(router: APIRouter, at_desk: Any, environment: Any) -> None:
    """Add the HTML pages."""
    from fastapi import Form
    from fastapi.responses import HTMLResponse, PlainTextResponse, RedirectResponse

    @router.get("/", response_class=HTMLResponse, include_in_schema=False)
    @router.get("/worklist", response_class=HTMLResponse)
    def show_worklist(
        page: int = 1,
        sort: str = "order",
        only: str = "all",
        search: str = "",
        machine: str = "",
        stage: str = "",
        desk: Desk = at_desk,
    ) -> str:
        """Show the exams with their scores, sorted, filtered and paged in the database."""
        try:
            query = WorklistQuery(page, sort, only, search, machine, stage, desk.reader, desk.room.mode.blind)
        except UsageError as error:
            raise _http_error(422, str(error)) from None
        desk.record(desk.request, "GET /worklist", None)
        shown = {"sort": sort, "only": only, "search": search, "machine": machine, "stage": stage}
        return environment.get_template("worklist.html.j2").render(
            desk=desk,
            base=desk.base,
            room=desk.room,
            found=desk.room.page(query),
            query=query,
            address=f"{desk.base}/worklist?{urlencode(shown)}&page=",
        )

    @router.post("/reader", include_in_schema=False, response_model=None)
    def set_reader(name: str = Form(""), desk: Desk = at_desk) -> RedirectResponse:
        try:
            name = check_name(name)
        except UsageError as error:
            raise _http_error(422, str(error)) from None
        answer = RedirectResponse(f"{desk.base}/worklist", 303)
        answer.set_cookie("reader", quote(name), max_age=YEAR, httponly=True, samesite="strict")
        return answer

    @router.get("/exams/{key}", response_class=HTMLResponse)
    def show_exam(key: str, desk: Desk = at_desk) -> str:
        """Show an exam: its views, scores, heat maps and readings."""
        exam = desk.exam(key, "GET /exams")
        return environment.get_template("exam.html.j2").render(base=desk.base, room=desk.room, exam=exam)

    @router.get("/model-card", response_model=None)
    def send_card(desk: Desk = at_desk) -> PlainTextResponse:
        """Return the model card."""
        if not desk.room.model.card:
            raise _http_error(404, "the package has no model card")
        return PlainTextResponse(desk.room.model.card)


def _add_exams(router: APIRouter, at_desk: Any) -> None:
    """Add what the exam page's script asks for and sends."""
    from fastapi.responses import JSONResponse

    no_store = {"Cache-Control": "no-store"}

    @router.get("/api/exams/{key}", response_model=None)
    def describe_exam(key: str, desk: Desk = at_desk) -> JSONResponse:
        """Return an exam as its page shows it."""
        return JSONResponse(desk.room.describe(desk.exam(key, "GET /api/exams"), desk.reader), headers=no_store)

    @router.post("/api/exams/{key}/readings", response_model=None)
    def store_reading(key: str, body: dict[str, Any], desk: Desk = at_desk) -> JSONResponse:
        """Store a reading: BI-RADS and agreement per breast, a remark and boxes."""
        exam = desk.exam(key, "POST readings")
        try:
            desk.room.store(exam, check_name(desk.reader), body)
        except UsageError as error:
            raise _http_error(422, str(error)) from None
        except VitmodelError as error:
            raise _http_error(FAILED, str(error)) from None
        return JSONResponse(desk.room.describe(exam, desk.reader), headers=no_store)


def _add_images(router: APIRouter, at_desk: Any) -> None:
    """Add the grey values and the heat maps."""
    from fastapi import Response
    from fastapi.responses import JSONResponse

    @router.get("/api/images/{key}/tiles/{level}/{row}/{column}", response_model=None)
    def send_tile(key: str, level: int, row: int, column: int, desk: Desk = at_desk) -> Response:
        """Return grey values, `(h, w)` uint16, little endian; brighter = denser. `X-Width` is w."""
        try:
            tile = desk.room.pixels.tile(desk.image(key)[0], level, row, column)
        except IndexError:
            raise _http_error(404, "the image has no such tile") from None
        except ImageRefusedError as error:
            raise _http_error(409, str(error)) from None
        body = gzip.compress(tile.astype("<u2").tobytes(), compresslevel=1)
        headers = {"Content-Encoding": "gzip", "X-Width": str(tile.shape[1]), "Cache-Control": "private, max-age=3600"}
        return Response(body, media_type="application/octet-stream", headers=headers)

    @router.get("/api/images/{key}/heat-maps/{method}", response_model=None)
    def send_heat_map(key: str, method: str, desk: Desk = at_desk) -> JSONResponse:
        """Return a heat map, or status 202 while it is computed."""
        image, exam = desk.image(key)
        heat_maps = desk.room.heat_maps
        if heat_maps is None or method not in heat_maps.methods or not exam.is_explainable:
            raise _http_error(404, "there is no such heat map")
        if desk.room.hides_scores(exam, desk.reader):
            raise _http_error(403, HIDDEN)
        future = heat_maps.request(image, method)
        if not future.done():
            return JSONResponse({"waiting": heat_maps.waiting()}, 202)
        error = future.exception()
        if error is not None:
            return JSONResponse({"error": str(error)}, 409 if isinstance(error, VitmodelError) else FAILED)
        return JSONResponse(asdict(future.result()))


def _http_error(status: int, sentence: str) -> HTTPException:
    from fastapi import HTTPException

    return HTTPException(status, sentence)


def make_environment(*folders: Path, viewer_link: Callable[[str], str] = lambda key: "") -> Any:
    """Return the templates, which escape all text.

    Args:
        folders: Further folders of templates, which may extend those of the reading room.
        viewer_link: Function from the key of an exam to its address in another viewer; empty = there is none.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([*folders, FOLDER / "templates"]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"notice": NOT_A_MEDICAL_DEVICE, "version": __version__, "viewer_link": viewer_link}
    return environment
