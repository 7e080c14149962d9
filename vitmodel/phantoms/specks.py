"""Crops whose only sign of cancer is a cluster of specks a few pixels wide, to test which models can see it.

Every crop has a cluster of spots and as many spots scattered over the breast. With a cancer, the clustered spots are
sharp (calcifications) and the scattered ones blurred; without a cancer it is the other way round. A sharp and a blurred
spot have the same mass. The label therefore follows neither from brightness nor from the number of spots, sharp or
blurred, and it is lost where pixels are coarser than the blur.

Parenchyma is rendered small and enlarged, which takes a hundredth of the time; noise and spots are drawn at full size.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from vitmodel.config import Size
from vitmodel.phantoms.anatomy import DENSITIES, BreastPhantom, render
from vitmodel.phantoms.lesions import ViewName
from vitmodel.utils import derive_seed

SMALL = Size(384, 256)  # size of the rendered breast, 240 x 160 mm
SPOTS = 8, 13  # range of the number of clustered spots (end excluded); as many are scattered
SHARP, BLURRED = 1.2, 3.0  # standard deviations of a spot in pixels
PEAK = 0.38, 0.5  # range of a sharp spot's peak on the 0 to 1 scale
RADIUS = 20.0  # radius of the cluster in pixels
NOISE = 0.02  # standard deviation of the detector noise


@dataclass(frozen=True)
class SpeckPhantom:
    """A crop and the position of its cluster."""

    image: np.ndarray
    """`(H, W)` float32 in [0, 1], chest wall at the left, 0 = air; the breast fills the height."""
    box: tuple[float, float, float, float]
    """(x0, y0, x1, y1) of the cluster, sharp or blurred, in pixels."""
    mm_per_pixel: float


def sample_specks(seed: int, cancer: bool, height: int) -> SpeckPhantom:
    """Return the crop of a seed, as wide as the breast. The same arguments give the same pixels.

    Args:
        seed: Seed of the breast and of all spots.
        cancer: Whether the clustered spots are sharp.
        height: Height of the crop in pixels.
    """
    rng = np.random.default_rng(derive_seed("specks", seed))
    views: tuple[ViewName, ...] = ("CC", "MLO")
    breast = BreastPhantom(seed, density=DENSITIES[rng.integers(3)], depth_mm=rng.uniform(70, 105))
    small = render(breast, views[rng.integers(2)], SMALL)
    rows, columns = np.nonzero(small.mask)
    window = np.s_[rows.min() : rows.max() + 1, : columns.max() + 1]
    scale = height / (rows.max() + 1 - rows.min())
    size = round((columns.max() + 1) * scale), height
    mask = cv2.resize(small.mask[window].astype(np.float32), size, interpolation=cv2.INTER_LINEAR) > 0.5
    image = cv2.resize(small.image[window], size, interpolation=cv2.INTER_CUBIC)
    image = image + NOISE * rng.standard_normal(image.shape, np.float32)

    depth = cv2.distanceTransform(np.pad(mask, 1).astype(np.uint8), cv2.DIST_L2, 3)[1:-1, 1:-1]
    inside = np.argwhere(depth > 2 * RADIUS)  # (N, 2) as (y, x)
    centre = inside[rng.integers(len(inside))].astype(float)
    count = int(rng.integers(*SPOTS))
    angle = rng.uniform(0, 2 * np.pi, count)
    distance = RADIUS * np.sqrt(rng.uniform(0, 1, count))
    clustered = centre + np.stack([np.sin(angle), np.cos(angle)], 1) * distance[:, None]
    scattered = inside[rng.integers(len(inside), size=count)].astype(float)
    for spots, sharp in ((clustered, cancer), (scattered, not cancer)):
        for spot in spots:
            _add_spot(image, spot + rng.uniform(-0.5, 0.5, 2), rng.uniform(*PEAK), SHARP if sharp else BLURRED)
    y, x = centre
    box = (x - RADIUS, y - RADIUS, x + RADIUS, y + RADIUS)
    return SpeckPhantom(np.where(mask, np.clip(image, 1 / 65535, 1), 0).astype(np.float32), box, small.spacing / scale)


def _add_spot(image: np.ndarray, position: np.ndarray, peak: float, deviation: float) -> None:
    """Add a Gaussian spot at `position` (y, x) with the mass of a spot that has this peak and the deviation `SHARP`."""
    reach = int(4 * deviation) + 1
    y, x = (round(float(value)) for value in position)
    window = np.s_[max(0, y - reach) : max(0, y + reach + 1), max(0, x - reach) : max(0, x + reach + 1)]
    rows, columns = (
        np.arange(part.start, min(part.stop, size)) for part, size in zip(window, image.shape, strict=True)
    )
    squared_distance = (rows[:, None] - position[0]) ** 2 + (columns - position[1]) ** 2
    image[window] += peak * (SHARP / deviation) ** 2 * np.exp(-squared_distance / (2 * deviation**2))
