"""What the pages need from a source of exams: a folder of scores, the database of a node, or an upload."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from vitmodel.errors import UsageError
from vitmodel.viewer.exams import Exam

PAGE = 50
"""Exams per page."""
SORTS = ("order", "patient", "probability", "difference")
FILTERS = ("all", "unread", "positive", "refused", "warned")
SHOWING_SCORES = frozenset(("probability", "difference", "positive"))
"""Orders and choices that reveal scores."""


@dataclass(frozen=True)
class WorklistQuery:
    """Which exams to list, and in what order.

    Raises:
        UsageError: `sort` or `only` is not a choice, or reveals the scores of a blinded reading.
    """

    page: int = 1
    """Number of the page, from 1; a number beyond the last one gives the last page."""
    sort: str = "order"
    """A member of `SORTS`: order of the source, patient, falling probability or difference; unscored exams last."""
    only: str = "all"
    """A member of `FILTERS`. `unread` means by the reader or, without one, by anybody."""
    search: str = ""
    """Text that the patient or exam id contains, in upper or lower case."""
    machine: str = ""
    """The machine of an image; empty = any."""
    stage: str = ""
    """A stage of the source; empty = any."""
    reader: str = ""
    """Who reads."""
    blind: bool = False
    """Whether to list in the random order of the reader, and never by scores."""

    def __post_init__(self) -> None:
        for name, choices in (("sort", SORTS), ("only", FILTERS)):
            value = getattr(self, name)
            if value not in choices:
                raise UsageError(f"{name}: {value!r} is not a choice; choose from {', '.join(choices)}")
            if self.blind and value in SHOWING_SCORES:
                raise UsageError(f"{name}: {value!r} reveals scores, which are hidden until an exam is read")


@dataclass(frozen=True)
class WorklistRow:
    """One line of the worklist."""

    key: str
    patient_id: str
    exam_id: str
    views: str
    right: float | None
    """Probability of the right breast."""
    left: float | None
    other_right: float | None
    """Probability of the right breast in the compared scores."""
    other_left: float | None
    positive: int
    """1 if a breast is at or above the threshold."""
    status: str
    reasons: str
    images: int
    machine: str
    """Machines of the images, separated by ';'."""
    date: str | None
    """Date of the exam, YYYY-MM-DD; empty = unknown, None = not looked up yet."""
    is_read: int
    """1 if the reader, or without one anybody, stored a reading."""
    stage: str = ""
    """Stage of the work on the exam, if the source has stages."""
    age: str = ""
    """How long ago the exam was scored, if it differs from exam to exam."""
    link: str = ""
    """Address of a page with technical details, which the stage links to."""
    is_hidden: bool = False
    """Whether the scores are hidden from the reader."""
    right_interval: tuple[float, float] | None = None
    """Calibration interval of the right breast's probability."""
    left_interval: tuple[float, float] | None = None

    def without_scores(self) -> WorklistRow:
        """Return the row for a reader who may not see scores."""
        unknown: dict[str, Any] = dict.fromkeys(
            ("right", "left", "other_right", "other_left", "right_interval", "left_interval")
        )
        return replace(self, **unknown, positive=0, is_hidden=True)


@dataclass(frozen=True)
class WorklistPage:
    """One page of the worklist."""

    rows: list[WorklistRow]
    total: int
    """Number of exams on all pages."""
    page: int
    """Number of this page, from 1."""
    pages: int


class ExamSource(Protocol):
    """Exams, listed in pages and found by the keys of their addresses. Several threads may ask."""

    @property
    def orders(self) -> Mapping[str, str]:
        """The members of `SORTS` that the source offers, and what the page calls them."""

    @property
    def machines(self) -> Sequence[str]:
        """The imaging devices, for the filter."""

    @property
    def stages(self) -> Sequence[str]:
        """The stages of the work on an exam, for the filter; empty = all exams are finished."""

    def exam(self, key: str) -> Exam | None:
        """Return the exam of a key; None if there is none."""

    def exam_of_image(self, key: str) -> Exam | None:
        """Return the exam that has the image of a key; None if there is none."""

    def page(self, query: WorklistQuery) -> WorklistPage:
        """Return one page of the exams."""

    def neighbours(self, key: str, query: WorklistQuery) -> tuple[str | None, str | None]:
        """Return the keys of the exams before and after an exam, in the order of the source or of blinded reading."""

    def other_exams(self, exam: Exam) -> Sequence[Exam]:
        """Return the other exams of the patient."""

    def date(self, key: str) -> str:
        """Return the date of an exam, `YYYY-MM-DD`; empty if it is unknown."""

    def is_read(self, key: str, reader: str) -> bool:
        """Return whether a reader has stored a reading of an exam."""

    def mark_read(self, key: str, reader: str) -> None:
        """Note that a reader has stored a reading of an exam."""

    def exams_named(self, ids: Iterable[tuple[str, str]]) -> list[Exam]:
        """Return the exams of these patients and exam ids; those that are no longer there are left out."""
