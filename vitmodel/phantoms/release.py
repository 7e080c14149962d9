"""Synthetic release in the format of RSNA's: DICOM files, train.csv, test.csv, sample_submission.csv and lesions.csv.

Columns and their empty cells follow the RSNA Screening Mammography release of 2022. Everything from which an honest
model must not infer the label (ids, age, implant, machine, mirroring, benign findings) is drawn independently of it.
"""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import cv2
import joblib
import numpy as np

from vitmodel.config import Size, SynthConfig
from vitmodel.errors import UsageError
from vitmodel.phantoms.anatomy import DENSITIES, BreastPhantom, PixelBox, render
from vitmodel.phantoms.dicom import FAULTS, MACHINES, AcquisitionInfo, Machine, encode_dicom
from vitmodel.phantoms.lesions import BENIGN_KINDS, CANCER_KINDS, ViewName, sample_lesion
from vitmodel.phantoms.style import apply_style
from vitmodel.utils import derive_seed, progress, to_json, write_atomic

IMAGE_COLUMNS = ["site_id", "patient_id", "image_id", "laterality", "view", "age"]
TRAIN_COLUMNS = [
    *IMAGE_COLUMNS,
    "cancer",
    "biopsy",
    "invasive",
    "BIRADS",
    "implant",
    "density",
    "machine_id",
    "difficult_negative_case",
]
TEST_COLUMNS = [*IMAGE_COLUMNS, "implant", "machine_id", "prediction_id"]
LESION_COLUMNS = ["patient_id", "image_id", "laterality", "view", "kind", "cancer", "x0", "y0", "x1", "y1"]

BILATERAL_RATE = 0.02  # fraction of the patients with cancer; RSNA has 6 such patients in 486
MIRRORED_RATE = 0.4  # fraction of the patients of a mirroring machine
EXTRA_VIEW_RATE = 0.1  # fraction of the patients
IMPLANT_RATE = 0.05  # fraction of the patients of site 1
BENIGN_FINDING_RATE = 0.3  # fraction of the breasts, with and without cancer
RECIPE_FILE = "synthetic.json"

CsvRow = dict[str, object]


@dataclass(frozen=True)
class PlannedImage:
    """One image of a patient before it is rendered."""

    image_id: int
    laterality: str
    view: ViewName
    repeat: int = 0
    """Number of the exposure of this view."""
    fault: str = ""
    """Key of `FAULTS`; '' = the file is good."""


@dataclass(frozen=True)
class PatientPlan:
    """One patient of the release: her table entries, her breasts and her images."""

    patient_id: int
    split: str
    machine: Machine
    mirrored: bool
    age: int | None
    breasts: dict[str, BreastPhantom]
    labels: dict[str, CsvRow]
    """By laterality: the columns of train.csv that test.csv lacks."""
    planned_images: tuple[PlannedImage, ...]


def write_release(config: SynthConfig) -> Path:
    """Write the release that `config` describes. The same configuration gives the same bytes.

    `train.csv` is written last, so that a folder with this file is complete.

    Returns:
        The folder of the release, `config.out`.

    Raises:
        UsageError: The folder is not empty and contains something other than this release.
    """
    _claim_folder(config)
    patients = plan_patients(config)
    absolute = replace(config, out=config.out.absolute())  # workers outlive this call and keep their working directory
    results = joblib.Parallel(n_jobs=config.workers or -1, return_as="generator")(
        joblib.delayed(_write_patient)(patient, absolute) for patient in patients
    )
    lesions: list[CsvRow] = []
    for patient_lesions in progress(results, "synth", total=len(patients), unit="patient"):
        lesions += patient_lesions
    train = _split_rows(patients, "train")
    test = _split_rows(patients, "test")
    prevalence = sum(bool(row["cancer"]) for row in train) / len(train)
    prediction_ids = dict.fromkeys(row["prediction_id"] for row in test)
    submission = [{"prediction_id": prediction_id, "cancer": prevalence} for prediction_id in prediction_ids]
    _write_csv(config.out / "lesions.csv", LESION_COLUMNS, lesions)
    _write_csv(config.out / "test.csv", TEST_COLUMNS, test)
    _write_csv(config.out / "sample_submission.csv", ["prediction_id", "cancer"], submission)
    if config.faults:
        images = itertools.chain.from_iterable(patient.planned_images for patient in patients)
        faults = [{"image_id": image.image_id, "fault": image.fault} for image in images if image.fault]
        _write_csv(config.out / "faults.csv", ["image_id", "fault"], faults)
    _write_csv(config.out / "train.csv", TRAIN_COLUMNS, train)
    return config.out


def _claim_folder(config: SynthConfig) -> None:
    """Write the release's settings to its folder, or raise UsageError if the folder contains something else."""
    recipe_file = config.out / RECIPE_FILE
    recipe = to_json({key: value for key, value in asdict(config).items() if key not in ("out", "workers")})
    if config.out.exists() and not config.out.is_dir():
        raise UsageError(f"out: {config.out} is a file; choose a folder")
    is_same_release = recipe_file.is_file() and recipe_file.read_text() == recipe
    if config.out.is_dir() and any(config.out.iterdir()) and not is_same_release:
        raise UsageError(
            f"out: {config.out} is not empty and contains no release with these settings; "
            "choose another folder or remove it"
        )
    write_atomic(recipe_file, recipe)


def plan_patients(config: SynthConfig) -> list[PatientPlan]:
    """Return all patients of a release without their pixels, in the order of the tables (by patient id as text)."""
    rng = np.random.default_rng(derive_seed(config.seed, "plan"))
    counts = {"train": config.patients, "test": max(1, config.patients // 10)}
    total = sum(counts.values())
    patient_ids = 5 + rng.choice(max(65_530, total), total, replace=False)
    image_ids: Iterator[int] = iter(dict.fromkeys(rng.integers(10**5, 2**31, 12 * total + 2 * len(FAULTS)).tolist()))
    patients: list[PatientPlan] = []
    for split, count in counts.items():
        sick = rng.permutation(np.arange(count) < round(config.positives * count))
        machines = rng.permutation(np.resize(np.arange(len(MACHINES)), count))
        for cancer, machine in zip(sick, machines, strict=True):
            seed = derive_seed(config.seed, "patient", len(patients))
            patient_id = int(patient_ids[len(patients)])
            patients.append(
                _plan_patient(patient_id, split, MACHINES[machine], bool(cancer), image_ids, seed, config.difficulty)
            )
    if config.faults:
        for index, fault in enumerate(FAULTS):
            patient = patients[index % config.patients]
            extra = PlannedImage(next(image_ids), "LR"[index % 2], "CC", repeat=2 + index, fault=fault)
            patients[index % config.patients] = replace(patient, planned_images=(*patient.planned_images, extra))
    return sorted(patients, key=lambda patient: str(patient.patient_id))


def _plan_patient(
    patient_id: int, split: str, machine: Machine, cancer: bool, image_ids: Iterator[int], seed: int, difficulty: float
) -> PatientPlan:
    """Return a random patient; `cancer` puts a cancer in one breast, rarely in both."""
    rng = np.random.default_rng(seed)
    density = DENSITIES[rng.choice(4, p=(0.11, 0.43, 0.41, 0.05))]
    age = int(np.clip(rng.normal(58, 10), 26, 89)) if rng.uniform() > 0.02 else None
    implant = machine.site == 1 and rng.uniform() < IMPLANT_RATE
    body = BreastPhantom(
        0, density=density, depth_mm=rng.uniform(65, 110), thickness_mm=rng.uniform(40, 62), implant=implant
    )
    mirrored = machine.writes_mirrored and rng.uniform() < MIRRORED_RATE
    first, second = rng.permutation(["L", "R"])
    standard: list[tuple[str, ViewName, int]] = [("L", "CC", 0), ("L", "MLO", 0), ("R", "CC", 0), ("R", "MLO", 0)]
    exposures = [standard[index] for index in rng.permutation(4)]
    if rng.uniform() < EXTRA_VIEW_RATE:
        exposures.append(("LR"[rng.integers(2)], "CC", 1))
    sick = {first: cancer, second: cancer and rng.uniform() < BILATERAL_RATE}
    breasts: dict[str, BreastPhantom] = {}
    labels: dict[str, CsvRow] = {}
    for side in "LR":
        kinds = [BENIGN_KINDS[rng.integers(3)]] if rng.uniform() < BENIGN_FINDING_RATE else []
        kinds += [CANCER_KINDS[rng.integers(2)]] if sick[side] else []
        lesions = tuple(sample_lesion(kind, difficulty, derive_seed(seed, side, kind)) for kind in kinds)
        breasts[side] = replace(body, seed=derive_seed(seed, side), laterality=side, lesions=lesions)
        labels[side] = _labels(rng, machine.site, sick[side]) | {"density": density if machine.site == 1 else None}
    planned_images = tuple(PlannedImage(next(image_ids), side, view, repeat) for side, view, repeat in exposures)
    return PatientPlan(patient_id, split, machine, mirrored, age, breasts, labels, planned_images)


def _labels(rng: np.random.Generator, site: int, cancer: bool) -> CsvRow:
    """Return the label columns of a breast with RSNA's frequencies.

    BIRADS is the category at the screening visit, which is unknown for many breasts.
    """
    if cancer:
        birads = 0 if rng.uniform() < 0.57 else None
        return {
            "cancer": 1,
            "biopsy": 1,
            "invasive": int(rng.uniform() < 0.72),
            "BIRADS": birads,
            "difficult_negative_case": False,
        }
    difficult = bool(rng.uniform() < (0.17 if site == 1 else 0.11))
    biopsy = int(difficult and rng.uniform() < 0.23)
    benign = [None, 1, 2][rng.choice(3, p=(0.24, 0.66, 0.10))] if site == 1 else None
    return {
        "cancer": 0,
        "biopsy": biopsy,
        "invasive": 0,
        "BIRADS": 0 if difficult else benign,
        "difficult_negative_case": difficult,
    }


def _split_rows(patients: Iterable[PatientPlan], split: str) -> list[CsvRow]:
    """Return the table rows of all images in `split`."""
    rows: list[CsvRow] = []
    for patient in patients:
        if patient.split == split:
            rows += _rows(patient)
    return rows


def _rows(patient: PatientPlan) -> Iterator[CsvRow]:
    """Yield one table row per image, with the columns of train.csv and test.csv."""
    for planned in patient.planned_images:
        yield {
            "site_id": patient.machine.site,
            "patient_id": patient.patient_id,
            "image_id": planned.image_id,
            "laterality": planned.laterality,
            "view": planned.view,
            "age": patient.age,
            "implant": int(patient.breasts[planned.laterality].implant),
            "machine_id": patient.machine.machine_id,
            "prediction_id": f"{patient.patient_id}_{planned.laterality}",
        } | patient.labels[planned.laterality]


def _write_patient(patient: PatientPlan, config: SynthConfig) -> list[CsvRow]:
    """Write the patient's files and return the rows of lesions.csv.

    There are none for test patients, whose labels the release withholds.
    """
    folder = config.out / f"{patient.split}_images" / str(patient.patient_id)
    rows: list[CsvRow] = []
    with _one_thread():
        for planned in patient.planned_images:
            content, boxes = _expose(patient, planned, config.size)
            written = FAULTS[planned.fault](content) if planned.fault else content
            if written is not None:
                write_atomic(folder / f"{planned.image_id}.dcm", written)
            if patient.split == "train" and not planned.fault:
                rows += _lesion_rows(patient, planned, boxes)
    return rows


def _expose(patient: PatientPlan, planned: PlannedImage, size: Size) -> tuple[bytes, tuple[PixelBox, ...]]:
    """Return the DICOM file of an image, and the boxes of its lesions in stored pixels."""
    breast = patient.breasts[planned.laterality]
    machine = patient.machine
    view = render(breast, planned.view, size, planned.repeat)
    chest_wall = planned.laterality
    if patient.mirrored:
        view = view.mirrored()
        chest_wall = "LR"[planned.laterality == "L"]
    marker = f"{planned.laterality}-{planned.view}"
    style_seed = derive_seed(breast.seed, planned.view, planned.repeat)
    picture = apply_style(view, machine.style, marker, style_seed, chest_wall)
    exposure = AcquisitionInfo(
        patient_id=patient.patient_id,
        image_id=planned.image_id,
        laterality=planned.laterality,
        view=planned.view,
        age=patient.age,
        implant=breast.implant,
        thickness_mm=breast.thickness_mm,
        spacing=view.spacing,
        chest_wall=chest_wall,
    )
    return encode_dicom(picture, exposure, machine), view.boxes


def _lesion_rows(patient: PatientPlan, planned: PlannedImage, boxes: tuple[PixelBox, ...]) -> Iterator[CsvRow]:
    for lesion, box in zip(patient.breasts[planned.laterality].lesions, boxes, strict=True):
        image = (patient.patient_id, planned.image_id, planned.laterality, planned.view)
        yield dict(zip(LESION_COLUMNS, (*image, lesion.kind, int(lesion.kind in CANCER_KINDS), *box), strict=True))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Limit OpenCV to one thread inside the block, because each worker process already occupies a core."""
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(threads)


def _write_csv(path: Path, columns: list[str], rows: Iterable[CsvRow]) -> None:
    """Write rows as CSV with `columns` in order; unknown values become empty cells."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, text.getvalue())
