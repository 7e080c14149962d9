"""3-D lesions and their projections: cancers, and benign findings that must be distinguished from them.

Breast frame (mm): x from the chest wall to the nipple, y lateral, z towards the head. Both views are parallel
projections of one anatomy, CC along z and MLO at 45 degrees between y and z, so that x is the same in both.
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
FINE_GRID_MM = 0.25  # thin structures are drawn on a grid at least this fine and then averaged
PROJECTIONS: dict[ViewName, np.ndarray] = {
    "CC": np.array([[1, 0], [0, -1], [0, 0]]),
    "MLO": np.array([[1, 0], [0, -np.sqrt(0.5)], [0, -np.sqrt(0.5)]]),
}
"""Matrices `(3, 2)` that map (x, y, z) to (right, down) in the image of a left breast."""


@dataclass(frozen=True)
class Lesion:
    """One finding."""

    kind: str
    """One of `CANCER_KINDS` or `BENIGN_KINDS`."""
    position: tuple[float, float, float]
    """(depth, lateral, up): depth from 0 at the chest wall to 0.95 just behind the nipple, the others in [-1, 1]."""
    radius_mm: float
    """Radius of the whole finding without spicules."""
    contrast: float
    """Log attenuation that the finding adds at its centre."""
    seed: int

    def __post_init__(self) -> None:
        assert self.kind in CANCER_KINDS + BENIGN_KINDS, f"unknown kind of lesion: {self.kind}"
        assert 0 <= self.position[0] <= 0.95, f"depth outside [0, 0.95]: {self.position}"
        assert max(map(abs, self.position)) <= 1, f"position outside [-1, 1]: {self.position}"


def sample_lesion(kind: str, difficulty: float, seed: int) -> Lesion:
    """Return a lesion at a random position; size and contrast decrease as `difficulty` goes from 0 to 1."""
    rng = np.random.default_rng(seed)
    ease = (1 - difficulty) * rng.uniform(0.85, 1.15)
    mass = kind.endswith("_mass")
    radius = (4 + 10 * ease) if mass else (5 + 8 * ease)
    contrast = (0.45 + 0.9 * ease) if mass else (1.0 + 1.6 * ease)
    angle = rng.uniform(0, 2 * np.pi)
    distance = 0.55 * np.sqrt(rng.uniform())
    position = (rng.uniform(0.4, 0.75), distance * np.cos(angle), distance * np.sin(angle))
    return Lesion(kind, position, float(radius), float(contrast), seed)


@dataclass(frozen=True)
class _Anatomy:
    """Geometry of a lesion in mm relative to its centre (x, y, z)."""

    balls: list[tuple[np.ndarray, float]] = field(default_factory=list)
    """Centre and radius of each ball."""
    threads: list[tuple[np.ndarray, float, float]] = field(default_factory=list)
    """Points `(N, 3)` of each thread and its widths at both ends."""
    blur: float = 0.0
    """Width in mm over which the margin fades."""
    thread_level: int = 255
    """Density of the threads; 255 = as dense as the balls."""


def _directions(rng: np.random.Generator, count: int) -> np.ndarray:
    """Return random unit vectors `(count, 3)`."""
    vectors = rng.standard_normal((count, 3))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _anatomy(lesion: Lesion) -> _Anatomy:
    """Return the random geometry of a lesion, which follows from its kind, radius and seed."""
    rng = np.random.default_rng(derive_seed(lesion.seed, "anatomy"))
    radius = lesion.radius_mm
    if lesion.kind == "spiculated_mass":
        return _spiculated_mass(rng, radius)
    if lesion.kind == "round_mass":
        return _Anatomy([(d * 0.12 * radius, 0.9 * radius) for d in _directions(rng, 3)], blur=0.02 * radius)
    if lesion.kind == "microcalcifications":
        grain = 0.1 * max(
            1.0, radius - 4
        )  # 0.1 mm specks in the hardest clusters, larger than real ones in easy clusters
        return _Anatomy(
            [(d * radius * rng.uniform(0.05, 1), grain * rng.uniform(0.5, 1.5)) for d in _directions(rng, 36)],
            blur=0.08,
        )
    if lesion.kind == "coarse_calcifications":
        return _Anatomy(
            [(d * radius * rng.uniform(0.0, 0.35), radius * rng.uniform(0.14, 0.26)) for d in _directions(rng, 5)],
            blur=0.2,
        )
    return _vascular_calcifications(rng, radius)


def _spiculated_mass(rng: np.random.Generator, radius: float) -> _Anatomy:
    """Return an irregular core with bent spicules that taper outwards."""
    core = [(d * radius * rng.uniform(0.1, 0.5), radius * rng.uniform(0.25, 0.5)) for d in _directions(rng, 14)]
    spicules = []
    for direction in _directions(rng, 42):
        bend = rng.normal(0, 0.12, 3)
        along = np.linspace(0.2, rng.uniform(1.5, 2.6), 6)[:, None]
        spicules.append((radius * along * (direction + bend * along), 0.16 * radius, 0.03 * radius))
    return _Anatomy(core, spicules, blur=0.05 * radius, thread_level=150)


def _vascular_calcifications(rng: np.random.Generator, radius: float) -> _Anatomy:
    """Return the two walls of a winding vessel, calcified in patches (a tram-track pattern)."""
    turns = np.cumsum(rng.normal(0, 0.22, (40, 1)), axis=0)
    path = np.cumsum(np.hstack([np.cos(turns), np.sin(turns), np.sin(turns)]), axis=0) * radius * 0.09
    path -= path.mean(axis=0)
    walls = [path + side * radius * 0.1 * np.array([-np.sin(turns.mean()), 0.8, 0.8]) for side in (-1, 1)]
    pieces = [wall[i : i + int(rng.integers(2, 5))] for wall in walls for i in range(0, 38, 3) if rng.uniform() < 0.8]
    return _Anatomy([], [(piece, 0.07 * radius, 0.07 * radius) for piece in pieces], blur=0.1)


def project_lesion(
    lesion: Lesion, view: ViewName, centre_mm: tuple[float, float], spacing: float
) -> tuple[np.ndarray, tuple[int, int]]:
    """Return the projection of a lesion.

    Args:
        lesion: The lesion to project.
        view: The projection, CC or MLO.
        centre_mm: Centre (x, y) of the lesion, in mm from the corner of the image.
        spacing: Millimetres per pixel.

    Returns:
        A square patch, 1 = full contrast, and the pixel (x, y) of the image at which the patch begins.
    """
    anatomy = _anatomy(lesion)
    centre = np.array(centre_mm)
    projection = PROJECTIONS[view]
    zoom, grid = fine_grid(spacing)
    count = 2 * int(np.ceil(3 * lesion.radius_mm / spacing))
    corner = np.round(centre / spacing).astype(int) - count // 2
    origin = centre - corner * spacing  # the lesion's centre within the patch, mm
    canvas = np.zeros((count * zoom, count * zoom), np.uint8)
    for points, first, last in anatomy.threads:
        draw_polyline(canvas, points @ projection + origin, first, last, grid, anatomy.thread_level)
    patch = canvas.astype(np.float32) / 255
    for point, radius in anatomy.balls:
        _add_ball(patch, (point @ projection + origin) / grid - 0.5, radius / grid)
    blurred = cv2.GaussianBlur(patch, (0, 0), max(anatomy.blur / grid, 0.4))
    return cv2.resize(blurred, (count, count), interpolation=cv2.INTER_AREA), (int(corner[0]), int(corner[1]))


def fine_grid(spacing: float) -> tuple[int, float]:
    """Return the factor by which the grid for thin structures is finer than `spacing`, and its own spacing in mm."""
    zoom = max(1, int(np.ceil(spacing / FINE_GRID_MM)))
    return zoom, spacing / zoom


def draw_polyline(canvas: np.ndarray, path: np.ndarray, first: float, last: float, grid: float, level: int) -> None:
    """Draw a tapered polyline on `canvas`; where it is thinner than a pixel it becomes fainter.

    Args:
        canvas: `(H, W)` uint8, modified in place.
        path: Points `(N, 2)` as (x, y) in mm.
        first: Width in mm at the first point.
        last: Width in mm at the last point.
        grid: Millimetres per pixel of the canvas.
        level: Grey value of the line, 0 to 255.
    """
    points = np.round(path / grid * 16).astype(int)
    for (a, b), width in zip(pairwise(points), np.linspace(first, last, len(points) - 1) / grid, strict=True):
        colour = round(level * min(1.0, width))
        cv2.line(canvas, a.tolist(), b.tolist(), colour, max(1, round(width)), cv2.LINE_AA, shift=4)


def _add_ball(patch: np.ndarray, centre: np.ndarray, radius: float) -> None:
    """Add the projection sqrt(1 - r^2) of a ball to the patch by maximum; centre and radius are in pixels."""
    reach = int(np.ceil(radius)) + 1
    x, y = (round(float(value)) for value in centre)
    window = np.s_[max(0, y - reach) : y + reach + 1, max(0, x - reach) : x + reach + 1]
    rows, columns = np.ogrid[window]
    square = ((columns - centre[0]) ** 2 + (rows - centre[1]) ** 2) / max(radius, 0.7) ** 2
    weight = min(1.0, (radius / 0.7) ** 2)  # a ball smaller than a pixel is fainter
    patch[window] = np.maximum(patch[window], weight * np.sqrt(np.clip(1 - square, 0, 1)))
