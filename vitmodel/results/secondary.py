"""The overlay as a Secondary Capture and the heat map as a Parametric Map, beside the source image in its study. Knows no model."""

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

MAX_STORED_VALUE = (
    255  # of 16 bits, for which the standard asks: steps enough for a few hundred patches, and a file ten times smaller
)
MAP_SERIES, CAPTURE_SERIES = 9101, 9102  # numbers that no acquisition uses


def secondary_capture(page: np.ndarray, source: Dataset, software: Software, side: str) -> Dataset:
    """The overlay `page` (H W 3, uint8, RGB) of the image `source` (its header); `side` is L, R or '' (PS3.3 A.8.1)."""
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
        patient_orientation=("L", "F"),  # highdicom knows no oblique one: replaced below
        transfer_syntax_uid=RLELossless,
    )
    capture.Laterality = side  # one series holds one side
    capture.PatientOrientation = source.get("PatientOrientation", "")
    capture.SeriesDescription = "Heat map overlay, research only"
    capture.ManufacturerModelName, capture.SoftwareVersions = software.model, software.version
    return capture


def parametric_map(values: np.ndarray, unit: str, source: Dataset, software: Software, side: str) -> Dataset:
    """The heat map `values` (H W float, NaN outside the breast) on the pixels of the image `source`, in 254 steps (PS3.3 A.75).

    Stored 0 is outside the breast and maps to no value. The object must lie in a plane, and a projection lies in none: it gets a frame of
    reference of its own, the detector, in millimetres where the source states its spacing, else in pixels.
    """
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    step = (high - low) / (MAX_STORED_VALUE - 1) or 1.0
    stored = np.where(np.isnan(values), 0, 1 + np.rint((np.nan_to_num(values) - low) / step)).astype(np.uint16)
    mapping = RealWorldValueMapping(
        lut_label="saliency", lut_explanation=unit[:64], unit=codes.UCUM.NoUnits, quantity_definition=codes.DCM.Saliency,
        value_range=(1, MAX_STORED_VALUE), slope=step, intercept=low - step,
    )  # fmt: skip
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
    """The header with its pixels on a plane: x along the rows, y along the columns, the first pixel at 0, 0, 0."""
    plane = copy.copy(source)
    plane.FrameOfReferenceUID = software.uid("detector", source.SOPInstanceUID)
    plane.PositionReferenceIndicator = ""
    plane.ImagePositionPatient, plane.ImageOrientationPatient = [0, 0, 0], [1, 0, 0, 0, 1, 0]
    plane.PixelSpacing = source.get("PixelSpacing") or source.get("ImagerPixelSpacing") or [1, 1]
    plane.SliceThickness = 1
    return plane
