"""Write images that are in memory to files, so that they are scored by the same code as any other input."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Union

import cv2
import numpy as np
import pandas as pd
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from vitmodel.data.tables import write_csv
from vitmodel.errors import UsageError
from vitmodel.utils import write_atomic

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Pixels = NDArray[np.uint8] | NDArray[np.uint16] | NDArray[np.floating]


@dataclass(frozen=True, kw_only=True, eq=False)
class Mammogram:
    """A mammogram as an array, with the metadata that a file's header would hold.

    The array has no pixel spacing. Models that crop at a physical scale (`mm_per_pixel`) refuse it; pass them a
    `pydicom.Dataset` instead.

    Args:
        pixels: `(H, W)`, brighter = denser, air near 0: uint8 or uint16 over the full range of the type (scale 12-bit
            data up), or float from 0 to 1.
        patient_id: The patient; images with the same id and laterality belong to one breast.
        laterality: Side of the breast, "L" or "R"; "" = unknown.
        view: Projection, such as "CC" or "MLO"; "" = unknown.
        image_id: Unique name of the image; None = array_1, array_2, ... by position among the sources.
        age: Age of the patient in years.
        implant: Whether the breast has an implant.
        machine_id: The device, for models that were trained with sources.
        site_id: The hospital, for models that were trained with sources.

    Raises:
        UsageError: The array has another shape, type or range, `patient_id` is empty, or `laterality` is not valid.

    Examples:
        >>> pixels = np.zeros((256, 208), np.uint16)
        >>> pixels[48:208, :96] = 30000
        >>> vitmodel.Mammogram(pixels=pixels, patient_id="p1", laterality="L", view="CC")
        Mammogram(256x208 uint16, patient_id='p1', laterality='L', view='CC')
    """

    pixels: Pixels
    patient_id: str
    laterality: str = ""
    view: str = ""
    image_id: str | None = None
    age: float | None = None
    implant: bool | None = None
    machine_id: str | None = None
    site_id: str | None = None

    def __post_init__(self) -> None:
        pixels = self.pixels
        if not isinstance(pixels, np.ndarray) or pixels.ndim != 2 or 0 in pixels.shape:
            shape = getattr(pixels, "shape", type(pixels).__name__)
            raise UsageError(
                f"pixels: must be an array of height x width grey values, not {shape}; convert colour to grey first"
            )
        if np.issubdtype(pixels.dtype, np.floating):
            if not (np.isfinite(pixels).all() and pixels.min() >= 0 and pixels.max() <= 1):
                raise UsageError("pixels: float values must be between 0 and 1; rescale them, 0 = air, 1 = densest")
        elif pixels.dtype not in (np.uint8, np.uint16):
            raise UsageError(f"pixels: must be uint8, uint16 or float, not {pixels.dtype}; rescale and convert them")
        if not self.patient_id:
            raise UsageError("patient_id: is empty; set it, so that the images of a breast are scored together")
        if self.laterality not in ("L", "R", ""):
            raise UsageError(f"laterality: must be 'L', 'R' or '' (unknown), not {self.laterality!r}; correct it")

    def __repr__(self) -> str:
        height, width = self.pixels.shape
        metadata = f"patient_id={self.patient_id!r}, laterality={self.laterality!r}, view={self.view!r}"
        return f"Mammogram({height}x{width} {self.pixels.dtype}, {metadata})"

    def _png(self) -> bytes:
        """Return the pixels as the bytes of a lossless PNG file of 8 or 16 bits; float pixels become 16 bits."""
        pixels: np.ndarray = self.pixels
        if np.issubdtype(pixels.dtype, np.floating):
            pixels = np.rint(pixels.astype(np.float64) * 65535).astype(np.uint16)
        return cv2.imencode(".png", np.ascontiguousarray(pixels))[1].tobytes()


# Documentation tools evaluate this at run time.
SourceImage = Union[str, os.PathLike[str], Dataset, Mammogram]  # noqa: UP007


def write_sources(sources: SourceImage | Iterable[SourceImage], folder: Path) -> list[str]:
    """Return a path for each source; data sets and arrays are written below `folder` first.

    Each data set becomes a DICOM file in a folder of its own, so that those without a PatientID and a study count as
    different patients. Arrays become PNG files, with one table for their metadata.

    Raises:
        UsageError: There is no source, or one has another type or cannot be written.
    """
    single = isinstance(sources, str | os.PathLike | Dataset | Mammogram | np.ndarray)
    if not single and not isinstance(sources, Iterable):
        raise _unsupported_source(sources)
    items = [sources] if single else list(sources)  # type: ignore[arg-type]
    if not items:
        raise UsageError(
            "sources: names nothing to score; pass a path, a pydicom Dataset, a vitmodel.Mammogram or a list of them"
        )
    paths: list[str] = []
    rows: list[dict[str, object]] = []
    for number, item in enumerate(items, start=1):
        if isinstance(item, Dataset):
            paths.append(str(_write_dataset(item, folder / f"dataset_{number}" / f"dataset_{number}.dcm")))
        elif isinstance(item, Mammogram):
            rows.append(_write_array(item, folder / "arrays" / f"array_{number}.png"))
        elif isinstance(item, str | os.PathLike):
            paths.append(_check_path(os.fspath(item)))
        else:
            raise _unsupported_source(item)
    if rows:
        table = folder / "arrays" / "arrays.csv"
        write_csv(pd.DataFrame(rows), table)
        paths.append(str(table))
    return paths


def _check_path(path: str) -> str:
    """Return `path`; raise UsageError if it means standard input."""
    if path == "-":
        raise UsageError("sources: '-' (standard input) works on the command line only; pass a list of paths")
    return path


def _unsupported_source(item: object) -> UsageError:
    if isinstance(item, np.ndarray):
        return UsageError(
            "sources: an array needs its metadata; "
            "wrap it: vitmodel.Mammogram(pixels=array, patient_id=..., laterality=...)"
        )
    supported = "a path, a pydicom Dataset, a vitmodel.Mammogram or a list of them"
    return UsageError(f"sources: {type(item).__name__} cannot be scored; pass {supported}")


def _write_dataset(dataset: Dataset, path: Path) -> Path:
    """Write a DICOM data set in its own transfer syntax, or as Explicit VR Little Endian if it has none.

    The data set itself is not changed.
    """
    dataset = copy.copy(dataset)
    meta = getattr(dataset, "file_meta", None)
    dataset.file_meta = FileMetaDataset() if meta is None else copy.copy(meta)
    if "TransferSyntaxUID" not in dataset.file_meta:
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    path.parent.mkdir(parents=True)
    try:
        dataset.save_as(path, enforce_file_format=True)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"sources: {path.stem} cannot be written as a DICOM file: {error}; complete the data set"
        ) from error
    return path


def _write_array(image: Mammogram, path: Path) -> dict[str, object]:
    """Write an array as PNG and return its row of the table."""
    write_atomic(path, image._png())
    values = {
        name: getattr(image, name) for name in ("patient_id", "laterality", "view", "age", "machine_id", "site_id")
    }
    implant = None if image.implant is None else int(image.implant)
    return {"image_id": image.image_id or path.stem, "path": path.name, "implant": implant} | values
