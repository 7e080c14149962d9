"""Synthetic breasts: seeded two-view projections with 3-D lesions whose positions are known exactly.

A breast is described in millimetres and rendered at any size; views of one aspect ratio show the same breast.
Parenchyma is power-law noise: the power spectrum of mammograms falls as 1 / f^beta with beta about 3 (Burgess 1999).

Image frame: rows run from head to foot (MLO) or from lateral to medial (CC). Everything is rendered as a left breast
with the chest wall at column 0, and right breasts are mirrored at the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np

from vitmodel.config import Size
from vitmodel.phantoms.lesions import Lesion, ViewName, draw_polyline, fine_grid, project_lesion
from vitmodel.utils import derive_seed

PixelBox = tuple[int, int, int, int]

DENSITIES = ("A", "B", "C", "D")

FIELD_MM = (240.0, 160.0)  # minimum height and width that every image shows
COARSE_MM = 0.625  # grid spacing of the tissue fields
PHOTONS_PER_MM2 = 8e5  # at the detector in air; behind 50 mm of tissue a 0.1 mm pixel receives a few hundred
MEAN_THICKNESS_MM = 50.0
FAT_PER_MM = 0.045  # linear attenuation at about 20 keV (Hammerstein 1979), scatter included
GLAND_PER_MM = 0.069  # the same for fibroglandular tissue
BLACK = 1.15  # log attenuation displayed as 0
WHITE = 4.6  # log attenuation displayed as 1
GLAND_THRESHOLD = {"A": 1.75, "B": 0.95, "C": 0.25, "D": -0.6}


@dataclass(frozen=True)
class BreastPhantom:
    """Description of a breast, shared by all of its views."""

    seed: int
    laterality: str = "L"
    density: str = "B"
    lesions: tuple[Lesion, ...] = ()
    depth_mm: float = 90.0
    """Distance from chest wall to nipple."""
    thickness_mm: float = MEAN_THICKNESS_MM
    """Compressed thickness."""
    implant: bool = False


@dataclass(frozen=True)
class PhantomView:
    """A projection of a breast."""

    image: np.ndarray
    """`(H, W)` float32 in [0, 1], brighter = denser."""
    mask: np.ndarray
    """`(H, W)` bool: all tissue."""
    boxes: tuple[PixelBox, ...]
    """One box (x0, y0, x1, y1) in pixels per lesion, ends excluded."""
    spacing: float
    """Millimetres per pixel."""

    @property
    def breast_mask(self) -> np.ndarray:
        """Return `mask` without the abdomen, which begins at the inframammary fold.

        The fold is the narrowest row below the nipple.
        """
        widths = self.mask.sum(1)
        nipple = int(widths.argmax())
        breast = self.mask.copy()
        breast[nipple + int(widths[nipple:].argmin()) :] = False
        return breast

    def mirrored(self) -> PhantomView:
        """Return the view with left and right exchanged."""
        width = self.image.shape[1]
        boxes = tuple((width - x1, y0, width - x0, y1) for x0, y0, x1, y1 in self.boxes)
        return PhantomView(
            np.ascontiguousarray(self.image[:, ::-1]), np.ascontiguousarray(self.mask[:, ::-1]), boxes, self.spacing
        )


def pixel_spacing(size: Size) -> float:
    """Return the millimetres per pixel at which an image of `size` shows at least `FIELD_MM`."""
    return max(FIELD_MM[0] / size.height, FIELD_MM[1] / size.width)


def render(breast: BreastPhantom, view: ViewName, size: Size, repeat: int = 0) -> PhantomView:
    """Render a projection of a breast.

    The image is the log attenuation with Poisson noise, equalised for thickness as for presentation. The same arguments
    give the same pixels. The chest wall lies at the right edge for a right breast and at the left edge for a left one.

    Args:
        breast: The breast to project.
        view: The projection, CC or MLO.
        size: Height and width of the image in pixels.
        repeat: Number of the exposure. Another number gives a repeated exposure: the same breast, positioned slightly
            higher or lower, with different noise.
    """
    scene = _Scene(breast, view, size, repeat)
    lesions, boxes = scene.lesions()
    projection = PhantomView(scene.expose(scene.tissue() + lesions), scene.mask, tuple(boxes), scene.spacing)
    return projection.mirrored() if breast.laterality == "R" else projection


class _Scene:
    """State of one view while it is rendered, chest wall at the left."""

    def __init__(self, breast: BreastPhantom, view: ViewName, size: Size, repeat: int) -> None:
        self.breast = breast
        self.view = view
        self.size = size
        self.repeat = repeat
        self.spacing = pixel_spacing(size)
        shape = self._rng("shape")
        self.height_mm = size.height * self.spacing
        self.width_mm = size.width * self.spacing
        shift_mm = self._rng(f"position {repeat}").uniform(-8, 8)
        self.nipple_mm = self.height_mm * (0.5 if view == "CC" else 0.6) + shift_mm
        self.above_mm = breast.depth_mm * shape.uniform(1.0, 1.15)
        self.below_mm = breast.depth_mm * (shape.uniform(1.0, 1.15) if view == "CC" else shape.uniform(0.8, 0.95))
        self.axilla_mm = breast.depth_mm * shape.uniform(0.5, 0.62)
        self.pectoral_mm = self.axilla_mm * shape.uniform(0.72, 0.9), self.nipple_mm * shape.uniform(0.85, 1.1)
        self.bump_mm = shape.uniform(1.5, 4.5)  # height of the nipple
        self.fullness = shape.uniform(0.58, 0.75)  # exponent of the outline: low = round, high = conical
        rows = (np.arange(size.height) + 0.5) * self.spacing
        self.edge_mm = self._edge(rows)
        columns = (np.arange(size.width) + 0.5) * self.spacing
        self.mask: np.ndarray = columns[None, :] < self.edge_mm[:, None]  # (H, W)
        skin = cv2.distanceTransform(self.mask.astype(np.uint8), cv2.DIST_L2, 5) * self.spacing
        self.skin_mm = cv2.GaussianBlur(skin, (0, 0), 0.8)

    def _rng(self, purpose: str) -> np.random.Generator:
        return np.random.default_rng(derive_seed(self.breast.seed, self.view, purpose))

    def _edge(self, rows: np.ndarray) -> np.ndarray:
        """Return the distance in mm from the chest wall to the skin at `rows` in mm."""
        depth = self.breast.depth_mm
        from_nipple = rows - self.nipple_mm
        if self.view == "CC":
            reach = np.where(from_nipple < 0, self.above_mm, self.below_mm)
            edge = depth * np.clip(1 - np.abs(from_nipple / reach) ** 2.0, 0, None) ** self.fullness
        else:
            up = np.clip(-from_nipple / self.nipple_mm, 0, 1)
            upper = self.axilla_mm + (depth - self.axilla_mm) * np.cos(np.pi / 2 * up**1.1) ** 1.3
            lower = depth * np.clip(1 - np.clip(from_nipple / self.below_mm, 0, None) ** 2.0, 0, None) ** self.fullness
            edge = np.where(from_nipple < 0, upper, lower)
            fold = self.nipple_mm + 0.97 * self.below_mm  # the upper abdomen lies below the fold
            edge = np.maximum(edge, 14 * (1 - np.exp(-np.clip(rows - fold, 0, None) / 12)) * (rows > fold))
        return edge + self.bump_mm * np.exp(-(np.abs(from_nipple / 5.5) ** 3))

    def _coarse(self) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
        """Return the rows `(h, 1)` and columns `(1, w)` in mm of the coarse grid, and its shape."""
        shape = round(self.height_mm / COARSE_MM), round(self.width_mm / COARSE_MM)
        rows = ((np.arange(shape[0]) + 0.5) * self.height_mm / shape[0])[:, None]
        columns = ((np.arange(shape[1]) + 0.5) * self.width_mm / shape[1])[None, :]
        return rows, columns, shape

    def _to_size(self, coarse: np.ndarray) -> np.ndarray:
        return cv2.resize(
            coarse.astype(np.float32), (self.size.width, self.size.height), interpolation=cv2.INTER_LINEAR
        )

    def tissue(self) -> np.ndarray:
        """Return the log attenuation `(H, W)` of the breast without lesions.

        The thinning towards the skin is mostly equalised away. Automatic exposure and equalisation map fat to one grey
        value at every thickness, whereas gland is more visible in a thick breast.
        """
        gland = self._to_size(self._parenchyma()) + self._strands()
        gland += self._grain() * (0.02 + 0.10 * np.clip(gland, 0, 1))
        if self.breast.implant:
            gland += self._implant()
        curved = np.clip(1 - self.skin_mm / 14, 0, 1)  # 1 at the skin, 0 where the paddles hold the breast flat
        fat = FAT_PER_MM * MEAN_THICKNESS_MM * (0.7 + 0.3 * np.sqrt(1 - curved**2)) - 0.55 * curved**3
        skin_line = 0.3 * np.exp(-(((self.skin_mm - 0.9) / 0.8) ** 2))
        return fat + (GLAND_PER_MM - FAT_PER_MM) * self.breast.thickness_mm * gland + skin_line

    def _parenchyma(self) -> np.ndarray:
        """Return the fraction of the beam in gland or tissue of equal density, on the coarse grid.

        This tissue is the fibroglandular disc, the septa and the pectoral muscle.
        """
        rows, columns, shape = self._coarse()
        skin = cv2.resize(self.skin_mm, shape[::-1], interpolation=cv2.INTER_AREA)
        rng = self._rng("parenchyma")
        depth = columns / self.breast.depth_mm
        across = (rows - self.nipple_mm) / (0.5 * (self.above_mm + self.below_mm))
        disc = 1.1 - ((depth - 0.6) / 0.42) ** 2 - (across / 0.6) ** 2  # high where gland is likely: behind the nipple
        fan = self._fan(rows, columns, rng)
        clumps = (
            0.75 * power_law_noise(rng, shape, 3.2, (6, 60))
            + 0.38 * fan
            + 0.14 * power_law_noise(rng, shape, 2.6, (1, 8))
        )
        gland = 1 / (1 + np.exp(-2.2 * (np.maximum(disc, -3) + clumps - GLAND_THRESHOLD[self.breast.density])))
        gland *= np.clip((skin - 3) / 12, 0, 1)  # fat lies under the skin
        gland *= np.clip(0.75 + 0.12 * fan + 0.12 * power_law_noise(rng, shape, 2.8, (1, 12)), 0.25, 1.3)
        # The zero crossings of noise form a mesh that resembles Cooper's ligaments.
        web = np.exp(-((power_law_noise(rng, shape, 2.6, (3, 18)) / 0.16) ** 2))
        web *= np.clip(0.65 + 0.4 * power_law_noise(rng, shape, 3, (8, 60)), 0, 1) * np.clip((skin - 1.5) / 6, 0, 1)
        gland += 0.2 * web * (1 - 0.6 * gland) + 0.035 * power_law_noise(rng, shape, 3, (2, 50))
        muscle = self._muscle(rows, columns, rng, shape)
        return gland * (1 - 0.8 * muscle) + 0.75 * muscle

    def _fan(self, rows: np.ndarray, columns: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return power-law noise on the coarse grid, stretched along rays through the nipple like lobes and ducts."""
        across = rows - self.nipple_mm
        behind = self.breast.depth_mm + 40 - columns
        radius = np.hypot(across, behind)
        angle = np.arctan2(across, behind)
        noise = power_law_noise(rng, (512, 512), 2.4, (1, 25))
        x = (0.3 * radius / COARSE_MM).astype(np.float32)
        y = (80 * angle / COARSE_MM + 256).astype(np.float32)
        return cv2.remap(noise, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)

    def _muscle(
        self, rows: np.ndarray, columns: np.ndarray, rng: np.random.Generator, shape: tuple[int, int]
    ) -> np.ndarray:
        """Return the fraction of the beam in pectoral muscle, on the coarse grid.

        Muscle fills the upper corner of an MLO; a CC shows none.
        """
        if self.view == "CC":
            return np.zeros(shape)
        top, bottom = self.pectoral_mm
        border = top * np.clip(1 - rows / bottom, 0, None) ** 0.85 + 1.5 * power_law_noise(rng, shape, 3.5, (30, 120))
        fibres = power_law_noise(rng, shape, 2.6, (1.5, 30))
        inside = np.clip((border - columns) / 3.5, 0, 1) * (rows < bottom)
        return inside * (0.8 + 0.3 * np.clip((border - columns) / 40, 0, 1) + 0.05 * fibres)

    def _strands(self) -> np.ndarray:
        """Return ducts that converge on the nipple and vessels that cross the fat, as extra gland content `(H, W)`."""
        rng = self._rng("strands")
        zoom, grid = fine_grid(self.spacing)
        canvas = np.zeros((self.size.height * zoom, self.size.width * zoom), np.uint8)
        depth = self.breast.depth_mm
        for _ in range(70):
            along = np.linspace(0, 1, 14)
            length = rng.uniform(0.35, 0.95) * depth
            angle = rng.uniform(-1.15, 1.15)
            sway = np.cumsum(rng.normal(0, 0.012, 14)) * length
            x = depth - 4 - length * along * np.cos(angle)
            y = self.nipple_mm + length * along * np.sin(angle) + sway + rng.normal(0, 2.5)
            draw_polyline(canvas, np.stack([x, y], 1), rng.uniform(0.4, 1.1), 0.3, grid, int(rng.integers(60, 150)))
        for _ in range(60):
            turn = rng.uniform(0, np.pi) + np.cumsum(rng.normal(0, 0.16, 16))
            start = np.array([rng.uniform(0, depth), self.nipple_mm + rng.uniform(-1, 1) * self.above_mm])
            path = start + np.cumsum(np.stack([np.cos(turn), np.sin(turn)], 1) * rng.uniform(0.8, 3.0), axis=0)
            draw_polyline(canvas, path, rng.uniform(0.3, 0.9), 0.25, grid, int(rng.integers(50, 130)))
        blurred = cv2.GaussianBlur(canvas, (0, 0), max(0.3 / grid, 0.5))
        strands = cv2.resize(blurred, (self.size.width, self.size.height), interpolation=cv2.INTER_AREA)
        return strands.astype(np.float32) * np.clip((self.skin_mm - 1.5) / 5, 0, 1) * np.float32(0.4 / 255)

    def _grain(self) -> np.ndarray:
        """Return texture too fine for the coarse grid, standard deviation about 1, as a repeated seamless tile."""
        if self.spacing > COARSE_MM:
            return np.zeros((), np.float32)
        tile = power_law_noise(self._rng("grain"), (512, 512), 2.0, (0.2, 1.5), self.spacing)
        repeats = -(-self.size.height // 512), -(-self.size.width // 512)
        return np.tile(tile, repeats)[: self.size.height, : self.size.width]

    def _implant(self) -> np.ndarray:
        """Return an oval implant in front of the chest wall, as extra gland content `(H, W)`."""
        rows = (np.arange(self.size.height, dtype=np.float32)[:, None] + 0.5) * self.spacing
        columns = (np.arange(self.size.width, dtype=np.float32)[None, :] + 0.5) * self.spacing
        across = (rows - self.nipple_mm) / (0.62 * self.above_mm)
        inside = 1 - across**2 - (columns / (0.38 * self.breast.depth_mm)) ** 2
        return np.clip(inside * 12, 0, 1.2)

    def lesions(self) -> tuple[np.ndarray, list[PixelBox]]:
        """Return the log attenuation `(H, W)` that the lesions add, and their boxes."""
        layer = np.zeros(self.size, np.float32)
        boxes = []
        for lesion in self.breast.lesions:
            patch, (x, y) = project_lesion(lesion, self.view, self._centre(lesion.position), self.spacing)
            height, width = patch.shape
            x0, y0, x1, y1 = self._clip(x, y, width, height)
            layer[y0:y1, x0:x1] += lesion.contrast * patch[y0 - y : y1 - y, x0 - x : x1 - x]
            left, top, box_width, box_height = cv2.boundingRect((patch > 0.15 * patch.max()).astype(np.uint8))
            boxes.append(self._clip(x + left, y + top, box_width, box_height))
        return layer, boxes

    def _clip(self, left: int, top: int, width: int, height: int) -> PixelBox:
        """Return the part of a rectangle that lies within the image, as a box."""
        return max(0, left), max(0, top), min(self.size.width, left + width), min(self.size.height, top + height)

    def _centre(self, position: tuple[float, float, float]) -> tuple[float, float]:
        """Return where the view shows a point of the breast, as (x, y) in mm.

        The distance from the nipple along x is the same in both views.
        """
        depth, lateral, up = position
        x = depth * self.breast.depth_mm
        rows = (np.arange(self.size.height) + 0.5) * self.spacing
        inside = rows[self.edge_mm > x]
        shift = lateral if self.view == "CC" else (up + lateral) / np.sqrt(2)
        above = min(self.nipple_mm - inside[0], self.above_mm)
        below = inside[-1] - self.nipple_mm
        return x, self.nipple_mm - shift * (above if shift > 0 else below)

    def expose(self, attenuation: np.ndarray) -> np.ndarray:
        """Return the exposed image `(H, W)` in [0, 1]: add counting noise and apply the grey scale.

        With hundreds of photons per pixel, the Poisson distribution is approximated by a normal one.
        """
        photons = PHOTONS_PER_MM2 * self.spacing**2 * np.exp(-attenuation)
        normal = self._rng(f"photons {self.repeat}").standard_normal(self.size, np.float32)
        noise = normal / np.sqrt(np.maximum(photons, 1))
        image = np.clip((attenuation + noise - BLACK) / (WHITE - BLACK), 0, 1)
        return np.where(self.mask, image, 0).astype(np.float32)


def power_law_noise(
    rng: np.random.Generator,
    shape: tuple[int, int],
    beta: float,
    band_mm: tuple[float, float],
    spacing: float = COARSE_MM,
) -> np.ndarray:
    """Return band-limited noise with a power spectrum of 1 / f^beta.

    Args:
        rng: Source of randomness.
        shape: Rows and columns of the grid.
        beta: Exponent of the power spectrum.
        band_mm: Shortest and longest wavelength in mm.
        spacing: Grid spacing in mm.

    Returns:
        Float32 array of `shape` with mean 0 and standard deviation 1. It is periodic in both directions.
    """
    spectrum = np.fft.rfft2(rng.standard_normal(shape, np.float32)) * _amplitude(shape, beta, band_mm, spacing)
    noise = np.fft.irfft2(spectrum, s=shape)
    return noise / noise.std()


@lru_cache(maxsize=32)
def _amplitude(shape: tuple[int, int], beta: float, band_mm: tuple[float, float], spacing: float) -> np.ndarray:
    """Return the amplitude spectrum on the grid of `numpy.fft.rfft2`, read-only because it is cached."""
    frequency = np.hypot(np.fft.fftfreq(shape[0], spacing)[:, None], np.fft.rfftfreq(shape[1], spacing)[None, :])
    frequency[0, 0] = np.inf
    band = np.exp(-((frequency * band_mm[0]) ** 2)) * (1 - np.exp(-((frequency * band_mm[1]) ** 2)))
    amplitude = (frequency ** (-beta / 2) * band).astype(np.float32)
    amplitude.flags.writeable = False
    return amplitude
