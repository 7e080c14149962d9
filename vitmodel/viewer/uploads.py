"""Uploads to a server that are kept for a while, each with a reading room of its own."""

from __future__ import annotations

import datetime
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from vitmodel.errors import RequestRefusedError
from vitmodel.viewer.readings import READINGS, ReadingStore
from vitmodel.viewer.room import Model, ReadingMode, ReadingRoom, Results
from vitmodel.viewer.scores_folder import make_exams
from vitmodel.viewer.worklist import Worklist

if TYPE_CHECKING:
    from starlette.requests import Request

BASE = "/uploads/{upload}"
"""Path of an upload's pages."""
MAX_KEPT = 50
"""Uploads that are kept at a time; a further one replaces the oldest."""
MAX_BYTES = 10_000_000_000
"""Size of the uploads that are kept at a time; beyond it, the oldest are deleted, but never the last one."""


@dataclass(frozen=True)
class KeptUpload:
    """An upload with its pages."""

    room: ReadingRoom
    folder: Path
    until: float
    """When it is deleted, by `time.monotonic`."""
    size: int
    """Bytes of its files."""


class KeptUploads:
    """The uploads that can be looked at. Several threads may ask.

    An upload's address holds a random name of 128 bits, so that nobody finds the upload of another one.

    Args:
        seconds: How long each is kept.
        discard: Function that deletes the folder of an upload.
        load_model: Function that returns the model that scored them.
    """

    def __init__(self, seconds: float, discard: Callable[[Path], None], load_model: Callable[[], Model]) -> None:
        self.seconds = seconds
        self._discard = discard
        self._load_model = load_model
        self._kept: dict[str, KeptUpload] = {}
        self._lock = threading.Lock()

    def keep(
        self, folder: Path, images: pd.DataFrame, breasts: pd.DataFrame, records: Sequence[Mapping[str, Any]]
    ) -> str:
        """Keep a scored upload and return the address of its worklist.

        Args:
            folder: Its files, which are deleted later.
            images: Table of images, N rows.
            breasts: Table of breasts.
            records: The N records of the images.
        """
        exams = make_exams(images, breasts, [{"record": record} for record in records])
        end = datetime.datetime.now().astimezone() + datetime.timedelta(seconds=self.seconds)
        title = f"Upload, deleted with its readings at {end:%H:%M}"
        mode = ReadingMode(ReadingStore(folder / READINGS))
        room = ReadingRoom(Worklist(exams), Results(title), mode, self._load_model)
        name = secrets.token_urlsafe(16)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        with self._lock:
            self._kept[name] = KeptUpload(room, folder, time.monotonic() + self.seconds, size)
        self.expire()
        return BASE.format(upload=name) + "/worklist"

    def find_room(self, request: Request) -> ReadingRoom:
        """Return the reading room of a request.

        Raises:
            RequestRefusedError: The upload does not exist or has been deleted.
        """
        with self._lock:
            kept = self._kept.get(request.path_params["upload"])
        if kept is None or kept.until < time.monotonic():
            raise RequestRefusedError(404, "the upload does not exist or has been deleted; upload the images again")
        return kept.room

    def expire(self) -> None:
        """Delete the uploads whose time is over, and the oldest ones above `MAX_KEPT` or `MAX_BYTES`."""
        now = time.monotonic()
        over = []
        with self._lock:
            for name in list(self._kept):  # the oldest first
                size = sum(kept.size for kept in self._kept.values())
                is_too_much = len(self._kept) > MAX_KEPT or (size > MAX_BYTES and len(self._kept) > 1)
                if is_too_much or self._kept[name].until < now:
                    over.append(self._kept.pop(name))
        for kept in over:
            self._discard(kept.folder)
