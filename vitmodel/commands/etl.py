"""Stage: an archive of DICOM, PNG or JPEG mammograms -> cropped images + manifest.csv; parallel, resumable. Knows no model."""

import contextlib
import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import pandas as pd

from vitmodel import pixels
from vitmodel.config import ETLConfig, Preprocessing, to_yaml
from vitmodel.data.cropping import ProvenanceRecord, SourceImage, crop_image, refusal_record
from vitmodel.data.manifest import as_manifest, write_manifest
from vitmodel.errors import ImageRefusedError
from vitmodel.jobs.journal import JOURNAL, Journal, file_state, lock_folder
from vitmodel.jobs.parallel import parallel_map
from vitmodel.pixels.decoding import GIL_BOUND_SYNTAXES
from vitmodel.pixels.open import open_image
from vitmodel.pixels.transcoding import transcode
from vitmodel.releases.files import safe_file_name
from vitmodel.releases.registry import read_release
from vitmodel.reports.etl import write_etl_report
from vitmodel.utils import retain_freed_memory, write_atomic

MIN_IMAGES_FOR_PROCESSES, MIN_IMAGES_TO_PROBE = 500, 30
"""Images from which on processes are worth their start: two give 1.8 to 2 times one with every codec, two threads 1.7 to 2, and 1.4 where
the decoder keeps the interpreter's lock, for which few images will do (dev/LOG.md)."""


class CropTask(NamedTuple):
    """One image to crop, where its crop goes, and what would have to change for it to be cropped again."""

    image_id: str
    source: SourceImage
    target: Path
    fingerprint: str
    copy: Path | None
    """Where its transcoded copy goes, if copies are wanted."""


class CropOutcome(NamedTuple):
    """What became of a task."""

    record: ProvenanceRecord
    copied: bool | None = None
    """Whether there is a transcoded copy; None = none was wanted."""


def etl(config: ETLConfig) -> int:
    """Crop every image that SOURCE lists and report on it; return 1 if no image could be used."""
    return summarise(crop_release(config), config.out)


def crop_release(config: ETLConfig, say: Callable[[str], object] = print) -> pd.DataFrame:
    """Crop every image that SOURCE lists and return the manifest: a row per listed image, also for refused ones.

    The command line and `vitmodel.etl` share this function.

    Args:
        config: Source, output folder and options.
        say: Called with each message of the run.
    """
    release = read_release(config.source, config.dataset)
    with lock_folder(config.out):
        write_atomic(config.out / "etl.yaml", to_yaml("etl", config, config.out / "etl.yaml"))
        tasks = plan_tasks(release, config)
        journal = Journal(config.out / JOURNAL)
        todo = [task for task in tasks if not is_done(task, journal)]
        for message in describe_done(tasks, todo, journal):
            say(message)
        work = functools.partial(crop_to_png, preprocessing=config.preprocessing)
        try:
            lost = functools.partial(make_lost_outcome, preprocessing=config.preprocessing)
            backend = config.backend if config.backend != "auto" else backend_for([task.source.path for task in todo])
            results = parallel_map(work, todo, "etl", config.jobs, backend, config.scheduler, on_lost=lost)
            for task, outcome in zip(todo, results, strict=True):
                journal.append(
                    task.image_id, {"fingerprint": task.fingerprint, "code": hash_code(), **outcome._asdict()}
                )
        finally:
            journal.close()
        manifest = join_provenance(release, tasks, journal)
        write_manifest(manifest, config.out / "manifest.csv")
        if config.transcode != "none":
            write_manifest(list_copies(release, tasks, journal), config.out / config.transcode / "manifest.csv")
        write_etl_report(config.out / "etl_report.html", manifest, config.jobs)
    return manifest


def backend_for(paths: Sequence[Path]) -> str:
    """What does the work the fastest: threads start at once, processes share no lock. Three of the files tell the codec."""
    if not MIN_IMAGES_TO_PROBE <= len(paths) < MIN_IMAGES_FOR_PROCESSES:
        return "processes" if len(paths) >= MIN_IMAGES_FOR_PROCESSES else "threads"
    syntaxes = []
    for path in (paths[0], paths[len(paths) // 2], paths[-1]):
        with contextlib.suppress(ImageRefusedError):
            syntaxes.append(open_image(path, for_processing="log").header.transfer_syntax)
    return "processes" if any(syntax in GIL_BOUND_SYNTAXES for syntax in syntaxes) else "threads"


@functools.cache
def hash_code() -> str:
    """A hash of the code that makes crops."""
    return hashlib.sha256(
        b"".join(path.read_bytes() for path in sorted(Path(pixels.__file__).parent.glob("*.py")))
    ).hexdigest()[:16]


def describe_done(tasks: list[CropTask], todo: list[CropTask], journal: Journal) -> list[str]:
    """Return messages on how many images an earlier run has done, and whether it did so with this version of the code."""
    if len(todo) == len(tasks):
        return []
    messages = [f"{len(tasks) - len(todo)} of {len(tasks)} images are done already"]
    left = {task.image_id for task in todo}
    others = sum(
        journal.entries[task.image_id].get("code") != hash_code() for task in tasks if task.image_id not in left
    )
    if others:
        redo = "to make all anew, choose another folder"
        messages.append(f"{others} of them by another version of vitmodel/pixels, whose crops may differ; {redo}")
    return messages


def plan_tasks(release: pd.DataFrame, config: ETLConfig) -> list[CropTask]:
    """A task per row of the release."""
    preprocessing = config.preprocessing.to_json()
    copies = None if config.transcode == "none" else config.out / config.transcode
    tasks = []
    for row in release[["image_id", "patient_id", "laterality", "path"]].itertuples(index=False):
        source = SourceImage(Path(row.path), row.laterality)
        folder, name = safe_file_name(row.patient_id), safe_file_name(row.image_id)
        target, copy = config.out / "images" / folder / f"{name}.png", copies and copies / folder / f"{name}.dcm"
        tasks.append(
            CropTask(row.image_id, source, target, f"{file_state(source.path)} {row.laterality} {preprocessing}", copy)
        )
    return tasks


def is_done(task: CropTask, journal: Journal) -> bool:
    """Whether the journal holds this very task and its crop and copy, if it has them, are still there."""
    entry = journal.entries.get(task.image_id)
    if entry is None or entry["fingerprint"] != task.fingerprint:
        return False
    if task.copy is not None and (entry["copied"] is None or (entry["copied"] and not task.copy.exists())):
        return False
    return entry["record"]["status"] == "refused" or task.target.exists()


def crop_to_png(task: CropTask, preprocessing: Preprocessing) -> CropOutcome:
    """Crop one image and write it, whole or not at all; the record says what became of it. Raises VitmodelError on a full disk."""
    cv2.setNumThreads(1)  # images are the unit of parallel work
    retain_freed_memory()
    cropped = crop_image(task.source, preprocessing)
    if cropped.crop is None:
        task.target.unlink(missing_ok=True)  # of an earlier run, when the source was still good
    else:
        write_atomic(task.target, cv2.imencode(".png", cropped.crop)[1].tobytes())
    copied = None if task.copy is None else cropped.crop is not None and write_copy(task.source.path, task.copy)
    return CropOutcome(cropped.record, copied)


def write_copy(source: Path, copy: Path) -> bool:
    """Keep a lossless HTJ2K copy of a DICOM file; False where the file needs none or can have none, and is read itself instead."""
    try:
        content = transcode(source)
    except ImageRefusedError:
        content = None
    if content is not None:
        write_atomic(copy, content)
    return content is not None


def make_lost_outcome(task: CropTask, message: str, preprocessing: Preprocessing) -> CropOutcome:
    """The outcome of an image whose worker process died or hung."""
    task.target.unlink(missing_ok=True)
    return CropOutcome(
        refusal_record(task.source, preprocessing, "failed", message), None if task.copy is None else False
    )


def join_provenance(release: pd.DataFrame, tasks: list[CropTask], journal: Journal) -> pd.DataFrame:
    """The release's table with the provenance columns of every row; `path` is the crop, empty where the image was refused."""
    records = pd.DataFrame([journal.entries[task.image_id]["record"] for task in tasks], index=release.index)
    targets = [str(task.target.absolute()) for task in tasks]
    paths = pd.Series(targets, index=release.index).where(records["status"] != "refused", "")
    return as_manifest(release.assign(**records, path=paths), "the cropped release")


def list_copies(release: pd.DataFrame, tasks: list[CropTask], journal: Journal) -> pd.DataFrame:
    """The release's table with the copies' paths in place of the originals', where there is a copy."""
    paths = [
        str(task.copy.absolute()) if task.copy and journal.entries[task.image_id]["copied"] else "" for task in tasks
    ]
    return release.assign(path=pd.Series(paths, index=release.index).where(lambda path: path != "", release["path"]))


def summarise(manifest: pd.DataFrame, out: Path) -> int:
    """Print what became of the images."""
    counts = manifest["status"].value_counts()
    print(
        f"{len(manifest)} images: "
        + ", ".join(f"{counts.get(status, 0)} {status}" for status in ("ok", "warned", "refused"))
    )
    reasons = manifest["reason"].dropna().str.split(";").explode().value_counts()
    for reason, count in reasons.items():
        print(f"  {count:6d} {reason}")
    print(f"manifest: {out / 'manifest.csv'}\nreport:   {out / 'etl_report.html'}")
    return 0 if (manifest["status"] != "refused").any() else 1
