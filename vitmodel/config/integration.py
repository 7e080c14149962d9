"""Options of networks that combine several inputs: tiles of an image, sources of images, and images of an exam."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from vitmodel.config.base import Config, Needs, require

WITH_SEGMENTS = Needs("--segments", lambda config: config.segments > 0)
SEGMENT_OPTIONS = ("segment_overlap", "segment_context", "segment_budget", "segment_top", "segment_samples")


@dataclass(frozen=True, kw_only=True)
class SegmentsConfig(Config):
    """How a large image is read in tiles. The model package stores it."""

    GROUPS: ClassVar[Mapping[str, tuple[str, ...]]] = {"segments": ("segments", *SEGMENT_OPTIONS)}
    NEEDS: ClassVar[Mapping[str, Needs]] = dict.fromkeys(SEGMENT_OPTIONS, WITH_SEGMENTS)

    segments: int = 0
    """Tile size in pixels. Tiles cover tissue; a downscaled overview is added. 0 disables tiling."""
    segment_overlap: int = 64
    """Smallest overlap of neighbouring tiles in pixels."""
    segment_context: int = 512
    """Longer side of the downscaled overview in pixels."""
    segment_budget: int = 4096
    """Largest number of tile tokens encoded at once. With --segments it bounds the memory, in place of TOKENS."""
    segment_top: int = 0
    """Number of tiles to read, those that the overview ranks highest. 0 = all."""
    segment_samples: int = 0
    """In training: tiles per image and step, those with a known lesion first, the others at random. 0 = as in
    prediction."""

    def _check(self) -> None:
        super()._check()
        for name in ("segments", "segment_overlap", "segment_top", "segment_samples"):
            require(getattr(self, name) >= 0, name, "must not be negative")
        for name in ("segment_context", "segment_budget"):
            require(getattr(self, name) >= 1, name, "must be at least 1")
        overlaps = not self.segments or self.segment_overlap < self.segments
        require(overlaps, "segment_overlap", f"must be smaller than --segments ({self.segments})")


WITH_FUSION = Needs("--fusion", lambda config: config.fusion)
WITH_SOURCES = Needs("--sources", lambda config: bool(config.sources))


@dataclass(frozen=True, kw_only=True)
class IntegrationConfig(Config):
    """How the images of an exam are combined, and which sources of images get parameters of their own."""

    GROUPS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "exams and sources": ("fusion", "asymmetry", "view_dropout", "sources", "source_images", "source_dropout"),
    }
    NEEDS: ClassVar[Mapping[str, Needs]] = {
        "asymmetry": WITH_FUSION,
        "view_dropout": WITH_FUSION,
        "source_images": Needs("--sources or --fusion", lambda config: bool(config.sources) or config.fusion),
        "source_dropout": WITH_SOURCES,
    }

    fusion: bool = False
    """Read all images of a patient together. Batches hold exams; losses are per image, breast and patient, metrics per
    breast."""
    asymmetry: bool = True
    """With --fusion: compare each breast with the other one."""
    view_dropout: float = 0.1
    """With --fusion, in training: probability of leaving an image out of its exam. One image of each labelled breast
    stays."""
    sources: tuple[str, ...] = ()
    """Columns of the manifest, such as view or machine_id, each of whose values gets small parts of the network
    (adapters) of its own."""
    source_images: int = 20
    """Smallest number of training images for which a value of SOURCES, or a view with --fusion, gets parameters of its
    own. Rarer and unknown values share theirs."""
    source_dropout: float = 0.1
    """In training: probability of treating an image's value as unknown, for each of SOURCES, so that the model can
    score images of new sources."""

    def _resolve(self) -> None:
        super()._resolve()
        object.__setattr__(self, "sources", tuple(dict.fromkeys(self.sources)))

    def _check(self) -> None:
        super()._check()
        for name in ("view_dropout", "source_dropout"):
            require(0 <= getattr(self, name) < 1, name, "must be at least 0 and below 1")
        require(self.source_images >= 1, "source_images", "must be at least 1")
