"""What a model looked at, brought back from the patches of a crop to the pixels of its source. Knows no model, colour or file."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from scipy.ndimage import distance_transform_edt

from vitmodel.pixels.preprocessing import CropGeometry


@dataclass(frozen=True, eq=False)
class HeatMap:
    """One value per patch of a crop, and where that crop lies in its source image."""

    values: np.ndarray
    """h w, float; NaN = air."""
    tissue: np.ndarray
    """H W bool: the crop's pixels that show breast."""
    geometry: CropGeometry
    patch: int
    """Side of a patch in crop pixels."""
    source_shape: tuple[int, int]
    """Rows and columns of the source image."""

    def to_source_image(self, scale: float = 1.0) -> np.ndarray:
        """The map over the whole source image, shrunk by `scale`: H W float32, NaN outside the breast.

        Between the centres of patches it is interpolated; a breast's edge is that of the crop, not of the patches.
        """
        nearest = distance_transform_edt(np.isnan(self.values), return_distances=False, return_indices=True)
        filled = self.values[tuple(nearest)].astype(np.float32)
        found = self._warp(filled, self.patch, scale, cv2.BORDER_REPLICATE)
        breast = self._warp(self.tissue.astype(np.float32), 1, scale, cv2.BORDER_CONSTANT) > 0.5
        return np.where(breast, found, np.float32(np.nan))

    def _warp(self, grid: np.ndarray, side: int, scale: float, border: int) -> np.ndarray:
        """Cells of `side` crop pixels each, to the source image shrunk by `scale`; pixel centres at whole numbers everywhere."""
        to_crop = _zoom(side)
        to_source = np.vstack([self.geometry.to_source(), [0, 0, 1]])
        matrix = (_zoom(scale) @ to_source @ to_crop)[:2]
        rows, columns = (max(1, round(length * scale)) for length in self.source_shape)
        return cv2.warpAffine(grid, matrix, (columns, rows), flags=cv2.INTER_LINEAR, borderMode=border)

    def peak_position(self) -> tuple[float, float]:
        """Where in the source the map is highest, x and y in pixels: the middle of the highest patch's tissue."""
        row, column = np.unravel_index(np.nanargmax(self.values), self.values.shape)
        top, left = row * self.patch, column * self.patch
        rows, columns = np.nonzero(self.tissue[top : top + self.patch, left : left + self.patch])
        x, y = self.geometry.to_source() @ [left + columns.mean(), top + rows.mean(), 1]
        return float(x), float(y)

    def peak_outline(self, share: float = 0.5) -> np.ndarray:
        """The outline, K x 2 (x, y) in source pixels, of the region about the peak where the map is above `share` of its highest value."""
        scale = min(1.0, 1024 / max(self.source_shape))
        found = np.nan_to_num(self.to_source_image(scale), nan=0)
        _, labels = cv2.connectedComponents((found >= share * found.max()).astype(np.uint8))
        region = labels == labels[np.unravel_index(found.argmax(), found.shape)]
        (outline, *_), _ = cv2.findContours(region.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_TC89_L1)
        corners = (outline[:, 0] + 0.5) / scale - 0.5
        return np.clip(corners, 0, [self.source_shape[1] - 1, self.source_shape[0] - 1])


def _zoom(factor: float) -> np.ndarray:
    """3 x 3: coordinates in cells to those in cells `factor` times as many, pixel centres at whole numbers."""
    return np.array([[factor, 0, (factor - 1) / 2], [0, factor, (factor - 1) / 2], [0, 0, 1]])
