"""Measure source adapters and exam fusion on phantoms and on real mammograms.

python benchmarks/sources.py WORK [--parts asymmetry one_view vendors real] [--json FILE]

Every variant (way) is `vitmodel train` with the same number of epochs. `vitmodel.phantoms.exams` documents the designs.
All variants of a design start from one trunk that was trained to detect densities in patients of the design `asymmetry`
that are in no test set: a trunk learns nothing from labels that an image cannot reveal, and radiologists mark visible
findings whether or not they are cancer. `real` is rsna_640 processed by `vitmodel etl`, trained from scratch in
patient-wise folds with out-of-fold scores. In this data the presence of the other breast reveals the label
(dev/LOG.md), so that each breast is scored alone, from one CC and one MLO image.

A row of the table is an AUROC over images, each with the label of its breast and, except for "single image", the score
of its breast. Every breast has two images, so that this equals the AUROC over breasts and each row can be compared with
the row above. Intervals are from resampled patients. The benchmark is resumable: a second start continues where the
first one ended.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import torch

from vitmodel.cli import main as vitmodel
from vitmodel.config import Size
from vitmodel.data.manifest import breast_ids, read_manifest, usable_rows, write_manifest
from vitmodel.metrics.bootstrap import Interval
from vitmodel.metrics.compare import compare
from vitmodel.metrics.metrics import compute_metrics
from vitmodel.metrics.scored_units import ScoredUnits
from vitmodel.phantoms.exams import sample_exam, write_exams
from vitmodel.reports.panel import contact_grid
from vitmodel.utils import to_json, write_atomic

DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"
SIZE = Size(128, 64)
PATIENTS = {"train": 500, "val": 50, "test": 300}
COMMON = "--model vit_micro --lr 1e-3 --layer_decay 1 --wandb off --workers 0 --precision fp32"
IMAGES = "--batch_size 32"
EXAMS = "--batch_size 8 --fusion true --view_dropout 0"  # about 32 images per step
ALONE = "--asymmetry false"
MACHINES = "--sources machine_id --source_dropout 0.2"
AS_DRAWN = "--drop_path 0 --augment.flip 0 --augment.rotate 0"
BRIGHTNESS = "--augment.gamma 0 --augment.contrast 0"  # preserves brightness, which reveals the label in `vendors`


@dataclass(frozen=True)
class Row:
    """A row of the table of a part."""

    title: str
    way: str
    column: str
    """Score of an image: its own (`score`), the `mean` over its breast, or that of its breast (`breast_score`)."""


@dataclass(frozen=True)
class Part:
    """The trainings of a part and the rows of its table."""

    ways: Mapping[str, str]
    """Flags of `vitmodel train` by way."""
    rows: tuple[Row, ...]
    flags: str
    """Flags of all ways."""
    machines: Mapping[str, str]
    """Subsets of the images by title: letters of the machines; an empty string means all images."""


SINGLE = Row("single image", "image", "score")
MEAN = Row("mean of views", "image", "mean")
PARTS = {
    "asymmetry": Part(
        {"image": IMAGES, "breast": f"{EXAMS} {ALONE}", "exam": EXAMS},
        (
            SINGLE,
            MEAN,
            Row("fusion of one breast's views", "breast", "breast_score"),
            Row("fusion of both breasts", "exam", "breast_score"),
        ),
        f"{AS_DRAWN} --epochs 8",
        {"": ""},
    ),
    "one_view": Part(
        {"image": IMAGES, "fusion": EXAMS},
        (SINGLE, MEAN, Row("fusion", "fusion", "breast_score")),
        f"{AS_DRAWN} --epochs 8",
        {"": ""},
    ),
    "vendors": Part(
        {"pooled": IMAGES, "sources": f"{IMAGES} {MACHINES}"},
        (Row("pooled", "pooled", "mean"), Row("sources", "sources", "mean")),
        f"{AS_DRAWN} {BRIGHTNESS} --epochs 8",
        {"machines A and B": "AB", "machine C, unseen": "C"},
    ),
    "real": Part(
        {
            "image": IMAGES,
            "fusion": f"{EXAMS} {ALONE}",
            "sources": f"{EXAMS} {ALONE} --sources view,machine_id --source_dropout 0.2",
        },
        # With fusion, the out-of-fold score of an image is that of its breast.
        (SINGLE, MEAN, Row("fusion", "fusion", "score"), Row("fusion + sources", "sources", "score")),
        "--folds 5 --epochs 8",
        {"": ""},
    ),
}


def train(manifest: Path, run: Path, flags: str) -> None:
    """Train unless the run has a package, from the last checkpoint if there is one."""
    if not (run / "package").exists():
        resume = ["--resume", "true"] if run.exists() else []
        run_command("train", str(manifest), str(run), *COMMON.split(), *flags.split(), *resume)


def run_command(*command: str) -> None:
    """Run a command of vitmodel and exit if it fails."""
    if status := vitmodel(list(command)):
        raise SystemExit(status)


def density_package(work: Path) -> Path:
    """Return a package that detects densities, trained on the training and validation patients of `asymmetry`."""
    table = read_manifest(phantoms(work, "asymmetry"))
    table = table[table["split"] != "test"]
    manifest = work / "densities.csv"
    shows_density = table["cancer"].notna()  # a breast with an unknown label shows none
    write_manifest(table.assign(cancer=shows_density.astype(float)), manifest)
    train(manifest, work / "densities", f"{IMAGES} {AS_DRAWN} --epochs 12 --test 0 --val 0.1")
    return work / "densities" / "package"


def phantoms(work: Path, design: str) -> Path:
    """Return the manifest of a design, whose images are rendered if it is missing."""
    manifest = work / design / "manifest.csv"
    if manifest.exists():
        return manifest
    return write_exams(work / design, design, PATIENTS, SIZE)  # type: ignore[arg-type]


def real_crops(work: Path) -> Path:
    """Return a manifest of the labelled breasts of rsna_640 that have both views, with the first image of each view."""
    folder = work / f"rsna_640_{SIZE}"
    if not (folder / "manifest.csv").exists():
        run_command("etl", str(DATA / "rsna_640"), str(folder), "--size", str(SIZE), "--jobs", "1")
    table = usable_rows(read_manifest(folder / "manifest.csv")).dropna(subset=["cancer"])
    table = table[table["view"].isin(["CC", "MLO"])]
    table = table.assign(breast=breast_ids(table)).drop_duplicates(["breast", "view"])
    table = table[table.groupby("breast")["view"].transform("size") == 2].drop(columns="breast")
    write_manifest(table, work / "real.csv")
    return work / "real.csv"


def scored(name: str, work: Path) -> dict[str, pd.DataFrame]:
    """Return by way of a part the scores of the held-out images whose label is known."""
    part = PARTS[name]
    real = name == "real"
    manifest = real_crops(work) if real else phantoms(work, name)
    flags = part.flags if real else f"{part.flags} --weights {density_package(work)}"
    labels = read_manifest(manifest).set_index("image_id")[["patient_id", "laterality", "machine_id", "cancer"]]
    scores = {}
    for way, own_flags in part.ways.items():
        run = work / "runs" / f"{name}_{way}"
        train(manifest, run, f"{flags} {own_flags}")
        path = run / ("out_of_fold.csv" if real else "report/scores.csv")
        if not path.exists():
            paths = (run / "package", run / "manifest.csv", path.parent)
            run_command("evaluate", *map(str, paths), "--audit", "false")
        table = pd.read_csv(path, dtype={"image_id": str, "patient_id": str}).set_index("image_id").sort_index()
        table = table.drop(columns=["patient_id", "laterality", "cancer"], errors="ignore").join(labels)
        table["breast"] = breast_ids(table)
        table["mean"] = table.groupby("breast")["score"].transform("mean")
        scores[way] = table.dropna(subset=["cancer"])
    return scores


def auroc(table: pd.DataFrame, scores: pd.Series) -> Interval:
    """Return the AUROC of `scores` with its interval."""
    return compute_metrics(ScoredUnits(table["cancer"], scores, table["patient_id"]), 0.5).intervals["auroc"]


def gain(table: pd.DataFrame, first: pd.Series, second: pd.Series) -> Interval:
    """Return the paired difference in AUROC of `second` over `first`."""
    samples = [ScoredUnits(table["cancer"], scores, table["patient_id"]) for scores in (first, second)]
    return compare(samples[0], samples[1], (0.5, 0.5)).differences["auroc"]


def table_rows(name: str, work: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of the table of a part."""
    part = PARTS[name]
    scores = scored(name, work)
    for title, machines in part.machines.items():
        previous: pd.Series | None = None
        for row in part.rows:
            table = scores[row.way]
            table = table[table["machine_id"].isin(list(machines))] if machines else table
            breasts = table.drop_duplicates("breast")
            yield {
                "part": name,
                "subset": title,
                "row": row.title,
                "breasts": len(breasts),
                "positive": int(breasts["cancer"].sum()),
                "auroc": auroc(table, table[row.column]),
                "gain": None if previous is None else gain(table, previous, table[row.column]),
            }
            previous = table[row.column]


def picture() -> np.ndarray:
    """Return a picture of one exam per design, four images in a row, with the label of each breast."""
    sick = {"L": True, "R": False}
    healthy = {"L": False, "R": False}
    cases = [
        ("vendors", sick, "A"),
        ("vendors", sick, "B"),
        ("one_view", sick, "A"),
        ("asymmetry", sick, "A"),
        ("asymmetry", healthy, "A"),
    ]
    crops: list[np.ndarray] = []
    captions: list[str] = []
    for design, sides, machine in cases:
        exam = sample_exam(design, 3, sides, machine)  # type: ignore[arg-type]
        for (side, view), crop in exam.crops(Size(192, 128)).items():
            crops.append(crop)
            captions.append(f"{side} {view} " + {0.0: "benign", 1.0: "CANCER"}.get(exam.labels[side], "unknown"))
        captions[-4] = (f"{design} {machine}: " if design == "vendors" else f"{design}: ") + captions[-4]
    return contact_grid(crops, captions, columns=4)


def show(lines: list[dict[str, Any]]) -> None:
    """Print the table as Markdown."""
    print("| part | subset | row | breasts (cancers) | AUROC | gain over the row above |\n|---|---|---|---|---|---|")
    for line in lines:
        cells = [
            line["part"],
            line["subset"],
            line["row"],
            f"{line['breasts']} ({line['positive']})",
            line["auroc"],
            line["gain"] or "",
        ]
        print("| " + " | ".join(map(str, cells)) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 = PyTorch's default")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    write_atomic(arguments.work / "exams.png", cv2.imencode(".png", picture())[1].tobytes())
    lines: list[dict[str, Any]] = []
    for name in arguments.parts:
        lines += table_rows(name, arguments.work)
    show(lines)
    if arguments.json:
        write_atomic(arguments.json, to_json([plain(line) for line in lines]))


def plain(line: dict[str, Any]) -> dict[str, Any]:
    """Return a row of the table with its intervals as dictionaries."""
    return {key: asdict(value) if isinstance(value, Interval) else value for key, value in line.items()}


if __name__ == "__main__":
    main()
