"""Exams as the reading room shows them: images with their scores, and breasts with theirs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["ok", "warned", "refused", "waiting"]
"""`waiting` = not scored yet."""
VIEW_ORDER = ("CC", "MLO")
"""Views in the order of hanging; all others follow."""
Outline = Sequence[Sequence[float]]
"""Corners (x, y) in source pixels."""


def short_key(*parts: str) -> str:
    """Return a key for addresses, 16 hexadecimal digits, which does not reveal the parts."""
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def format_date(date: str) -> str:
    """Return a date of DICOM as `YYYY-MM-DD`; empty if it is none."""
    return f"{date[:4]}-{date[4:6]}-{date[6:]}" if len(date) == 8 and date.isdigit() else ""


def to_interval(low: float | None, high: float | None) -> tuple[float, float] | None:
    """Return the limits of an interval; None if one is unknown."""
    return None if low is None or high is None else (low, high)


@dataclass(frozen=True)
class ImageEntry:
    """One image of an exam. None marks unknown values."""

    key: str
    image_id: str
    side: str
    """L, R or empty."""
    view: str
    path: str | None
    """File of the source image."""
    status: Status
    reason: str
    """Codes of warnings or of the refusal, separated by ';'."""
    remark: str
    probability: float | None = None
    """Calibrated probability from this image alone."""
    rows: int | None = None
    columns: int | None = None
    spacing: tuple[float, float] | None = None
    """Distance of pixel centres (between rows, between columns) in mm."""
    chest_wall: str = ""
    """Side of the source image at which the chest wall is: left, right or empty."""
    voi: str = ""
    """The grey range that the crop was made with; see `pixels.open.open_as_cropped`."""
    preprocessing: str = ""
    """Settings of the crop as JSON."""
    region: Outline = ()
    """Outline of the region with the highest values of the heat map that `predict` made."""
    box: tuple[int, int, int, int] | None = None
    """The crop (x0, y0, x1, y1) in source pixels."""
    machine: str = ""
    """The imaging device."""
    typicality: float | None = None
    """Share of the validation images that are less like the training images."""
    outputs: Mapping[str, str] = field(default_factory=dict)
    """Further columns of scores.csv, such as the density of this image."""
    inputs: Mapping[str, Any] = field(default_factory=dict)
    """Values of the columns that the network may have read in addition to the pixels, such as age."""

    @property
    def is_mirrored(self) -> bool:
        """Whether the page mirrors the image, so that the chest wall of a right breast is at the right."""
        wanted = {"R": "right", "L": "left"}.get(self.side)
        return bool(self.chest_wall and wanted and self.chest_wall != wanted)

    @property
    def wall_margin(self) -> float:
        """Width in source pixels of what lies behind the chest wall, such as the border of a digitised film."""
        if self.box is None or not self.columns or self.chest_wall not in ("left", "right"):
            return 0.0
        x0, _, x1, _ = self.box
        return max(0.0, float(x0 if self.chest_wall == "left" else self.columns - x1))

    @property
    def reach(self) -> float | None:
        """Width in source pixels from the chest wall to the end of the breast; None if it is unknown."""
        return None if self.box is None else float(self.box[2] - self.box[0])

    @property
    def is_inverted(self) -> bool:
        """Whether the stated polarity is wrong, so that the page inverts the grey values."""
        return "inverted" in self.reason.split(";")


@dataclass(frozen=True)
class BreastEntry:
    """One breast of an exam with its score."""

    side: str
    probability: float | None
    is_positive: bool | None
    """Whether the probability is at least the threshold."""
    status: str
    reason: str
    views: str
    outputs: Mapping[str, Any] = field(default_factory=dict)
    """Further columns of breast_scores.csv, such as the density."""
    interval: tuple[float, float] | None = None
    """Calibration interval of the probability, 95 % over the patients that the calibration was fitted to."""


@dataclass(frozen=True)
class Exam:
    """The images of one patient in one exam."""

    patient_id: str
    exam_id: str
    images: tuple[ImageEntry, ...]
    breasts: tuple[BreastEntry, ...]
    key: str = ""
    """Name of the exam in addresses. Empty = derived from patient and exam id, which it does not reveal."""
    note: str = ""
    """What else is to be known of the scores, such as that an image arrived after them."""
    link: str = ""
    """Address of a page with technical details; empty = there is none."""
    is_explainable: bool = True
    """Whether the model at hand is the one that scored the exam, so that its heat maps explain the scores."""

    def __post_init__(self) -> None:
        if not self.key:
            object.__setattr__(self, "key", short_key("exam", self.patient_id, self.exam_id))

    @property
    def ids(self) -> tuple[str, str]:
        """Patient and exam, which identify the exam in another folder of scores."""
        return self.patient_id, self.exam_id

    def breast(self, side: str) -> BreastEntry | None:
        """Return the breast of a side; None if the exam has no image of it."""
        return next((breast for breast in self.breasts if breast.side == side), None)

    @property
    def probability(self) -> float | None:
        """The larger probability of the breasts; None if neither was scored."""
        return max((breast.probability for breast in self.breasts if breast.probability is not None), default=None)

    @property
    def is_positive(self) -> bool:
        return any(breast.is_positive for breast in self.breasts)

    @property
    def status(self) -> Status:
        """`waiting` if an image waits, `refused` if an image or breast has no score, `warned` if one has a warning."""
        states = {image.status for image in self.images} | {breast.status for breast in self.breasts}
        if "waiting" in states:
            return "waiting"
        if "refused" in states or self.probability is None:
            return "refused"
        return "warned" if "warned" in states else "ok"

    @property
    def reasons(self) -> list[str]:
        """The codes of all warnings and refusals, each once."""
        reasons = [image.reason for image in self.images] + [breast.reason for breast in self.breasts]
        return list(dict.fromkeys(code for reason in reasons for code in reason.split(";") if code))

    @property
    def views(self) -> list[str]:
        """The views that are present, such as R-CC, in the order of hanging."""
        return list(dict.fromkeys(f"{image.side or '?'}-{image.view or '?'}" for image in self.hanging()))

    def hanging(self) -> list[ImageEntry]:
        """Return the images in the order of hanging: R-CC, L-CC, R-MLO, L-MLO, then all others; refused ones last."""

        def place(image: ImageEntry) -> tuple[int, int, int]:
            view = VIEW_ORDER.index(image.view) if image.view in VIEW_ORDER else len(VIEW_ORDER)
            side = {"R": 0, "L": 1}.get(image.side, 2)
            return int(image.status == "refused"), view, side

        return sorted(self.images, key=place)
