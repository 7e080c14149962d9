"""Measure the accuracy and speed of the crop on the real images in ../shared/data.

The references are hand-drawn boxes, known sides and lesion positions. Prints a table.

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


def read_small_view(path: Path) -> np.ndarray:
    """Return the whole image at `path` in grey, at most `LONG_SIDE` pixels long."""
    file = open_image(path)
    stored = file.read_stored()
    factor = min(1, LONG_SIDE / max(stored.shape))
    return file.to_grey(cv2.resize(stored, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA))


def overlap(box: np.ndarray, hand: np.ndarray) -> tuple[float, float]:
    """Return the intersection over union, and the fraction of `hand` that lies outside `box`."""
    common = np.clip(np.minimum(hand[2:], box[2:]) - np.maximum(hand[:2], box[:2]), 0, None).prod()
    box_area = (box[2:] - box[:2]).prod()
    hand_area = (hand[2:] - hand[:2]).prod()
    return float(common / (box_area + hand_area - common)), float(1 - common / hand_area)


def read_release(name: str) -> pd.DataFrame:
    """Return the table of a shared subset with absolute paths."""
    table = pd.read_csv(DATA / name / f"{name}.csv")
    return table.assign(path=[DATA / name / path for path in table.image_path])


def find_breasts(table: pd.DataFrame, title: str) -> list[tuple[Any, BreastRegion | None, float]]:
    """Return for each image its row, its breast (None = refused) and the milliseconds needed to find it."""
    results = []
    for row in progress(list(table.itertuples()), title):
        view = read_small_view(Path(str(row.path)))
        start = time.perf_counter()
        try:
            breast = find_breast(view)
        except ImageRefusedError:
            breast = None
        results.append((row, breast, 1e3 * (time.perf_counter() - start)))
    return results


def boxes() -> dict[str, Any]:
    """Compare the crop with hand-drawn boxes."""
    drawn = pd.read_csv(DATA / "metadata" / "rsna" / "breast_boxes_hand_labelled.csv").drop_duplicates("image_id")
    columns = ["image_id", "path"]
    images = pd.concat([read_release("rsna_640")[columns], read_release("rsna_dicom")[columns]])
    scores = []
    for row, breast, _ in find_breasts(images.merge(drawn, on="image_id"), "hand-drawn boxes"):
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
    """Compare the crop of digitised films with their known sides and lesion centres."""
    results = find_breasts(read_release("mias_512"), "films")
    lesions = [(row, breast.box) for row, breast, _ in results if breast and not np.isnan(row.x)]
    inside = [box.x0 <= row.x < box.x1 and box.y0 <= row.y_top_left < box.y1 for row, box in lesions]
    correct = [breast is not None and breast.chest_wall == row.chest_wall_side for row, breast, _ in results]
    return {
        "images": len(results),
        "chest wall right": np.mean(correct),
        "lesions": len(inside),
        "lesions in the box": np.mean(inside),
    }


def machines() -> dict[str, Any]:
    """Compare side and polarity by machine with the table."""
    results = find_breasts(read_release("rsna_640"), "rsna_640")
    kept = [(row, breast) for row, breast, _ in results if breast]
    agree = pd.DataFrame(
        {"machine": row.machine_id, "agree": {"left": "L", "right": "R"}[breast.chest_wall] == row.laterality}
        for row, breast in kept
    )
    return {
        "images": len(results),
        "refused": len(results) - len(kept),
        "polarity wrong": sum(breast.inverted != row.monochrome1_not_inverted > 0 for row, breast in kept),
        "remarks": dict(Counter(warning.code for _, breast in kept for warning in breast.warnings)),
        "side agrees with laterality, by machine": agree.groupby("machine").agree.mean().to_dict(),
        "median ms": np.median([milliseconds for _, _, milliseconds in results]),
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
