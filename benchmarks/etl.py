"""Measure the speed of the ETL for one image on one thread, by codec and size, against a common pipeline.

python benchmarks/etl.py [--repeats 5] [--parts speed,levels,writer,copies] [--json FILE]

The peer is the pipeline found in most public code: pydicom's pixel_array, apply_voi_lut, connected components at full
size, everything else black, cv2.resize and a PNG of level 6. It is measured unchanged and "tuned", with an allocator
that keeps large arrays as ours does (`retain_freed_memory`). Each variant runs in its own process. The images are two
phantoms (CC, MLO) with 12 bits, half of them air, in every transfer syntax, and the real ones of
../shared/data/rsna_dicom if available. Prints tables.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import cv2
import imagecodecs
import numpy as np
import pandas as pd
from pydicom import dcmread, uid
from pydicom.encaps import encapsulate
from pydicom.pixels import apply_voi_lut
from rle.utils import encode_pixel_data

from vitmodel.config import Preprocessing, Size, SynthConfig
from vitmodel.data.cropping import SourceImage, crop_image
from vitmodel.phantoms.anatomy import BreastPhantom, render
from vitmodel.phantoms.dicom import MACHINES
from vitmodel.phantoms.lesions import ViewName
from vitmodel.phantoms.release import write_release
from vitmodel.phantoms.style import apply_style
from vitmodel.pixels.preprocessing import preprocess
from vitmodel.pixels.transcoding import transcode
from vitmodel.utils import retain_freed_memory, to_json, write_atomic

REAL = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "rsna_dicom" / "dicom"
SHAPES = {"5928x4728": Size(5928, 4728), "4096x3328": Size(4096, 3328)}
# Standard deviation of the detector's blur in pixels. With it, JPEG 2000 needs 8 bits per pixel of tissue for the
# phantoms, as it does for real images.
DETECTOR = 0.4
VIEWS: tuple[ViewName, ...] = ("CC", "MLO")
TARGETS = (Size(1024, 512), Size(2048, 1024))
WRITERS = {  # PNG settings of cv2
    "level 0": [cv2.IMWRITE_PNG_COMPRESSION, 0],
    "cv2's default": [],
    "level 1": [cv2.IMWRITE_PNG_COMPRESSION, 1],
    "level 3": [cv2.IMWRITE_PNG_COMPRESSION, 3],
    "level 6": [cv2.IMWRITE_PNG_COMPRESSION, 6],
    "level 6, filtered": [cv2.IMWRITE_PNG_COMPRESSION, 6, cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_FILTERED],
    "level 9": [cv2.IMWRITE_PNG_COMPRESSION, 9],
}


def encode_rle(stored: np.ndarray) -> bytes:
    rows, columns = stored.shape
    layout = {"rows": rows, "columns": columns, "samples_per_pixel": 1, "bits_allocated": 16, "number_of_frames": 1}
    return bytes(encode_pixel_data(stored.astype("<u2").tobytes(), **layout, byteorder="<"))


SYNTAXES: dict[str, tuple[uid.UID, Callable[[np.ndarray], bytes]]] = {
    "JPEG 2000": (
        uid.JPEG2000Lossless,
        lambda x: imagecodecs.jpeg2k_encode(x, level=0, reversible=True, codecformat="j2k", resolutions=6),
    ),
    "HTJ2K": (uid.HTJ2KLossless, lambda x: imagecodecs.htj2k_encode(x, reversible=True)),
    "JPEG lossless": (
        uid.JPEGLosslessSV1,
        lambda x: imagecodecs.jpeg8_encode(x, lossless=True, predictor=1, bitspersample=12),
    ),
    "JPEG-LS": (uid.JPEGLSLossless, imagecodecs.jpegls_encode),
    "RLE": (uid.RLELossless, encode_rle),
    "uncompressed": (uid.ExplicitVRLittleEndian, np.ndarray.tobytes),
}


def phantom(view: ViewName, shape: Size) -> np.ndarray:
    """Return a breast as high as the image, of which it fills about half: `(H, W)`, 12 of 16 bits."""
    larger = Size(*(round(1.35 * side) for side in shape))
    rendered = render(BreastPhantom(seed=7, depth_mm=78), view, larger)
    picture = apply_style(rendered, MACHINES[0].style, "", seed=7, chest_wall="L")
    picture = cv2.GaussianBlur(picture, None, DETECTOR)
    rows = np.flatnonzero(rendered.mask.any(axis=1))
    top = (rows[0] + rows[-1] - shape.height) // 2
    return np.round(picture[top : top + shape.height, : shape.width] * 4095).astype(np.uint16)


def write_samples(folder: Path) -> pd.DataFrame:
    """Write two phantoms of each shape in each syntax; return a table of them and the real images (sample, path)."""
    release = write_release(SynthConfig(out=folder / "release", patients=1, size=Size(128, 128)))
    header = dcmread(next(release.rglob("*.dcm")))
    header.PhotometricInterpretation = "MONOCHROME2"
    header.PresentationLUTShape = "IDENTITY"
    header.WindowCenter = "2048"
    header.WindowWidth = "4096"
    header.VOILUTFunction = "LINEAR"
    header.BitsStored = 12
    header.HighBit = 11
    header.PixelPaddingValue = 0
    rows = []
    for shape, size in SHAPES.items():
        for view in VIEWS:
            stored = phantom(view, size)
            header.Rows, header.Columns = stored.shape
            for name, (syntax, encode) in SYNTAXES.items():
                data = bytes(encode(stored))
                header.PixelData = encapsulate([data]) if syntax.is_encapsulated else data
                header["PixelData"].VR = "OB" if syntax.is_encapsulated else "OW"
                header["PixelData"].is_undefined_length = syntax.is_encapsulated
                header.file_meta.TransferSyntaxUID = syntax
                path = folder / f"{shape} {name} {view}.dcm"
                header.save_as(path, enforce_file_format=True)
                rows.append({"sample": f"{shape} {name}", "path": path})
            copy = folder / f"{shape} our HTJ2K copy {view}.dcm"
            copy.write_bytes(transcode(folder / f"{shape} JPEG 2000 {view}.dcm") or b"")
            rows.append({"sample": f"{shape} our HTJ2K copy", "path": copy})
    for path in sorted(REAL.rglob("*.dcm")):
        real = dcmread(path, stop_before_pixels=True)
        rows.append({"sample": f"real RSNA {real.Rows}x{real.Columns} JPEG 2000", "path": path})
    return pd.DataFrame(rows)


def peer(path: Path, target: Size) -> bytes:
    """Return the PNG of a crop by the common pipeline."""
    dataset = dcmread(path)
    pixels = apply_voi_lut(dataset.pixel_array, dataset)
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        pixels = pixels.max() - pixels
    pixels = pixels - pixels.min()
    grey = (pixels / pixels.max() * 255).astype(np.uint8)
    _, labels, stats, _ = cv2.connectedComponentsWithStats((grey > 20).astype(np.uint8))
    largest = 1 + stats[1:, cv2.CC_STAT_AREA].argmax()
    x, y, width, height, _ = stats[largest]
    grey = np.where(labels == largest, grey, 0).astype(np.uint8)
    scale = min(target.height / height, target.width / width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small = cv2.resize(grey[y : y + height, x : x + width], size, interpolation=cv2.INTER_AREA)
    return cv2.imencode(".png", small, [cv2.IMWRITE_PNG_COMPRESSION, 6])[1].tobytes()


def tuned_peer(path: Path, target: Size) -> bytes:
    """Return the PNG of a crop by the common pipeline with a tuned allocator."""
    retain_freed_memory(1 << 30)  # its arrays of doubles are larger than ours
    return peer(path, target)


def ours(path: Path, target: Size, exact: bool = False) -> bytes:
    """Return the PNG of a crop by our ETL, including the SHA-256 of the source and the verdict."""
    retain_freed_memory()
    cropped = crop_image(SourceImage(path), Preprocessing(size=target, exact=exact))
    assert cropped.crop is not None, cropped.record
    return cv2.imencode(".png", cropped.crop)[1].tobytes()


VARIANTS = {"peer": peer, "tuned": tuned_peer, "ours": ours, "exact": functools.partial(ours, exact=True)}


def seconds(functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Return the median time of each function.

    The functions take turns, so that changes of the machine's speed affect all of them. Each runs twice per turn and
    the second run counts, because the first one has to reallocate memory that another function released.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            function()
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def speed(samples: pd.DataFrame, repeats: int) -> pd.DataFrame:
    """Measure seconds per image of the peer, the tuned peer, our ETL, and our ETL with --exact."""
    rows = []
    with contextlib.ExitStack() as stack:
        pool = functools.partial(ProcessPoolExecutor, 1, get_context("spawn"), cv2.setNumThreads, (1,))
        pools = {name: stack.enter_context(pool()) for name in VARIANTS}

        def run(name: str, path: Path, target: Size) -> None:
            pools[name].submit(VARIANTS[name], path, target).result()

        for sample, group in samples.groupby("sample", sort=False):
            for target in TARGETS:
                times = []
                for path in group.path[:2]:
                    functions = {name: functools.partial(run, name, path, target) for name in VARIANTS}
                    times.append(seconds(functions, repeats))
                mean = {name: statistics.mean(medians[name] for medians in times) for name in VARIANTS}
                row = {"sample": sample, "target": str(target), **mean}
                for mine, other in itertools.product(("ours", "exact"), ("peer", "tuned")):
                    row[f"{other} / {mine}"] = mean[other] / mean[mine]
                rows.append(row)
                line = pd.DataFrame([row]).to_string(index=False, header=len(rows) == 1, float_format="%.3f")
                print(line, flush=True)
    return pd.DataFrame(rows)


def levels(samples: pd.DataFrame, repeats: int) -> pd.DataFrame:
    """Compare the crops of a reduced and a full decode by the minimum PSNR in tissue, in dB of the full range."""
    rows = []
    for sample, group in samples[samples["sample"].str.contains("2000|HTJ2K")].groupby("sample", sort=False):
        for target in TARGETS:
            level = 0
            psnr = np.inf
            for path in group.path:
                fast = preprocess(path, Preprocessing(size=target, bits=16))
                exact = preprocess(path, Preprocessing(size=target, bits=16, exact=True))
                tissue = (fast.crop > 0) & (exact.crop > 0)
                error = (fast.crop[tissue].astype(float) - exact.crop[tissue]) / 65535
                level = max(level, fast.decode_level)
                if np.any(error):
                    psnr = min(psnr, -10 * np.log10(np.mean(error**2)))
            rows.append({"sample": sample, "target": str(target), "level": level, "least PSNR": psnr})
    return pd.DataFrame(rows)


def writer(samples: pd.DataFrame, repeats: int) -> pd.DataFrame:
    """Measure milliseconds and kilobytes of a crop's PNG by setting."""
    rows = []
    for target in TARGETS:
        crops = [preprocess(path, Preprocessing(size=target)).crop for path in samples.drop_duplicates("sample").path]
        encoders = {
            name: lambda setting=setting, crops=crops: [cv2.imencode(".png", crop, setting)[1] for crop in crops]
            for name, setting in WRITERS.items()
        }
        taken = seconds(encoders, repeats)
        for name, encode in encoders.items():
            size = sum(len(data) for data in encode()) / len(crops) / 1000
            rows.append({"target": str(target), "setting": name, "ms": 1000 * taken[name] / len(crops), "kB": size})
    return pd.DataFrame(rows)


def copies(samples: pd.DataFrame, repeats: int) -> pd.DataFrame:
    """Measure the seconds to make and write an HTJ2K copy of a JPEG 2000 file, and to read all pixels of both.

    `make` includes reading the original.
    """
    from vitmodel.pixels.dicom import DicomFile

    rows = []
    for sample, group in samples[samples["sample"].str.endswith("JPEG 2000")].groupby("sample", sort=False):
        path = group.path.iloc[0]
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "copy.dcm"
            content = transcode(path) or b""
            stored = DicomFile(path).read_stored()
            functions = {
                "make": lambda path=path: transcode(path),
                "encode": lambda stored=stored: imagecodecs.htj2k_encode(stored, reversible=True),
                "write": lambda copy=copy, content=content: write_atomic(copy, content),
                "read original": lambda path=path: DicomFile(path).read_stored(),
                "read copy": lambda copy=copy: DicomFile(copy).read_stored(),
            }
            write_atomic(copy, content)
            taken = seconds(functions, repeats)
        ratio = taken["read original"] / taken["read copy"]
        rows.append(
            {"sample": sample, **taken, "original / copy": ratio, "size of copy": len(content) / path.stat().st_size}
        )
    return pd.DataFrame(rows)


PARTS = {"speed": speed, "levels": levels, "writer": writer, "copies": copies}


def measure_parts(parts: str, measure: Callable[[str], pd.DataFrame], target: Path | None) -> None:
    """Measure each part, print its table and write all tables to `target`."""
    tables = {}
    for part in parts.split(","):
        table = measure(part)
        print(f"\n{part}\n{table.to_string(index=False, float_format='%.3f')}", flush=True)
        tables[part] = table.to_dict("records")
    if target:
        write_atomic(target, to_json(tables))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="number of measurements, whose median is reported")
    parser.add_argument(
        "--parts", default=",".join(PARTS), help="comma-separated parts to measure (default: %(default)s)"
    )
    parser.add_argument("--only", default="", help="measure only samples whose name matches this regular expression")
    parser.add_argument("--samples", type=Path, help="folder in which the phantoms are kept and reused")
    parser.add_argument("--json", type=Path, help="also write the tables to this file")
    options = parser.parse_args()
    cv2.setNumThreads(1)
    retain_freed_memory()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.samples or Path(temporary)
        index = folder / "samples.csv"
        if not index.exists():
            write_samples(folder).to_csv(index, index=False)
        samples = pd.read_csv(index).assign(path=lambda table: table.path.map(Path))
        samples = samples[samples["sample"].map(lambda name: re.search(options.only, name) is not None)]
        measure_parts(options.parts, lambda part: PARTS[part](samples, options.repeats), options.json)


if __name__ == "__main__":
    main()
