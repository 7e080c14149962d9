"""The scores of one study for viewers: a structured report (TID 1500) whose every measurement is drawn on its image.

Viewers such as OHIF read the coordinates of every measurement group and show a report without any as a black viewport.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from highdicom.sr import (
    Comprehensive3DSR,
    FindingSite,
    ImageRegion,
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
    evidence_of,
    identity,
    label_report,
    measured_probability,
    observation_context,
    shorten,
)

REPORT_SERIES_NUMBER = 9103  # a series number that no acquisition uses


def structured_report(breasts: Sequence[BreastFinding], software: Software) -> Dataset | None:
    """Return one report on the breasts of one study, with its images as evidence (PS3.16 TID 1500, 1410).

    The outline of the breast in each image has the probability of the breast; in suspicious breasts, the region where
    the heat map is highest has the probability of the image alone.

    Args:
        breasts: The breasts of one study with their images.
        software: Software and model that computed the scores.

    Returns:
        The report, or None if no image has an outline.
    """
    groups = [group for breast in breasts for group in _measurement_groups(breast, software)]
    if not groups:
        return None
    evidence = evidence_of(breasts)
    content = MeasurementReport(
        observation_context=observation_context(software),
        procedure_reported=codes.SCT.Mammography,
        imaging_measurements=groups,
        title=codes.DCM.ImagingMeasurementReport,  # OHIF shows a report with another title as text
    )
    report = Comprehensive3DSR(
        evidence=evidence,
        content=content,
        series_instance_uid=software.uid("reports of a study", evidence[0].StudyInstanceUID),
        series_number=REPORT_SERIES_NUMBER,
        sop_instance_uid=software.uid("report", *identity(breasts)),
        instance_number=1,
        manufacturer=MANUFACTURER,
        is_complete=True,
        is_final=False,
        is_verified=False,
    )
    return label_report(report, f"{shorten(target_title(software.label), 26)} probability outlines, research", software)


def _measurement_groups(
    breast: BreastFinding, software: Software
) -> Iterator[PlanarROIMeasurementsAndQualitativeEvaluations]:
    """Yield a measurement group for the outline of a breast in each image, then one for each region."""
    for image in breast.images:
        if image.outline is not None:
            name = f"{breast.title(image)}: breast, all views"
            yield _group(name, image, image.outline, breast.probability, breast, software)
    for image, region in breast.regions():
        name = f"{breast.title(image)}: highest saliency, this view"
        yield _group(name, image, region, image.probability, breast, software)


def _group(
    name: str, image: ImageFinding, outline: np.ndarray, probability: float, breast: BreastFinding, software: Software
) -> PlanarROIMeasurementsAndQualitativeEvaluations:
    """Return the measurement group of a probability inside an outline."""
    return PlanarROIMeasurementsAndQualitativeEvaluations(
        tracking_identifier=TrackingIdentifier(software.uid(name, image.source.SOPInstanceUID), name),
        referenced_region=ImageRegion(
            graphic_type="POLYLINE",
            graphic_data=closed(outline),
            source_image=SourceImageForRegion.from_source_image(image.source),
        ),
        finding_type=codes.DCM.Saliency if outline is image.region else codes.SCT.Breast,
        algorithm_id=algorithm_of(software),
        finding_sites=[FindingSite(anatomic_location=codes.SCT.Breast, laterality=LATERALITY_CODES.get(breast.side))],
        measurements=[measured_probability(probability, software.label)],
    )


def closed(outline: np.ndarray) -> np.ndarray:
    """Return the corners `(K + 1, 2)` of a closed line along an outline, in the coordinates of DICOM objects.

    In these, the centre of the first pixel is (0.5, 0.5), not (0, 0) (PS3.3 C.18.6.1.2 and C.10.5).
    """
    return np.vstack([outline, outline[:1]]) + 0.5
