"""The exams of one source with what belongs to them: worklist, pixels, heat maps, readings and a second model."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from vitmodel.errors import ImageRefusedError
from vitmodel.pixels.identity import read_identity
from vitmodel.pixels.verdict import REFUSAL_REASONS, WARNING_REASONS
from vitmodel.utils import NOT_A_MEDICAL_DEVICE
from vitmodel.viewer.exams import BreastEntry, Exam, ImageEntry
from vitmodel.viewer.heat_maps import METHODS, HeatMapStore
from vitmodel.viewer.model_facts import ModelFacts
from vitmodel.viewer.pixels import TILE, PixelStore
from vitmodel.viewer.readings import BIRADS, Form, Reading, ReadingStore
from vitmodel.viewer.worklist import FILTERS, SHOWING_SCORES, SORTS, Worklist, WorklistPage, WorklistQuery

MEANINGS = REFUSAL_REASONS | WARNING_REASONS


@dataclass(frozen=True, eq=False)
class Results:
    """Finished results that are shown."""

    exams: Sequence[Exam]
    title: str
    """Name of the source, shown above the worklist."""
    scored: datetime.datetime | None = None
    """When the scores were written."""
    others: Sequence[Exam] = ()
    """The same exams with the scores of another model."""
    other_title: str = ""
    truth: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Key of the exam -> side -> label, after an evaluation."""


@dataclass(frozen=True)
class ReadingMode:
    """Who reads, and whether scores are hidden until a reading is stored."""

    store: ReadingStore
    reader: str = ""
    """The only reader; empty = the page asks for the name."""
    blind: bool = False


@dataclass(frozen=True, eq=False)
class Model:
    """The model behind the scores, and its heat maps; None = there are none."""

    facts: ModelFacts = field(default_factory=ModelFacts)
    heat_maps: HeatMapStore | None = None


class ReadingRoom:
    """The exams of one source with their pixels, heat maps and readings.

    Args:
        results: The exams and their scores.
        model: The model that scored them.
        mode: The readings and how they are made.
    """

    def __init__(self, results: Results, model: Model, mode: ReadingMode) -> None:
        self.results = results
        self.exams = {exam.key: exam for exam in results.exams}
        self.images = {image.key: image for exam in self.exams.values() for image in exam.images}
        self.exam_of_image = {image.key: exam for exam in self.exams.values() for image in exam.images}
        self.others = {exam.ids: exam for exam in results.others}
        self.worklist = Worklist(self.exams.values(), self.others, self._find_date)
        self.model = model.facts
        self.heat_maps = model.heat_maps
        self.mode = mode
        self.pixels = PixelStore()
        keys = {exam.ids: exam.key for exam in self.exams.values()}
        for reading in mode.store.all():
            if reading.exam in keys:
                self.worklist.mark_read(keys[reading.exam], reading.reader)

    @property
    def age(self) -> str:
        """How long ago the scores were written, in words; empty if it is unknown."""
        return (
            ""
            if self.results.scored is None
            else describe_age(self.results.scored, datetime.datetime.now().astimezone())
        )

    @property
    def sorts(self) -> list[str]:
        """The orders that the worklist offers."""
        hidden = SHOWING_SCORES | {"patient"} if self.mode.blind else () if self.others else ("difference",)
        return [name for name in SORTS if name not in hidden]

    @property
    def filters(self) -> list[str]:
        """The choices that the worklist offers."""
        return [name for name in FILTERS if not (self.mode.blind and name in SHOWING_SCORES)]

    def hides_scores(self, exam: Exam, reader: str) -> bool:
        """Return whether a reader may not see the scores of an exam yet."""
        return self.mode.blind and not (reader and self.worklist.is_read(exam.key, reader))

    def page(self, query: WorklistQuery) -> WorklistPage:
        """Return a page of the worklist, without the scores that are hidden."""
        found = self.worklist.page(query)
        rows = [
            row.without_scores() if self.hides_scores(self.exams[row.key], query.reader) else row for row in found.rows
        ]
        return WorklistPage(rows, found.total, found.page, found.pages)

    def store(self, exam: Exam, reader: str, body: dict[str, Any]) -> Reading:
        """Store a reading.

        Raises:
            UsageError: A value is missing or not allowed.
            VitmodelError: The file cannot be written.
        """
        reading = self.mode.store.add(Form(exam, reader, self.hides_scores(exam, reader), body).to_reading())
        self.worklist.mark_read(exam.key, reader)
        return reading

    def describe(self, exam: Exam, reader: str) -> dict[str, Any]:
        """Return an exam as the page's script reads it, without the scores if they are hidden from the reader."""
        hidden = self.hides_scores(exam, reader)
        query = WorklistQuery(reader=reader, blind=self.mode.blind)
        before, after = self.worklist.neighbours(exam.key, query)
        other = None if hidden else self.others.get(exam.ids)
        facts = asdict(self.model)
        facts["card"] = bool(self.model.card)
        return {
            "key": exam.key,
            "patient_id": exam.patient_id,
            "exam_id": exam.exam_id,
            "date": self.worklist.date(exam.key),
            "status": exam.status,
            "hidden": hidden,
            "images": [self._describe_image(image, hidden) for image in exam.hanging()],
            "breasts": [_describe_breast(breast, other, hidden) for breast in exam.breasts],
            "truth": {} if hidden else self.results.truth.get(exam.key, {}),
            "model": facts,
            "other_title": self.results.other_title,
            "methods": METHODS if self.heat_maps and not hidden else {},
            "tile": TILE,
            "before": before,
            "after": after,
            "others": self._describe_others(exam, reader),
            "reader": reader,
            "readings": [self._describe_reading(exam, reading) for reading in self._visible_readings(exam, reader)],
            "birads": BIRADS,
            "notice": NOT_A_MEDICAL_DEVICE,
        }

    def _visible_readings(self, exam: Exam, reader: str) -> list[Reading]:
        """Return the readings that a reader may see: in blinded reading only her own."""
        if self.mode.blind and not reader:
            return []
        return self.mode.store.of(exam, reader if self.mode.blind else "")

    def _describe_reading(self, exam: Exam, reading: Reading) -> dict[str, Any]:
        keys = {image.image_id: image.key for image in exam.images}
        boxes = [{"image": keys[box.image_id], "box": box.box} for box in reading.boxes if box.image_id in keys]
        return asdict(reading) | {"boxes": boxes}

    def _describe_others(self, exam: Exam, reader: str) -> list[dict[str, Any]]:
        """Return the other exams of the patient, the latest first where their dates are known."""
        others = [self.exams[key] for key in self.worklist.exams_of(exam.patient_id) if key != exam.key]
        described = [
            {
                "key": other.key,
                "exam_id": other.exam_id,
                "date": self.worklist.date(other.key),
                "breasts": [
                    _describe_breast(breast, None, self.hides_scores(other, reader)) for breast in other.breasts
                ],
            }
            for other in others
        ]
        return sorted(described, key=lambda other: str(other["date"]), reverse=True)

    def _describe_image(self, image: ImageEntry, hidden: bool) -> dict[str, Any]:
        names = (
            *("key", "image_id", "side", "view", "status", "reason", "remark", "probability", "region", "typicality"),
            *("outputs", "machine"),
        )
        described: dict[str, Any] = {name: getattr(image, name) for name in names}
        if hidden:
            described |= {"probability": None, "region": (), "typicality": None, "outputs": {}}
        described["meaning"] = explain(image.reason)
        described["mirrored"] = image.is_mirrored
        try:
            described["pixels"] = asdict(self.pixels.facts(image))
        except ImageRefusedError as error:
            described["pixels"] = None
            described["problem"] = str(error)
        return described

    def _find_date(self, key: str) -> str:
        """Return the date in the header of the exam's first readable image; empty if there is none."""
        for image in self.exams[key].images:
            date = read_identity(image.path).exam_date if image.path else ""
            if len(date) == 8 and date.isdigit():
                return f"{date[:4]}-{date[4:6]}-{date[6:]}"
        return ""


def describe_age(then: datetime.datetime, now: datetime.datetime) -> str:
    """Return the time between two moments in the largest whole unit, such as `3 days ago`."""
    seconds = max(0, int((now - then).total_seconds()))
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        count = seconds // length
        if count:
            return f"{count} {unit}{'' if count == 1 else 's'} ago"
    return "just now"


def explain(reasons: str) -> str:
    """Return the sentences on codes of `pixels/verdict.py` that are separated by ';'."""
    return "; ".join(MEANINGS.get(code, code) for code in reasons.split(";") if code)


def _describe_breast(breast: BreastEntry, other: Exam | None, hidden: bool) -> dict[str, Any]:
    """Return a breast with the probability of the other model."""
    second = other.breast(breast.side) if other else None
    described = asdict(breast) | {"other": second.probability if second else None, "meaning": explain(breast.reason)}
    if hidden:
        described |= {"probability": None, "is_positive": None, "outputs": {}}
    return described
