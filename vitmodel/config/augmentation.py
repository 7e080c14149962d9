"""Options of the random changes of training crops."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from vitmodel.config.base import Config, Needs, require


@dataclass(frozen=True, kw_only=True)
class AugmentConfig(Config):
    """Random changes of training crops. 0 switches a change off."""

    PREFIX: ClassVar[str] = "augment."
    GROUPS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "augmentation": (
            "flip", "mirror", "area", "rotate", "scale", "shift", "gamma", "contrast", "noise", "elastic", "window",
            "blur", "holes", "hole",
        ),
    }  # fmt: skip
    NEEDS: ClassVar[Mapping[str, Needs]] = {"hole": Needs("--augment.holes", lambda config: config.holes > 0)}

    flip: float = 0.5
    """Probability of an upside-down flip."""
    mirror: float = 0.0
    """Probability of a left-right flip. Crops have the chest wall at the left, so this is meant for whole images."""
    area: float = 1.0
    """Smallest fraction of the area that a random resized crop keeps, at 3/4 to 4/3 of the image's aspect ratio. 1 =
    no cropping."""
    rotate: float = 10.0
    """Largest rotation in degrees."""
    scale: float = 0.1
    """Largest relative change of scale."""
    shift: float = 0.04
    """Largest shift as a fraction of height and width."""
    gamma: float = 0.2
    """Largest change of the logarithm of gamma."""
    contrast: float = 0.15
    """Largest relative change of contrast."""
    noise: float = 0.01
    """Largest standard deviation of Gaussian noise on tissue, as a fraction of the grey range."""
    elastic: float = 0.0
    """Largest elastic displacement as a fraction of the width."""
    window: float = 0.0
    """Largest shift of the black point and of the white point, as a fraction of the grey range."""
    blur: float = 0.0
    """Largest standard deviation of a Gaussian blur in pixels."""
    holes: int = 0
    """Largest number of square holes, filled with the mean grey of the tissue."""
    hole: float = 0.15
    """Side of a hole as a fraction of the width."""

    def _check(self) -> None:
        super()._check()
        for name in ("flip", "mirror"):
            require(0 <= getattr(self, name) <= 1, f"augment.{name}", "must be a probability between 0 and 1")
        require(0 < self.area <= 1, "augment.area", "must be above 0 and at most 1")
        for name in ("rotate", "scale", "shift", "gamma", "contrast", "noise", "elastic", "window", "blur", "holes"):
            require(getattr(self, name) >= 0, f"augment.{name}", "must not be negative")
        require(self.scale < 1, "augment.scale", "must be below 1")
        require(self.contrast < 1, "augment.contrast", "must be below 1")
        require(self.window < 0.5, "augment.window", "must be below 0.5")
        require(0 < self.hole <= 1, "augment.hole", "must be above 0 and at most 1")
