"""How well the crop does on the real images in ../shared/data: hand-drawn boxes, known sides, lesions, time. Prints a table.

python benchmarks/crop.py [--json FILE]
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd

from vitmodel.errors import ImageRefusedError
from vitmodel.pixels.crop import BreastRegion, find_breast
from vitmodel.pixels.open import open_image
from vitmodel.utils import progress, to_json, write_atomic

DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"
LONG_SIDE = 512


def view_of(path: Path) -> np.ndarray:
    """The whole image at `path`, grey, at most LONG_SIDE pixels long."""
    file = open_image(path)
    stored = file.read_stored()
    factor = min(1, LONG_SIDE / max(stored.shape))
    return file.to_grey(cv2.resize(stored, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA))


def overlap(box: np.ndarray, hand: np.ndarray) -> tuple[float, float]:
    """Intersection over union, and the share of `hand` that `box` leaves out."""
    common = np.clip(np.minimum(hand[2:], box[2:]) - np.maximum(hand[:2], box[:2]), 0, None).prod()
    areas = [(each[2:] - each[:2]).prod() for each in (box, hand)]
    return float(common / (sum(areas) - common)), float(1 - common / areas[1])


def release(name: str) -> pd.DataFrame:
    table = pd.read_csv(DATA / name / f"{name}.csv")
    return table.assign(path=[DATA / name / path for path in table.image_path])


def find(table: pd.DataFrame, what: str) -> list[tuple[Any, BreastRegion | None, float]]:
    """For each row: the row, its breast (None = refused) and the milliseconds that it took."""
    found = []
    for row in progress(list(table.itertuples()), what):
        view = view_of(Path(str(row.path)))
        start = time.perf_counter()
        try:
            breast = find_breast(view)
        except ImageRefusedError:
            breast = None
        found.append((row, breast, 1e3 * (time.perf_counter() - start)))
    return found


def boxes() -> dict[str, Any]:
    drawn = pd.read_csv(DATA / "metadata" / "rsna" / "breast_boxes_hand_labelled.csv").drop_duplicates("image_id")
    columns = ["image_id", "path"]
    images = pd.concat([release("rsna_640")[columns], release("rsna_dicom")[columns]]).merge(drawn, on="image_id")
    scores = []
    for row, breast, _ in find(images, "hand-drawn boxes"):
        assert breast is not None, row.path
        height, width = breast.mask.shape
        hand = np.array([row.x0_frac, row.y0_frac, row.x0_frac + row.w_frac, row.y0_frac + row.h_frac])
        scores.append(overlap(np.array(breast.box), hand * [width, height, width, height]))
    iou, outside = np.array(scores).T
    return {
        "images": len(iou),
        "median IoU": np.median(iou),
        "least IoU": iou.min(),
        "most of a hand-drawn box left out": outside.max(),
    }


def films() -> dict[str, Any]:
    found = find(release("mias_512"), "films")
    lesions = [(row, breast.box) for row, breast, _ in found if breast and row.x == row.x]
    inside = [box.x0 <= row.x < box.x1 and box.y0 <= row.y_top_left < box.y1 for row, box in lesions]
    return {
        "images": len(found),
        "chest wall right": np.mean(
            [breast is not None and breast.chest_wall == row.chest_wall_side for row, breast, _ in found]
        ),
        "lesions": len(inside),
        "lesions in the box": np.mean(inside),
    }


def machines() -> dict[str, Any]:
    found = find(release("rsna_640"), "rsna_640")
    kept = [(row, breast) for row, breast, _ in found if breast]
    agree = pd.DataFrame(
        {"machine": row.machine_id, "agree": {"left": "L", "right": "R"}[breast.chest_wall] == row.laterality}
        for row, breast in kept
    )
    return {
        "images": len(found),
        "refused": len(found) - len(kept),
        "polarity wrong": sum(breast.inverted != row.monochrome1_not_inverted > 0 for row, breast in kept),
        "remarks": dict(Counter(warning.code for _, breast in kept for warning in breast.warnings)),
        "side agrees with laterality, by machine": agree.groupby("machine").agree.mean().to_dict(),
        "median ms": np.median([milliseconds for _, _, milliseconds in found]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    results = {"hand-drawn boxes": boxes(), "mini-MIAS films": films(), "RSNA, squashed to 640 x 640": machines()}
    for title, numbers in results.items():
        print(title)
        for name, value in numbers.items():
            print(f"  {name:42} {value:.3f}" if isinstance(value, float) else f"  {name:42} {value}")
    if arguments.json:
        write_atomic(arguments.json, to_json(results))


if __name__ == "__main__":
    main()
