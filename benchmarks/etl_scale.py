"""Measure how the ETL scales with workers of each kind and with the number of files, and how long a repeated run takes.

python benchmarks/etl_scale.py [--parts workers,files,rerun] [--rows 54706] [--json FILE]

workers  full-size images in each transfer syntax, by workers that have already started; every run is a separate
         process, so that its peak memory can be measured
files    many links to small files, which show the overhead of the run itself
rerun    a table of which all images, or all but ten, are finished already

Run it on an idle machine. Prints tables.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import pandas as pd
from etl import SYNTAXES, measure_parts, write_samples

from vitmodel.commands.etl import etl
from vitmodel.config import ETLConfig, Size, SynthConfig
from vitmodel.phantoms.release import write_release

IMAGES = 12
"""Number of images in one timed run of the workers."""
WORKER_SCRIPT = """
import contextlib, json, resource, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import cv2
from vitmodel.config import Preprocessing, Size
from vitmodel.data.cropping import SourceImage, crop_image
from vitmodel.jobs.workers import process_per_thread
from vitmodel.utils import retain_freed_memory
def work(path):
    cv2.setNumThreads(1)
    retain_freed_memory()
    cropped = crop_image(SourceImage(Path(path)), Preprocessing(size=Size(1024, 512)))
    return len(cv2.imencode(".png", cropped.crop)[1])
if __name__ == "__main__":
    backend, jobs, *paths = sys.argv[1:]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    processes = backend == "processes"
    workers = process_per_thread(work, lambda path, loss: 1 / 0) if processes else contextlib.nullcontext(work)
    with workers as function, ThreadPoolExecutor(int(jobs)) as pool:
        list(pool.map(function, paths[:4]))
        times = []
        for _ in range(3):
            start = time.perf_counter()
            list(pool.map(function, paths))
            times.append(time.perf_counter() - start)
    own, child = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    memory = child if backend == "processes" else before + (own - before) / int(jobs)
    print(json.dumps({"seconds": sorted(times)[1], "memory": memory * 1024}))
"""


def workers(folder: Path, rows: int) -> pd.DataFrame:
    """Measure images per second of one and two workers, and the peak memory per worker in MB.

    For threads, the memory of one worker is an equal share of the growth of the process.
    """
    index = folder / "samples.csv"
    samples = pd.read_csv(index) if index.exists() else write_samples(folder)
    script = folder / "work.py"
    script.write_text(WORKER_SCRIPT)
    results = []
    for syntax in SYNTAXES:
        paths = samples.loc[samples["sample"] == f"5928x4728 {syntax}", "path"].tolist()
        for backend in ("threads", "processes"):
            one = run_workers(script, backend, 1, paths)
            two = run_workers(script, backend, 2, paths)
            row = {
                "syntax": syntax,
                "backend": backend,
                "1 worker": IMAGES / one["seconds"],
                "2 workers": IMAGES / two["seconds"],
                "gain": one["seconds"] / two["seconds"],
                "MB a worker": two["memory"] / 1e6,
            }
            results.append(row)
            line = pd.DataFrame([row]).to_string(index=False, header=len(results) == 1, float_format="%.2f")
            print(line, flush=True)
    return pd.DataFrame(results)


def run_workers(script: Path, backend: str, jobs: int, paths: list[str]) -> dict[str, float]:
    """Run the worker script in a process of its own; return its median seconds and the bytes of one worker."""
    command = [sys.executable, str(script), backend, str(jobs), *map(str, (paths * IMAGES)[:IMAGES])]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return json.loads(subprocess.run(command, check=True, capture_output=True, env=environment).stdout)


def link_release(folder: Path, count: int) -> Path:
    """Write a table of `count` images that are links to a few small phantoms, and return its path."""
    small = sorted(write_release(SynthConfig(out=folder / "small", patients=4, size=Size(256, 208))).rglob("*.dcm"))
    images = folder / f"images{count}"
    images.mkdir()
    rows = []
    for number in range(count):
        path = images / f"{number}.dcm"
        os.link(small[number % len(small)], path)
        rows.append(
            {
                "patient_id": number // 4,
                "image_id": number,
                "laterality": "LR"[number % 2],
                "view": "CC",
                "path": path,
                "cancer": 0,
            }
        )
    table = folder / f"table{count}.csv"
    pd.DataFrame(rows).to_csv(table, index=False)
    return table


def run(source: Path, out: Path) -> float:
    """Return the seconds of one ETL run, including its start."""
    start = time.perf_counter()
    etl(ETLConfig(source=source, out=out, size=Size(64, 32)))
    return time.perf_counter() - start


def files(folder: Path, rows: int) -> pd.DataFrame:
    """Measure milliseconds per image of a first and a repeated run.

    The sources are a table, and a folder, for which all headers are read at the start.
    """
    results = []
    for count in (100, 1000, 10000):
        table = link_release(folder / str(count), count)
        for kind, source in (("table", table), ("folder", table.parent / f"images{count}")):
            out = table.parent / f"out-{kind}"
            first = run(source, out)
            again = statistics.median(run(source, out) for _ in range(3))
            results.append(
                {
                    "source": kind,
                    "files": count,
                    "ms an image": 1e3 * first / count,
                    "again, ms an image": 1e3 * again / count,
                }
            )
    return pd.DataFrame(results)


def rerun(folder: Path, rows: int) -> pd.DataFrame:
    """Measure the seconds of a run over a table of `rows` images, of a repeated run, and after losing ten crops."""
    table = link_release(folder / "rerun", rows)
    out = folder / "rerun" / "out"
    first = run(table, out)
    again = run(table, out)
    for lost in sorted((out / "images").rglob("*.png"))[:10]:
        lost.unlink()
    return pd.DataFrame([{"rows": rows, "first": first, "again": again, "ten crops lost": run(table, out)}])


PARTS = {"workers": workers, "files": files, "rerun": rerun}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parts", default=",".join(PARTS), help="comma-separated parts to measure (default: %(default)s)"
    )
    parser.add_argument("--samples", type=Path, help="folder of images written by benchmarks/etl.py --samples")
    parser.add_argument("--rows", type=int, default=54706, help="length of the table of the part rerun")
    parser.add_argument("--json", type=Path, help="also write the tables to this file")
    options = parser.parse_args()
    cv2.setNumThreads(1)

    def measure(part: str) -> pd.DataFrame:
        with tempfile.TemporaryDirectory() as folder:
            return PARTS[part](options.samples if part == "workers" and options.samples else Path(folder), options.rows)

    measure_parts(options.parts, measure, options.json)


if __name__ == "__main__":
    main()
