"""Throughput and memory of `vitmodel node` compared with `vitmodel predict` on the same files, in turns.

    python benchmarks/node.py PACKAGE MAMMOGRAM.dcm [--studies 500] [--rounds 1] [--processes 1] [--orthanc]

Each study has four views, copies of MAMMOGRAM with UIDs of their own, which are sent by C-STORE to a node with
`--processes` scoring processes. The clock runs from the first object until the last job is finished; the node has
loaded its model before. The time of `predict` is that of the command, less that of a run on one study. Both make heat
maps and DICOM results.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from pydicom import dcmread
from pydicom.uid import ExplicitVRLittleEndian, generate_uid
from pynetdicom import AE

from vitmodel.node.demo import find_orthanc, running_orthanc, usable_port

RESULTS = ("--explain", "gradient", "--dicom", "sr,sc", "--device", "cpu", "--workers", "1")
VIEWS = (("L", "CC"), ("L", "MLO"), ("R", "CC"), ("R", "MLO"))
VITMODEL = (sys.executable, "-m", "vitmodel.cli")


def make_studies(mammogram: Path, folder: Path, count: int) -> None:
    """Write the files of `count` studies."""
    image = dcmread(mammogram)
    if image.file_meta.TransferSyntaxUID.is_compressed:
        image.decompress(generate_instance_uid=False)
    image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    for study in range(count):
        image.StudyInstanceUID, image.PatientID = generate_uid(), f"P{study}"
        for side, view in VIEWS:
            image.SeriesInstanceUID = generate_uid()
            image.SOPInstanceUID = image.file_meta.MediaStorageSOPInstanceUID = generate_uid()
            image.ImageLaterality, image.ViewPosition = side, view
            image.save_as(folder / f"{study:05d}-{side}{view}.dcm")


def time_predict(package: Path, files: Path, out: Path) -> float:
    """Return the seconds of `vitmodel predict`."""
    start = time.perf_counter()
    command = [*VITMODEL, "predict", str(package), str(files), str(out), *RESULTS]
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def rss(process: int) -> float:
    """Return the resident memory of a process and its descendants in MB."""
    total = 0.0
    with contextlib.suppress(OSError):
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
        children += [c for t in Path(f"/proc/{process}/task").iterdir() for c in (t / "children").read_text().split()]
        total = int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
        total += sum(rss(int(child)) for child in set(children))
    return total


@contextlib.contextmanager
def running_node(package: Path, folder: Path, port: int, *flags: str) -> Iterator[subprocess.Popen[str]]:
    """Run a node whose model is loaded."""
    command = [*VITMODEL, "node", "run", "--package", str(package), "--folder", str(folder), "--port", "0"]
    command += ["--dicom-port", str(port), "--min-free-gb", "0", *RESULTS, *flags]
    with (
        (folder.parent / "node.log").open("w") as log,
        subprocess.Popen(command, stdout=log, stderr=log, text=True) as node,
    ):
        try:
            while not ask(folder, "SELECT count(*) FROM workers WHERE ready AND role = 'score'"):
                assert node.poll() is None, (folder.parent / "node.log").read_text()
                time.sleep(0.1)
            yield node
        finally:
            node.terminate()


def ask(folder: Path, query: str) -> int:
    """Return the number that a query finds in the node's database; 0 before there is one."""
    with (
        contextlib.suppress(sqlite3.OperationalError),
        contextlib.closing(sqlite3.connect(f"file:{folder}/node.sqlite?mode=ro", uri=True)) as connection,
    ):
        return int(connection.execute(query).fetchone()[0])
    return 0


def time_node(package: Path, files: list[Path], folder: Path, studies: int, *flags: str) -> dict[str, object]:
    """Send the files to a node, one association per study; return the seconds, the jobs and the memory."""
    port = usable_port()
    with running_node(package, folder, port, *flags) as node:
        memory = [(0, rss(node.pid))]
        start = time.perf_counter()
        for first in range(0, len(files), len(VIEWS)):
            send(files[first : first + len(VIEWS)], port)
        done = 0
        sent_after = time.perf_counter() - start
        while done < studies:
            time.sleep(0.2)
            done = ask(folder, "SELECT count(*) FROM jobs WHERE stage IN ('sent', 'kept')")
            if done > memory[-1][0]:
                memory.append((done, rss(node.pid)))
            assert node.poll() is None, "the node has ended"
        seconds = time.perf_counter() - start
        dead = ask(folder, "SELECT count(*) FROM jobs WHERE stage NOT IN ('sent', 'kept')")
    half = [point for point in memory if point[0] >= studies / 4]
    slope = float(np.polyfit(*np.transpose(half), 1)[0]) * 100 if len(half) > 2 else float("nan")
    return {
        "seconds": round(seconds, 1),
        "received_after": round(sent_after, 1),
        "finished": done,
        "other": dead,
        "peak_mb": round(max(value for _, value in memory)),
        "mb_per_100_studies": round(slope, 1),
    }


def send(files: list[Path], port: int) -> None:
    """Send the files of a study."""
    images = [dcmread(path) for path in files]
    ae = AE("MODALITY")
    ae.add_requested_context(images[0].SOPClassUID, ExplicitVRLittleEndian)
    association = ae.associate("127.0.0.1", port, ae_title="VITMODEL")
    for image in images:
        assert association.send_c_store(image).Status == 0
    association.release()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, help="model package")
    parser.add_argument("mammogram", type=Path, help="DICOM file, such as one of `vitmodel synth --size 512x416`")
    parser.add_argument("--studies", type=int, default=500, help="number of studies of four images (default: 500)")
    parser.add_argument("--rounds", type=int, default=1, help="repetitions of predict and node in turns (default: 1)")
    parser.add_argument("--orthanc", action="store_true", help="also with an Orthanc as the destination")
    parser.add_argument("--processes", type=int, default=1, help="scoring processes of the node (default: 1)")
    options = parser.parse_args()
    processes = ("--processes", str(options.processes))
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        (work / "one").mkdir()
        make_studies(options.mammogram, work / "one", 1)
        (work / "files").mkdir()
        make_studies(options.mammogram, work / "files", options.studies)
        files = sorted((work / "files").iterdir())
        for number in range(options.rounds):
            start = time_predict(options.package, work / "one", work / f"start-{number}")
            seconds = time_predict(options.package, work / "files", work / f"predict-{number}") - start
            print(
                json.dumps({"round": number, "predict_seconds": round(seconds, 1), "start": round(start, 1)}),
                flush=True,
            )
            (work / str(number)).mkdir()
            found = time_node(options.package, files, work / str(number) / "node", options.studies, *processes)
            ratio = seconds / float(str(found["seconds"]))
            print(json.dumps({"round": number, "node": found, "node_to_predict": round(ratio, 2)}), flush=True)
            if options.orthanc:
                port = usable_port()
                with running_orthanc(find_orthanc(), work / f"orthanc-{number}", "VITMODEL", port) as orthanc:
                    (work / f"o{number}").mkdir()
                    flags = (*processes, "--destination", f"dicom://ORTHANC@127.0.0.1:{orthanc.dicom_port}")
                    found = time_node(
                        options.package, files, work / f"o{number}" / "node", options.studies, *processes, *flags
                    )
                ratio = seconds / float(str(found["seconds"]))
                print(
                    json.dumps({"round": number, "node_with_orthanc": found, "node_to_predict": round(ratio, 2)}),
                    flush=True,
                )


if __name__ == "__main__":
    main()
