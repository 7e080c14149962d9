"""Findings in 3-D and their projections: cancers and the benign decoys that must not be taken for them. Knows no breast around them.

Breast frame (mm): x from chest wall to nipple, y lateral, z towards the head. Both views are parallel projections of one
anatomy: CC along z, MLO at 45 degrees between y and z; x, the distance from the nipple, is the same in both.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import cv2
import numpy as np

from vitmodel.utils import derive_seed

ViewName = Literal["CC", "MLO"]

CANCER_KINDS = ("spiculated_mass", "microcalcifications")
BENIGN_KINDS = ("round_mass", "coarse_calcifications", "vascular_calcifications")
FINE_GRID_MM = 0.25  # thin things are drawn on a grid at least this fine, then averaged
PROJECTIONS: dict[ViewName, np.ndarray] = {
    "CC": np.array([[1, 0], [0, -1], [0, 0]]),
    "MLO": np.array([[1, 0], [0, -np.sqrt(0.5)], [0, -np.sqrt(0.5)]]),
}
"""From (x, y, z) to (right, down) in the picture of a left breast."""


@dataclass(frozen=True)
class Lesion:
    """One finding. `position` is (depth, lateral, up): depth 0 at the chest wall to 0.95 just behind the nipple, the others in [-1, 1].

    `radius_mm` is that of the whole finding without spicules, `contrast` the log attenuation that it adds at its centre.
    """

    kind: str
    position: tuple[float, float, float]
    radius_mm: float
    contrast: float
    seed: int

    def __post_init__(self) -> None:
        assert self.kind in CANCER_KINDS + BENIGN_KINDS, self.kind
        assert 0 <= self.position[0] <= 0.95, self.position
        assert max(map(abs, self.position)) <= 1, self.position


def sample_lesion(kind: str, difficulty: float, seed: int) -> Lesion:
    """A lesion of `kind` somewhere within the breast; size and contrast fall as `difficulty` goes from 0 to 1."""
    rng = np.random.default_rng(seed)
    ease = (1 - difficulty) * rng.uniform(0.85, 1.15)
    mass = kind.endswith("_mass")
    radius = (4 + 10 * ease) if mass else (5 + 8 * ease)
    contrast = (0.45 + 0.9 * ease) if mass else (1.0 + 1.6 * ease)
    angle, reach = rng.uniform(0, 2 * np.pi), 0.55 * np.sqrt(rng.uniform())
    position = (rng.uniform(0.4, 0.75), reach * np.cos(angle), reach * np.sin(angle))
    return Lesion(kind, position, float(radius), float(contrast), seed)


@dataclass(frozen=True)
class _Finding:
    """A lesion's anatomy in mm about its centre (x y z): balls with radii, and threads with widths at both ends."""

    balls: list[tuple[np.ndarray, float]] = field(default_factory=list)
    threads: list[tuple[np.ndarray, float, float]] = field(default_factory=list)
    blur: float = 0.0
    """Width in mm of the margin's fading."""
    thread_level: int = 255
    """Density of the threads, 255 = that of the balls."""


def _directions(rng: np.random.Generator, count: int) -> np.ndarray:
    vectors = rng.standard_normal((count, 3))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _anatomy(lesion: Lesion) -> _Finding:
    rng, radius = np.random.default_rng(derive_seed(lesion.seed, "anatomy")), lesion.radius_mm
    if lesion.kind == "spiculated_mass":
        core = [(d * radius * rng.uniform(0.1, 0.5), radius * rng.uniform(0.25, 0.5)) for d in _directions(rng, 14)]
        spicules = []
        for direction in _directions(rng, 42):
            bend = rng.normal(0, 0.12, 3)
            along = np.linspace(0.2, rng.uniform(1.5, 2.6), 6)[:, None]
            spicules.append((radius * along * (direction + bend * along), 0.16 * radius, 0.03 * radius))
        return _Finding(core, spicules, blur=0.05 * radius, thread_level=150)
    if lesion.kind == "round_mass":
        return _Finding([(d * 0.12 * radius, 0.9 * radius) for d in _directions(rng, 3)], blur=0.02 * radius)
    if lesion.kind == "microcalcifications":
        grain = 0.1 * max(
            1.0, radius - 4
        )  # specks of 0.1 mm in the hardest clusters, larger than life in the easy ones
        return _Finding(
            [(d * radius * rng.uniform(0.05, 1), grain * rng.uniform(0.5, 1.5)) for d in _directions(rng, 36)],
            blur=0.08,
        )
    if lesion.kind == "coarse_calcifications":
        return _Finding(
            [(d * radius * rng.uniform(0.0, 0.35), radius * rng.uniform(0.14, 0.26)) for d in _directions(rng, 5)],
            blur=0.2,
        )
    # vascular: a tram track along a winding vessel, calcified in patches
    turns = np.cumsum(rng.normal(0, 0.22, (40, 1)), axis=0)
    path = np.cumsum(np.hstack([np.cos(turns), np.sin(turns), np.sin(turns)]), axis=0) * radius * 0.09
    path -= path.mean(axis=0)
    walls = [path + side * radius * 0.1 * np.array([-np.sin(turns.mean()), 0.8, 0.8]) for side in (-1, 1)]
    pieces = [wall[i : i + int(rng.integers(2, 5))] for wall in walls for i in range(0, 38, 3) if rng.uniform() < 0.8]
    return _Finding([], [(piece, 0.07 * radius, 0.07 * radius) for piece in pieces], blur=0.1)


def project_lesion(
    lesion: Lesion, view: ViewName, centre_mm: tuple[float, float], spacing: float
) -> tuple[np.ndarray, tuple[int, int]]:
    """The lesion's projection about `centre_mm` (x, y from the picture's corner), pixels of `spacing` mm.

    Returns the patch (square, 1 = full contrast) and the picture's pixel (x, y) that its first column and row fall on.
    """
    anatomy, centre, flat = _anatomy(lesion), np.array(centre_mm), PROJECTIONS[view]
    zoom, grid = fine_grid(spacing)
    count = 2 * int(np.ceil(3 * lesion.radius_mm / spacing))
    corner = np.round(centre / spacing).astype(int) - count // 2
    origin = centre - corner * spacing  # the lesion's centre within the patch, mm
    canvas = np.zeros((count * zoom, count * zoom), np.uint8)
    for points, first, last in anatomy.threads:
        draw_polyline(canvas, points @ flat + origin, first, last, grid, anatomy.thread_level)
    patch = canvas.astype(np.float32) / 255
    for point, radius in anatomy.balls:
        _stamp(patch, (point @ flat + origin) / grid - 0.5, radius / grid)
    soft = cv2.GaussianBlur(patch, (0, 0), max(anatomy.blur / grid, 0.4))
    return cv2.resize(soft, (count, count), interpolation=cv2.INTER_AREA), (int(corner[0]), int(corner[1]))


def fine_grid(spacing: float) -> tuple[int, float]:
    """How many times finer than `spacing` thin things are drawn, and the distance in mm of the points of that grid."""
    zoom = max(1, int(np.ceil(spacing / FINE_GRID_MM)))
    return zoom, spacing / zoom


def draw_polyline(canvas: np.ndarray, path: np.ndarray, first: float, last: float, grid: float, level: int) -> None:
    """Draw a polyline (points x y and widths in mm) that tapers from `first` to `last`; thinner than a pixel = fainter."""
    points = np.round(path / grid * 16).astype(int)
    for (a, b), width in zip(pairwise(points), np.linspace(first, last, len(points) - 1) / grid, strict=True):
        colour = round(level * min(1.0, width))
        cv2.line(canvas, a.tolist(), b.tolist(), colour, max(1, round(width)), cv2.LINE_AA, shift=4)


def _stamp(patch: np.ndarray, centre: np.ndarray, radius: float) -> None:
    """Lay the projection of a ball (pixels), sqrt(1 - r^2), over the patch; the greater value stays."""
    reach = int(np.ceil(radius)) + 1
    x, y = (round(float(value)) for value in centre)
    window = np.s_[max(0, y - reach) : y + reach + 1, max(0, x - reach) : x + reach + 1]
    rows, columns = np.ogrid[window]
    square = ((columns - centre[0]) ** 2 + (rows - centre[1]) ** 2) / max(radius, 0.7) ** 2
    weight = min(1.0, (radius / 0.7) ** 2)  # what is smaller than a pixel is fainter
    patch[window] = np.maximum(patch[window], weight * np.sqrt(np.clip(1 - square, 0, 1)))
