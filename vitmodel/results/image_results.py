"""Results of an image or study other than score tables: overlays and DICOM objects."""

from __future__ import annotations

import io
import logging
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

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
from vitmodel.utils import describe_failure, import_extra, write_atomic

if TYPE_CHECKING:
    from vitmodel.results.findings import BreastFinding

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
        dicom: Kinds of DICOM results to write, as in `--dicom`.
        secret: Seed for de-identification; '' = keep the patient's identity.

    Raises:
        UsageError: highdicom or dicognito is needed but not installed.
    """

    def __init__(
        self,
        out: Path,
        software: Software,
        preprocessing: Preprocessing,
        threshold: float,
        dicom: Collection[str],
        secret: str,
    ) -> None:
        self.out = out
        self.software = software
        self.preprocessing = preprocessing
        self.threshold = threshold
        self.dicom = frozenset(dicom)
        self.deidentify = make_deidentifier(secret) if secret else None
        if dicom:
            import_extra("highdicom", "dicom", "dicom")  # fail here rather than after an hour of scoring

    def write_explanation(
        self, image: ImageResult, heat: HeatMap, unit: str, low: float, high: float
    ) -> tuple[Region, list[str]]:
        """Write the overlay and, as `dicom` says, the overlay, the heat map and its region as DICOM objects.

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
        outline = heat.peak_outline()
        if self.dicom & {"sc", "seg", "pm"} and (source := self.read_header(image.path)) is not None:
            from vitmodel.results.maps import parametric_map, segmentation
            from vitmodel.results.secondary import secondary_capture

            if "sc" in self.dicom:
                written.append(self.save(secondary_capture(page, source, self.software, image.side, image.view)))
            if "seg" in self.dicom:
                written.append(self.save(segmentation(outline, source, self.software, image.side)))
            if "pm" in self.dicom:
                values = heat.to_source_image()
                written.append(self.save(parametric_map(values, unit, source, self.software, image.side)))
        return to_region(outline), [str(path.relative_to(self.out)) for path in written]

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
        """Write the reports and presentation states of each study that `dicom` names.

        A study whose images state several patients gets none: it would carry one woman's name over another's results.

        Args:
            images: One row per image with the columns path, breast_id, laterality, view, probability, and outline and
                region (of the breast and of the heat map's highest values, or None).
            breasts: One row per breast and exam with the columns breast_id, laterality, probability and decision.

        Returns:
            The number of studies with a report, and the number of scored images that are in none: they have no usable
            header, or their study is shared by several patients.
        """
        from vitmodel.results.findings import BreastFinding, ImageFinding

        studies: dict[str, dict[str, list[ImageFinding]]] = {}
        patients: dict[str, set[tuple[str, str]]] = {}
        files: dict[str, str] = {}
        """StudyInstanceUID -> its first file, for messages, which do not quote values of a header."""
        skipped = 0
        for row in images[images["probability"].notna()].itertuples():
            source = self.read_header(Path(str(row.path)))
            if source is None:
                skipped += 1
                continue
            finding = ImageFinding(
                source=source,
                probability=float(row.probability),
                view=str(row.view),
                outline=None if row.outline is None else np.array(row.outline),
                region=None if row.region is None else np.array(row.region),
            )
            study_uid = str(source.StudyInstanceUID)
            files.setdefault(study_uid, str(row.path))
            studies.setdefault(study_uid, {}).setdefault(str(row.breast_id), []).append(finding)
            patients.setdefault(study_uid, set()).add((str(source.get("IssuerOfPatientID", "")), str(source.PatientID)))
        rows = breasts.set_index("breast_id")
        reports = 0
        for study_uid, study in studies.items():
            if len(patients[study_uid]) > 1:
                images_of_study = sum(map(len, study.values()))
                skipped += images_of_study
                logger.warning(
                    "the study of %s states %d patients, so its %d images get no report; correct the headers",
                    files[study_uid],
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
                for result in self._reports(findings):
                    self.save(result)
            except VitmodelError:  # such as a full disk, which concerns the whole run
                raise
            except Exception as error:  # noqa: BLE001 (an odd header must not cost other patients their reports)
                skipped += sum(map(len, study.values()))
                logger.warning(
                    "the study of %s gets no report, because its headers are invalid (%s)",
                    files[study_uid],
                    type(error).__name__,
                )
                continue
            reports += 1
        return reports, skipped

    def _reports(self, breasts: list[BreastFinding]) -> list[Dataset]:
        """Return the reports and presentation states of one study."""
        from vitmodel.results.cad_report import cad_report
        from vitmodel.results.presentation import presentation_states
        from vitmodel.results.structured_report import structured_reports
        from vitmodel.results.text_report import text_report

        results: list[Dataset] = []
        if "sr" in self.dicom:
            results.append(text_report(breasts, self.software, self.threshold))
            for breast in breasts:
                results += structured_reports(breast, self.software)
        if "gsps" in self.dicom:
            for breast in breasts:
                results += presentation_states(breast, self.software)
        if "cad" in self.dicom:
            cad = cad_report(breasts, self.software)
            results += [] if cad is None else [cad]
        return results

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
        content = io.BytesIO()  # written to a full disk, pydicom prints a traceback after the error that it raises
        result.save_as(content, enforce_file_format=True)
        write_atomic(path, content.getvalue())
        return path


def to_region(outline: np.ndarray) -> Region:
    """Return an outline as lists, rounded to a tenth of a pixel, for the journal."""
    return [[round(float(x), 1), round(float(y), 1)] for x, y in outline]
