"""The overlay as a Secondary Capture and the heat map as a Parametric Map, in the study of the source image."""

from __future__ import annotations

import copy

import numpy as np
from highdicom import VOILUTTransformation
from highdicom.pm import ParametricMap, RealWorldValueMapping
from highdicom.sc import SCImage
from pydicom import Dataset
from pydicom.sr.codedict import codes
from pydicom.uid import RLELossless

from vitmodel.results.evidence import MANUFACTURER, Software

# The standard requires 16 bits, but 8 of them resolve a few hundred patches and make the file ten times smaller.
MAX_STORED_VALUE = 255
MAP_SERIES, CAPTURE_SERIES = 9101, 9102  # series numbers that no acquisition uses


def secondary_capture(page: np.ndarray, source: Dataset, software: Software, side: str) -> Dataset:
    """Return an overlay as a Secondary Capture (PS3.3 A.8.1).

    Args:
        page: The overlay, `(H, W, 3)` uint8, RGB.
        source: Header of the source image.
        software: Software and model that computed the heat map.
        side: L, R or '' = unknown.
    """
    capture = SCImage.from_ref_dataset(
        ref_dataset=source,
        pixel_array=page,
        photometric_interpretation="RGB",
        bits_allocated=8,
        coordinate_system="PATIENT",
        series_instance_uid=software.uid(f"captures of a study {side}", source.StudyInstanceUID),
        series_number=CAPTURE_SERIES,
        sop_instance_uid=software.uid("capture", source.SOPInstanceUID),
        instance_number=int(source.get("InstanceNumber") or 1),
        manufacturer=MANUFACTURER,
        laterality=side or None,
        patient_orientation=("L", "F"),  # highdicom does not accept oblique orientations: replaced below
        transfer_syntax_uid=RLELossless,
    )
    capture.Laterality = side  # one series contains one side
    capture.PatientOrientation = source.get("PatientOrientation", "")
    capture.SeriesDescription = "Heat map overlay, research only"
    capture.ManufacturerModelName = software.model
    capture.SoftwareVersions = software.version
    return capture


def parametric_map(values: np.ndarray, unit: str, source: Dataset, software: Software, side: str) -> Dataset:
    """Return a heat map as a Parametric Map on the pixels of its source image, in 254 steps (PS3.3 A.75).

    The stored value 0 lies outside the breast and maps to no value. The standard requires a plane in space, which a
    projection does not have. The object therefore gets a frame of reference of its own, the detector, in millimetres if
    the source states its pixel spacing and in pixels otherwise.

    Args:
        values: The heat map, `(H, W)` float, NaN outside the breast.
        unit: Meaning of the values.
        source: Header of the source image.
        software: Software and model that computed the map.
        side: L, R or '' = unknown.
    """
    low = float(np.nanmin(values))
    high = float(np.nanmax(values))
    step = (high - low) / (MAX_STORED_VALUE - 1) or 1.0
    stored = np.where(np.isnan(values), 0, 1 + np.rint((np.nan_to_num(values) - low) / step)).astype(np.uint16)
    mapping = RealWorldValueMapping(
        lut_label="saliency",
        lut_explanation=unit[:64],
        unit=codes.UCUM.NoUnits,
        quantity_definition=codes.DCM.Saliency,
        value_range=(1, MAX_STORED_VALUE),
        slope=step,
        intercept=low - step,
    )
    heat = ParametricMap(
        source_images=[_in_a_plane(source, software)],
        pixel_array=stored,
        series_instance_uid=software.uid(f"maps of a study {side}", source.StudyInstanceUID),
        series_number=MAP_SERIES,
        sop_instance_uid=software.uid("map", source.SOPInstanceUID),
        instance_number=int(source.get("InstanceNumber") or 1),
        manufacturer=MANUFACTURER,
        manufacturer_model_name=software.model,
        software_versions=software.version,
        device_serial_number=software.serial,
        contains_recognizable_visual_features=False,
        real_world_value_mappings=[mapping],
        voi_lut_transformations=[
            VOILUTTransformation(window_center=MAX_STORED_VALUE / 2, window_width=float(MAX_STORED_VALUE))
        ],
        content_label="SALIENCY",
        content_description=unit[:64],
        transfer_syntax_uid=RLELossless,
    )
    heat.Laterality = side
    heat.SeriesDescription = "Heat map, research only"
    return heat


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
