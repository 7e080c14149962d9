"""What readers wrote about exams, in a file of lines: BI-RADS per breast, agreement with scores, remarks and boxes."""

from __future__ import annotations

import datetime
import math
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vitmodel.errors import UsageError
from vitmodel.jobs.journal import Journal, read_journal
from vitmodel.viewer.exams import Exam

READINGS = "readings.jsonl"
"""Name of the file of readings in a folder of scores."""
BIRADS = ("0", "1", "2", "3", "4", "4A", "4B", "4C", "5", "6")
MAX_NOTE = 5000
"""Most characters of a remark."""
MAX_BOXES = 50
MAX_NAME = 64
"""Most characters of a reader's name."""
MAX_SECONDS = 86400.0
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class BreastReading:
    """What a reader says of one breast."""

    birads: str = ""
    """One of `BIRADS`, or empty."""
    agrees: bool | None = None
    """Whether the reader agrees with the score; None = not stated, or the score was hidden."""


@dataclass(frozen=True)
class DrawnBox:
    """A box that a reader drew on an image."""

    image_id: str
    box: Box
    """x0, y0, x1, y1 in pixels of the source image."""


@dataclass(frozen=True)
class Reading:
    """One reader's view of one exam, as it was stored. A later one of the same reader replaces it in exports."""

    id: str
    """Chosen by the page, so that an answer that got lost does not store a reading twice."""
    reader: str
    patient_id: str
    exam_id: str
    stored: str
    """Time at which it was stored (ISO 8601)."""
    seconds: float | None
    """Time from opening the exam to storing."""
    active_seconds: float | None
    """The part of it during which the page was visible."""
    is_blinded: bool
    """Whether the scores were hidden from the reader until then."""
    breasts: Mapping[str, BreastReading]
    """By side: R, L, or empty if it is unknown."""
    note: str = ""
    boxes: tuple[DrawnBox, ...] = ()

    @property
    def exam(self) -> tuple[str, str]:
        return self.patient_id, self.exam_id

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Reading:
        """Return the reading of a line of the file."""
        breasts = {side: BreastReading(**breast) for side, breast in values["breasts"].items()}
        boxes = tuple(DrawnBox(box["image_id"], tuple(box["box"])) for box in values["boxes"])
        known = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
        return cls(**known | {"breasts": breasts, "boxes": boxes})


@dataclass(frozen=True)
class Form:
    """What the page sends when a reader stores a reading."""

    exam: Exam
    reader: str
    is_blinded: bool
    body: Mapping[str, Any] = field(repr=False)

    def to_reading(self) -> Reading:
        """Return the reading with the time of now.

        Raises:
            UsageError: A value is missing or not allowed.
        """
        breasts = {side: self._breast(side, values) for side, values in self._mapping("breasts").items()}
        note = str(self.body.get("note") or "").strip()
        _require(len(note) <= MAX_NOTE, f"note: must have at most {MAX_NOTE} characters")
        boxes = self._boxes()
        if self.is_blinded:
            unread = [
                breast.side or "unknown side" for breast in self.exam.breasts if not _is_read(breasts, breast.side)
            ]
            _require(not unread, f"BI-RADS is missing for: {', '.join(unread)}; give one for each breast")
        empty = not note and not boxes and all(breast == BreastReading() for breast in breasts.values())
        _require(not empty, "the reading is empty; give BI-RADS, an agreement, a remark or a box")
        return Reading(
            id=_text(self.body.get("id"), "id"),
            reader=self.reader,
            patient_id=self.exam.patient_id,
            exam_id=self.exam.exam_id,
            stored=datetime.datetime.now().astimezone().isoformat(timespec="milliseconds"),
            seconds=self._seconds("seconds"),
            active_seconds=self._seconds("active_seconds"),
            is_blinded=self.is_blinded,
            breasts=breasts,
            note=note,
            boxes=boxes,
        )

    def _mapping(self, name: str) -> Mapping[str, Any]:
        value = self.body.get(name) or {}
        _require(isinstance(value, Mapping), f"{name}: must be an object")
        return value

    def _breast(self, side: str, values: Any) -> BreastReading:
        _require(self.exam.breast(side) is not None, f"breasts: the exam has no breast {side!r}")
        _require(isinstance(values, Mapping), f"breasts.{side}: must be an object")
        birads, agrees = values.get("birads") or "", values.get("agrees")
        _require(birads in ("", *BIRADS), f"birads: {birads!r} is none of {', '.join(BIRADS)}")
        _require(agrees in (None, True, False), "agrees: must be true, false or null")
        _require(agrees is None or not self.is_blinded, "agrees: the score is hidden until the reading is stored")
        return BreastReading(birads, agrees)

    def _boxes(self) -> tuple[DrawnBox, ...]:
        boxes = self.body.get("boxes") or []
        _require(isinstance(boxes, list) and len(boxes) <= MAX_BOXES, f"boxes: must be at most {MAX_BOXES} boxes")
        return tuple(self._box(box) for box in boxes)

    def _box(self, box: Any) -> DrawnBox:
        images = {image.key: image for image in self.exam.images}
        known = isinstance(box, Mapping) and box.get("image") in images
        _require(known, "boxes: each needs `image`, the key of an image of the exam")
        numbers = box.get("box")
        valid = isinstance(numbers, list) and len(numbers) == 4 and all(_is_number(number) for number in numbers)
        _require(valid, "boxes: each needs `box`, the four numbers x0 y0 x1 y1")
        x0, y0, x1, y1 = (max(0.0, float(number)) for number in numbers)
        image = images[box["image"]]
        x1, y1 = min(x1, image.columns or math.inf), min(y1, image.rows or math.inf)
        _require(x0 < x1 and y0 < y1, "boxes: a box is empty or outside its image")
        return DrawnBox(image.image_id, (round(x0, 1), round(y0, 1), round(x1, 1), round(y1, 1)))

    def _seconds(self, name: str) -> float | None:
        value = self.body.get(name)
        if value is None:
            return None
        _require(_is_number(value) and 0 <= value <= MAX_SECONDS, f"{name}: must lie between 0 and {MAX_SECONDS:.0f}")
        return round(float(value), 1)


class ReadingStore:
    """The readings of a file, one JSON object per line; lines are only appended. Several threads may ask.

    Args:
        path: The file; it is created with the first reading.

    Raises:
        UsageError: The file cannot be read, or holds lines that are no readings.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._journal: Journal | None = None
        self._readings = _read(path)

    def add(self, reading: Reading) -> Reading:
        """Store a reading, and return it or the one with the same id that was stored before.

        Raises:
            VitmodelError: The file cannot be written.
        """
        with self._lock:
            if reading.id not in self._readings:
                self._journal = self._journal or Journal(self.path, durable=True)
                self._journal.append(reading.id, asdict(reading))
                self._readings[reading.id] = reading
            return self._readings[reading.id]

    def all(self, reader: str = "") -> list[Reading]:
        """Return the readings in the order of storing; `reader` limits them to one reader."""
        with self._lock:
            return [reading for reading in self._readings.values() if reader in ("", reading.reader)]

    def of(self, exam: Exam, reader: str = "") -> list[Reading]:
        """Return the readings of an exam in the order of storing; `reader` limits them to one reader."""
        return [reading for reading in self.all(reader) if reading.exam == exam.ids]


def check_name(name: str) -> str:
    """Return a reader's name without spaces around it.

    Raises:
        UsageError: It is empty, too long, or has characters that cannot be printed.
    """
    name = " ".join(name.split())
    _require(0 < len(name) <= MAX_NAME and name.isprintable(), f"reader: must be a name of 1 to {MAX_NAME} characters")
    return name


def _read(path: Path) -> dict[str, Reading]:
    try:
        return {key: Reading.from_dict(entry) for key, entry in read_journal(path).items()}
    except OSError as error:
        raise UsageError(f"readings: cannot read {path}: {error.strerror or error}") from error
    except (KeyError, TypeError, AttributeError):
        raise UsageError(
            f"readings: {path} is not a file that `vitmodel view` wrote; choose another one with --readings"
        ) from None


def _is_read(breasts: Mapping[str, BreastReading], side: str) -> bool:
    return side in breasts and bool(breasts[side].birads)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _text(value: Any, name: str) -> str:
    _require(isinstance(value, str) and 0 < len(value) <= MAX_NAME, f"{name}: must be a text of 1 to {MAX_NAME}")
    return str(value)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UsageError(message)
