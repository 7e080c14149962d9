"""The overlay as a Secondary Capture in the study of the source image."""

from __future__ import annotations

import numpy as np
from highdicom.sc import SCImage
from pydicom import Dataset
from pydicom.uid import ExplicitVRLittleEndian

from vitmodel.results.evidence import MANUFACTURER, Software, instance_number

CAPTURE_SERIES = 9102  # a series number that no acquisition uses


def secondary_capture(page: np.ndarray, source: Dataset, software: Software, side: str, view: str = "") -> Dataset:
    """Return an overlay as a Secondary Capture (PS3.3 A.8.1).

    Args:
        page: The overlay, `(H, W, 3)` uint8, RGB.
        source: Header of the source image.
        software: Software and model that computed the heat map.
        side: L, R or '' = unknown.
        view: View of the image, which the overlay names.
    """
    capture = SCImage.from_ref_dataset(
        ref_dataset=source,
        pixel_array=page,
        photometric_interpretation="RGB",
        bits_allocated=8,
        coordinate_system="PATIENT",
        series_instance_uid=software.uid(f"captures of a study {side}", source.StudyInstanceUID),
        series_number=CAPTURE_SERIES,
        sop_instance_uid=software.uid("capture", source.SOPInstanceUID, side, view),
        instance_number=instance_number(source),
        manufacturer=MANUFACTURER,
        laterality=side or None,
        patient_orientation=("L", "F"),  # highdicom does not accept oblique orientations: replaced below
        transfer_syntax_uid=ExplicitVRLittleEndian,  # a plain storescu sends no compressed pixels
    )
    capture.Laterality = side  # one series contains one side
    capture.PatientOrientation = source.get("PatientOrientation", "")
    capture.SeriesDescription = "Heat map overlay, research only"
    capture.ManufacturerModelName = software.model
    capture.SoftwareVersions = software.version
    return capture
