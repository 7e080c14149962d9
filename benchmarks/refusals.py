"""Measure how many mammograms are refused and how many other pictures are not.

Mammograms are the real images in ../shared/data (read there, where present) and synthetic ones. Other pictures are the
generators of `benchmarks/non_mammograms.py`, the sample images of scikit-image, scikit-learn and Matplotlib where
installed, parts of them, and the test files of pydicom, both as they are and, without their header, as PNG.

The ranges in `vitmodel/pixels/plausibility.py` were set on the images of even number of each set ("tune"); the table
gives the images of odd number ("report") next to them.

python benchmarks/refusals.py [--seeds 40] [--json FILE]
"""

from __future__ import annotations

import argparse
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import cv2
import non_mammograms
import numpy as np
import pandas as pd
import pydicom
import pydicom.data

from vitmodel.config import Preprocessing, Size
from vitmodel.data.cropping import SourceImage, crop_image
from vitmodel.utils import progress, to_json, write_atomic

DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"
RELEASES = ("rsna_640", "rsna_crop256", "mias_512", "rsna_dicom")
PARTS = 4
"""Number of parts that are cut out of each sample image."""
CONFIG = Preprocessing(size=Size(256, 128))


class Item(NamedTuple):
    """An image file to judge."""

    kind: str
    number: int
    path: Path
    mammogram: bool


def real_images() -> Iterator[Item]:
    """Yield the real mammograms, numbered by patient where the patient is known."""
    for name in RELEASES:
        if not (DATA / name).exists():
            continue
        if (DATA / name / f"{name}.csv").exists():
            table = pd.read_csv(DATA / name / f"{name}.csv")
            patients = table["patient_id"] if "patient_id" in table else pd.Series(table.index)
            for number, path in zip(pd.factorize(patients)[0], table["image_path"], strict=True):
                yield Item(f"real: {name}", int(number), DATA / name / path, True)


def written(folder: Path, kind: str, number: int, picture: np.ndarray, mammogram: bool = False) -> Item:
    """Return the item of a picture, which is written as a PNG file of 8 bits."""
    path = folder / f"{zlib.crc32(kind.encode())}_{number}_{len(list(folder.iterdir()))}.png"
    cv2.imwrite(str(path), np.rint(np.clip(picture, 0, 1) * 255).astype(np.uint8))
    return Item(kind, number, path, mammogram)


def drawn_images(folder: Path, seeds: int) -> Iterator[Item]:
    """Yield the pictures of the generators, the sample images and synthetic mammograms."""
    for seed in range(5 * seeds):
        rng = np.random.default_rng(seed)
        yield written(folder, "synthetic mammogram", seed, non_mammograms.phantom(rng, "LR"[seed % 2]), True)
    for kind, draw in non_mammograms.GENERATORS.items():
        for seed in range(seeds):
            yield written(folder, kind, seed, draw(np.random.default_rng([zlib.crc32(kind.encode()), seed])))
    for number, (name, picture) in enumerate(non_mammograms.sample_images()):
        is_face = name.startswith("face")
        yield written(folder, "photographed face" if is_face else "sample image", number, picture)
        for part in range(0 if is_face else PARTS):
            piece = non_mammograms.cut_out(np.random.default_rng([number, part]), picture)
            yield written(folder, "part of a sample image", number, piece)


def pydicom_files(folder: Path) -> Iterator[Item]:
    """Yield the test files of pydicom, as they are and their pixels as PNG."""
    for number, name in enumerate(sorted(pydicom.data.get_testdata_files("*.dcm"))):
        yield Item("pydicom test file", number, Path(name), False)
        try:
            pixels = pydicom.dcmread(name).pixel_array
        except Exception:  # noqa: BLE001 (damaged on purpose, or without pixels)
            continue
        if pixels.ndim == 2 and min(pixels.shape) >= 16:
            low, high = float(pixels.min()), float(pixels.max())
            yield written(folder, "pydicom test file as PNG", number, (pixels - low) / max(high - low, 1))


def judge(items: list[Item]) -> pd.DataFrame:
    """Return for each item its kind, its half, whether it was refused, why, and the time it took."""
    rows = []
    for item in progress(items, "judge"):
        start = time.perf_counter()
        record = crop_image(SourceImage(item.path), CONFIG).record
        rows.append({
            "kind": item.kind,
            "mammogram": item.mammogram,
            "half": ("tune", "report")[item.number % 2],
            "refused": record["status"] == "refused",
            "reason": record["reason"] if record["status"] == "refused" else "",
            "path": str(item.path),
            "ms": 1e3 * (time.perf_counter() - start),
        })  # fmt: skip
    return pd.DataFrame(rows)


def tabulate(table: pd.DataFrame) -> pd.DataFrame:
    """Return per kind, and for all, the number of images and the fraction refused in each half."""
    total = table.assign(kind=np.where(table["mammogram"], "ALL MAMMOGRAMS", "ALL OTHERS"))
    real = table[table["kind"].str.startswith("real")].assign(kind="ALL REAL MAMMOGRAMS")
    groups = pd.concat([table, real, total]).groupby(["kind", "half"], sort=False)["refused"]
    return groups.agg(["size", "mean"]).unstack("half")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=40, help="pictures of each generator")
    parser.add_argument("--json", type=Path, help="also write every verdict to this file")
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        items = [*real_images(), *drawn_images(folder, arguments.seeds), *pydicom_files(folder)]
        table = judge(items)
    print(f"{'kind':36} {'tune':>6} {'refused':>8} {'report':>7} {'refused':>8}")
    for kind, row in tabulate(table).iterrows():
        counts = [0 if np.isnan(row["size", half]) else int(row["size", half]) for half in ("tune", "report")]
        tune, report = (row["mean", half] for half in ("tune", "report"))
        print(f"{kind:36} {counts[0]:6d} {tune:8.2%} {counts[1]:7d} {report:8.2%}")
    print(table[table["refused"]].groupby(["mammogram", "reason"]).size().to_string())
    if arguments.json:
        write_atomic(arguments.json, to_json(table.to_dict("records")))


if __name__ == "__main__":
    main()
