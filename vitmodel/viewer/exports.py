"""Readings as CSV, over HTTP."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from vitmodel.data.tables import write_csv
from vitmodel.viewer.exams import Exam
from vitmodel.viewer.reading_tables import label_table, study_table
from vitmodel.viewer.readings import Reading
from vitmodel.viewer.room import ReadingRoom

if TYPE_CHECKING:
    from fastapi import APIRouter


def add_exports(router: APIRouter, at_desk: Any) -> None:
    """Add the exports of readings; in a blinded reading they are refused, because they hold scores."""
    from fastapi import HTTPException, Response

    def find_readings(room: ReadingRoom, reader: str) -> tuple[list[Exam], list[Reading]]:
        if room.mode.blind:
            raise HTTPException(
                403, "exports are not served in a blinded reading; write them with `vitmodel view --export`"
            )
        readings = room.mode.store.all(reader)
        return room.source.exams_named({reading.exam for reading in readings}), readings

    def send(table: pd.DataFrame, name: str) -> Response:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            write_csv(table, path)
            headers = {"Content-Disposition": f'attachment; filename="{name}"', "Cache-Control": "no-store"}
            return Response(path.read_bytes(), media_type="text/csv; charset=utf-8", headers=headers)

    def send_labels(reader: str = "", desk: Any = at_desk) -> Response:
        """Return the latest readings as labels for `vitmodel etl`, one row per reader and image."""
        return send(label_table(*find_readings(desk.room, reader)), "readings.csv")

    def send_study(reader: str = "", desk: Any = at_desk) -> Response:
        """Return one row per reader, exam and breast, for the analysis of several readers."""
        table = study_table(*find_readings(desk.room, reader), desk.room.results.truth)
        return send(table, "reader-study.csv")

    router.get("/readings.csv", response_model=None)(send_labels)
    router.get("/reader-study.csv", response_model=None)(send_study)
