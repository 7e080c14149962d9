"""The outlines of one image as a Grayscale Softcopy Presentation State: lines that a viewer draws on the image."""

from __future__ import annotations

import numpy as np
from highdicom.pr import (
    GraphicAnnotation,
    GraphicLayer,
    GraphicObject,
    GrayscaleSoftcopyPresentationState,
    TextObject,
)
from pydicom import Dataset

from vitmodel.config.labels import target_name
from vitmodel.results.evidence import MANUFACTURER, Software, instance_number
from vitmodel.results.findings import BreastFinding, ImageFinding, identity, percent, shorten
from vitmodel.results.structured_report import closed

STATE_SERIES = 9105  # a series number that no acquisition uses


def presentation_states(breast: BreastFinding, software: Software) -> list[Dataset]:
    """Return a presentation state for each image of a breast with an outline (PS3.3 A.33.1)."""
    return [_state(breast, image, software) for image in breast.images if image.outline is not None]


def _state(breast: BreastFinding, image: ImageFinding, software: Software) -> Dataset:
    assert image.outline is not None
    study = image.source.StudyInstanceUID
    name = target_name(software.label)
    lines = [(image.outline, f"{breast.name}: probability of {name} {percent(breast.probability)}, research only")]
    if breast.suspicious and image.region is not None:
        lines.append((image.region, f"Highest saliency; this view alone: {percent(image.probability)}"))
    layer = GraphicLayer(layer_name="VITMODEL", order=1, description="Scores, research only")
    annotation = GraphicAnnotation(
        referenced_images=[image.source],
        graphic_layer=layer,
        graphic_objects=[
            GraphicObject(graphic_type="POLYLINE", graphic_data=closed(outline), units="PIXEL") for outline, _ in lines
        ],
        text_objects=[
            TextObject(text_value=text, units="PIXEL", anchor_point=_anchor(outline), anchor_point_visible=False)
            for outline, text in lines
        ],
    )
    state = GrayscaleSoftcopyPresentationState(
        referenced_images=[image.source],
        series_instance_uid=software.uid(f"presentation states of a study {breast.side}", study),
        series_number=STATE_SERIES,
        sop_instance_uid=software.uid("presentation state", image.source.SOPInstanceUID, *identity([breast])),
        instance_number=instance_number(image.source),
        manufacturer=MANUFACTURER,
        manufacturer_model_name=software.model,
        software_versions=software.version,
        device_serial_number=software.serial,
        content_label="SCORES",
        content_description=shorten(f"{breast.title(image)}: outlines, research only", 64),
        graphic_annotations=[annotation],
        graphic_layers=[layer],
    )
    state.Laterality = breast.side  # one series contains one side
    state.SeriesDescription = "Outlines, research only"
    return state


def _anchor(outline: np.ndarray) -> tuple[float, float]:
    """Return the topmost corner of an outline as (x, y)."""
    x, y = outline[outline[:, 1].argmin()] + 0.5
    return float(x), float(y)
