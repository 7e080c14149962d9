"""A heat map on the pixels of its source image: its values as Parametric Map, its highest region as Segmentation."""

from __future__ import annotations

import copy

import cv2
import numpy as np
from highdicom import AlgorithmIdentificationSequence, VOILUTTransformation
from highdicom.pm import ParametricMap, RealWorldValueMapping
from highdicom.seg import Segmentation, SegmentDescription
from pydicom import Dataset
from pydicom.sr.codedict import codes
from pydicom.uid import ExplicitVRLittleEndian

from vitmodel.results.evidence import MANUFACTURER, Software, instance_number

MAP_SERIES, SEGMENTATION_SERIES = 9101, 9106  # series numbers that no acquisition uses


def parametric_map(values: np.ndarray, unit: str, source: Dataset, software: Software, side: str) -> Dataset:
    """Return a heat map as a Parametric Map of 32-bit floating point values, in a series of its own (PS3.3 A.75).

    Pixels outside the breast hold a padding value below all others. The standard requires a plane in space, which a
    projection does not have. The object therefore gets a frame of reference of its own, the detector, in millimetres if
    the source states its pixel spacing and in pixels otherwise.

    Args:
        values: The heat map, `(H, W)` float, NaN outside the breast.
        unit: Meaning of the values.
        source: Header of the source image.
        software: Software and model that computed the map.
        side: L, R or '' = unknown.
    """
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    width = high - low or 1.0
    padding = np.float32(low - width)
    mapping = RealWorldValueMapping(
        lut_label="saliency",
        lut_explanation=unit[:64],
        unit=codes.UCUM.NoUnits,
        quantity_definition=codes.DCM.Saliency,
        value_range=(low, high),
        slope=1.0,
        intercept=0.0,
    )
    heat = ParametricMap(
        source_images=[_in_a_plane(source, software)],
        pixel_array=np.where(np.isnan(values), padding, values).astype(np.float32),
        series_instance_uid=software.uid("series of a map", source.SOPInstanceUID, side),
        series_number=MAP_SERIES,
        sop_instance_uid=software.uid("map", source.SOPInstanceUID, side),
        instance_number=instance_number(source),
        manufacturer=MANUFACTURER,
        manufacturer_model_name=software.model,
        software_versions=software.version,
        device_serial_number=software.serial,
        contains_recognizable_visual_features=False,
        real_world_value_mappings=[mapping],
        voi_lut_transformations=[VOILUTTransformation(window_center=low + width / 2, window_width=width)],
        content_label="SALIENCY",
        content_description=unit[:64],
        transfer_syntax_uid=ExplicitVRLittleEndian,
    )
    heat.FloatPixelPaddingValue = heat.FloatPixelPaddingRangeLimit = float(padding)
    heat.Laterality = side
    heat.SeriesDescription = "Heat map, research only"
    return heat


def segmentation(outline: np.ndarray, source: Dataset, software: Software, side: str) -> Dataset:
    """Return the region inside an outline as a binary Segmentation, in a series of its own (PS3.3 A.51).

    Args:
        outline: Corners `(K, 2)` as (x, y) in pixels of the source image.
        source: Header of the source image.
        software: Software and model that computed the region.
        side: L, R or '' = unknown.
    """
    mask = np.zeros((1, int(source.Rows), int(source.Columns)), np.uint8)
    cv2.fillPoly(mask[0], [np.rint(outline).astype(np.int32)], (1,))
    region = SegmentDescription(
        segment_number=1,
        segment_label="Highest saliency",
        segmented_property_category=codes.SCT.SpatialAndRelationalConcept,
        segmented_property_type=codes.DCM.Saliency,
        algorithm_type="AUTOMATIC",
        algorithm_identification=AlgorithmIdentificationSequence(
            name=MANUFACTURER, family=codes.DCM.ArtificialIntelligence, version=software.version
        ),
        tracking_uid=software.uid("segment", source.SOPInstanceUID, side),
        tracking_id="Highest saliency",
        anatomic_regions=[codes.SCT.Breast],
    )
    result = Segmentation(
        source_images=[_in_a_plane(source, software)],
        pixel_array=mask,
        segmentation_type="BINARY",
        segment_descriptions=[region],
        series_instance_uid=software.uid("series of a segmentation", source.SOPInstanceUID, side),
        series_number=SEGMENTATION_SERIES,
        sop_instance_uid=software.uid("segmentation", source.SOPInstanceUID, side),
        instance_number=instance_number(source),
        manufacturer=MANUFACTURER,
        manufacturer_model_name=software.model,
        software_versions=software.version,
        device_serial_number=software.serial,
        content_label="SALIENCY",
        content_description="Region of the highest saliency, research only",
        transfer_syntax_uid=ExplicitVRLittleEndian,
    )
    result.SeriesDescription = "Highest saliency, research only"
    return result


def _in_a_plane(source: Dataset, software: Software) -> Dataset:
    """Return the header with its pixels on a plane: x along rows, y along columns, the first pixel at (0, 0, 0)."""
    plane = copy.copy(source)
    plane.FrameOfReferenceUID = software.uid("detector", source.SOPInstanceUID)
    plane.PositionReferenceIndicator = ""
    plane.ImagePositionPatient = [0, 0, 0]
    plane.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    plane.PixelSpacing = source.get("PixelSpacing") or source.get("ImagerPixelSpacing") or [1, 1]
    plane.SliceThickness = 1
    return plane
