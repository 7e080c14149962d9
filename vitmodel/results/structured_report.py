"""The scores of one study as a Comprehensive SR (TID 1500): a probability per breast, a region per suspicious image."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from highdicom.sr import (
    AlgorithmIdentification,
    CodedConcept,
    ComprehensiveSR,
    DeviceObserverIdentifyingAttributes,
    FindingSite,
    ImageRegion,
    Measurement,
    MeasurementReport,
    MeasurementsAndQualitativeEvaluations,
    ObservationContext,
    ObserverContext,
    PlanarROIMeasurementsAndQualitativeEvaluations,
    SourceImageForMeasurementGroup,
    SourceImageForRegion,
    TrackingIdentifier,
)
from pydicom import Dataset
from pydicom.sr.codedict import codes

from vitmodel.config.labels import CANCER, target_name, target_title
from vitmodel.results.evidence import MANUFACTURER, Software
from vitmodel.utils import NOT_A_MEDICAL_DEVICE

REPORT_SERIES_NUMBER = 9103  # a series number that no acquisition uses
PRIVATE_SCHEME = "99VITMODEL"
"""Designator of our own codes; 99 marks a private coding scheme (PS3.16, section 8)."""
LATERALITY_CODES = {"L": codes.SCT.Left, "R": codes.SCT.Right}


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageFinding:
    """Reported data of one image."""

    source: Dataset
    """Header of the image."""
    probability: float
    region: np.ndarray | None = None
    """Outline from the heat map, `(K, 2)` as (x, y) in pixels of the image; None = no region."""


@dataclass(frozen=True, kw_only=True)
class BreastFinding:
    """Reported data of one breast."""

    side: str
    """L, R or '' = unknown."""
    probability: float
    suspicious: bool
    """Whether the probability reaches the threshold."""
    images: Sequence[ImageFinding]


def structured_report(breasts: Sequence[BreastFinding], software: Software) -> Dataset:
    """Return one report on the breasts of one study, with its images as evidence (PS3.16 TID 1500, 1501, 1410).

    Regions are reported for suspicious breasts only. Every map has a maximum, but in other breasts it is not evidence
    of the label.

    Args:
        breasts: The breasts of one study with their images.
        software: Software and model that computed the scores.
    """
    evidence = [image.source for breast in breasts for image in breast.images]
    study = evidence[0].StudyInstanceUID
    algorithm = AlgorithmIdentification(
        name=f"{MANUFACTURER} {software.model}", version=software.version, parameters=list(software.parameters)
    )
    device = DeviceObserverIdentifyingAttributes(
        uid=software.uid("device"),
        name=MANUFACTURER,
        manufacturer_name=MANUFACTURER,
        model_name=software.model,
        serial_number=software.serial,
    )
    observer = ObserverContext(observer_type=codes.DCM.Device, observer_identifying_attributes=device)
    groups = (_measurement_groups(breast, software, algorithm) for breast in breasts)
    content = MeasurementReport(
        observation_context=ObservationContext(observer_device_context=observer),
        procedure_reported=codes.SCT.Mammography,
        imaging_measurements=list(itertools.chain.from_iterable(groups)),
        title=codes.DCM.ImagingMeasurementReport,
    )
    report = ComprehensiveSR(
        evidence=evidence,
        content=content,
        series_instance_uid=software.uid("reports of a study", study),
        series_number=REPORT_SERIES_NUMBER,
        sop_instance_uid=software.uid("report", *(source.SOPInstanceUID for source in evidence)),
        instance_number=1,
        manufacturer=MANUFACTURER,
        is_complete=True,
        is_final=False,
        is_verified=False,
    )
    report.SeriesDescription = f"{_shorten(target_title(software.label), 26)} probability per breast, research only"
    report.CompletionFlagDescription = NOT_A_MEDICAL_DEVICE.partition(". ")[0]  # LO: at most 64 characters
    report.ManufacturerModelName = software.model
    report.SoftwareVersions = software.version
    return report


def _measurement_groups(
    breast: BreastFinding, software: Software, algorithm: AlgorithmIdentification
) -> Iterator[MeasurementsAndQualitativeEvaluations | PlanarROIMeasurementsAndQualitativeEvaluations]:
    """Yield the measurement group of a breast, then one per region."""
    site = [FindingSite(anatomic_location=codes.SCT.Breast, laterality=LATERALITY_CODES.get(breast.side))]
    image_uids = [image.source.SOPInstanceUID for image in breast.images]
    yield MeasurementsAndQualitativeEvaluations(
        tracking_identifier=TrackingIdentifier(software.uid("breast", *image_uids), f"Breast {breast.side}".strip()),
        algorithm_id=algorithm,
        finding_sites=site,
        measurements=[_probability(breast.probability, software.label)],
        source_images=[SourceImageForMeasurementGroup.from_source_image(image.source) for image in breast.images],
    )
    for image in breast.images if breast.suspicious else ():
        if image.region is not None:
            yield PlanarROIMeasurementsAndQualitativeEvaluations(
                tracking_identifier=TrackingIdentifier(
                    software.uid("region", image.source.SOPInstanceUID), "Highest saliency"
                ),
                referenced_region=ImageRegion(
                    graphic_type="POLYLINE",
                    graphic_data=np.vstack([image.region, image.region[:1]]),
                    source_image=SourceImageForRegion.from_source_image(image.source),
                ),
                finding_type=codes.DCM.Saliency,
                algorithm_id=algorithm,
                finding_sites=site,
                measurements=[_probability(image.probability, software.label)],
            )


def _probability(value: float, label: str) -> Measurement:
    """Return a probability in percent. The standard has a code for cancer; a private one names any other label."""
    name = codes.DCM.ProbabilityOfCancer
    if label != CANCER:
        digest = hashlib.sha256(label.encode()).hexdigest()
        name = CodedConcept(
            value=f"P-{digest[:12]}",  # SH: at most 16 characters
            scheme_designator=PRIVATE_SCHEME,
            meaning=f"Probability of {_shorten(target_name(label), 49)}",
        )
    return Measurement(name=name, value=round(100 * value, 4), unit=codes.UCUM.Percent)


def _shorten(text: str, length: int) -> str:
    """Return `text`, cut to `length` characters with an ellipsis: the value type LO holds at most 64 characters."""
    return text if len(text) <= length else f"{text[: length - 3]}..."
