"""The scores of one study for people: a structured report of sentences, in a series of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from highdicom.sr import (
    CodeContentItem,
    CodedConcept,
    ContainerContentItem,
    ContentItem,
    ContentSequence,
    EnhancedSR,
    RelationshipTypeValues,
    TextContentItem,
)
from pydicom import Dataset
from pydicom.sr.codedict import codes

from vitmodel.config.labels import target_name, target_title
from vitmodel.results.evidence import MANUFACTURER, Software
from vitmodel.results.findings import (
    LATERALITY_CODES,
    PRIVATE_SCHEME,
    BreastFinding,
    evidence_of,
    identity,
    label_report,
    observation_context,
    percent,
    shorten,
)
from vitmodel.utils import NOT_A_MEDICAL_DEVICE

TEXT_SERIES_NUMBER = 9104  # a series number that no acquisition uses
TITLE = CodedConcept(value="SCORES", scheme_designator=PRIVATE_SCHEME, meaning="Research scores of a mammography study")
CONTAINS = RelationshipTypeValues.CONTAINS


def text_report(breasts: Sequence[BreastFinding], software: Software, threshold: float) -> Dataset:
    """Return one report on the breasts of one study as text (PS3.3 A.35.2).

    Its title is not that of a measurement report (TID 1500), so that viewers show text and do not look for regions.

    Args:
        breasts: The breasts of one study with their images.
        software: Software and model that computed the scores.
        threshold: Probability from which a breast is suspicious.
    """
    evidence = evidence_of(breasts)
    root = ContainerContentItem(name=TITLE, is_content_continuous=False)
    language = CodedConcept(value="en", scheme_designator="RFC5646", meaning="English")
    root.ContentSequence = ContentSequence(
        [
            CodeContentItem(
                name=codes.DCM.LanguageOfContentItemAndDescendants,
                value=language,
                relationship_type=RelationshipTypeValues.HAS_CONCEPT_MOD,
            ),
            _text(codes.DCM.Comment, NOT_A_MEDICAL_DEVICE),
            *(_section(breast, software, threshold) for breast in breasts),
            *observation_context(software),
            *(_text(codes.DCM.AlgorithmParameters, parameter) for parameter in software.parameters),
        ]
    )
    report = EnhancedSR(
        evidence=evidence,
        content=root,
        series_instance_uid=software.uid("text reports of a study", evidence[0].StudyInstanceUID),
        series_number=TEXT_SERIES_NUMBER,
        sop_instance_uid=software.uid("text report", *identity(breasts)),
        instance_number=1,
        manufacturer=MANUFACTURER,
        is_complete=True,
        is_final=False,
        is_verified=False,
    )
    return label_report(
        report, f"{shorten(target_title(software.label), 26)} probability per breast, research", software
    )


def _section(breast: BreastFinding, software: Software, threshold: float) -> ContainerContentItem:
    """Return the section of a breast: its probability, then that of each of its images."""
    section = ContainerContentItem(name=codes.DCM.Findings, is_content_continuous=False, relationship_type=CONTAINS)
    section.ContentSequence = ContentSequence(list(_items(breast, software, threshold)))
    return section


def _items(breast: BreastFinding, software: Software, threshold: float) -> Iterator[ContentItem]:
    side = LATERALITY_CODES.get(breast.side)
    if side is not None:
        yield CodeContentItem(
            name=codes.SCT.Laterality, value=side, relationship_type=RelationshipTypeValues.HAS_CONCEPT_MOD
        )
    relation = "at or above" if breast.suspicious else "below"
    # Short lines, because viewers do not wrap them.
    yield _text(codes.DCM.Finding, f"{breast.name}: probability of {target_name(software.label)}")
    yield _text(codes.DCM.Finding, f"{percent(breast.probability)}, {relation} {percent(threshold)} (threshold)")
    for image in breast.images:
        yield _text(codes.DCM.Finding, f"{breast.title(image)} alone: {percent(image.probability)}")


def _text(name: CodedConcept, text: str) -> TextContentItem:
    return TextContentItem(name=name, value=text, relationship_type=CONTAINS)
