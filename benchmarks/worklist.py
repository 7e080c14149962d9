"""Measure how long a page of the worklist takes: over a folder of scores (in memory) and over the database of a node.

Each time is the median of five pages, the filter of machines included.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path

from sqlalchemy import insert

from vitmodel.node.database import Database
from vitmodel.node.models import Job, Study
from vitmodel.node.study_source import StudySource
from vitmodel.viewer.exams import BreastEntry, Exam
from vitmodel.viewer.source import PAGE, ExamSource, WorklistQuery
from vitmodel.viewer.worklist import Worklist

REPEATS = 5
VIEWS = [(side, view) for side in "RL" for view in ("CC", "MLO")]


def folder_source(count: int) -> ExamSource:
    """Return exams with random scores, as of a folder of scores."""
    rng = random.Random(0)
    sides = [[(side, rng.random()) for side in "RL"] for _ in range(count)]
    return Worklist(
        Exam(f"P{n}", "", (), tuple(BreastEntry(side, p, p > 0.9, "ok", "", "CC;MLO") for side, p in both))
        for n, both in enumerate(sides)
    )


def node_source(count: int, folder: Path) -> ExamSource:
    """Return studies with random scores in the SQLite database of a node."""
    rng = random.Random(0)
    common = {"probability": 0.3, "status": "ok", "reason": None}
    images = [
        {"image_id": "1.2", "laterality": side, "view": view, "machine_id": "m", **common} for side, view in VIEWS
    ]
    breasts = [{"laterality": side, "decision": 0, "n_images": 2, "views": "CC;MLO", **common} for side in "RL"]
    job = {"images": "1", "stage": "sent", "created_at": 1, "updated_at": 1, "scored_at": 1, "status": "ok"}
    job |= {"scores": json.dumps({"images": images, "breasts": breasts}), "suspicious": False, "machines": "m"}
    study = {"first_arrival": 0, "pending": False, "state": "ready"}
    database = Database.in_folder(folder)
    with database.write() as session:
        rows = [{"study_uid": f"1.{n}", "patient_id": f"P{n}", "last_arrival": n, **study} for n in range(count)]
        session.execute(insert(Study), rows)
        jobs = [{"key": str(n), "study_uid": f"1.{n}", "probability": rng.random(), **job} for n in range(count)]
        session.execute(insert(Job), jobs)
    return StudySource(database, folder)


def measure(source: ExamSource, query: WorklistQuery) -> float:
    """Return the time of a page in milliseconds."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        source.page(query)
        _ = source.machines
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def main() -> None:
    """Print a table of times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--counts", type=int, nargs="+", default=[10_000, 100_000], help="numbers of exams")
    options = parser.parse_args()
    print("exams    source  page                          ms")
    for count in options.counts:
        with tempfile.TemporaryDirectory() as folder:
            sources = {"folder": folder_source(count), "node": node_source(count, Path(folder))}
            queries = {
                "first": WorklistQuery(),
                "last": WorklistQuery(page=-(-count // PAGE)),
                "first by probability": WorklistQuery(sort="probability"),
                "unread, search '77'": WorklistQuery(only="unread", search="77"),
            }
            for name, source in sources.items():
                for title, query in queries.items():
                    print(f"{count:<8} {name:<7} {title:<25} {measure(source, query):>6.0f}", flush=True)


if __name__ == "__main__":
    main()
