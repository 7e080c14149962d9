"""How the ETL scales: with workers of each kind, with the number of files, and over a table that is finished already. Prints tables.

python benchmarks/etl_scale.py [--parts workers,files,rerun] [--rows 54706] [--json FILE]

workers: images of full size in each syntax, by workers that have started; every run is a process of its own, whose peak memory counts.
files: many links to small files, so that what the run itself costs shows. Run it on an idle machine.
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
"""In one timed run of the workers."""
WORK = """
import contextlib, json, resource, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import cv2
from vitmodel.config import Preprocessing, Size
from vitmodel.data.cropping import SourceImage, crop_image
from vitmodel.jobs.workers import process_per_thread
from vitmodel.utils import keep_freed_memory
def work(path):
    cv2.setNumThreads(1)
    keep_freed_memory()
    cropped = crop_image(SourceImage(Path(path)), Preprocessing(size=Size(1024, 512)))
    return len(cv2.imencode(".png", cropped.crop)[1])
if __name__ == "__main__":
    backend, jobs, *paths = sys.argv[1:]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    workers = process_per_thread(work, lambda path, loss: 1 / 0) if backend == "processes" else contextlib.nullcontext(work)
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
    """Images a second of one and two workers, and the peak memory of one in MB (threads: an even share of the process's growth)."""
    kept = folder / "samples.csv"
    samples = pd.read_csv(kept) if kept.exists() else write_samples(folder)
    script = folder / "work.py"
    script.write_text(WORK)
    found = []
    for syntax in SYNTAXES:
        paths = samples.loc[samples["sample"] == f"5928x4728 {syntax}", "path"].tolist()
        for backend in ("threads", "processes"):
            taken: dict[int, dict[str, float]] = {}
            for jobs in (1, 2):
                command = [sys.executable, str(script), backend, str(jobs), *map(str, (paths * IMAGES)[:IMAGES])]
                environment = os.environ | {"OMP_NUM_THREADS": "1"}
                taken[jobs] = json.loads(
                    subprocess.run(command, check=True, capture_output=True, env=environment).stdout
                )
            speeds = {f"{jobs} worker{'s' * (jobs > 1)}": IMAGES / taken[jobs]["seconds"] for jobs in taken}
            gain = taken[1]["seconds"] / taken[2]["seconds"]
            found.append(
                {"syntax": syntax, "backend": backend, **speeds, "gain": gain, "MB a worker": taken[2]["memory"] / 1e6}
            )
            print(
                pd.DataFrame(found[-1:]).to_string(index=False, header=len(found) == 1, float_format="%.2f"), flush=True
            )
    return pd.DataFrame(found)


def link_release(folder: Path, count: int) -> Path:
    """A table of `count` images, which are links to a few small phantoms."""
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
    """Seconds of one ETL, its start included."""
    start = time.perf_counter()
    etl(ETLConfig(source=source, out=out, size=Size(64, 32)))
    return time.perf_counter() - start


def files(folder: Path, rows: int) -> pd.DataFrame:
    """Milliseconds an image of a whole run and of a repeated one, over a table and over a folder whose headers are read at the start."""
    found = []
    for count in (100, 1000, 10000):
        table = link_release(folder / str(count), count)
        for kind, source in (("table", table), ("folder", table.parent / f"images{count}")):
            out = table.parent / f"out-{kind}"
            first = run(source, out)
            again = statistics.median(run(source, out) for _ in range(3))
            found.append(
                {
                    "source": kind,
                    "files": count,
                    "ms an image": 1e3 * first / count,
                    "again, ms an image": 1e3 * again / count,
                }
            )
    return pd.DataFrame(found)


def rerun(folder: Path, rows: int) -> pd.DataFrame:
    """Seconds of a run over a table of the RSNA release's length, of a repeated run, and of one after ten crops were lost."""
    table, out = link_release(folder / "rerun", rows), folder / "rerun" / "out"
    first, again = run(table, out), run(table, out)
    for lost in sorted((out / "images").rglob("*.png"))[:10]:
        lost.unlink()
    return pd.DataFrame([{"rows": rows, "first": first, "again": again, "ten crops lost": run(table, out)}])


PARTS = {"workers": workers, "files": files, "rerun": rerun}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="what to measure, of %(default)s")
    parser.add_argument("--samples", type=Path, help="folder of images that benchmarks/etl.py --samples kept")
    parser.add_argument("--rows", type=int, default=54706, help="length of the table of `rerun`")
    parser.add_argument("--json", type=Path, help="also write the tables here")
    options = parser.parse_args()
    cv2.setNumThreads(1)

    def measure(part: str) -> pd.DataFrame:
        with tempfile.TemporaryDirectory() as folder:
            return PARTS[part](options.samples if part == "workers" and options.samples else Path(folder), options.rows)

    measure_parts(options.parts, measure, options.json)


if __name__ == "__main__":
    main()
