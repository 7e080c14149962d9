"""Random changes of a crop: sample the parameters first, then apply them purely. Knows no loader and no label."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from vitmodel.config import AugmentConfig


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

    @classmethod
    def sample(cls, config: AugmentConfig, rng: np.random.Generator) -> Augmentation:
        """Draw the parameters; the number of draws does not depend on the configuration."""
        flip, noise = rng.random(2)
        angle, scale, shift_x, shift_y, gamma, contrast = rng.uniform(-1, 1, 6)
        return cls(
            flip=bool(flip < config.flip),
            angle=config.rotate * angle,
            scale=1 + config.scale * scale,
            shift=(config.shift * shift_x, config.shift * shift_y),
            gamma=float(np.exp(config.gamma * gamma)),
            contrast=1 + config.contrast * contrast,
            noise=config.noise * noise,
            seed=int(rng.integers(2**63)),
        )

    def apply(self, image: np.ndarray) -> np.ndarray:
        """`image` (H W float32 in [0, 1], 0 = air) changed; air stays 0, tissue stays in (0, 1]."""
        if self.flip:
            image = image[::-1]
        image = self._move(image)
        tissue = image > 0
        values = image[tissue] ** self.gamma
        middle = values.mean() if values.size else 0.0
        values = middle + self.contrast * (values - middle)
        if self.noise > 0:
            values = values + np.random.default_rng(self.seed).normal(0, self.noise, values.shape).astype(np.float32)
        result = np.zeros_like(image)
        result[tissue] = np.clip(values, 1 / 65535, 1)
        return result

    def _move(self, image: np.ndarray) -> np.ndarray:
        """Rotate and scale about the middle of the chest wall, then shift; one interpolation."""
        height, width = image.shape
        matrix = cv2.getRotationMatrix2D((0, (height - 1) / 2), self.angle, self.scale)
        matrix[:, 2] += np.array(self.shift) * (width, height)
        if np.array_equal(matrix, np.eye(2, 3)):
            return np.ascontiguousarray(image)
        return cv2.warpAffine(np.ascontiguousarray(image), matrix, (width, height), flags=cv2.INTER_LINEAR, borderValue=0)
