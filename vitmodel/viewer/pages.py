"""The pages of the reading room and the data behind them, as routes that an application includes."""

from __future__ import annotations

import gzip
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitmodel import __version__
from vitmodel.errors import ImageRefusedError, UsageError
from vitmodel.pixels.verdict import REFUSAL_REASONS
from vitmodel.utils import NOT_A_MEDICAL_DEVICE, import_extra
from vitmodel.viewer.exams import Exam, ImageEntry
from vitmodel.viewer.heat_maps import METHODS, HeatMapStore
from vitmodel.viewer.pixels import TILE, PixelStore
from vitmodel.viewer.worklist import FILTERS, SORTS, Worklist

if TYPE_CHECKING:
    from fastapi import APIRouter

FOLDER = Path(__file__).parent
FAILED = 500


@dataclass(frozen=True)
class ModelFacts:
    """The model behind the scores, as far as it is known."""

    name: str = ""
    version: str = ""
    threshold: float | None = None
    label: str = "cancer"


class ReadingRoom:
    """The exams of one source with their pixels and heat maps.

    Args:
        exams: The exams.
        title: Name of the source, shown above the worklist.
        model: The model behind the scores.
        heat_maps: Computes heat maps; None = there are none.
    """

    def __init__(
        self, exams: Iterable[Exam], title: str, model: ModelFacts, heat_maps: HeatMapStore | None = None
    ) -> None:
        self.exams = {exam.key: exam for exam in exams}
        self.images = {image.key: image for exam in self.exams.values() for image in exam.images}
        self.worklist = Worklist(self.exams.values())
        self.title = title
        self.model = model
        self.pixels = PixelStore()
        self.heat_maps = heat_maps

    def describe(self, exam: Exam) -> dict[str, Any]:
        """Return an exam as the page's script reads it."""
        before, after = self.worklist.neighbours(exam.key)
        return {
            "key": exam.key,
            "patient_id": exam.patient_id,
            "exam_id": exam.exam_id,
            "status": exam.status,
            "images": [self._describe_image(image) for image in exam.hanging()],
            "breasts": [asdict(breast) for breast in exam.breasts],
            "model": asdict(self.model),
            "methods": METHODS if self.heat_maps else {},
            "tile": TILE,
            "before": before,
            "after": after,
            "notice": NOT_A_MEDICAL_DEVICE,
        }

    def _describe_image(self, image: ImageEntry) -> dict[str, Any]:
        described: dict[str, Any] = {
            name: getattr(image, name)
            for name in ("key", "image_id", "side", "view", "status", "reason", "remark", "probability", "region")
        }
        described["meaning"] = "; ".join(REFUSAL_REASONS.get(code, code) for code in image.reason.split(";") if code)
        described["mirrored"] = image.is_mirrored
        try:
            described["pixels"] = asdict(self.pixels.facts(image))
        except ImageRefusedError as error:
            described["pixels"] = None
            described["problem"] = str(error)
        return described


def make_router(room: ReadingRoom) -> APIRouter:
    """Return the routes of the reading room.

    `GET /` is the worklist and `GET /exams/KEY` an exam; `/api` holds their data.

    Raises:
        UsageError: The extra `serve` is not installed.
    """
    import_extra("fastapi", "serve", "view")
    from fastapi import APIRouter, HTTPException, Response
    from fastapi.responses import FileResponse, HTMLResponse, JSONResponse

    router = APIRouter()
    environment = _templates()

    def find(table: dict[str, Any], key: str) -> Any:
        if key not in table:
            raise HTTPException(404, "not found")
        return table[key]

    @router.get("/", response_class=HTMLResponse)
    def show_worklist(page: int = 1, sort: str = "order", only: str = "all", search: str = "") -> str:
        try:
            found = room.worklist.page(page, sort, only, search)  # type: ignore[arg-type]
        except UsageError as error:
            raise HTTPException(422, str(error)) from None
        return environment.get_template("worklist.html.j2").render(
            room=room, found=found, sort=sort, only=only, search=search, sorts=SORTS, filters=FILTERS
        )

    @router.get("/exams/{key}", response_class=HTMLResponse)
    def show_exam(key: str) -> str:
        return environment.get_template("exam.html.j2").render(room=room, exam=find(room.exams, key))

    @router.get("/api/exams/{key}")
    def describe_exam(key: str) -> JSONResponse:
        return JSONResponse(room.describe(find(room.exams, key)))

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
    def send_heat_map(key: str, method: str) -> JSONResponse:
        image = find(room.images, key)
        if room.heat_maps is None or method not in METHODS:
            raise HTTPException(404, "not found")
        future = room.heat_maps.request(image, method)
        if not future.done():
            return JSONResponse({"waiting": room.heat_maps.waiting()}, 202)
        error = future.exception()
        if error is not None:
            return JSONResponse({"error": str(error)}, 409 if isinstance(error, ImageRefusedError) else FAILED)
        return JSONResponse(asdict(future.result()))

    @router.get("/static/{name}")
    def send_static(name: str) -> FileResponse:
        path = FOLDER / "static" / name
        if path.parent != FOLDER / "static" or not path.is_file():
            raise HTTPException(404, "not found")
        return FileResponse(path)

    return router


def _templates() -> Any:
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
