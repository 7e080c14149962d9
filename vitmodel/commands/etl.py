"""The command `etl`: crop the DICOM, PNG or JPEG mammograms of a release and write manifest.csv, in parallel.

An interrupted run resumes where it stopped.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import cv2
import pandas as pd

from vitmodel import pixels
from vitmodel.archives import source_state
from vitmodel.config import ETLConfig, Preprocessing, Size, to_yaml
from vitmodel.data.columns import COLUMNS
from vitmodel.data.cropping import ProvenanceRecord, SourceImage, crop_image, refusal_record
from vitmodel.data.grey_range import measure_all_bits, shared_ranges
from vitmodel.data.manifest import as_manifest, write_manifest
from vitmodel.jobs.journal import JOURNAL, Journal, lock_folder
from vitmodel.jobs.parallel import parallel_map
from vitmodel.model.architecture import PRESETS, whole_patches
from vitmodel.pixels.decoding import GIL_BOUND_SYNTAXES
from vitmodel.pixels.open import open_image
from vitmodel.pixels.picture_range import range_of_bits
from vitmodel.pixels.transcoding import transcode
from vitmodel.releases.files import safe_file_name
from vitmodel.releases.registry import read_release
from vitmodel.reports.etl import fold_mirrored, write_etl_report
from vitmodel.utils import retain_freed_memory, write_atomic

MIN_IMAGES_FOR_PROCESSES = 500
"""Number of images from which starting worker processes pays off with every codec.

Two processes are 1.8 to 2 times as fast as one with every codec. Two threads are 1.7 to 2 times as fast, but only 1.4
times where the decoder holds the interpreter's lock (dev/LOG.md).
"""
FULL_RANGE = str(range_of_bits(16))
"""Range of a 16-bit picture that uses all its bits."""
MIN_IMAGES_TO_PROBE = 30
"""Number of images from which processes pay off if the decoder holds the interpreter's lock."""


class CropTask(NamedTuple):
    """One image to crop, the path of its crop, and a fingerprint by which an earlier crop is known to be valid."""

    image_id: str
    source: SourceImage
    target: Path
    fingerprint: str
    """State of the source file, laterality and preprocessing. If it changes, the image is cropped again."""
    copy: Path | None
    """Path of the transcoded copy; None = not requested."""
    bits: int = 0
    """Significant bits of a 16-bit picture whose range is found automatically; 0 = another file."""


class CropOutcome(NamedTuple):
    """The result of a task."""

    record: ProvenanceRecord
    copied: bool | None = None
    """Whether a transcoded copy was written; None = not requested."""


def etl(config: ETLConfig) -> int:
    """Crop every image that SOURCE lists, write a report and return the exit status: 1 if no image could be used."""
    return summarise(crop_release(config), config.out)


def crop_release(config: ETLConfig, say: Callable[[str], object] = print) -> pd.DataFrame:
    """Crop every image that SOURCE lists and return the manifest, with a row for every image, refused ones included.

    The command line and `vitmodel.etl` share this function.

    Args:
        config: Source, output folder and options.
        say: Called with each message of the run.

    Raises:
        UsageError: The source is missing or invalid, or another run holds the output folder.
        VitmodelError: A file cannot be written.
    """
    release = read_release(config.source, config.dataset, config.images, config.own_columns)
    say(describe_patches(config.size))
    with lock_folder(config.out):
        write_atomic(config.out / "etl.yaml", to_yaml("etl", config, config.out / "etl.yaml"))
        journal = Journal(config.out / JOURNAL)
        tasks = plan_tasks(release, config, journal)
        todo = [task for task in tasks if not is_done(task, journal)]
        for message in describe_done(tasks, todo, journal):
            say(message)
        try:
            run_tasks(todo, journal, config)
        finally:
            journal.close()
        manifest = join_provenance(release, tasks, journal)
        write_manifest(manifest, config.out / "manifest.csv")
        if config.transcode != "none":
            write_manifest(list_copies(release, tasks, journal), config.out / config.transcode / "manifest.csv")
        write_etl_report(config.out / "etl_report.html", manifest, config.workers)
    return manifest


def describe_patches(size: Size) -> str:
    """Return which networks the crops suit: their sides must be whole patches."""
    patches = sorted({preset.patch for preset in PRESETS.values()})
    suited = [str(patch) for patch in patches if whole_patches(size, patch) == size]
    others = [f"of {patch} use --size {whole_patches(size, patch)}" for patch in patches if str(patch) not in suited]
    first = (
        f"crops of {size}: whole patches of {' and '.join(suited)} pixels"
        if suited
        else f"crops of {size}: no patches fit"
    )
    return "; for patches ".join([first, ", ".join(others)] if others else [first])


def run_tasks(tasks: list[CropTask], journal: Journal, config: ETLConfig) -> None:
    """Crop the images of `tasks` in parallel and record each outcome in the journal."""
    work = functools.partial(crop_to_png, preprocessing=config.preprocessing)
    lost = functools.partial(make_lost_outcome, preprocessing=config.preprocessing)
    backend = config.backend
    if backend == "auto":
        backend = backend_for([task.source.path for task in tasks])
    outcomes = parallel_map(work, tasks, "etl", config.workers, backend, config.scheduler, on_lost=lost)
    for task, outcome in zip(tasks, outcomes, strict=True):
        entry = {"fingerprint": task.fingerprint, "code": hash_code(), "bits": task.bits}
        journal.append(task.image_id, entry | outcome._asdict())


def backend_for(paths: Sequence[Path]) -> Literal["threads", "processes"]:
    """Return the faster backend for these files.

    Threads start at once; processes do not share the interpreter's lock. Between the two limits the codec decides. It
    is read from the first, the middle and the last file; a file that cannot be read is ignored.
    """
    if len(paths) >= MIN_IMAGES_FOR_PROCESSES:
        return "processes"
    if len(paths) < MIN_IMAGES_TO_PROBE:
        return "threads"
    syntaxes = []
    for path in (paths[0], paths[len(paths) // 2], paths[-1]):
        with contextlib.suppress(Exception):  # reported when the image is cropped
            syntaxes.append(open_image(path, for_processing="log").header.transfer_syntax)
    return "processes" if any(syntax in GIL_BOUND_SYNTAXES for syntax in syntaxes) else "threads"


@functools.cache
def hash_code() -> str:
    """Return a hash of the code in `vitmodel/pixels`, which makes the crops."""
    modules = sorted(Path(pixels.__file__).parent.glob("*.py"))
    code = b"".join(path.read_bytes() for path in modules)
    return hashlib.sha256(code).hexdigest()[:16]


def describe_done(tasks: list[CropTask], todo: list[CropTask], journal: Journal) -> list[str]:
    """Return messages on how many images an earlier run has cropped, and how many of them with other code."""
    if len(todo) == len(tasks):
        return []
    messages = [f"{len(tasks) - len(todo)} of {len(tasks)} images were cropped by an earlier run and are kept"]
    remaining = {task.image_id for task in todo}
    done = [task.image_id for task in tasks if task.image_id not in remaining]
    outdated = sum(journal.entries[name].get("code") != hash_code() for name in done)
    if outdated:
        messages.append(
            f"{outdated} of them were cropped by another version of vitmodel/pixels and may differ; "
            "to crop all images again, choose another output folder"
        )
    return messages


def find_bits(release: pd.DataFrame, config: ETLConfig, journal: Journal) -> list[int]:
    """Return the significant bits of each row's file, 0 unless it is a 16-bit picture and the range is automatic.

    Files that an earlier run has measured are not opened again, unless they have changed.
    """
    if config.picture_range != "auto":
        return [0] * len(release)
    known: list[int | None] = []
    paths = [Path(path) for path in release["path"]]
    for name, path in zip(release["image_id"], paths, strict=True):
        entry = journal.entries.get(name, {})
        is_current = str(entry.get("fingerprint", "")).startswith(f"{source_state(path)} ")
        known.append(entry.get("bits") if is_current else None)
    backend = backend_for(paths) if config.backend == "auto" else config.backend
    return measure_all_bits(paths, known, config.workers, backend, config.scheduler)


def plan_tasks(release: pd.DataFrame, config: ETLConfig, journal: Journal) -> list[CropTask]:
    """Return one task per row of the release."""
    bits = find_bits(release, config, journal)
    preprocessing = config.preprocessing.to_json()
    copies = None if config.transcode == "none" else config.out / config.transcode
    tasks = []
    rows = release[["image_id", "patient_id", "laterality", "path"]].itertuples(index=False)
    for row, needed, picture_range in zip(rows, bits, shared_ranges(bits), strict=True):
        source = SourceImage(Path(row.path), row.laterality, picture_range)
        folder = safe_file_name(row.patient_id)
        name = safe_file_name(row.image_id)
        target = config.out / "images" / folder / f"{name}.png"
        copy = copies and copies / folder / f"{name}.dcm"
        fingerprint = f"{source_state(source.path)} {row.laterality} {preprocessing}"
        if picture_range not in ("", FULL_RANGE):  # with the full range, crops of earlier versions are the same
            fingerprint += f" {picture_range}"
        tasks.append(CropTask(row.image_id, source, target, fingerprint, copy, needed))
    return tasks


def is_done(task: CropTask, journal: Journal) -> bool:
    """Return whether the journal holds this task unchanged and the crop and copy that it lists still exist."""
    entry = journal.entries.get(task.image_id)
    if entry is None or entry["fingerprint"] != task.fingerprint:
        return False
    if task.copy is not None and (entry["copied"] is None or (entry["copied"] and not task.copy.exists())):
        return False
    return entry["record"]["status"] == "refused" or task.target.exists()


def crop_to_png(task: CropTask, preprocessing: Preprocessing) -> CropOutcome:
    """Crop one image, write the crop atomically and return the outcome.

    Raises:
        VitmodelError: The disk is full.
    """
    cv2.setNumThreads(1)  # images are processed in parallel, so that threads within one would only compete
    retain_freed_memory()
    cropped = crop_image(task.source, preprocessing)
    if cropped.crop is None:
        task.target.unlink(missing_ok=True)  # written by an earlier run, when the source was still readable
    else:
        write_atomic(task.target, cv2.imencode(".png", cropped.crop)[1].tobytes())
    copied = None if task.copy is None else cropped.crop is not None and write_copy(task.source.path, task.copy)
    return CropOutcome(cropped.record, copied)


def write_copy(source: Path, copy: Path) -> bool:
    """Write a lossless HTJ2K copy of a DICOM file and return whether there is one.

    A file that needs no copy or cannot have one is read itself instead.
    """
    try:
        content = transcode(source)
    except Exception:  # noqa: BLE001 (no copy, however it fails, may end the run)
        return False
    if content is None:
        return False
    write_atomic(copy, content)
    return True


def make_lost_outcome(task: CropTask, message: str, preprocessing: Preprocessing) -> CropOutcome:
    """Return the outcome of an image whose worker process died or hung."""
    task.target.unlink(missing_ok=True)
    record = refusal_record(task.source, preprocessing, "failed", message)
    return CropOutcome(record, copied=None if task.copy is None else False)


def join_provenance(release: pd.DataFrame, tasks: list[CropTask], journal: Journal) -> pd.DataFrame:
    """Return the release's table with the provenance of every row; `path` is the crop, empty if refused."""
    records = pd.DataFrame([journal.entries[task.image_id]["record"] for task in tasks], index=release.index)
    targets = [str(task.target.absolute()) for task in tasks]
    paths = pd.Series(targets, index=release.index).where(records["status"] != "refused", "")
    return as_manifest(release.assign(**records, path=paths), "the cropped release")


def list_copies(release: pd.DataFrame, tasks: list[CropTask], journal: Journal) -> pd.DataFrame:
    """Return the release's table with the path of the copy instead of the original's, where there is a copy."""
    paths = []
    for task, original in zip(tasks, release["path"], strict=True):
        copied = task.copy is not None and journal.entries[task.image_id]["copied"]
        paths.append(str(task.copy.absolute()) if task.copy is not None and copied else original)
    return release.assign(path=pd.Series(paths, index=release.index))


def summarise(manifest: pd.DataFrame, out: Path) -> int:
    """Print counts by status and by reason, and return the exit status: 1 if every image was refused."""
    shown, mirrored = fold_mirrored(manifest)
    counts = shown["status"].value_counts()
    parts = [f"{counts.get(status, 0)} {status}" for status in ("ok", "warned", "refused")]
    print(f"{len(manifest)} images: {', '.join(parts)}")
    reasons = shown["reason"].dropna().str.split(";").explode().value_counts()
    for reason, count in reasons.items():
        print(f"  {count:6d} {reason}")
    for column in ("laterality", "view"):
        unknown = int((manifest[column] == "").sum())
        if unknown:
            print(f"  {unknown:6d} images without a {'side' if column == 'laterality' else column}")
    for sentence in mirrored:
        print(sentence)
    print(describe_labels(manifest))
    print(f"manifest: {out / 'manifest.csv'}\nreport:   {out / 'etl_report.html'}")
    return 0 if (manifest["status"] != "refused").any() else 1


def describe_labels(manifest: pd.DataFrame) -> str:
    """Return a sentence on how many rows have a label, for each target that is known for some row."""
    targets = [column.name for column in COLUMNS if column.role == "target"]
    known = {name: int(manifest[name].notna().sum()) for name in targets}
    listed = [f"{name} {count}" for name, count in known.items() if count]
    if not listed:
        return f"labels:   none of the {len(manifest)} rows has a label"
    positive = f"; {int((manifest['cancer'] == 1).sum())} rows with cancer" if known["cancer"] else ""
    return f"labels:   known in rows of {len(manifest)}: {', '.join(listed)}{positive}"
