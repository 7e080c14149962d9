"""How fast the ETL is, one image on one thread: against the pipeline that everybody writes, by codec and size. Prints tables.

python benchmarks/etl.py [--repeats 5] [--parts speed,levels,writer,copies] [--json FILE]

The peer: pydicom's pixel_array, apply_voi_lut, components at full size, everything else black, cv2.resize, PNG level 6; once as it is and
once "tuned", with the allocator keeping its large arrays as ours does (`retain_freed_memory`). Each way runs in a process of its own. The
images are two phantoms (CC, MLO) of 12 bits, half of them air, in every syntax, and, where they are at hand, the real ones of
../shared/data/rsna_dicom.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
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
DETECTOR = 0.4  # pixels that the detector blurs by; gives the phantoms 8 bits per pixel of tissue in JPEG 2000, as the real images have
VIEWS: tuple[ViewName, ...] = ("CC", "MLO")
TARGETS = (Size(1024, 512), Size(2048, 1024))
WRITERS = {  # cv2's settings of a PNG
    "level 0": [cv2.IMWRITE_PNG_COMPRESSION, 0],
    "cv2's default": [],
    "level 1": [cv2.IMWRITE_PNG_COMPRESSION, 1],
    "level 3": [cv2.IMWRITE_PNG_COMPRESSION, 3],
    "level 6": [cv2.IMWRITE_PNG_COMPRESSION, 6],
    "level 6, filtered": [cv2.IMWRITE_PNG_COMPRESSION, 6, cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_FILTERED],
    "level 9": [cv2.IMWRITE_PNG_COMPRESSION, 9],
}


def rle(stored: np.ndarray) -> bytes:
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
    "RLE": (uid.RLELossless, rle),
    "uncompressed": (uid.ExplicitVRLittleEndian, np.ndarray.tobytes),
}


def phantom(view: ViewName, shape: Size) -> np.ndarray:
    """A breast as high as the picture, which it fills by about half: H W, 12 of 16 bits."""
    larger = Size(*(round(1.35 * side) for side in shape))
    drawn = render(BreastPhantom(seed=7, depth_mm=78), view, larger)
    picture = apply_style(drawn, MACHINES[0].style, "", seed=7, chest_wall="L")
    picture = cv2.GaussianBlur(picture, None, DETECTOR)
    rows = np.flatnonzero(drawn.mask.any(axis=1))
    top = (rows[0] + rows[-1] - shape.height) // 2
    return np.round(picture[top : top + shape.height, : shape.width] * 4095).astype(np.uint16)


def write_samples(folder: Path) -> pd.DataFrame:
    """Two phantoms of each shape in each syntax, and the real images: columns sample, path."""
    header = dcmread(
        next(write_release(SynthConfig(out=folder / "release", patients=1, size=Size(128, 128))).rglob("*.dcm"))
    )
    header.PhotometricInterpretation, header.PresentationLUTShape = "MONOCHROME2", "IDENTITY"
    header.WindowCenter, header.WindowWidth, header.VOILUTFunction = "2048", "4096", "LINEAR"
    header.BitsStored, header.HighBit, header.PixelPaddingValue = 12, 11, 0
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


def everybodys(path: Path, target: Size) -> bytes:
    """The pipeline that everybody writes."""
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


def tuned(path: Path, target: Size) -> bytes:
    """The same with a tuned allocator."""
    retain_freed_memory(1 << 30)  # its arrays of doubles are larger than ours
    return everybodys(path, target)


def ours(path: Path, target: Size, exact: bool = False) -> bytes:
    """What ETL does with one file, to the PNG's bytes: SHA-256 of the source and verdict included."""
    retain_freed_memory()
    cropped = crop_image(SourceImage(path), Preprocessing(size=target, exact=exact))
    assert cropped.crop is not None, cropped.record
    return cv2.imencode(".png", cropped.crop)[1].tobytes()


WAYS = {"peer": everybodys, "tuned": tuned, "ours": ours, "exact": functools.partial(ours, exact=True)}


def seconds(functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """The median time of each function; they take turns, so that a change of the machine's pace meets all of them.

    Each runs twice in a turn and the second run counts: the first one pays for the memory that another has given back.
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
    """Seconds an image: the peer as it is and tuned, ours, and ours with --exact."""
    rows = []
    with contextlib.ExitStack() as stack:
        pool = functools.partial(ProcessPoolExecutor, 1, get_context("spawn"), cv2.setNumThreads, (1,))
        pools = {name: stack.enter_context(pool()) for name in WAYS}

        def run(name: str, path: Path, target: Size) -> None:
            pools[name].submit(WAYS[name], path, target).result()

        for sample, group in samples.groupby("sample", sort=False):
            for target in TARGETS:
                paths = group.path[:2]
                runs = [
                    seconds({name: functools.partial(run, name, path, target) for name in WAYS}, repeats)
                    for path in paths
                ]
                mean = {name: statistics.mean(run[name] for run in runs) for name in WAYS}
                ratios = {
                    f"{peer} / {our}": mean[peer] / mean[our] for our in ("ours", "exact") for peer in ("peer", "tuned")
                }
                rows.append({"sample": sample, "target": str(target), **mean, **ratios})
                print(
                    pd.DataFrame(rows[-1:]).to_string(index=False, header=len(rows) == 1, float_format="%.3f"),
                    flush=True,
                )
    return pd.DataFrame(rows)


def levels(samples: pd.DataFrame, repeats: int) -> pd.DataFrame:
    """How near the crop of a reduced decode is to that of a full one, in tissue: PSNR in dB of the 8-bit range, the least of the sample."""
    rows = []
    for sample, group in samples[samples["sample"].str.contains("2000|HTJ2K")].groupby("sample", sort=False):
        for target in TARGETS:
            found = []
            for path in group.path:
                fast, exact = (
                    preprocess(path, Preprocessing(size=target, bits=16, exact=exact)) for exact in (False, True)
                )
                tissue = (fast.crop > 0) & (exact.crop > 0)
                error = (fast.crop[tissue].astype(float) - exact.crop[tissue]) / 65535
                found.append((fast.decode_level, -10 * np.log10(np.mean(error**2)) if np.any(error) else np.inf))
            rows.append(
                {
                    "sample": sample,
                    "target": str(target),
                    "level": max(found)[0],
                    "least PSNR": min(psnr for _, psnr in found),
                }
            )
    return pd.DataFrame(rows)


def writer(samples: pd.DataFrame, repeats: int) -> pd.DataFrame:
    """Milliseconds and kilobytes of a crop's PNG by setting."""
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
    """Seconds to make an HTJ2K copy of a JPEG 2000 file (reading it included), to write one, and to read all stored pixels of either."""
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
    """Measure each part, print its table and write all to `target`."""
    tables = {}
    for part in parts.split(","):
        table = measure(part)
        print(f"\n{part}\n{table.to_string(index=False, float_format='%.3f')}", flush=True)
        tables[part] = table.to_dict("records")
    if target:
        write_atomic(target, to_json(tables))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="times that each is measured; the median counts")
    parser.add_argument("--parts", default=",".join(PARTS), help="what to measure, of %(default)s")
    parser.add_argument("--only", default="", help="measure only samples whose name has this (a regular expression)")
    parser.add_argument("--samples", type=Path, help="folder to keep the phantoms in; an existing one is used again")
    parser.add_argument("--json", type=Path, help="also write the tables here")
    options = parser.parse_args()
    cv2.setNumThreads(1)
    retain_freed_memory()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.samples or Path(temporary)
        kept = folder / "samples.csv"
        if not kept.exists():
            write_samples(folder).to_csv(kept, index=False)
        samples = pd.read_csv(kept).assign(path=lambda table: table.path.map(Path))
        samples = samples[samples["sample"].map(lambda name: re.search(options.only, name) is not None)]
        measure_parts(options.parts, lambda part: PARTS[part](samples, options.repeats), options.json)


if __name__ == "__main__":
    main()
