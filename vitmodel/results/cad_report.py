"""The suspicious regions of one study as a Mammography CAD report (TID 4000), for workstations without TID 1500."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from highdicom.sr import (
    CodeContentItem,
    CodedConcept,
    ComprehensiveSR,
    ContainerContentItem,
    ContentItem,
    ContentSequence,
    ImageContentItem,
    NumContentItem,
    RelationshipTypeValues,
    ScoordContentItem,
    TextContentItem,
)
from pydicom import Dataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code
from pydicom.uid import MammographyCADSRStorage

from vitmodel.results.evidence import MANUFACTURER, Software
from vitmodel.results.findings import (
    LATERALITY_CODES,
    BreastFinding,
    evidence_of,
    identity,
    label_report,
    observation_context,
    probability_name,
)
from vitmodel.results.structured_report import closed
from vitmodel.utils import NOT_A_MEDICAL_DEVICE

# pydicom's meanings of these two codes hold a zero-width space, which plain character sets lack.
IMPRESSION = CodedConcept(value="111034", scheme_designator="DCM", meaning="Individual Impression/Recommendation")
OVERALL_ANALYSIS = CodedConcept(
    value="111234", scheme_designator="DCM", meaning="Overall Impression/Recommendation Analysis"
)
CAD_SERIES_NUMBER = 9107  # a series number that no acquisition uses
CONTAINS = RelationshipTypeValues.CONTAINS
HAS_PROPERTIES = RelationshipTypeValues.HAS_PROPERTIES
HAS_CONCEPT_MOD = RelationshipTypeValues.HAS_CONCEPT_MOD
INFERRED_FROM = RelationshipTypeValues.INFERRED_FROM


def cad_report(breasts: Sequence[BreastFinding], software: Software) -> Dataset | None:
    """Return a Mammography CAD SR with a selected region per suspicious image (PS3.3 A.35.5).

    Args:
        breasts: The breasts of one study with their images.
        software: Software and model that computed the scores.

    Returns:
        The report, or None if a suspicious breast has no region: "without findings" would contradict its score.
    """
    if any(breast.suspicious and not breast.regions() for breast in breasts):
        return None
    evidence = evidence_of(breasts)
    root = ContainerContentItem(name=codes.DCM.MammographyCADReport, template_id="4000", is_content_continuous=False)
    root.ContentSequence = ContentSequence(list(_content(breasts, evidence, software)))
    report = ComprehensiveSR(
        evidence=evidence,
        content=root,
        series_instance_uid=software.uid("CAD reports of a study", evidence[0].StudyInstanceUID),
        series_number=CAD_SERIES_NUMBER,
        sop_instance_uid=software.uid("CAD report", *identity(breasts)),
        instance_number=1,
        manufacturer=MANUFACTURER,
        is_complete=True,
        is_final=False,
        is_verified=False,
    )
    _reference_images(report, breasts, evidence)
    # highdicom has no class for this SOP class, whose modules are those of the Comprehensive SR.
    report.SOPClassUID = report.file_meta.MediaStorageSOPClassUID = MammographyCADSRStorage
    return label_report(report, "CAD regions, research only", software)


def _content(
    breasts: Sequence[BreastFinding], evidence: Sequence[Dataset], software: Software
) -> Iterator[ContentItem]:
    """Yield the items below the root (TID 4000)."""
    english = CodedConcept(value="en", scheme_designator="RFC5646", meaning="English")
    yield _code(codes.DCM.LanguageOfContentItemAndDescendants, english, HAS_CONCEPT_MOD)
    yield from observation_context(software)
    library = ContainerContentItem(name=codes.DCM.ImageLibrary, relationship_type=CONTAINS)
    library.ContentSequence = ContentSequence([_library_entry(image) for image in evidence])
    yield library
    found = any(breast.regions() for breast in breasts)
    summary = _code(
        codes.DCM.CADProcessingAndFindingsSummary,
        codes.DCM.AllAlgorithmsSucceededWithFindings if found else codes.DCM.AllAlgorithmsSucceededWithoutFindings,
        CONTAINS,
    )
    if found:
        summary.ContentSequence = ContentSequence([_impression(breasts, software)])
    yield summary
    yield _code(codes.DCM.SummaryOfDetections, codes.DCM.NotAttempted, CONTAINS)
    analyses = _code(codes.DCM.SummaryOfAnalyses, codes.DCM.Succeeded, CONTAINS)
    performed = ContainerContentItem(name=codes.DCM.SuccessfulAnalyses, relationship_type=INFERRED_FROM)
    kind = _code(codes.DCM.AnalysisPerformed, OVERALL_ANALYSIS, CONTAINS)
    kind.ContentSequence = ContentSequence(_algorithm(software))
    performed.ContentSequence = ContentSequence([kind])
    analyses.ContentSequence = ContentSequence([performed])
    yield analyses


def _library_entry(source: Dataset) -> ImageContentItem:
    """Return the entry of an image in the report's library (TID 4020)."""
    return ImageContentItem(
        name=codes.DCM.SourceOfMeasurement,
        referenced_sop_class_uid=source.SOPClassUID,
        referenced_sop_instance_uid=source.SOPInstanceUID,
        relationship_type=CONTAINS,
    )


def _impression(breasts: Sequence[BreastFinding], software: Software) -> ContainerContentItem:
    """Return the findings that rendering devices may draw (TID 4003)."""
    impression = ContainerContentItem(name=IMPRESSION, relationship_type=INFERRED_FROM)
    findings = [
        _finding(breast, image.probability, region, software)
        for breast in breasts
        for image, region in breast.regions()
    ]
    impression.ContentSequence = ContentSequence([_intent(), *findings])
    return impression


def _finding(breast: BreastFinding, probability: float, region: np.ndarray, software: Software) -> CodeContentItem:
    """Return a region of one image with its probability (TID 4006, 4021)."""
    finding = _code(codes.DCM.SingleImageFinding, codes.DCM.SelectedRegion, CONTAINS)
    line = closed(region)
    items: list[ContentItem] = [
        _intent(),
        *_algorithm(software),
        NumContentItem(
            name=probability_name(software.label),
            value=round(100 * probability, 4),
            unit=codes.UCUM.Percent,
            relationship_type=HAS_PROPERTIES,
        ),
        _shape(codes.DCM.Center, "POINT", line[:-1].mean(0, keepdims=True)),
        _shape(codes.DCM.Outline, "POLYLINE", line),
    ]
    if breast.side in LATERALITY_CODES:
        items.append(_code(codes.SCT.Laterality, LATERALITY_CODES[breast.side], HAS_PROPERTIES))
    finding.ContentSequence = ContentSequence(items)
    return finding


def _shape(name: Code, kind: str, corners: np.ndarray) -> ScoordContentItem:
    return ScoordContentItem(name=name, graphic_type=kind, graphic_data=corners, relationship_type=HAS_PROPERTIES)


def _reference_images(report: Dataset, breasts: Sequence[BreastFinding], evidence: Sequence[Dataset]) -> None:
    """Add to each shape a reference to its image, by the image's position in the tree, as the SOP class requires.

    highdicom does not build such references.
    """
    names = [item.ConceptNameCodeSequence[0].CodeValue for item in report.ContentSequence]
    library = 1 + names.index(codes.DCM.ImageLibrary.value)
    positions = {image.SOPInstanceUID: number for number, image in enumerate(evidence, start=1)}
    images = [image for breast in breasts for image, _ in breast.regions() for _ in range(2)]  # centre and outline
    shapes = [shape for finding in _findings(report) for shape in finding.ContentSequence if "GraphicType" in shape]
    for shape, image in zip(shapes, images, strict=True):
        reference = Dataset()
        reference.RelationshipType = "SELECTED FROM"
        reference.ReferencedContentItemIdentifier = [1, library, positions[image.source.SOPInstanceUID]]
        Dataset.__setattr__(shape, "ContentSequence", [reference])


def _findings(report: Dataset) -> Iterator[Dataset]:
    """Yield the findings of the impression below the summary."""
    for summary in report.ContentSequence:
        for impression in summary.get("ContentSequence", ()):
            for finding in impression.get("ContentSequence", ()):
                if finding.ConceptNameCodeSequence[0].CodeValue == codes.DCM.SingleImageFinding.value:
                    yield finding


def _intent() -> CodeContentItem:
    """Return that a rendering device may leave the finding out: research results are no CAD marks to be relied on."""
    return _code(codes.DCM.RenderingIntent, codes.DCM.PresentationOptionalRenderingDeviceMayPresent, HAS_CONCEPT_MOD)


def _algorithm(software: Software) -> list[ContentItem]:
    """Return the name and version of the software, and the note that it is for research only (TID 4019)."""
    texts = {
        codes.DCM.AlgorithmName: f"{MANUFACTURER} {software.model}",
        codes.DCM.AlgorithmVersion: software.version,
        codes.DCM.AlgorithmParameters: NOT_A_MEDICAL_DEVICE,
    }
    return [TextContentItem(name=name, value=text, relationship_type=HAS_PROPERTIES) for name, text in texts.items()]


def _code(name: Code, value: Code | CodedConcept, relationship: RelationshipTypeValues) -> CodeContentItem:
    return CodeContentItem(name=name, value=value, relationship_type=relationship)
