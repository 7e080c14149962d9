"""Sources learned apart and exams read whole, on phantoms that no single image can tell and on real mammograms: one command, resumable.

python benchmarks/sources.py WORK [--parts asymmetry one_view vendors real] [--json FILE]

Every way is `vitmodel train` with the same number of epochs. `data.exam_phantoms` says what its designs are. All ways of a design start
from one trunk that has learned to see densities in patients of the design `asymmetry` whom no test holds: what an image cannot tell
teaches a trunk nothing, and radiologists mark what they see, cancer or not. `real` is rsna_640 by `vitmodel etl`, from scratch, in
patient-wise folds, every score out of fold. There the presence of the other breast tells the label (dev/LOG.md), so each breast is read
alone, in one CC and one MLO image.

A row is an AUROC over images, each with the label of its breast and, but for "single image", the score of its breast. Every breast has
two images, so that this is the breast's AUROC, and each row can be compared with the one above it. Intervals are of resampled patients.
A second start goes on where the first one ended.
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
IMAGES, EXAMS = "--batch_size 32", "--batch_size 8 --fusion true --view_dropout 0"  # some 32 images a step
ALONE, MACHINES = "--asymmetry false", "--sources machine_id --source_dropout 0.2"
AS_DRAWN = "--drop_path 0 --augment.flip 0 --augment.rotate 0"
BRIGHTNESS = "--augment.gamma 0 --augment.contrast 0"  # tells the vendors' labels, and is kept


@dataclass(frozen=True)
class Row:
    """A row of a part's table."""

    title: str
    way: str
    column: str
    """Whose score an image has: its own (`score`), the `mean` of its breast's images, or its breast's by fusion (`breast_score`)."""


@dataclass(frozen=True)
class Part:
    """What is trained, and what stands in the table."""

    ways: Mapping[str, str]
    """Flags by name."""
    rows: tuple[Row, ...]
    flags: str
    machines: Mapping[str, str]
    """Subsets of the rows by title; an empty one is all."""


SINGLE, MEAN = Row("single image", "image", "score"), Row("mean of views", "image", "mean")
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
        (
            SINGLE,
            MEAN,
            Row("fusion", "fusion", "score"),
            Row("fusion + sources", "sources", "score"),
        ),  # out of fold: the breast's
        "--folds 5 --epochs 8",
        {"": ""},
    ),
}


def train(manifest: Path, run: Path, flags: str) -> None:
    """Train where no package is, from the last checkpoint where there is one."""
    if not (run / "package").exists():
        resume = ["--resume", "true"] if run.exists() else []
        done("train", str(manifest), str(run), *COMMON.split(), *flags.split(), *resume)


def done(*command: str) -> None:
    """Run a stage, and end with it where it fails."""
    if code := vitmodel(list(command)):
        raise SystemExit(code)


def seeing_trunk(work: Path) -> Path:
    """A package that tells whether an image shows a density, from the designs' training patients of `asymmetry`."""
    table = read_manifest(phantoms(work, "asymmetry"))
    table = table[table["split"] != "test"]
    manifest = work / "densities.csv"
    write_manifest(
        table.assign(cancer=table["cancer"].notna().astype(float)), manifest
    )  # of one label unknown: the breast without
    train(manifest, work / "densities", f"{IMAGES} {AS_DRAWN} --epochs 12 --test 0 --val 0.1")
    return work / "densities" / "package"


def phantoms(work: Path, design: str) -> Path:
    """The manifest of a design, drawn where it is missing."""
    manifest = work / design / "manifest.csv"
    return manifest if manifest.exists() else write_exams(work / design, design, PATIENTS, SIZE)  # type: ignore[arg-type]


def real_crops(work: Path) -> Path:
    """The manifest of rsna_640's labelled breasts that have both views, the first image of each."""
    folder = work / f"rsna_640_{SIZE}"
    if not (folder / "manifest.csv").exists():
        done("etl", str(DATA / "rsna_640"), str(folder), "--size", str(SIZE), "--jobs", "1")
    table = usable_rows(read_manifest(folder / "manifest.csv")).dropna(subset=["cancer"])
    table = table[table["view"].isin(["CC", "MLO"])]
    table = table.assign(breast=breast_ids(table)).drop_duplicates(["breast", "view"])
    table = table[table.groupby("breast")["view"].transform("size") == 2].drop(columns="breast")
    write_manifest(table, work / "real.csv")
    return work / "real.csv"


def scored(name: str, work: Path) -> dict[str, pd.DataFrame]:
    """By way of a part, the held-out images whose label is known with their scores."""
    part, real = PARTS[name], name == "real"
    manifest = real_crops(work) if real else phantoms(work, name)
    flags = part.flags if real else f"{part.flags} --weights {seeing_trunk(work)}"
    truth, said = read_manifest(manifest).set_index("image_id"), {}
    for way, own in part.ways.items():
        run = work / "runs" / f"{name}_{way}"
        train(manifest, run, f"{flags} {own}")
        scores = run / ("out_of_fold.csv" if real else "report/scores.csv")
        if not scores.exists():
            done("evaluate", str(run / "package"), str(run / "manifest.csv"), str(scores.parent), "--audit", "false")
        table = pd.read_csv(scores, dtype={"image_id": str, "patient_id": str}).set_index("image_id").sort_index()
        table = table.drop(columns=["patient_id", "laterality", "cancer"], errors="ignore").join(
            truth[["patient_id", "laterality", "machine_id", "cancer"]]
        )
        table["breast"] = breast_ids(table)
        table["mean"] = table.groupby("breast")["score"].transform("mean")
        said[way] = table.dropna(subset=["cancer"])
    return said


def auroc(table: pd.DataFrame, scores: pd.Series) -> Interval:
    return compute_metrics(ScoredUnits(table["cancer"], scores, table["patient_id"]), 0.5).intervals["auroc"]


def gain(table: pd.DataFrame, first: pd.Series, second: pd.Series) -> Interval:
    samples = [ScoredUnits(table["cancer"], scores, table["patient_id"]) for scores in (first, second)]
    return compare(samples[0], samples[1], (0.5, 0.5)).differences["auroc"]


def lines_of(name: str, work: Path) -> Iterator[dict[str, Any]]:
    """The table of a part."""
    part, said = PARTS[name], scored(name, work)
    for title, machines in part.machines.items():
        before: pd.Series | None = None
        for row in part.rows:
            table = said[row.way]
            table = table[table["machine_id"].isin(list(machines))] if machines else table
            breasts = table.drop_duplicates("breast")
            line: dict[str, Any] = {"part": name, "subset": title, "row": row.title}
            line |= {
                "breasts": len(breasts),
                "positive": int(breasts["cancer"].sum()),
                "auroc": auroc(table, table[row.column]),
            }
            line["gain"] = None if before is None else gain(table, before, table[row.column])
            before = table[row.column]
            yield line


def picture() -> np.ndarray:
    """One exam of each design, four images in a row, with what is known of each breast."""
    sick, healthy = {"L": True, "R": False}, {"L": False, "R": False}
    cases = [
        ("vendors", sick, "A"),
        ("vendors", sick, "B"),
        ("one_view", sick, "A"),
        ("asymmetry", sick, "A"),
        ("asymmetry", healthy, "A"),
    ]
    crops, captions = [], []
    for design, sides, machine in cases:
        exam = sample_exam(design, 3, sides, machine)  # type: ignore[arg-type]
        for (side, view), crop in exam.crops(Size(192, 128)).items():
            crops.append(crop)
            captions.append(f"{side} {view} " + {0.0: "benign", 1.0: "CANCER"}.get(exam.labels[side], "unknown"))
        captions[-4] = (f"{design} {machine}: " if design == "vendors" else f"{design}: ") + captions[-4]
    return contact_grid(crops, captions, columns=4)


def show(lines: list[dict[str, Any]]) -> None:
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
    parser.add_argument("--json", type=Path)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 = torch's choice")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    write_atomic(arguments.work / "exams.png", cv2.imencode(".png", picture())[1].tobytes())
    lines = [line for name in arguments.parts for line in lines_of(name, arguments.work)]
    show(lines)
    if arguments.json:
        plain = [
            {key: asdict(value) if isinstance(value, Interval) else value for key, value in line.items()}
            for line in lines
        ]
        write_atomic(arguments.json, to_json(plain))


if __name__ == "__main__":
    main()
