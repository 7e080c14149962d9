"""Random changes of a crop: sample the parameters first, then apply them purely. Knows no loader and no label.

All of it works on float32 in [0, 1], so that 16-bit crops keep their steps. Geometry moves tissue and air together, in one interpolation;
everything else changes tissue alone and never its order of grey: denser stays brighter, and air stays 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from vitmodel.config import AugmentConfig

MIN_TISSUE_VALUE = 1 / 65535  # of tissue: the least step of a 16-bit crop
ELASTIC_KNOTS = 6  # knots across the shorter side of the web that an elastic change pulls at


@dataclass(frozen=True)
class Augmentation:
    """One change, wholly determined; applying it twice gives the same crop."""

    flip: bool
    angle: float  # degrees
    scale: float
    shift: tuple[float, float]  # x, y as fractions of width and height
    gamma: float
    contrast: float
    noise: float
    seed: int
    elastic: float = 0.0  # largest displacement, as a fraction of the width
    window: tuple[float, float] = (0.0, 1.0)  # the greys that become black and white
    blur: float = 0.0  # standard deviation in pixels
    holes: int = 0
    hole: float = 0.0  # side of a hole as a fraction of the width
    mirror: bool = False
    crop_box: tuple[float, float, float, float] = (
        0.0,
        0.0,
        1.0,
        1.0,
    )  # y, x, height, width of what is cut out, as fractions

    @classmethod
    def sample(cls, config: AugmentConfig, rng: np.random.Generator) -> Augmentation:
        """Draw the parameters; the number of draws does not depend on the configuration."""
        flip, noise = rng.random(2)
        angle, scale, shift_x, shift_y, gamma, contrast = rng.uniform(-1, 1, 6)
        seed = int(rng.integers(2**63))
        elastic, blur, holes = rng.random(3)
        low, high = rng.uniform(-1, 1, 2)
        mirror, area, place_y, place_x = rng.random(4)
        aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        share = config.area + (1 - config.area) * area
        height, width = (
            (1.0, 1.0) if config.area == 1 else (min(1, np.sqrt(share / aspect)), min(1, np.sqrt(share * aspect)))
        )
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
            crop_box=(float((1 - height) * place_y), float((1 - width) * place_x), float(height), float(width)),
        )

    def apply(self, image: np.ndarray) -> np.ndarray:
        """`image` (H W float32 in [0, 1], 0 = air) changed; air stays 0, tissue stays in (0, 1]."""
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
        middle = values.mean()
        values = middle + self.contrast * (values - middle)
        if self.noise > 0:
            values = values + rng.normal(0, self.noise, values.shape).astype(np.float32)
        result = np.zeros_like(image)
        result[tissue] = np.clip(values, MIN_TISSUE_VALUE, 1)
        return self._cut_out(result, tissue, rng)

    def transform_boxes(self, boxes: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
        """Where boxes (K 4: x0 y0 x1 y1 in pixels, ends exclusive) of an image H W come to lie: K 4, each about all of what it held.

        An elastic change widens them by its largest displacement.
        """
        rows, columns = shape
        x, y = boxes[:, [0, 0, 2, 2]], boxes[:, [1, 3, 1, 3]]  # the four corners
        x, y = columns - x if self.mirror else x, rows - y if self.flip else y
        top, left, height, width = self._crop_box_pixels(rows, columns)
        x, y = (x - left) * columns / width, (y - top) * rows / height
        matrix = self._affine_matrix(rows, columns)
        x, y = (factors[0] * (x - 0.5) + factors[1] * (y - 0.5) + factors[2] + 0.5 for factors in matrix)
        pull = self.elastic * columns
        return np.stack([x.min(1) - pull, y.min(1) - pull, x.max(1) + pull, y.max(1) + pull], axis=1).astype(np.float32)

    def _crop_box_pixels(self, rows: int, columns: int) -> tuple[int, int, int, int]:
        """Top, left, height and width in pixels of the part that takes the place of the whole."""
        y, x, height, width = self.crop_box
        return round(y * rows), round(x * columns), max(1, round(height * rows)), max(1, round(width * columns))

    def _affine_matrix(self, rows: int, columns: int) -> np.ndarray:
        """The affine map, 2 x 3, pixel centres at whole numbers: about the middle of the chest wall, then the shift."""
        matrix: np.ndarray = cv2.getRotationMatrix2D((0, (rows - 1) / 2), self.angle, self.scale)
        matrix[:, 2] += np.array(self.shift) * (columns, rows)
        return matrix

    def _apply_crop(self, image: np.ndarray) -> np.ndarray:
        """A part of the image in the place of the whole."""
        if self.crop_box == (0.0, 0.0, 1.0, 1.0):
            return image
        rows, columns = image.shape
        top, left, height, width = self._crop_box_pixels(rows, columns)
        return cv2.resize(
            image[top : top + height, left : left + width], (columns, rows), interpolation=cv2.INTER_LINEAR
        )

    def _apply_geometry(self, image: np.ndarray) -> np.ndarray:
        """Rotate and scale about the middle of the chest wall, shift, and pull at an elastic web; one interpolation."""
        height, width = image.shape
        matrix = self._affine_matrix(height, width)
        if self.elastic > 0:
            return cv2.remap(image, *self._elastic_map(matrix, height, width), cv2.INTER_LINEAR, borderValue=0)
        if np.array_equal(matrix, np.eye(2, 3)):
            return image
        return cv2.warpAffine(image, matrix, (width, height), flags=cv2.INTER_LINEAR, borderValue=0)

    def _elastic_map(self, matrix: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Where each pixel comes from, x and y: through the affine map's inverse, and drawn off by a smooth random field."""
        inverse = cv2.invertAffineTransform(matrix)
        columns, rows = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
        knots = ELASTIC_KNOTS, max(ELASTIC_KNOTS, round(ELASTIC_KNOTS * height / width))
        pulls = (
            np.random.default_rng(self.seed + 1).uniform(-1, 1, (2, knots[1], knots[0])).astype(np.float32)
            * self.elastic
            * width
        )
        x, y = (cv2.resize(pull, (width, height), interpolation=cv2.INTER_LINEAR) for pull in pulls)
        x = (
            cv2.GaussianBlur(x, (0, 0), width / (2 * ELASTIC_KNOTS)) * columns / width
        )  # the chest wall stays where it is: no air comes in there
        y = cv2.GaussianBlur(y, (0, 0), width / (2 * ELASTIC_KNOTS))
        from_x = inverse[0, 0] * columns + inverse[0, 1] * rows + inverse[0, 2] + x
        from_y = inverse[1, 0] * columns + inverse[1, 1] * rows + inverse[1, 2] + y
        return from_x.astype(np.float32), from_y.astype(np.float32)

    def _blur_tissue(self, image: np.ndarray, tissue: np.ndarray) -> np.ndarray:
        """Gaussian blur that takes no grey from the air: both image and mask are blurred, and divided."""
        weight = cv2.GaussianBlur(tissue.astype(np.float32), (0, 0), self.blur)
        return np.where(tissue, cv2.GaussianBlur(image, (0, 0), self.blur) / np.maximum(weight, 1e-6), 0).astype(
            np.float32
        )

    def _cut_out(self, image: np.ndarray, tissue: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Square holes in the tissue, filled with its mean (DeVries and Taylor 2017, arXiv 1708.04552): 0 would be air."""
        if not self.holes:
            return image
        side = max(1, round(self.hole * image.shape[1]))
        rows, columns = np.nonzero(tissue)
        fill = image[tissue].mean()
        for middle in rng.integers(len(rows), size=self.holes):
            top, left = max(0, rows[middle] - side // 2), max(0, columns[middle] - side // 2)
            square = np.s_[top : top + side, left : left + side]
            image[square] = np.where(tissue[square], fill, 0)
        return image
