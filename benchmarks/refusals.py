"""Measure how many mammograms are refused and how many other pictures are not.

Mammograms are the real images in ../shared/data (read there, where present) and synthetic ones. Other pictures are the
generators of `benchmarks/non_mammograms.py`, the sample images of scikit-image, scikit-learn and Matplotlib where
installed, parts of them, and the test files of pydicom, both as they are and, without their header, as PNG.

The ranges in `vitmodel/pixels/plausibility.py` were set on the images in the columns "seen": all real images, the
first seeds of the generators and the sample images. "New" are later seeds, synthetic mammograms and pydicom's files.

With --package, each image that is not refused so far also passes through the model of a package, which refuses images
of a typicality below --atypical; --shape off leaves only this check. A last table has the typicality of each real set.

python benchmarks/refusals.py [--sets real others] [--seeds 20] [--package PACKAGE] [--shape off] [--json FILE]
"""

from __future__ import annotations

import argparse
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import cv2
import non_mammograms
import numpy as np
import pandas as pd
import pydicom
import pydicom.data

from vitmodel.config import Preprocessing, Size
from vitmodel.data.cropping import ProvenanceRecord, SourceImage, crop_image
from vitmodel.data.manifest import as_manifest
from vitmodel.utils import progress, progress_bars, to_json, write_atomic

DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"
RELEASES = ("rsna_640", "rsna_crop256", "mias_512", "rsna_dicom")
PARTS = 4
"""Number of parts that are cut out of each sample image."""
FIRST_NEW_SEED = 1000
COLUMNS = ["image_id", "patient_id", "laterality", "view", "path", "source_path"]
SETS = ("real", "others")
CONFIG = Preprocessing(size=Size(256, 128))


class Item(NamedTuple):
    """An image file to judge."""

    kind: str
    path: Path
    mammogram: bool = False
    new: bool = False
    """Whether it was not used to set the ranges."""


def real_images() -> Iterator[Item]:
    """Yield the real mammograms."""
    for name in RELEASES:
        table = DATA / name / f"{name}.csv"
        if table.exists():
            for path in pd.read_csv(table)["image_path"]:
                yield Item(f"real: {name}", DATA / name / path, mammogram=True)


def save(folder: Path, picture: np.ndarray) -> Path:
    """Write a picture as a PNG file of 8 bits and return its path."""
    path = folder / f"{len(list(folder.iterdir()))}.png"
    cv2.imwrite(str(path), np.rint(np.clip(picture, 0, 1) * 255).astype(np.uint8))
    return path


def drawn_images(folder: Path, seeds: int) -> Iterator[Item]:
    """Yield synthetic mammograms, the pictures of the generators and the sample images with parts of them."""
    for seed in range(5 * seeds):
        phantom = non_mammograms.phantom(np.random.default_rng(seed), "LR"[seed % 2])
        yield Item("synthetic mammogram", save(folder, phantom), mammogram=True, new=True)
    for kind, draw in non_mammograms.GENERATORS.items():
        for first in (0, FIRST_NEW_SEED):
            for seed in range(first, first + seeds):
                picture = draw(np.random.default_rng([zlib.crc32(kind.encode()), seed]))
                yield Item(kind, save(folder, picture), new=first > 0)
    for number, (name, picture) in enumerate(non_mammograms.sample_images()):
        is_face = name.startswith("face")
        yield Item("photographed face" if is_face else "sample image", save(folder, picture))
        for part in range(0 if is_face else PARTS):
            piece = non_mammograms.cut_out(np.random.default_rng([number, part]), picture)
            yield Item("part of a sample image", save(folder, piece))


def pydicom_files(folder: Path) -> Iterator[Item]:
    """Yield the test files of pydicom, as they are and their pixels as PNG."""
    for name in sorted(pydicom.data.get_testdata_files("*.dcm")):
        yield Item("pydicom test file", Path(name), new=True)
        try:
            pixels = pydicom.dcmread(name).pixel_array
        except Exception:  # noqa: BLE001 (damaged on purpose, or without pixels)
            continue
        if pixels.ndim == 2 and min(pixels.shape) >= 16:
            low, high = float(pixels.min()), float(pixels.max())
            yield Item("pydicom test file as PNG", save(folder, (pixels - low) / max(high - low, 1)), new=True)


class ModelJudge:
    """The verdict of the checks of the ETL and, after them, of a package's model.

    Args:
        arguments: The arguments of the program.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        from vitmodel.config import PredictorConfig
        from vitmodel.scoring.predictor import Predictor

        implausible = "warn" if arguments.shape == "off" else "refuse"
        config = PredictorConfig(
            package=arguments.package, implausible=implausible, atypical=arguments.atypical, device="cpu", jobs=1
        )
        self.predictor = Predictor(config)

    def __call__(self, item: Item) -> ProvenanceRecord:
        """Return the verdict on an image, with its typicality."""
        path = str(item.path)
        table = as_manifest(pd.DataFrame([["image", "patient", "", "", path, path]], columns=COLUMNS), "the image")
        ((_, scored),) = self.predictor.scores(self.predictor.attach(table))
        return scored.loaded.cropped.record


def judge_shape(item: Item) -> ProvenanceRecord:
    """Return the verdict of the checks of the ETL on an image."""
    return crop_image(SourceImage(item.path), CONFIG).record


def judge(items: list[Item], verdict_on: Callable[[Item], ProvenanceRecord]) -> pd.DataFrame:
    """Return for each item its kind, whether it is new, whether it was refused, why, and the time it took."""
    rows = []
    for item in progress(items, "judge"):
        start = time.perf_counter()
        record = verdict_on(item)
        rows.append({
            "kind": item.kind,
            "mammogram": item.mammogram,
            "half": "new" if item.new else "seen",
            "refused": record["status"] == "refused",
            "reason": record["reason"] if record["status"] == "refused" else "",
            "typicality": record.get("typicality"),
            "path": str(item.path),
            "ms": 1e3 * (time.perf_counter() - start),
        })  # fmt: skip
    return pd.DataFrame(rows)


def tabulate(table: pd.DataFrame) -> pd.DataFrame:
    """Return per kind, and for all, the number and the fraction refused of seen and of new images."""
    total = table.assign(kind=np.where(table["mammogram"], "ALL MAMMOGRAMS", "ALL OTHERS"))
    real = table[table["kind"].str.startswith("real")].assign(kind="ALL REAL MAMMOGRAMS")
    groups = pd.concat([table, real, total]).groupby(["kind", "half"], sort=False)["refused"]
    return groups.agg(["size", "mean"]).unstack("half")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS, help="images to judge")
    parser.add_argument("--seeds", type=int, default=20, help="pictures of each generator, seen and new")
    parser.add_argument("--package", type=Path, help="model package that judges typicality")
    parser.add_argument("--atypical", type=float, default=0.001, help="typicality below which an image is refused")
    parser.add_argument("--shape", choices=["on", "off"], default="on", help="off: judge by the package only")
    parser.add_argument("--json", type=Path, help="also write every verdict to this file")
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        items = list(real_images()) if "real" in arguments.sets else []
        if "others" in arguments.sets:
            items += [*drawn_images(folder, arguments.seeds), *pydicom_files(folder)]
        with progress_bars(arguments.package is None):  # else each image has a bar of its own
            table = judge(items, ModelJudge(arguments) if arguments.package else judge_shape)
    print(f"{'kind':36} {'seen':>6} {'refused':>8} {'new':>6} {'refused':>8}")
    for kind, row in tabulate(table).iterrows():
        print(f"{kind:36}", end="")
        for half in ("seen", "new"):
            size = row.get(("size", half), np.nan)
            print(f" {0 if np.isnan(size) else int(size):6d} {row.get(('mean', half), np.nan):8.2%}", end="")
        print()
    print(table[table["refused"]].groupby(["mammogram", "reason"]).size().to_string())
    known = table[table["mammogram"] & table["typicality"].notna()].astype({"typicality": float})
    if len(known):
        quantiles = known.groupby("kind")["typicality"].quantile([0.01, 0.1, 0.5, 0.9]).unstack()
        print("typicality, quantiles:", quantiles.to_string(float_format="{:.4f}".format), sep="\n")
    if arguments.json:
        write_atomic(arguments.json, to_json(table.to_dict("records")))


if __name__ == "__main__":
    main()
