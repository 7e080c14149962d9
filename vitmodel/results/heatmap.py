"""Heat maps of a model's explanation, mapped from the patches of a crop to the pixels of its source image."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from scipy.ndimage import distance_transform_edt

from vitmodel.pixels.preprocessing import CropGeometry


@dataclass(frozen=True, eq=False)
class HeatMap:
    """One value per patch of a crop, and the position of the crop in its source image."""

    values: np.ndarray
    """`(h, w)` float, one value per patch; NaN = air."""
    tissue: np.ndarray
    """`(H, W)` bool: the pixels of the crop that show breast."""
    geometry: CropGeometry
    """Mapping between crop and source image."""
    patch: int
    """Side of a patch in crop pixels."""
    source_shape: tuple[int, int]
    """Rows and columns of the source image."""

    def to_source_image(self, scale: float = 1.0) -> np.ndarray:
        """Return the map over the whole source image, `(H, W)` float32, NaN outside the breast.

        Values are interpolated between the centres of patches. The edge of the breast is that of the crop's mask, which
        is finer than the patches.

        Args:
            scale: Size of the result relative to the source image.
        """
        nearest = distance_transform_edt(np.isnan(self.values), return_distances=False, return_indices=True)
        filled = self.values[tuple(nearest)].astype(np.float32)
        values = self._warp(filled, self.patch, scale, cv2.BORDER_REPLICATE)
        breast = self._warp(self.tissue.astype(np.float32), 1, scale, cv2.BORDER_CONSTANT) > 0.5
        return np.where(breast, values, np.float32(np.nan))

    def _warp(self, grid: np.ndarray, side: int, scale: float, border: int) -> np.ndarray:
        """Resample a grid with cells of `side` crop pixels to the source image scaled by `scale`.

        Pixel centres have integer coordinates in all three grids.
        """
        to_crop = _zoom(side)
        to_source = np.vstack([self.geometry.to_source(), [0, 0, 1]])
        matrix = (_zoom(scale) @ to_source @ to_crop)[:2]
        rows, columns = (max(1, round(length * scale)) for length in self.source_shape)
        return cv2.warpAffine(grid, matrix, (columns, rows), flags=cv2.INTER_LINEAR, borderMode=border)

    def peak_position(self) -> tuple[float, float]:
        """Return the position (x, y) of the maximum in source pixels: the centre of the tissue in the highest patch."""
        row, column = np.unravel_index(np.nanargmax(self.values), self.values.shape)
        top, left = row * self.patch, column * self.patch
        rows, columns = np.nonzero(self.tissue[top : top + self.patch, left : left + self.patch])
        x, y = self.geometry.to_source() @ [left + columns.mean(), top + rows.mean(), 1]
        return float(x), float(y)

    def peak_outline(self, share: float = 0.5) -> np.ndarray:
        """Return the outline of the region around the peak.

        Args:
            share: The region is where the map reaches this fraction of its maximum.

        Returns:
            Corners `(K, 2)` as (x, y) in source pixels.
        """
        scale = min(1.0, 1024 / max(self.source_shape))
        values = np.nan_to_num(self.to_source_image(scale), nan=0)
        _, labels = cv2.connectedComponents((values >= share * values.max()).astype(np.uint8))
        region = labels == labels[np.unravel_index(values.argmax(), values.shape)]
        (outline, *_), _ = cv2.findContours(region.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_TC89_L1)
        corners = (outline[:, 0] + 0.5) / scale - 0.5
        return np.clip(corners, 0, [self.source_shape[1] - 1, self.source_shape[0] - 1])


def breast_outline(tissue: np.ndarray, geometry: CropGeometry) -> np.ndarray | None:
    """Return the outline of the breast in its source image.

    Args:
        tissue: `(H, W)` bool: the pixels of the crop that show breast.
        geometry: Mapping between crop and source image.

    Returns:
        Corners `(K, 2)` as (x, y) in source pixels, within one crop pixel of the mask's edge; None = no breast.
    """
    outlines, _ = cv2.findContours(tissue.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    if not outlines:
        return None
    outline = cv2.approxPolyDP(max(outlines, key=cv2.contourArea), 1.0, closed=True)[:, 0]
    if len(outline) < 3:
        return None
    return np.asarray(np.column_stack([outline, np.ones(len(outline))]) @ geometry.to_source().T)


def _zoom(factor: float) -> np.ndarray:
    """Return the matrix `(3, 3)` that maps coordinates to a grid `factor` times as fine, pixel centres at integers."""
    return np.array([[factor, 0, (factor - 1) / 2], [0, factor, (factor - 1) / 2], [0, 0, 1]])
