"""Options of `synth` and `etl`: from an image archive to crops."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar, Literal

from vitmodel.config.base import Config, Needs, Size, require, require_apart
from vitmodel.errors import UsageError

LARGEST_CROP = 100_000_000
"""Largest number of pixels of a crop."""


@dataclass(frozen=True, kw_only=True)
class SynthConfig(Config):
    """Write a synthetic mammography release in the layout of RSNA: seeded phantoms as DICOM, labels and lesion
    boxes."""

    GROUPS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "input and output": ("out", "patients", "seed", "size", "difficulty", "positives", "faults"),
        "hardware": ("workers",),
    }

    out: Path
    """Output folder of the release."""
    patients: int = 40
    """Number of patients. Each has four images."""
    seed: int = 0
    """Random seed; it determines every pixel."""
    size: Size = Size(2048, 1664)
    """Height and width of the images in pixels."""
    difficulty: float = 0.5
    """How hard lesions are to see: 0 = large and bright, 1 = small and faint."""
    positives: float = 0.3
    """Fraction of patients with a cancer, in one breast or, rarely, in both."""
    faults: bool = False
    """Also write a few deliberately broken files."""
    workers: int = 0
    """Number of worker processes. 0 = one per core."""

    def _check(self) -> None:
        super()._check()
        require(self.patients > 0, "patients", "must be at least 1")
        require(min(self.size) >= 128, "size", "must be at least 128x128 pixels")
        require(0 <= self.difficulty <= 1, "difficulty", "must lie between 0 and 1")
        require(0 <= self.positives <= 1, "positives", "must lie between 0 and 1")
        require(self.workers >= 0, "workers", "must not be negative")


def range_ends(text: str) -> tuple[float, float] | None:
    """Return the ends of a range of values written as LOW:HIGH; None if the text is something else."""
    match = re.fullmatch(r"(-?\d{1,12}(?:\.\d{1,12})?):(-?\d{1,12}(?:\.\d{1,12})?)", text)
    return (float(match[1]), float(match[2])) if match else None


@dataclass(frozen=True, kw_only=True)
class Preprocessing(Config):
    """Options of cropping. The model package stores them, so that prediction repeats the preprocessing of training."""

    GROUPS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "input and output": (
            *("size", "mm_per_pixel", "bits", "voi", "picture_range", "for_processing", "exact", "implausible"),
        ),
    }

    size: Size = Size(1024, 512)
    """Height and width of the crop in pixels. The breast keeps its aspect ratio; the rest is padded with air."""
    mm_per_pixel: float | None = None
    """Resample to this pixel spacing in mm instead, so that crops differ in size. Images without a known pixel spacing
    are refused. SIZE is then the size for which the model learns its position embeddings. none = resize to SIZE."""
    bits: Literal[8, 16] = 8
    """Bits per pixel of the crop."""
    voi: int = 1
    """Number of the stored VOI LUT or window to apply, counted from 1. The manifest records the one that was used."""
    picture_range: str = "auto"
    """Values of a PNG, TIFF or other picture that are shown black and white. auto = from 0 to the end of the bits that
    are in use (8, 10, 12, 14 or 16), which those of all pictures of a release together decide; full = all that the file
    can hold; percentile = from the 0.1 to the 99.9 percentile of each picture; LOW:HIGH = these values, such as 0:4095.
    """
    for_processing: Literal["refuse", "log"] = "refuse"
    """Treatment of raw detector data (DICOM "FOR PROCESSING"): refuse the image, or use the inverted logarithm."""
    exact: bool = False
    """Always decode at full resolution, even where a lower JPEG 2000 resolution level is large enough."""
    implausible: Literal["refuse", "warn"] = "refuse"
    """Treatment of images in which nothing looks like a breast in a screening mammogram: refuse them, or use them with
    a warning."""

    def _check(self) -> None:
        super()._check()
        require(min(self.size) >= 16, "size", "must be at least 16x16 pixels")
        require(
            self.size.height * self.size.width <= LARGEST_CROP,
            "size",
            f"must have at most {LARGEST_CROP // 10**6} million pixels, twice those of the largest mammograms",
        )
        scale_is_sane = self.mm_per_pixel is None or 0.02 <= self.mm_per_pixel <= 2
        require(scale_is_sane, "mm_per_pixel", "must lie between 0.02 and 2 (mammograms have 0.05 to 0.1)")
        require(self.voi >= 1, "voi", "must be at least 1: VOI LUTs and windows are counted from 1")
        ends = range_ends(self.picture_range)
        is_range = ends is not None and ends[0] < ends[1]
        require(
            self.picture_range in ("auto", "full", "percentile") or is_range,
            "picture_range",
            f"{self.picture_range!r} is not a choice; choose auto, full, percentile or LOW:HIGH, such as 0:4095",
        )

    def to_json(self) -> str:
        """Return the fields as one line of JSON, as the manifest and the model package store it.

        A field that was added later is left out at its default, so that the crops of earlier versions stay valid.
        """
        added = ("picture_range", "implausible")
        defaults = {field.name: field.default for field in fields(Preprocessing)}
        values = {name: getattr(self, name) for name in defaults}
        values = {name: value for name, value in values.items() if name not in added or value != defaults[name]}
        return json.dumps(values | {"size": str(self.size)})

    @classmethod
    def from_json(cls, text: str) -> Preprocessing:
        """Return the preprocessing that `to_json` wrote.

        Raises:
            UsageError: The text is something else, or this version of vitmodel does not know one of the fields.
        """
        try:
            values = dict(json.loads(text))
            values["size"] = Size.parse(values["size"])
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise UsageError(
                "preprocessing: is not the line of JSON with a size that `vitmodel etl` writes; copy the file again"
            ) from error
        unknown = sorted(set(values) - {field.name for field in fields(Preprocessing)})
        require(not unknown, "preprocessing", f"fields unknown to this version of vitmodel: {', '.join(unknown)}")
        return Preprocessing(**values)


@dataclass(frozen=True, kw_only=True)
class ETLConfig(Preprocessing):
    """Crop, orient and resize all mammograms of an archive; write PNG files and manifest.csv.

    The manifest has one row per image; refused images have a row with the reason. A repeated run processes only what is
    missing or changed.
    """

    GROUPS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "input and output": ("source", "out", "dataset", "images", "columns", "transcode"),
        "hardware": ("workers", "backend", "scheduler"),
    }
    NEEDS: ClassVar[Mapping[str, Needs]] = {
        "scheduler": Needs("--backend dask", lambda config: config.backend == "dask")
    }

    source: Path
    """Input: a release folder, a folder of images, a zip or tar of either, one file, or a manifest."""
    out: Path
    """Output folder for the crops and manifest.csv."""
    dataset: str = "auto"
    """Kind of release that SOURCE is (rsna, vindr, class_folders, dicom_folder, ...). auto = detected from its
    files."""
    images: Path | None = None
    """Folder of the images, where SOURCE is your own table and its files are elsewhere. none = the table's folder."""
    columns: tuple[str, ...] = ()
    """Columns of your own table that have other names, such as patient_id=PID or cancer=Diagnosis. May be repeated."""
    workers: int = 0
    """Number of parallel workers. 0 = one per core."""
    backend: Literal["auto", "threads", "processes", "dask"] = "auto"
    """Kind of workers. With processes, a file that crashes or hangs its decoder loses only itself. auto = threads,
    which start at once, or processes from 500 images on (from 30 where they are RLE, whose decoder runs one thread at a
    time)."""
    transcode: Literal["none", "htj2k"] = "none"
    """Also write a lossless HTJ2K copy of each DICOM file to OUT/htj2k; later runs read its manifest.csv much
    faster."""
    scheduler: str = ""
    """Address of the dask scheduler, such as tcp://host:8786, with --backend dask. none = start a local cluster."""

    def _check(self) -> None:
        super()._check()
        require_apart(self.out, [self.source])
        require(self.workers >= 0, "workers", "must not be negative")
        for pair in self.columns:
            name, _, own = pair.partition("=")
            require(bool(name and own), "columns", f"{pair!r} must be COLUMN=YOURS, such as patient_id=PID")

    @property
    def own_columns(self) -> dict[str, str]:
        """Return column of the manifest -> column of the user's own table."""
        return {name: own for name, _, own in (pair.partition("=") for pair in self.columns)}

    @property
    def preprocessing(self) -> Preprocessing:
        """Return the part that the manifest and the model package store."""
        return Preprocessing(**{field.name: getattr(self, field.name) for field in fields(Preprocessing)})
