"""Grey values of source images in tiles, decoded and converted as for the crop: the page shows what was scored."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from vitmodel.config import Preprocessing
from vitmodel.errors import ImageRefusedError
from vitmodel.pixels.header import ImageFile
from vitmodel.pixels.open import open_as_cropped, open_image
from vitmodel.viewer.exams import ImageEntry

TILE = 512
"""Side of a tile in pixels of its level."""
SMALLEST = 512
"""The coarsest level is the first one whose longer side is at most this."""
MEMORY = 1_500_000_000
"""Bytes of decoded images that are kept."""


@dataclass(frozen=True)
class ImageFacts:
    """What the page needs to know about an image before it asks for tiles."""

    rows: int
    columns: int
    levels: int
    """Number of the coarsest level; level n is the image reduced by 2^n, level 0 the image itself."""
    spacing: tuple[float, float] | None
    """Distance of pixel centres (between rows, between columns) in mm."""
    voi: str
    """Name of the VOI LUT, window or range that is applied."""


def coarsest_level(rows: int, columns: int) -> int:
    """Return the number of halvings after which the longer side is at most `SMALLEST` pixels."""
    level = 0
    while -(-max(rows, columns) // 2**level) > SMALLEST:
        level += 1
    return level


class PixelStore:
    """Decoded images, the most recent ones in memory; several threads may ask.

    Args:
        memory: Bytes of grey values to keep.
    """

    def __init__(self, memory: int = MEMORY) -> None:
        self.memory = memory
        self._kept: OrderedDict[tuple[str, int], np.ndarray] = OrderedDict()
        self._lock = threading.Lock()
        self._decoding: dict[tuple[str, int], threading.Lock] = {}

    def facts(self, image: ImageEntry) -> ImageFacts:
        """Return size, spacing and grey conversion of an image.

        Raises:
            ImageRefusedError: The file is missing or cannot be read.
        """
        header = _open(image).header
        spacing = image.spacing or header.spacing
        levels = coarsest_level(header.rows, header.columns)
        return ImageFacts(header.rows, header.columns, levels, spacing, header.voi)

    def level(self, image: ImageEntry, level: int) -> np.ndarray:
        """Return the grey values of an image, reduced by 2^level: `(H, W)` uint16, brighter = denser.

        Raises:
            ImageRefusedError: The file is missing or cannot be read.
        """
        place = image.key, level
        with self._lock:
            if place in self._kept:
                self._kept.move_to_end(place)
                return self._kept[place]
            decoding = self._decoding.setdefault(place, threading.Lock())
        with decoding:  # one thread decodes, the others wait for it
            with self._lock:
                if place in self._kept:
                    return self._kept[place]
            grey = self._make(image, level)
            self._keep(place, grey)
        return grey

    def tile(self, image: ImageEntry, level: int, row: int, column: int) -> np.ndarray:
        """Return one tile of a level, `(h, w)` uint16; tiles at the right and lower border are smaller.

        Raises:
            ImageRefusedError: The file is missing or cannot be read.
            IndexError: The image has no such tile.
        """
        if min(level, row, column) < 0:
            raise IndexError("tile")
        grey = self.level(image, level)
        tile = grey[row * TILE : (row + 1) * TILE, column * TILE : (column + 1) * TILE]
        if not tile.size:
            raise IndexError("tile")
        return tile

    def _make(self, image: ImageEntry, level: int) -> np.ndarray:
        """Return a level: from the codec if it can reduce the image, else from a finer level."""
        file = _open(image)
        if level > coarsest_level(file.header.rows, file.header.columns):
            raise IndexError("level")
        if level and level > file.levels:
            finer = self.level(image, level - 1 if file.levels >= level - 1 else 0)
            shape = -(-file.header.rows // 2**level), -(-file.header.columns // 2**level)
            return cv2.resize(finer, shape[::-1], interpolation=cv2.INTER_AREA)
        grey = file.to_grey(file.read_stored(level))
        grey = np.float32(1) - grey if image.is_inverted else grey
        return np.rint(grey * np.float32(65535)).astype(np.uint16)

    def _keep(self, place: tuple[str, int], grey: np.ndarray) -> None:
        with self._lock:
            self._kept[place] = grey
            self._decoding.pop(place, None)
            while len(self._kept) > 1 and sum(kept.nbytes for kept in self._kept.values()) > self.memory:
                self._kept.popitem(last=False)


def _open(image: ImageEntry) -> ImageFile:
    """Return the opened source of an image, with the grey range of its crop if it is known."""
    if not image.path:
        raise ImageRefusedError("missing_file", "the results do not name the file of the image; predict it again")
    if image.preprocessing:
        return open_as_cropped(Path(image.path), Preprocessing.from_json(image.preprocessing), image.voi)
    return open_image(Path(image.path))
