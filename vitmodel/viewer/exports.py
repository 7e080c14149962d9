"""Readings as CSV, over HTTP and as files."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from vitmodel.data.tables import write_csv
from vitmodel.utils import import_extra
from vitmodel.viewer.exams import Exam
from vitmodel.viewer.reading_tables import label_table, study_table
from vitmodel.viewer.readings import Reading
from vitmodel.viewer.room import ReadingRoom

if TYPE_CHECKING:
    from fastapi import APIRouter


def make_export_router(room: ReadingRoom) -> APIRouter:
    """Return the routes of the exports; in a blinded reading they are refused, because they hold scores."""
    import_extra("fastapi", "serve", "view")
    from fastapi import APIRouter, HTTPException, Response

    router = APIRouter()

    def send(table: pd.DataFrame, name: str) -> Response:
        if room.mode.blind:
            raise HTTPException(
                403, "exports are not served in a blinded reading; write them with `vitmodel view --export`"
            )
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            write_csv(table, path)
            headers = {"Content-Disposition": f'attachment; filename="{name}"', "Cache-Control": "no-store"}
            return Response(path.read_bytes(), media_type="text/csv; charset=utf-8", headers=headers)

    def find_readings(reader: str) -> tuple[list[Exam], list[Reading]]:
        readings = room.mode.store.all(reader)
        return room.source.exams_named({reading.exam for reading in readings}), readings

    @router.get("/readings.csv")
    def send_labels(reader: str = "") -> Response:
        return send(label_table(*find_readings(reader)), "readings.csv")

    @router.get("/reader-study.csv")
    def send_study(reader: str = "") -> Response:
        return send(study_table(*find_readings(reader), room.results.truth), "reader-study.csv")

    return router
