"""Measure prediction: end to end against decoding and the network alone, cold start, and memory over many files.

python benchmarks/predict.py PACKAGE FOLDER [--files 1000] [--rounds 3] [--json FILE]

The images of FOLDER are repeated by symbolic links to the requested number. End to end is `vitmodel predict` from the
file names to the written tables, in a warm process. Decoding alone and the network alone do the same work one after the
other, each with all cores. Rounds alternate and ratios are medians, because the machine may be shared.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vitmodel.commands.predict import predict
from vitmodel.config import PredictConfig, PredictorConfig
from vitmodel.jobs.parallel import parallel_map
from vitmodel.releases.inputs import read_inputs
from vitmodel.releases.source import Source
from vitmodel.scoring.predictor import Predictor
from vitmodel.scoring.stream import ScoredImage, ScoringRows, Unit
from vitmodel.utils import to_json, write_atomic


def repeat(folder: Path, files: int, into: Path) -> Path:
    """Create the folder `into` with `files` links to the images of `folder` in turn, and return it."""
    into.mkdir()
    images = Source(folder).images
    for number in range(files):
        source = images[number % len(images)]
        (into / f"{number:05d}{Path(source).suffix}").symlink_to(source)
    return into


def seconds(work: Callable[[], Any]) -> float:
    """Return the seconds that a call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def parts(package: Path, folder: Path, scratch: Path, rounds: int) -> dict[str, Any]:
    """Measure seconds of decoding alone, the network alone and end to end, and the ratio of the last to their sum."""
    results: dict[str, list[float]] = {"decoding alone": [], "network alone": [], "end to end": [], "ratio": []}
    for number in range(rounds):
        predictor = Predictor(PredictorConfig(package=package))
        table = read_inputs([str(folder)], "auto")
        rows = predictor.attach(table)
        decoding = seconds(partial(decode_all, predictor, rows))
        groups = list(predictor.stream.groups(predictor.stream.units(rows)))
        network = seconds(partial(run_network, predictor, groups))
        config = PredictConfig(package=package, source=[str(folder)], out=scratch / f"round{number}")
        whole = seconds(partial(predict, config))
        for name, value in zip(results, (decoding, network, whole, whole / (decoding + network)), strict=True):
            results[name].append(value)
    return {"images": len(rows)} | {name: statistics.median(values) for name, values in results.items()}


def decode_all(predictor: Predictor, rows: ScoringRows) -> None:
    """Decode all images with all cores."""
    list(parallel_map(predictor.stream.load, rows.rows, "decode"))


def run_network(predictor: Predictor, groups: list[Unit]) -> None:
    """Compute the logits of all groups of decoded images."""
    for group in groups:
        predictor.ensemble.logits([image.pack for _, image in group if image.pack is not None])


def cold_start(package: Path, image: str, scratch: Path, rounds: int) -> dict[str, float]:
    """Measure the whole command for one image in new processes.

    On a shared machine their CPU time is more reliable than wall time.
    """
    command = [sys.executable, "-m", "vitmodel.cli", "predict", str(package), image]
    clock: list[float] = []
    cpu: list[float] = []
    for number in range(rounds):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        out = str(scratch / f"cold{number}")
        clock.append(seconds(partial(subprocess.run, [*command, out], check=True, capture_output=True)))
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return {"seconds, median": statistics.median(clock), "seconds, best": min(clock), "CPU seconds, best": min(cpu)}


def memory(package: Path, folder: Path) -> dict[str, float]:
    """Measure the resident memory in MB after parts of the files, and its growth per 100 files over the second half."""
    held: list[float] = []

    class MemoryRecorder(Predictor):
        def scores(self, rows: ScoringRows) -> Iterator[tuple[int, ScoredImage]]:
            for scored in super().scores(rows):
                pages = int(Path("/proc/self/statm").read_text().split()[1])
                held.append(pages * os.sysconf("SC_PAGE_SIZE") / 1e6)
                yield scored

    predictor = MemoryRecorder(PredictorConfig(package=package))
    predictor.score_images(read_inputs([str(folder)], "auto"))
    half = len(held) // 2
    slope = np.polyfit(np.arange(half, len(held)), held[half:], 1)[0]
    marks = {f"MB after {n} files": held[n - 1] for n in (len(held) // 10, half, len(held))}
    return {**marks, "MB per further 100 files": float(100 * slope)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--files", type=int, default=1000, help="files of the part memory; times uses a tenth")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=["times", "cold", "memory"], help="measure only this part")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        if arguments.only in (None, "times"):
            few = repeat(arguments.folder, max(1, arguments.files // 10), scratch / "few")
            results["times"] = parts(arguments.package, few, scratch, arguments.rounds)
        if arguments.only in (None, "cold"):
            image = Source(arguments.folder).images[0]
            results["cold start"] = cold_start(arguments.package, image, scratch, arguments.rounds)
        if arguments.only in (None, "memory"):
            many = repeat(arguments.folder, arguments.files, scratch / "many")
            results["memory"] = memory(arguments.package, many)
    for title, numbers in results.items():
        print(title)
        for name, value in numbers.items():
            print(f"  {name:28} {value:.3f}" if isinstance(value, float) else f"  {name:28} {value}")
    if arguments.json:
        write_atomic(arguments.json, to_json(results))


if __name__ == "__main__":
    main()
