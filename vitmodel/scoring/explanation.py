"""Heat maps of scored images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pandas as pd

from vitmodel.data.rows import ManifestRow
from vitmodel.errors import UsageError
from vitmodel.releases.files import safe_file_name
from vitmodel.results.heatmap import HeatMap
from vitmodel.results.image_results import ImageResult
from vitmodel.scoring.predictor import Predictor
from vitmodel.scoring.stream import LoadedImage, ScoredImage, ScoringRows
from vitmodel.utils import NOT_A_MEDICAL_DEVICE, write_atomic

NO_GEOMETRY = "the manifest does not contain the position of the crop in its source"


def heat_map(image: LoadedImage, predictor: Predictor, method: str) -> HeatMap:
    """Return the heat map of a loaded image, whose geometry must be known."""
    cropped = image.cropped
    assert cropped.crop is not None
    assert cropped.geometry is not None
    record: dict[str, Any] = cropped.record
    return HeatMap(
        values=predictor.explain(image, method),
        tissue=cropped.crop > 0,
        geometry=cropped.geometry,
        patch=predictor.ensemble.model.config.vit.patch,
        source_shape=(int(record["source_height"]), int(record["source_width"])),
    )


class ExplainedImage(NamedTuple):
    """One image with its score and its heat map."""

    rows: ScoringRows
    """Its row."""
    scored: ScoredImage
    heat: HeatMap


def score_image(table: pd.DataFrame, predictor: Predictor) -> tuple[ScoringRows, ScoredImage]:
    """Score the only image of a manifest, whose crop has a known position in its source.

    Args:
        table: A manifest of one row.
        predictor: The loaded packages.

    Raises:
        UsageError: There are several images, the image is refused, or the position of its crop is unknown.
    """
    rows = predictor.attach(table)
    if len(rows) != 1:
        raise UsageError(f"source: holds {len(rows)} images; pass one of them")
    ((_, scored),) = predictor.scores(rows)
    record = scored.loaded.cropped.record
    if scored.loaded.pack is None:
        raise UsageError(f"source: the image is refused ({record['reason']}): {record['remark']}")
    if scored.loaded.cropped.geometry is None:
        raise UsageError(f"source: {NO_GEOMETRY}; pass the source image instead of its crop")
    return rows, scored


def explain_image(table: pd.DataFrame, predictor: Predictor, method: str) -> ExplainedImage:
    """Score and explain the only image of a manifest.

    Args:
        table: A manifest of one row.
        predictor: The loaded packages.
        method: Name of the method.

    Raises:
        UsageError: `score_image` refuses the image.
    """
    rows, scored = score_image(table, predictor)
    return ExplainedImage(rows, scored, heat_map(scored.loaded, predictor, method))


def image_of(place: pd.Series, row: ManifestRow, scored: ScoredImage, predictor: Predictor) -> ImageResult:
    """Return the data of an image for the picture and the DICOM results; `place` is its row of the manifest."""
    record = scored.loaded.cropped.record
    return ImageResult(
        name=safe_file_name(place.image_id),
        path=row.source_file,
        side=place.laterality,
        view=place.view,
        probability=predictor.ensemble.probability(scored.logits[:1])[0],
        inverted="inverted" in (record["reason"] or ""),  # type: ignore[operator]
        voi=str(record.get("voi") or row.voi or ""),  # only the manifest names the grey range of a crop that ETL made
    )


@dataclass(frozen=True, eq=False)
class Explanation:
    """The contribution of each part of an image to its score. Research software, not a medical device.

    A heat map shows what influenced the network; it does not outline lesions. `vitmodel.Model.explain` returns it.

    Attributes:
        image_id: The image.
        method: "rollout", "gradient", "occlusion" or "integrated".
        unit: Unit of the values.
        probability: Calibrated probability of the model's label (cancer) from this image alone, 0 to 1.
        threshold: Smallest probability that the model calls positive.
        heat: The values and their position in the source image.
        picture: The breast, plain and below the heat map, with a colour bar and a caption: `(H, W, 3)` uint8, RGB.

    Examples:
        >>> model = vitmodel.load("run/package", progress=False)
        >>> heat = model.explain("exam/rcc.dcm")
        >>> heat.values.ndim, heat.picture.shape[-1]
        (2, 3)
        >>> heat.save("rcc.png")
    """

    image_id: str
    method: str
    unit: str
    probability: float
    threshold: float
    heat: HeatMap
    picture: np.ndarray

    @property
    def values(self) -> np.ndarray:
        """Values per patch of the crop, `(h, w)` float; NaN = air."""
        return self.heat.values

    @property
    def peak(self) -> tuple[float, float]:
        """Position of the highest value, `(x, y)` in pixels of the source image."""
        return self.heat.peak_position()

    @property
    def region(self) -> np.ndarray:
        """Outline of the region around the peak, `(K, 2)` points `(x, y)` in pixels of the source image."""
        return self.heat.peak_outline()

    def to_source_image(self) -> np.ndarray:
        """Return the values at the resolution of the source image.

        Returns:
            Float array `(H, W)` with the height and width of the source image; NaN outside the breast.

        Examples:
            >>> model = vitmodel.load("run/package", progress=False)
            >>> model.explain("exam/rcc.dcm").to_source_image().ndim
            2
        """
        return self.heat.to_source_image()

    def save(self, path: str | Path) -> None:
        """Write `picture` as a PNG file.

        Args:
            path: File to write; its name must end in .png.

        Raises:
            UsageError: The name does not end in .png.
            VitmodelError: The file cannot be written.

        Examples:
            >>> model = vitmodel.load("run/package", progress=False)
            >>> model.explain("exam/rcc.dcm", method="rollout").save("rollout.png")
        """
        if Path(path).suffix.lower() != ".png":
            raise UsageError(f"path: {path} is not the name of a PNG file; use a name that ends in .png")
        write_atomic(path, self._repr_png_())

    def _repr_png_(self) -> bytes:
        return cv2.imencode(".png", self.picture[..., ::-1])[1].tobytes()

    def __repr__(self) -> str:
        rows, columns = self.values.shape
        shown = f"{self.image_id!r}, {self.method}, {rows}x{columns} patches, probability {self.probability:.4f}"
        return f"Explanation({shown})\n{NOT_A_MEDICAL_DEVICE}"
