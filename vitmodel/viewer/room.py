"""The exams of one source with what belongs to them: worklist, pixels, heat maps, readings and a second model."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from vitmodel.errors import ImageRefusedError
from vitmodel.pixels.verdict import REFUSAL_REASONS, WARNING_REASONS
from vitmodel.utils import NOT_A_MEDICAL_DEVICE
from vitmodel.viewer.exams import BreastEntry, Exam, ImageEntry
from vitmodel.viewer.heat_maps import HeatMapStore
from vitmodel.viewer.model_facts import ModelFacts
from vitmodel.viewer.pixels import TILE, PixelStore
from vitmodel.viewer.readings import BIRADS, Form, Reading
from vitmodel.viewer.source import FILTERS, SHOWING_SCORES, ExamSource, WorklistPage, WorklistQuery

MEANINGS = REFUSAL_REASONS | WARNING_REASONS
WITHOUT_PIXELS = ("no_pixels", "unreadable", "undecodable")
"""Codes of refused images whose pixels cannot be shown."""


@dataclass(frozen=True, eq=False)
class Results:
    """What is shown with the exams."""

    title: str
    """Name of the source, shown above the worklist."""
    scored: float | None = None
    """When the scores were written, in seconds since 1970; None = it is unknown or differs from exam to exam."""
    others: Sequence[Exam] = ()
    """The same exams with the scores of another model."""
    other_title: str = ""
    truth: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Key of the exam -> side -> label, after an evaluation."""


class Readings(Protocol):
    """Where readings are kept."""

    def add(self, reading: Reading) -> Reading:
        """Store a reading, and return it or the one with the same id that was stored before."""

    def all(self, reader: str = "") -> list[Reading]:
        """Return the readings in the order of storing; `reader` limits them to one reader."""

    def of(self, exam: Exam, reader: str = "") -> list[Reading]:
        """Return the readings of an exam in the order of storing; `reader` limits them to one reader."""


@dataclass(frozen=True)
class ReadingMode:
    """Who reads, and whether scores are hidden until a reading is stored."""

    store: Readings
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
        source: The exams.
        results: What is shown with them.
        mode: The readings and how they are made.
        load_model: Function that returns the model that scored them; it is called when the model is first needed.
    """

    def __init__(
        self, source: ExamSource, results: Results, mode: ReadingMode, load_model: Callable[[], Model] = Model
    ) -> None:
        self.source = source
        self.results = results
        self.others = {exam.ids: exam for exam in results.others}
        self.mode = mode
        self.pixels = PixelStore()
        self._load_model = load_model
        self._loading = threading.Lock()
        self._loaded: Model | None = None

    def _model(self) -> Model:
        with self._loading:  # a second request waits for the first instead of loading once more
            if self._loaded is None:
                self._loaded = self._load_model()
            return self._loaded

    @property
    def model(self) -> ModelFacts:
        """What is known of the model."""
        return self._model().facts

    @property
    def heat_maps(self) -> HeatMapStore | None:
        """The heat maps on demand; None = there are none."""
        return self._model().heat_maps

    @property
    def age(self) -> str:
        """How long ago the scores were written, in words; empty if it is unknown."""
        scored = self.results.scored
        return "" if scored is None else describe_age(time.time() - scored)

    @property
    def orders(self) -> dict[str, str]:
        """The orders that the worklist offers, and what the page calls them."""
        hidden = SHOWING_SCORES | {"patient"} if self.mode.blind else ()
        return {name: text for name, text in self.source.orders.items() if name not in hidden}

    @property
    def filters(self) -> list[str]:
        """The choices that the worklist offers."""
        return [name for name in FILTERS if not (self.mode.blind and name in SHOWING_SCORES)]

    def hides_scores(self, exam: Exam, reader: str) -> bool:
        """Return whether a reader may not see the scores of an exam yet."""
        return self.mode.blind and not self._is_open(exam.key, reader)

    def _is_open(self, key: str, reader: str) -> bool:
        return bool(reader) and self.source.is_read(key, reader)

    def page(self, query: WorklistQuery) -> WorklistPage:
        """Return a page of the worklist, without the scores that are hidden."""
        found = self.source.page(query)
        if not self.mode.blind:
            return found
        rows = [row if self._is_open(row.key, query.reader) else row.without_scores() for row in found.rows]
        return WorklistPage(rows, found.total, found.page, found.pages)

    def store(self, exam: Exam, reader: str, body: dict[str, Any]) -> Reading:
        """Store a reading.

        Raises:
            UsageError: A value is missing or not allowed.
            VitmodelError: The file cannot be written.
        """
        reading = self.mode.store.add(Form(exam, reader, self.hides_scores(exam, reader), body).to_reading())
        self.source.mark_read(exam.key, reader)
        return reading

    def describe(self, exam: Exam, reader: str) -> dict[str, Any]:
        """Return an exam as the page's script reads it, without the scores if they are hidden from the reader."""
        hidden = self.hides_scores(exam, reader)
        query = WorklistQuery(reader=reader, blind=self.mode.blind)
        before, after = self.source.neighbours(exam.key, query)
        other = None if hidden else self.others.get(exam.ids)
        facts = asdict(self.model)
        facts["card"] = bool(self.model.card)
        return {
            "key": exam.key,
            "patient_id": exam.patient_id,
            "exam_id": exam.exam_id,
            "date": self.source.date(exam.key),
            "status": exam.status,
            "note": exam.note,
            "hidden": hidden,
            "images": [self._describe_image(image, hidden) for image in exam.hanging()],
            "breasts": [_describe_breast(breast, other, hidden) for breast in exam.breasts],
            "truth": {} if hidden else self.results.truth.get(exam.key, {}),
            "model": facts,
            "other_title": self.results.other_title,
            "methods": self.heat_maps.methods if self.heat_maps and exam.is_explainable and not hidden else {},
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
        described = [
            {
                "key": other.key,
                "exam_id": other.exam_id,
                "date": self.source.date(other.key),
                "breasts": [
                    _describe_breast(breast, None, self.hides_scores(other, reader)) for breast in other.breasts
                ],
            }
            for other in self.source.other_exams(exam)
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
        described |= {"mirrored": image.is_mirrored, "margin": image.wall_margin, "reach": image.reach}
        described["pixels"] = None
        if image.reason in WITHOUT_PIXELS:  # the header may be readable, but the page would ask for tiles in vain
            described["problem"] = image.remark
            return described
        try:
            described["pixels"] = asdict(self.pixels.facts(image))
        except ImageRefusedError as error:
            described["problem"] = str(error)
        return described


def describe_age(seconds: float) -> str:
    """Return a time that has passed in the largest whole unit, such as `3 days ago`."""
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        count = int(seconds // length)
        if count > 0:
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
        described |= {"probability": None, "is_positive": None, "outputs": {}, "interval": None}
    return described
