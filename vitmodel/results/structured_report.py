"""The scores of images for viewers: structured reports (TID 1500) whose every measurement is drawn on its image.

Viewers such as OHIF read the coordinates of every measurement group and show a report without any as a black viewport.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from highdicom.sr import (
    Comprehensive3DSR,
    FindingSite,
    ImageRegion,
    Measurement,
    MeasurementReport,
    PlanarROIMeasurementsAndQualitativeEvaluations,
    SourceImageForRegion,
    TrackingIdentifier,
)
from pydicom import Dataset
from pydicom.sr.codedict import codes

from vitmodel.config.labels import target_title
from vitmodel.results.evidence import MANUFACTURER, Software
from vitmodel.results.findings import (
    LATERALITY_CODES,
    BreastFinding,
    ImageFinding,
    algorithm_of,
    identity,
    label_report,
    measured_probability,
    observation_context,
    shorten,
)

REPORT_SERIES_NUMBER = 9103  # a series number that no acquisition uses


def structured_reports(breast: BreastFinding, software: Software) -> list[Dataset]:
    """Return a report for each image of a breast with an outline, in a series of its own (PS3.16 TID 1500, 1410).

    The outline of the breast has the probability of the breast; in suspicious breasts, the region where the heat map is
    highest has the probability of the image alone. OHIF stays on the first image of a report on several images.

    Args:
        breast: A breast with its images.
        software: Software and model that computed the scores.
    """
    return [
        _report(replace(breast, images=[image]), image, software)
        for image in breast.images
        if image.outline is not None
    ]


def _report(breast: BreastFinding, image: ImageFinding, software: Software) -> Dataset:
    content = MeasurementReport(
        observation_context=observation_context(software),
        procedure_reported=codes.SCT.Mammography,
        imaging_measurements=list(_measurement_groups(breast, software)),
        title=codes.DCM.ImagingMeasurementReport,  # OHIF shows a report with another title as text
    )
    report = Comprehensive3DSR(
        evidence=[image.source],
        content=content,
        series_instance_uid=software.uid("series of a report", image.source.SOPInstanceUID),
        series_number=REPORT_SERIES_NUMBER,
        sop_instance_uid=software.uid("report", *identity([breast])),
        instance_number=1,
        manufacturer=MANUFACTURER,
        is_complete=True,
        is_final=False,
        is_verified=False,
    )
    title = f"{breast.title(image)}: {shorten(target_title(software.label), 22)} probability, research only"
    return label_report(report, shorten(title, 64), software)


def _measurement_groups(
    breast: BreastFinding, software: Software
) -> Iterator[PlanarROIMeasurementsAndQualitativeEvaluations]:
    """Yield a measurement group for the outline of a breast in each image, then one for each region."""
    for image in breast.images:
        if image.outline is not None:
            probability = measured_probability(breast.probability, software.label)
            yield _group("breast", image, image.outline, probability, breast, software)
    for image, region in breast.regions():
        probability = measured_probability(image.probability, software.label, "this view alone")
        yield _group("highest saliency", image, region, probability, breast, software)


def _group(
    part: str,
    image: ImageFinding,
    outline: np.ndarray,
    probability: Measurement,
    breast: BreastFinding,
    software: Software,
) -> PlanarROIMeasurementsAndQualitativeEvaluations:
    """Return the measurement group of a probability inside the outline of a part of the image."""
    uid = software.uid(f"outline of {part}", image.source.SOPInstanceUID)
    return PlanarROIMeasurementsAndQualitativeEvaluations(
        tracking_identifier=TrackingIdentifier(uid, f"{breast.title(image)}, {part}"),
        referenced_region=ImageRegion(
            graphic_type="POLYLINE",
            graphic_data=closed(outline),
            source_image=SourceImageForRegion.from_source_image(image.source),
        ),
        finding_type=codes.DCM.Saliency if outline is image.region else codes.SCT.Breast,
        algorithm_id=algorithm_of(software),
        finding_sites=[FindingSite(anatomic_location=codes.SCT.Breast, laterality=LATERALITY_CODES.get(breast.side))],
        measurements=[probability],
    )


def closed(outline: np.ndarray) -> np.ndarray:
    """Return the corners `(K + 1, 2)` of a closed line along an outline, in the coordinates of DICOM objects.

    In these, the centre of the first pixel is (0.5, 0.5), not (0, 0) (PS3.3 C.18.6.1.2 and C.10.5).
    """
    return np.vstack([outline, outline[:1]]) + 0.5
