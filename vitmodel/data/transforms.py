"""Random augmentation of crops: sample the parameters first, then apply them without further randomness.

All changes work on float32 in [0, 1], so that 16-bit crops keep their grey levels. Geometric changes move tissue and
air together, in one interpolation. All other changes affect tissue only and keep the order of grey levels: denser
tissue stays brighter, and air stays 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from vitmodel.config import AugmentConfig

MIN_TISSUE_VALUE = 1 / 65535  # the smallest step of a 16-bit crop; 0 would be air
ELASTIC_KNOTS = 6  # control points of the elastic field across the width, and at least as many down the height

FULL_IMAGE = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True)
class Augmentation:
    """One fully determined change of an image; applying it twice gives the same result."""

    flip: bool
    """Whether to flip up and down."""
    angle: float
    """Rotation in degrees."""
    scale: float
    """Scale factor."""
    shift: tuple[float, float]
    """Shift in x and y, as fractions of width and height."""
    gamma: float
    """Exponent of the grey values."""
    contrast: float
    """Factor of the differences from the mean grey value of the tissue."""
    noise: float
    """Standard deviation of the Gaussian noise."""
    seed: int
    """Seed of the noise, the holes and the elastic field."""
    elastic: float = 0.0
    """Largest elastic displacement, as a fraction of the width."""
    window: tuple[float, float] = (0.0, 1.0)
    """Grey values that become black and white."""
    blur: float = 0.0
    """Standard deviation of the Gaussian blur in pixels."""
    holes: int = 0
    """Number of holes."""
    hole: float = 0.0
    """Side of a hole, as a fraction of the width."""
    mirror: bool = False
    """Whether to flip left and right."""
    crop_box: tuple[float, float, float, float] = FULL_IMAGE
    """Part of the image that is enlarged to the whole: y, x, height, width as fractions."""

    @classmethod
    def sample(cls, config: AugmentConfig, rng: np.random.Generator) -> Augmentation:
        """Sample the parameters; the number of random draws does not depend on the configuration.

        Args:
            config: Ranges and probabilities of the changes.
            rng: Source of the random numbers.
        """
        flip, noise = rng.random(2)
        angle, scale, shift_x, shift_y, gamma, contrast = rng.uniform(-1, 1, 6)
        seed = int(rng.integers(2**63))
        elastic, blur, holes = rng.random(3)
        low, high = rng.uniform(-1, 1, 2)
        mirror, area, place_y, place_x = rng.random(4)
        aspect_ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        crop_box = FULL_IMAGE
        if config.area != 1:
            share = config.area + (1 - config.area) * area
            height = min(1, np.sqrt(share / aspect_ratio))
            width = min(1, np.sqrt(share * aspect_ratio))
            crop_box = (float((1 - height) * place_y), float((1 - width) * place_x), float(height), float(width))
        return cls(
            flip=bool(flip < config.flip),
            angle=config.rotate * angle,
            scale=1 + config.scale * scale,
            shift=(config.shift * shift_x, config.shift * shift_y),
            gamma=float(np.exp(config.gamma * gamma)),
            contrast=1 + config.contrast * contrast,
            noise=config.noise * noise,
            seed=seed,
            elastic=config.elastic * elastic,
            window=(config.window * low, 1 + config.window * high),
            blur=config.blur * blur,
            holes=int(holes * (config.holes + 1)),
            hole=config.hole,
            mirror=bool(mirror < config.mirror),
            crop_box=crop_box,
        )

    def apply(self, image: np.ndarray) -> np.ndarray:
        """Return the changed image; air stays 0, and tissue stays in (0, 1].

        Args:
            image: `(H, W)` float32 in [0, 1], 0 = air. It is not modified.
        """
        if self.flip:
            image = image[::-1]
        if self.mirror:
            image = image[:, ::-1]
        image = self._apply_geometry(self._apply_crop(np.ascontiguousarray(image)))
        tissue = image > 0
        if not tissue.any():
            return image
        if self.blur > 0:
            image = self._blur_tissue(image, tissue)
        rng = np.random.default_rng(self.seed)
        low, high = self.window
        values = np.clip((image[tissue] - low) / (high - low), MIN_TISSUE_VALUE, 1) ** self.gamma
        mean = values.mean()
        values = mean + self.contrast * (values - mean)
        if self.noise > 0:
            values = values + rng.normal(0, self.noise, values.shape).astype(np.float32)
        result = np.zeros_like(image)
        result[tissue] = np.clip(values, MIN_TISSUE_VALUE, 1)
        return self._cut_out(result, tissue, rng)

    def transform_boxes(self, boxes: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
        """Return the boxes on the changed image that enclose everything in the given ones: `(K, 4)`.

        An elastic change widens the boxes by its largest displacement.

        Args:
            boxes: `(K, 4)`: x0 y0 x1 y1 in pixels, ends exclusive.
            shape: Height and width of the image.
        """
        rows, columns = shape
        x = boxes[:, [0, 0, 2, 2]]  # the four corners
        y = boxes[:, [1, 3, 1, 3]]
        if self.mirror:
            x = columns - x
        if self.flip:
            y = rows - y
        top, left, height, width = self._crop_box_pixels(rows, columns)
        x = (x - left) * columns / width
        y = (y - top) * rows / height
        matrix = self._affine_matrix(rows, columns)
        x, y = (factors[0] * (x - 0.5) + factors[1] * (y - 0.5) + factors[2] + 0.5 for factors in matrix)
        margin = self.elastic * columns
        corners = [x.min(1) - margin, y.min(1) - margin, x.max(1) + margin, y.max(1) + margin]
        return np.stack(corners, axis=1).astype(np.float32)

    def _crop_box_pixels(self, rows: int, columns: int) -> tuple[int, int, int, int]:
        """Return top, left, height and width of the crop box in pixels."""
        y, x, height, width = self.crop_box
        return round(y * rows), round(x * columns), max(1, round(height * rows)), max(1, round(width * columns))

    def _affine_matrix(self, rows: int, columns: int) -> np.ndarray:
        """Return the affine map from old to new positions, `(2, 3)`, with pixel centres at whole numbers.

        It rotates and scales about the middle of the chest wall (the left edge), then shifts.
        """
        matrix: np.ndarray = cv2.getRotationMatrix2D((0, (rows - 1) / 2), self.angle, self.scale)
        matrix[:, 2] += np.array(self.shift) * (columns, rows)
        return matrix

    def _apply_crop(self, image: np.ndarray) -> np.ndarray:
        """Enlarge the crop box to the size of the image."""
        if self.crop_box == FULL_IMAGE:
            return image
        rows, columns = image.shape
        top, left, height, width = self._crop_box_pixels(rows, columns)
        part = image[top : top + height, left : left + width]
        return cv2.resize(part, (columns, rows), interpolation=cv2.INTER_LINEAR)

    def _apply_geometry(self, image: np.ndarray) -> np.ndarray:
        """Apply the affine map and the elastic displacement, in one interpolation."""
        height, width = image.shape
        matrix = self._affine_matrix(height, width)
        if self.elastic > 0:
            return cv2.remap(image, *self._elastic_map(matrix, height, width), cv2.INTER_LINEAR, borderValue=0)
        if np.array_equal(matrix, np.eye(2, 3)):
            return image
        return cv2.warpAffine(image, matrix, (width, height), flags=cv2.INTER_LINEAR, borderValue=0)

    def _elastic_map(self, matrix: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the source position of each pixel, x and y, `(H, W)` each.

        It is the inverse of the affine map plus a smooth random displacement.
        """
        inverse = cv2.invertAffineTransform(matrix)
        columns, rows = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
        knot_rows = max(ELASTIC_KNOTS, round(ELASTIC_KNOTS * height / width))
        knots = np.random.default_rng(self.seed + 1).uniform(-1, 1, (2, knot_rows, ELASTIC_KNOTS)).astype(np.float32)
        knots = knots * self.elastic * width
        dx, dy = (cv2.resize(values, (width, height), interpolation=cv2.INTER_LINEAR) for values in knots)
        # No displacement in x at the chest wall (column 0), so that no air enters there.
        dx = cv2.GaussianBlur(dx, (0, 0), width / (2 * ELASTIC_KNOTS)) * columns / width
        dy = cv2.GaussianBlur(dy, (0, 0), width / (2 * ELASTIC_KNOTS))
        source_x = inverse[0, 0] * columns + inverse[0, 1] * rows + inverse[0, 2] + dx
        source_y = inverse[1, 0] * columns + inverse[1, 1] * rows + inverse[1, 2] + dy
        return source_x.astype(np.float32), source_y.astype(np.float32)

    def _blur_tissue(self, image: np.ndarray, tissue: np.ndarray) -> np.ndarray:
        """Blur the tissue without mixing in air: blur image and mask, and divide them (normalized convolution)."""
        blurred = cv2.GaussianBlur(image, (0, 0), self.blur)
        weight = cv2.GaussianBlur(tissue.astype(np.float32), (0, 0), self.blur)
        return np.where(tissue, blurred / np.maximum(weight, 1e-6), 0).astype(np.float32)

    def _cut_out(self, image: np.ndarray, tissue: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Fill random squares of the tissue with its mean, because 0 would be air (Cutout).

        DeVries and Taylor 2017, arXiv 1708.04552.
        """
        if not self.holes:
            return image
        side = max(1, round(self.hole * image.shape[1]))
        rows, columns = np.nonzero(tissue)
        fill = image[tissue].mean()
        for center in rng.integers(len(rows), size=self.holes):
            top = max(0, rows[center] - side // 2)
            left = max(0, columns[center] - side // 2)
            square = np.s_[top : top + side, left : left + side]
            image[square] = np.where(tissue[square], fill, 0)
        return image
