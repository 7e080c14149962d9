"""What DICOM reports state about the breasts of one study, and the codes for it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from highdicom.sr import (
    AlgorithmIdentification,
    CodedConcept,
    DeviceObserverIdentifyingAttributes,
    Measurement,
    ObservationContext,
    ObserverContext,
)
from pydicom import Dataset
from pydicom.sr.codedict import codes

from vitmodel.config.labels import CANCER, target_name
from vitmodel.results.evidence import MANUFACTURER, Software
from vitmodel.utils import NOT_A_MEDICAL_DEVICE

PRIVATE_SCHEME = "99VITMODEL"
"""Designator of our own codes; 99 marks a private coding scheme (PS3.16, section 8)."""
LATERALITY_CODES = {"L": codes.SCT.Left, "R": codes.SCT.Right}
SIDES = {"L": "Left breast", "R": "Right breast"}


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageFinding:
    """Reported data of one image."""

    source: Dataset
    """Header of the image."""
    probability: float
    view: str = ""
    outline: np.ndarray | None = None
    """Outline of the breast, `(K, 2)` as (x, y) in pixels of the image; None = unknown."""
    region: np.ndarray | None = None
    """Outline of the heat map's highest values, as `outline`; None = no heat map."""


@dataclass(frozen=True, kw_only=True)
class BreastFinding:
    """Reported data of one breast."""

    side: str
    """L, R or '' = unknown."""
    probability: float
    suspicious: bool
    """Whether the probability reaches the threshold."""
    images: Sequence[ImageFinding]

    @property
    def name(self) -> str:
        return SIDES.get(self.side, "Breast of unknown side")

    def title(self, image: ImageFinding) -> str:
        """Return side and view of one of the images, such as 'R MLO'."""
        return f"{self.side} {image.view}".strip() or "side and view unknown"

    def regions(self) -> list[tuple[ImageFinding, np.ndarray]]:
        """Return the images with a region to report, and the regions.

        Every heat map has a maximum, but only in a suspicious breast it is evidence of the label.
        """
        return [(image, image.region) for image in self.images if self.suspicious and image.region is not None]


def identity(breasts: Sequence[BreastFinding]) -> list[str]:
    """Return texts that identify the images of a report and what the report was given about them, for its UID."""
    return [f"{image.source.SOPInstanceUID} {breast.title(image)}" for breast in breasts for image in breast.images]


def evidence_of(breasts: Sequence[BreastFinding]) -> list[Dataset]:
    """Return the headers of all images of a report."""
    return [image.source for breast in breasts for image in breast.images]


def percent(probability: float) -> str:
    """Return a probability as text, such as 31.7 %."""
    return f"{100 * probability:.1f} %"


def probability_name(label: str, scope: str = "") -> CodedConcept:
    """Return the concept of a label's probability: that of the standard for cancer, else a private one.

    Args:
        label: Label rule of the model.
        scope: What the probability is limited to, such as "this view alone"; it makes a concept of its own, because
            viewers show the concept's meaning in front of the value.
    """
    if label == CANCER and not scope:
        return CodedConcept.from_code(codes.DCM.ProbabilityOfCancer)
    digest = hashlib.sha256(f"{label}{scope}".encode()).hexdigest()
    ending = f", {scope}" if scope else ""
    return CodedConcept(
        value=f"P-{digest[:12]}",  # SH: at most 16 characters
        scheme_designator=PRIVATE_SCHEME,
        meaning=f"Probability of {shorten(target_name(label), 49 - len(ending))}{ending}",
    )


def measured_probability(value: float, label: str, scope: str = "") -> Measurement:
    """Return a probability as a measurement in percent."""
    return Measurement(name=probability_name(label, scope), value=round(100 * value, 4), unit=codes.UCUM.Percent)


def algorithm_of(software: Software) -> AlgorithmIdentification:
    """Return the name, version and settings of the software as a content item (PS3.16 TID 4019)."""
    return AlgorithmIdentification(
        name=f"{MANUFACTURER} {software.model}", version=software.version, parameters=list(software.parameters)
    )


def observation_context(software: Software) -> ObservationContext:
    """Return the software as the observer of a report (PS3.16 TID 1001)."""
    device = DeviceObserverIdentifyingAttributes(
        uid=software.uid("device"),
        name=MANUFACTURER,
        manufacturer_name=MANUFACTURER,
        model_name=software.model,
        serial_number=software.serial,
    )
    observer = ObserverContext(observer_type=codes.DCM.Device, observer_identifying_attributes=device)
    return ObservationContext(observer_device_context=observer)


def label_report(report: Dataset, description: str, software: Software) -> Dataset:
    """Return a report with its series description, its software and the note that it is for research only."""
    report.SeriesDescription = description
    report.CompletionFlagDescription = NOT_A_MEDICAL_DEVICE.partition(". ")[0]  # LO: at most 64 characters
    report.ManufacturerModelName = software.model
    report.SoftwareVersions = software.version
    return report


def shorten(text: str, length: int) -> str:
    """Return `text`, cut to `length` characters with an ellipsis: the value type LO holds at most 64 characters."""
    return text if len(text) <= length else f"{text[: length - 3]}..."
