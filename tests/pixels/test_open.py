"""Opening a source again shows the grey range that its crop has."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from vitmodel.config import Preprocessing
from vitmodel.pixels.open import open_as_cropped, open_image


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """Return a 16-bit picture with the values 0 to 999."""
    path = tmp_path / "picture.png"
    cv2.imwrite(str(path), np.arange(1000, dtype=np.uint16).reshape(20, 50))
    return path


def brightest(path: Path, voi: str | None) -> float:
    file = open_as_cropped(path, Preprocessing(), voi)
    return float(file.to_grey(file.read_stored()).max())


def test_a_range_shared_with_other_pictures_is_used_again(picture: Path) -> None:
    assert brightest(picture, "0:4095") == pytest.approx(999 / 4095, rel=1e-6)
    assert brightest(picture, None) == pytest.approx(999 / 1023, rel=1e-6)


def test_an_own_range_is_used_again(picture: Path) -> None:
    cropped = open_image(picture)
    cropped.use_own_range()
    reopened = open_as_cropped(picture, Preprocessing(), cropped.header.voi)
    stored = reopened.read_stored()
    assert reopened.header.voi == cropped.header.voi
    np.testing.assert_array_equal(reopened.to_grey(stored), cropped.to_grey(stored))
