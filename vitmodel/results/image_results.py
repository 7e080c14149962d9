"""Results of an image or study other than score tables: overlays and DICOM objects."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from pydicom import Dataset

from vitmodel.config import Preprocessing
from vitmodel.config.labels import target_name
from vitmodel.errors import ImageRefusedError, VitmodelError
from vitmodel.results.evidence import Software, make_deidentifier, read_source_header
from vitmodel.results.heatmap import HeatMap
from vitmodel.results.overlay import Caption, draw_overlay, read_display_image
from vitmodel.utils import atomic_path, describe_failure, import_extra, write_atomic

Region = list[list[float]]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ImageResult:
    """Data of one image that its results contain."""

    name: str
    """File name of its overlay, without suffix."""
    path: Path
    side: str
    """L, R or '' = unknown."""
    view: str
    probability: float
    inverted: bool
    """Whether the polarity of the image was corrected."""
    voi: str = ""
    """The grey range of the crop, as recorded in the manifest; empty if it is unknown."""


class ResultWriter:
    """Writer of overlays and DICOM results.

    It writes OUT/overlays/NAME.png and, with `dicom`, OUT/dicom/SOPINSTANCEUID.dcm.

    Args:
        out: Folder of the results.
        software: Software and model to which the results are attributed.
        preprocessing: Preprocessing of the crops.
        threshold: Probability from which a breast is suspicious.
        dicom: Whether DICOM results are written.
        secret: Seed for de-identification; '' = keep the patient's identity.

    Raises:
        UsageError: highdicom or dicognito is needed but not installed.
    """

    def __init__(
        self, out: Path, software: Software, preprocessing: Preprocessing, threshold: float, dicom: bool, secret: str
    ) -> None:
        self.out = out
        self.software = software
        self.preprocessing = preprocessing
        self.threshold = threshold
        self.dicom = dicom
        self.deidentify = make_deidentifier(secret) if secret else None
        if dicom:
            import_extra("highdicom", "dicom", "dicom")  # fail here rather than after an hour of scoring

    def write_explanation(
        self, image: ImageResult, heat: HeatMap, unit: str, low: float, high: float
    ) -> tuple[Region, list[str]]:
        """Write the overlay and, with `dicom`, the overlay and the heat map as DICOM objects.

        Args:
            image: The explained image.
            heat: Its heat map.
            unit: Meaning of the map's values.
            low: Value at which colour begins.
            high: Value of the strongest colour, unless the map exceeds it.

        Returns:
            The outline of the region with the highest values as (x, y) in source pixels, and the paths of the files
            relative to OUT.
        """
        page = self.draw(image, heat, unit, low, high)
        written = [self.out / "overlays" / f"{image.name}.png"]
        write_atomic(written[0], cv2.imencode(".png", page[..., ::-1])[1].tobytes())
        if self.dicom and (source := self.read_header(image.path)) is not None:
            from vitmodel.results.secondary import parametric_map, secondary_capture

            written.append(self.save(secondary_capture(page, source, self.software, image.side)))
            written.append(self.save(parametric_map(heat.to_source_image(), unit, source, self.software, image.side)))
        region = [[round(float(x), 1), round(float(y), 1)] for x, y in heat.peak_outline()]
        return region, [str(path.relative_to(self.out)) for path in written]

    def draw(self, image: ImageResult, heat: HeatMap, unit: str, low: float, high: float) -> np.ndarray:
        """Return the breast, plain and below the heat map, with colour bar and caption: `(H, W, 3)` uint8, RGB."""
        picture = read_display_image(image.path, heat, self.preprocessing, image.inverted, image.voi)
        relation = "at or above" if image.probability >= self.threshold else "below"
        caption = Caption(
            title=f"{image.side} {image.view}".strip() or "side and view unknown",
            score=f"Probability of {target_name(self.software.label)} from this image alone: {image.probability:.1%}, "
            f"{relation} the threshold of {self.threshold:.1%}",
            unit=unit,
            low=low,
            high=max(high, float(np.nanmax(heat.values))),
        )
        return draw_overlay(picture, heat, caption, breast_only=self.deidentify is not None)

    def report(self, images: pd.DataFrame, breasts: pd.DataFrame) -> tuple[int, int]:
        """Write a structured report per study.

        A study whose images state several patients gets none: it would carry one woman's name over another's results.

        Args:
            images: One row per image with the columns path, breast_id, laterality, probability and region (an
                outline or None).
            breasts: One row per breast and exam with the columns breast_id, laterality, probability and decision.

        Returns:
            The number of reports, and the number of scored images that are in none: they have no usable header, or
            their study is shared by several patients.
        """
        from vitmodel.results.structured_report import BreastFinding, ImageFinding, structured_report

        studies: dict[str, dict[str, list[ImageFinding]]] = {}
        patients: dict[str, set[tuple[str, str]]] = {}
        skipped = 0
        for row in images[images["probability"].notna()].itertuples():
            source = self.read_header(Path(str(row.path)))
            if source is None:
                skipped += 1
                continue
            region = None if row.region is None else np.array(row.region)
            finding = ImageFinding(source=source, probability=float(row.probability), region=region)
            study_uid = str(source.StudyInstanceUID)
            studies.setdefault(study_uid, {}).setdefault(str(row.breast_id), []).append(finding)
            patients.setdefault(study_uid, set()).add((str(source.get("IssuerOfPatientID", "")), str(source.PatientID)))
        rows = breasts.set_index("breast_id")
        reports = 0
        for study_uid, study in studies.items():
            if len(patients[study_uid]) > 1:
                images_of_study = sum(map(len, study.values()))
                skipped += images_of_study
                logger.warning(
                    "study %s states %d patients in its images, so its %d images get no report; correct the headers",
                    study_uid,
                    len(patients[study_uid]),
                    images_of_study,
                )
                continue
            findings: list[BreastFinding] = []
            for breast_id, image_findings in study.items():
                breast = rows.loc[breast_id]
                breast_finding = BreastFinding(
                    side=breast["laterality"],
                    probability=breast["probability"],
                    suspicious=breast["decision"] == 1,
                    images=image_findings,
                )
                findings.append(breast_finding)
            try:
                self.save(structured_report(findings, self.software))
            except VitmodelError:  # such as a full disk, which concerns the whole run
                raise
            except Exception as error:  # noqa: BLE001 (an odd header must not cost other patients their reports)
                skipped += sum(map(len, study.values()))
                logger.warning(
                    "study %s gets no report, because its headers are invalid (%s)", study_uid, type(error).__name__
                )
                continue
            reports += 1
        return reports, skipped

    def read_header(self, path: Path) -> Dataset | None:
        """Return the header of an image as results refer to it, or None if no result can refer to the file."""
        try:
            return read_source_header(path, self.deidentify)
        except ImageRefusedError:
            return None
        except Exception as error:  # noqa: BLE001 (an odd header must not cost other images their results)
            logger.warning("%s: no DICOM result refers to it: %s", path, describe_failure(error))
            return None

    def save(self, result: Dataset) -> Path:
        """Write a DICOM object to a file named after its SOP Instance UID and return the path."""
        path = self.out / "dicom" / f"{result.SOPInstanceUID}.dcm"
        with atomic_path(path) as temporary:
            result.save_as(temporary, enforce_file_format=True)
        return path
