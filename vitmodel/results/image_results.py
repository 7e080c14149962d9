"""All that is written of an image or a study beside its scores: overlay and DICOM results. Knows the parts, not how a score came to be."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from pydicom import Dataset

from vitmodel.config import Preprocessing
from vitmodel.errors import ImageRefusedError
from vitmodel.results.evidence import Software, make_deidentifier, read_source_header
from vitmodel.results.heatmap import HeatMap
from vitmodel.results.overlay import Caption, draw_overlay, read_display_image
from vitmodel.utils import atomic_path, import_extra, write_atomic

Region = list[list[float]]


@dataclass(frozen=True, kw_only=True)
class ImageResult:
    """What the results of one image need to know of it."""

    name: str
    """Name of its overlay's file, without suffix."""
    path: Path
    side: str
    """L, R or ''."""
    view: str
    probability: float
    inverted: bool
    """Whether its polarity was put right."""


class ResultWriter:
    """Writes below OUT: overlays/NAME.png and, if `dicom`, dicom/SOPINSTANCEUID.dcm.

    Raises UsageError where highdicom or dicognito is needed and not installed.
    """

    def __init__(
        self, out: Path, software: Software, preprocessing: Preprocessing, threshold: float, dicom: bool, secret: str
    ) -> None:
        self.out, self.software, self.preprocessing, self.threshold, self.dicom = (
            out,
            software,
            preprocessing,
            threshold,
            dicom,
        )
        self.deidentify = make_deidentifier(secret) if secret else None
        if dicom:
            import_extra("highdicom", "dicom", "dicom")  # fail here rather than after an hour of scoring

    def write_explanation(
        self, image: ImageResult, heat: HeatMap, unit: str, low: float, high: float
    ) -> tuple[Region, list[str]]:
        """The overlay, and as DICOM the overlay and the map; returns the outline (x, y in source pixels) of the hottest region, and the
        files' paths below OUT.
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
        picture = read_display_image(image.path, heat, self.preprocessing, image.inverted)
        words = "at or above" if image.probability >= self.threshold else "below"
        caption = Caption(
            title=f"{image.side} {image.view}".strip() or "side and view unknown",
            score=f"Probability of cancer by this image alone {image.probability:.1%}, {words} the threshold of {self.threshold:.1%}",
            unit=unit, low=low, high=max(high, float(np.nanmax(heat.values))),
        )  # fmt: skip
        return draw_overlay(picture, heat, caption, breast_only=self.deidentify is not None)

    def report(self, images: pd.DataFrame, breasts: pd.DataFrame) -> tuple[int, int]:
        """A structured report per study; how many were written, and how many scored images could have no DICOM result.

        `images` has a row per image with path, prediction_id, laterality, probability and region (an outline or None), `breasts` one per
        breast with prediction_id, laterality, probability and decision.
        """
        from vitmodel.results.structured_report import BreastFinding, ImageFinding, structured_report

        studies: dict[str, dict[str, list[ImageFinding]]] = {}
        without = 0
        for row in images[images["probability"].notna()].itertuples():
            source = self.read_header(Path(str(row.path)))
            if source is None:
                without += 1
                continue
            region = None if row.region is None else np.array(row.region)
            finding = ImageFinding(source=source, probability=float(row.probability), region=region)
            studies.setdefault(str(source.StudyInstanceUID), {}).setdefault(str(row.prediction_id), []).append(finding)
        known = breasts.set_index("prediction_id")
        for study in studies.values():
            findings = []
            for breast, members in study.items():
                row = known.loc[breast]
                suspicious = row["decision"] == 1
                findings.append(
                    BreastFinding(
                        side=row["laterality"], probability=row["probability"], suspicious=suspicious, images=members
                    )
                )
            self.save(structured_report(findings, self.software))
        return len(studies), without

    def read_header(self, path: Path) -> Dataset | None:
        """The image's header as results refer to it; None where it is no DICOM object that one could refer to."""
        try:
            return read_source_header(path, self.deidentify)
        except ImageRefusedError:
            return None

    def save(self, result: Dataset) -> Path:
        """Write a DICOM file under its own name, and return its path."""
        path = self.out / "dicom" / f"{result.SOPInstanceUID}.dcm"
        with atomic_path(path) as temporary:
            result.save_as(temporary, enforce_file_format=True)
        return path
