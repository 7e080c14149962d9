"""Phantoms as an RSNA-shaped release: DICOM files, train.csv, test.csv, sample_submission.csv, lesions.csv. Knows no crop and no model.

Columns and their empty cells follow the RSNA Screening Mammography release of 2022. Whatever an honest model must not read
the label from (ids, age, implant, machine, mirroring, benign findings) is drawn without regard to it.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import cv2
import joblib
import numpy as np

from vitmodel.config import Size, SynthConfig
from vitmodel.errors import UsageError
from vitmodel.phantoms.anatomy import DENSITIES, Box, Breast, render
from vitmodel.phantoms.dicom import FAULTS, MACHINES, Exposure, Machine, encode
from vitmodel.phantoms.lesions import BENIGN_KINDS, CANCER_KINDS, ViewName, draw_lesion
from vitmodel.phantoms.style import dress
from vitmodel.utils import progress, seed_from, to_json, write_atomic

IMAGE_COLUMNS = ["site_id", "patient_id", "image_id", "laterality", "view", "age"]
TRAIN_COLUMNS = [*IMAGE_COLUMNS, "cancer", "biopsy", "invasive", "BIRADS", "implant", "density", "machine_id", "difficult_negative_case"]
TEST_COLUMNS = [*IMAGE_COLUMNS, "implant", "machine_id", "prediction_id"]
LESION_COLUMNS = ["patient_id", "image_id", "laterality", "view", "kind", "cancer", "x0", "y0", "x1", "y1"]

BILATERAL = 0.02  # of the patients with cancer; RSNA has 6 such patients in 486
MIRRORED = 0.4  # of a mirroring machine's patients
EXTRA_VIEW = 0.1  # of the patients
IMPLANT = 0.05  # of site 1's patients
DECOYS = 0.3  # of the breasts, with and without cancer
RECIPE = "synthetic.json"

Row = dict[str, object]


@dataclass(frozen=True)
class Shot:
    """One image to be taken."""

    image_id: int
    laterality: str
    view: ViewName
    take: int = 0
    fault: str = ""


@dataclass(frozen=True)
class Patient:
    """One patient of the release: what the tables say of her, her breasts, and the images to take."""

    patient_id: int
    split: str
    machine: Machine
    mirrored: bool
    age: int | None
    breasts: dict[str, Breast]
    labels: dict[str, Row]
    """By laterality: the columns of train.csv that test.csv lacks."""
    shots: tuple[Shot, ...]


def write_release(config: SynthConfig) -> Path:
    """Write the release that `config` describes to `config.out` and return that folder; same config, same bytes.

    `train.csv` comes last, so a folder that has one is complete. Raises UsageError where the folder holds anything else than
    this very release.
    """
    _claim(config)
    patients = plan(config)
    work = joblib.Parallel(n_jobs=config.jobs or -1, return_as="generator")(joblib.delayed(_write_patient)(p, config) for p in patients)
    lesions: list[Row] = []
    for found in progress(work, "synth", total=len(patients), unit="patient"):
        lesions += found
    train = [row for patient in patients if patient.split == "train" for row in _rows(patient)]
    test = [row for patient in patients if patient.split == "test" for row in _rows(patient)]
    prevalence = sum(bool(row["cancer"]) for row in train) / len(train)
    submission = [{"prediction_id": name, "cancer": prevalence} for name in dict.fromkeys(row["prediction_id"] for row in test)]
    _write_csv(config.out / "lesions.csv", LESION_COLUMNS, lesions)
    _write_csv(config.out / "test.csv", TEST_COLUMNS, test)
    _write_csv(config.out / "sample_submission.csv", ["prediction_id", "cancer"], submission)
    if config.faults:
        faults = [{"image_id": s.image_id, "fault": s.fault} for p in patients for s in p.shots if s.fault]
        _write_csv(config.out / "faults.csv", ["image_id", "fault"], faults)
    _write_csv(config.out / "train.csv", TRAIN_COLUMNS, train)
    return config.out


def _claim(config: SynthConfig) -> None:
    """Mark the folder as this release's, or refuse it."""
    mark = config.out / RECIPE
    recipe = to_json({key: value for key, value in asdict(config).items() if key not in ("out", "jobs")})
    if config.out.exists() and not config.out.is_dir():
        raise UsageError(f"out: {config.out} is a file; name a folder")
    if config.out.is_dir() and any(config.out.iterdir()) and not (mark.is_file() and mark.read_text() == recipe):
        raise UsageError(f"out: {config.out} is not empty and not a release of these same settings; name another folder or remove it")
    write_atomic(mark, recipe)


def plan(config: SynthConfig) -> list[Patient]:
    """Everything about the release but its pixels, in the order of the tables (by patient id as text)."""
    rng = np.random.default_rng(seed_from(config.seed, "plan"))
    counts = {"train": config.patients, "test": max(1, config.patients // 10)}
    total = sum(counts.values())
    patient_ids = 5 + rng.choice(max(65_530, total), total, replace=False)
    image_ids: Iterator[int] = iter(dict.fromkeys(rng.integers(10**5, 2**31, 12 * total + 2 * len(FAULTS)).tolist()))
    patients: list[Patient] = []
    for split, count in counts.items():
        sick = rng.permutation(np.arange(count) < round(config.positives * count))
        machines = rng.permutation(np.resize(np.arange(len(MACHINES)), count))
        for cancer, machine in zip(sick, machines, strict=True):
            seed = seed_from(config.seed, "patient", len(patients))
            patient_id = int(patient_ids[len(patients)])
            patients.append(_plan_patient(patient_id, split, MACHINES[machine], bool(cancer), image_ids, seed, config.difficulty))
    if config.faults:
        for index, fault in enumerate(FAULTS):
            patient = patients[index % config.patients]
            extra = Shot(next(image_ids), "LR"[index % 2], "CC", take=2 + index, fault=fault)
            patients[index % config.patients] = replace(patient, shots=(*patient.shots, extra))
    return sorted(patients, key=lambda patient: str(patient.patient_id))


def _plan_patient(
    patient_id: int, split: str, machine: Machine, cancer: bool, image_ids: Iterator[int], seed: int, difficulty: float
) -> Patient:
    rng = np.random.default_rng(seed)
    density = DENSITIES[rng.choice(4, p=(0.11, 0.43, 0.41, 0.05))]
    age = int(np.clip(rng.normal(58, 10), 26, 89)) if rng.uniform() > 0.02 else None
    implant = machine.site == 1 and rng.uniform() < IMPLANT
    body = Breast(0, density=density, depth_mm=rng.uniform(65, 110), thickness_mm=rng.uniform(40, 62), implant=implant)
    mirrored = machine.mirrors and rng.uniform() < MIRRORED
    first, second = rng.permutation(["L", "R"])
    standard: list[tuple[str, ViewName, int]] = [("L", "CC", 0), ("L", "MLO", 0), ("R", "CC", 0), ("R", "MLO", 0)]
    takes = [standard[index] for index in rng.permutation(4)]
    if rng.uniform() < EXTRA_VIEW:
        takes.append(("LR"[rng.integers(2)], "CC", 1))
    sick = {first: cancer, second: cancer and rng.uniform() < BILATERAL}
    breasts, labels = {}, {}
    for side in "LR":
        kinds = [BENIGN_KINDS[rng.integers(3)]] if rng.uniform() < DECOYS else []
        kinds += [CANCER_KINDS[rng.integers(2)]] if sick[side] else []
        lesions = tuple(draw_lesion(kind, difficulty, seed_from(seed, side, kind)) for kind in kinds)
        breasts[side] = replace(body, seed=seed_from(seed, side), laterality=side, lesions=lesions)
        labels[side] = _labels(rng, machine.site, sick[side]) | {"density": density if machine.site == 1 else None}
    shots = tuple(Shot(next(image_ids), side, view, take) for side, view, take in takes)
    return Patient(patient_id, split, machine, mirrored, age, breasts, labels, shots)


def _labels(rng: np.random.Generator, site: int, cancer: bool) -> Row:
    """A breast's label columns with RSNA's frequencies: BIRADS is that of the screening visit, unknown for many."""
    if cancer:
        birads = 0 if rng.uniform() < 0.57 else None
        return {"cancer": 1, "biopsy": 1, "invasive": int(rng.uniform() < 0.72), "BIRADS": birads, "difficult_negative_case": False}
    difficult = bool(rng.uniform() < (0.17 if site == 1 else 0.11))
    biopsy = int(difficult and rng.uniform() < 0.23)
    benign = [None, 1, 2][rng.choice(3, p=(0.24, 0.66, 0.10))] if site == 1 else None
    return {"cancer": 0, "biopsy": biopsy, "invasive": 0, "BIRADS": 0 if difficult else benign, "difficult_negative_case": difficult}


def _rows(patient: Patient) -> Iterator[Row]:
    for shot in patient.shots:
        yield {
            "site_id": patient.machine.site,
            "patient_id": patient.patient_id,
            "image_id": shot.image_id,
            "laterality": shot.laterality,
            "view": shot.view,
            "age": patient.age,
            "implant": int(patient.breasts[shot.laterality].implant),
            "machine_id": patient.machine.machine_id,
            "prediction_id": f"{patient.patient_id}_{shot.laterality}",
        } | patient.labels[shot.laterality]


def _write_patient(patient: Patient, config: SynthConfig) -> list[Row]:
    """Write the patient's files; her lesions' rows, none for test patients, whose labels the release withholds."""
    folder = config.out / f"{patient.split}_images" / str(patient.patient_id)
    found: list[Row] = []
    with _one_thread():
        for shot in patient.shots:
            content, boxes = _take(patient, shot, config.size)
            written = FAULTS[shot.fault](content) if shot.fault else content
            if written is not None:
                write_atomic(folder / f"{shot.image_id}.dcm", written)
            if patient.split == "train" and not shot.fault:
                found += _lesion_rows(patient, shot, boxes)
    return found


def _take(patient: Patient, shot: Shot, size: Size) -> tuple[bytes, tuple[Box, ...]]:
    """The shot's DICOM file and its lesions' boxes in stored pixels."""
    breast, machine = patient.breasts[shot.laterality], patient.machine
    view = render(breast, shot.view, size, shot.take)
    chest_wall = shot.laterality
    if patient.mirrored:
        view, chest_wall = view.mirrored(), "LR"[shot.laterality == "L"]
    picture = dress(view, machine.look, f"{shot.laterality}-{shot.view}", seed_from(breast.seed, shot.view, shot.take), chest_wall)
    exposure = Exposure(
        patient_id=patient.patient_id,
        image_id=shot.image_id,
        laterality=shot.laterality,
        view=shot.view,
        age=patient.age,
        implant=breast.implant,
        thickness_mm=breast.thickness_mm,
        spacing=view.spacing,
        chest_wall=chest_wall,
    )
    return encode(picture, exposure, machine), view.boxes


def _lesion_rows(patient: Patient, shot: Shot, boxes: tuple[Box, ...]) -> Iterator[Row]:
    for lesion, box in zip(patient.breasts[shot.laterality].lesions, boxes, strict=True):
        image = (patient.patient_id, shot.image_id, shot.laterality, shot.view)
        yield dict(zip(LESION_COLUMNS, (*image, lesion.kind, int(lesion.kind in CANCER_KINDS), *box), strict=True))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Every worker has a core of its own: OpenCV must not start threads beside it."""
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(threads)


def _write_csv(path: Path, columns: list[str], rows: Iterable[Row]) -> None:
    """Columns in order, unknown = empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, text.getvalue())
