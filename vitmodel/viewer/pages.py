"""The pages of the reading room and the data behind them, as routes that an application includes."""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote, urlencode

from vitmodel import __version__
from vitmodel.errors import ImageRefusedError, UsageError, VitmodelError
from vitmodel.utils import NOT_A_MEDICAL_DEVICE, import_extra
from vitmodel.viewer.heat_maps import METHODS
from vitmodel.viewer.readings import check_name
from vitmodel.viewer.room import ReadingRoom
from vitmodel.viewer.worklist import WorklistQuery

if TYPE_CHECKING:
    from fastapi import APIRouter

FOLDER = Path(__file__).parent
FAILED = 500
HIDDEN = "the scores of this exam are hidden until you have stored a reading"
YEAR = 365 * 86400


def make_router(room: ReadingRoom) -> APIRouter:
    """Return the routes of the reading room.

    `GET /` is the worklist and `GET /exams/KEY` an exam; `/api` holds their data. A reader's name is in a cookie,
    unless the room has a single reader.

    Raises:
        UsageError: The extra `serve` is not installed.
    """
    import_extra("fastapi", "serve", "view")
    from fastapi import APIRouter, Cookie, Form, HTTPException, Response
    from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, PlainTextResponse, RedirectResponse

    router = APIRouter()
    environment = make_environment()

    def find(table: Mapping[str, Any], key: str) -> Any:
        if key not in table:
            raise HTTPException(404, "not found")
        return table[key]

    def name_of(cookie: str) -> str:
        return room.mode.reader or unquote(cookie)

    @router.get("/", response_class=HTMLResponse)
    def show_worklist(
        page: int = 1,
        sort: str = "order",
        only: str = "all",
        search: str = "",
        machine: str = "",
        reader: str = Cookie(""),
    ) -> str:
        try:
            query = WorklistQuery(page, sort, only, search, machine, name_of(reader), room.mode.blind)
        except UsageError as error:
            raise HTTPException(422, str(error)) from None
        address = "/?" + urlencode({"sort": sort, "only": only, "search": search, "machine": machine}) + "&page="
        return environment.get_template("worklist.html.j2").render(
            room=room, found=room.page(query), query=query, address=address
        )

    @router.post("/reader")
    def set_reader(name: str = Form("")) -> RedirectResponse:
        try:
            name = check_name(name)
        except UsageError as error:
            raise HTTPException(422, str(error)) from None
        answer = RedirectResponse("/", 303)
        answer.set_cookie("reader", quote(name), max_age=YEAR, httponly=True, samesite="strict")
        return answer

    @router.get("/exams/{key}", response_class=HTMLResponse)
    def show_exam(key: str) -> str:
        return environment.get_template("exam.html.j2").render(room=room, exam=find(room.exams, key))

    @router.get("/api/exams/{key}")
    def describe_exam(key: str, reader: str = Cookie("")) -> JSONResponse:
        return JSONResponse(
            room.describe(find(room.exams, key), name_of(reader)), headers={"Cache-Control": "no-store"}
        )

    @router.post("/api/exams/{key}/readings")
    def store_reading(key: str, body: dict[str, Any], reader: str = Cookie("")) -> JSONResponse:
        exam = find(room.exams, key)
        try:
            room.store(exam, check_name(name_of(reader)), body)
        except UsageError as error:
            raise HTTPException(422, str(error)) from None
        except VitmodelError as error:
            raise HTTPException(FAILED, str(error)) from None
        return JSONResponse(room.describe(exam, name_of(reader)))

    @router.get("/model-card")
    def send_card() -> PlainTextResponse:
        if not room.model.card:
            raise HTTPException(404, "not found")
        return PlainTextResponse(room.model.card)

    @router.get("/api/images/{key}/tiles/{level}/{row}/{column}")
    def send_tile(key: str, level: int, row: int, column: int) -> Response:
        try:
            tile = room.pixels.tile(find(room.images, key), level, row, column)
        except IndexError:
            raise HTTPException(404, "not found") from None
        except ImageRefusedError as error:
            raise HTTPException(409, str(error)) from None
        body = gzip.compress(tile.astype("<u2").tobytes(), compresslevel=1)
        headers = {"Content-Encoding": "gzip", "X-Width": str(tile.shape[1]), "Cache-Control": "private, max-age=3600"}
        return Response(body, media_type="application/octet-stream", headers=headers)

    @router.get("/api/images/{key}/heat-maps/{method}")
    def send_heat_map(key: str, method: str, reader: str = Cookie("")) -> JSONResponse:
        image = find(room.images, key)
        if room.heat_maps is None or method not in METHODS:
            raise HTTPException(404, "not found")
        if room.hides_scores(room.exam_of_image[key], name_of(reader)):
            raise HTTPException(403, HIDDEN)
        future = room.heat_maps.request(image, method)
        if not future.done():
            return JSONResponse({"waiting": room.heat_maps.waiting()}, 202)
        error = future.exception()
        if error is not None:
            return JSONResponse({"error": str(error)}, 409 if isinstance(error, VitmodelError) else FAILED)
        return JSONResponse(asdict(future.result()))

    @router.get("/static/{name}")
    def send_static(name: str) -> FileResponse:
        path = FOLDER / "static" / name
        if path.parent != FOLDER / "static" or not path.is_file():
            raise HTTPException(404, "not found")
        return FileResponse(path)

    return router


def make_environment() -> Any:
    """Return the templates, which escape all text."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"notice": NOT_A_MEDICAL_DEVICE, "version": __version__}
    return environment
