"""Phantoms of whole exams (two breasts in CC and MLO, as crops and a manifest) for what a single image cannot reveal.

The only finding is a round density of constant shape, so that the label of a breast follows only from what its design
lists:

vendors    Every breast shows a density. On machine A cancers are bright and benign densities faint, on machine B the
           other way round: a cancer on one machine is identical, to the pixel, to a benign density on the other. On
           every machine the density lies deep in 3 of 4 breasts with a cancer and in 1 of 4 without. On machine C,
           which occurs only in the split `test`, depth is the only evidence because brightness is random.
one_view   A breast with a cancer shows it in one of its two views; all other breasts show nothing.
asymmetry  Every labelled breast shows a density. It is a cancer if the other breast shows none (whose label is then
           unknown), and benign if both breasts show one. Images of a cancer and of a benign density come from the same
           distribution.

Styles are drawn per exam and not per machine, so that no other pixel reveals the machine. All breasts are fatty: the
designs test where the evidence lies, not how hard it is to see.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import cv2
import numpy as np
import pandas as pd

from vitmodel.config import Preprocessing, Size
from vitmodel.data.manifest import as_manifest, write_manifest
from vitmodel.phantoms.anatomy import BreastPhantom, render
from vitmodel.phantoms.dataset import crop_phantom, sample_breast, sample_style, style_view
from vitmodel.phantoms.lesions import Lesion, ViewName
from vitmodel.phantoms.style import VendorStyle
from vitmodel.utils import derive_seed, progress, write_atomic

ExamDesign = Literal["vendors", "one_view", "asymmetry"]

SIDES = ("L", "R")
VIEWS: tuple[ViewName, ...] = get_args(ViewName)
SPLIT_MACHINES: Mapping[str, str] = {"train": "AB", "val": "AB", "test": "ABC"}
"""Machines of the design `vendors`, assigned in turn; all other designs use machine A."""
RADIUS_MM = 13.0
FAINT, BRIGHT = 0.75, 1.5  # log attenuation
DEEP, SHALLOW = 0.3, 0.7  # depth as a fraction of the distance from the chest wall to the nipple
INFORMATIVE_DEPTH_RATE = 0.75  # how often the depth agrees with the label


@dataclass(frozen=True)
class ExamPhantom:
    """One patient's exam: the contents of her four images and the label of each breast."""

    seed: int
    machine: str
    style: VendorStyle
    labels: dict[str, float]
    """By side: 1 = cancer, 0 = none, NaN = unknown."""
    breasts: dict[tuple[str, ViewName], BreastPhantom]
    """By side and view: the breast with the lesions that are visible in this view."""

    def crops(self, size: Size) -> dict[tuple[str, ViewName], np.ndarray]:
        """Return the crops `(H, W)` uint8 by side and view as `vitmodel etl` makes them, chest wall at the left."""
        # A view covers 240 x 160 mm, of which the breast fills about two thirds.
        view_size = Size(round(size.height * 1.5), size.height)
        views = {key: render(breast, key[1], view_size) for key, breast in self.breasts.items()}
        return {
            key: crop_phantom(style_view(view, self.style, derive_seed(self.seed, *key)), size)
            for key, view in views.items()
        }


def sample_exam(design: ExamDesign, seed: int, sick: Mapping[str, bool], machine: str = "A") -> ExamPhantom:
    """Return the exam of one patient.

    All random numbers are drawn in the same order for sick and healthy breasts, so that exams of one seed differ only
    in their evidence.

    Args:
        design: What reveals the label, see the module's docstring.
        seed: Seed of the exam.
        sick: By side, whether the breast has a cancer; at most one side in the design `asymmetry`.
        machine: A, B or C; only the design `vendors` depends on it.
    """
    rng = np.random.default_rng(derive_seed("exam", seed))
    body = replace(sample_breast(rng), density="A")
    style = sample_style(rng)
    position = rng.uniform(0.4, 0.65), *rng.uniform(-0.4, 0.4, 2)
    labels = {side: float(sick[side]) for side in SIDES}
    if design == "asymmetry" and any(sick.values()):
        labels = {side: 1.0 if sick[side] else np.nan for side in SIDES}
    breasts: dict[tuple[str, ViewName], BreastPhantom] = {}
    for side in SIDES:
        breast_rng = np.random.default_rng(derive_seed("breast", seed, side))
        brightness_draw, depth_draw = breast_rng.random(2)
        random_view = VIEWS[breast_rng.integers(2)]
        bright = True
        visible_in = VIEWS
        if design == "vendors":
            bright = bool(brightness_draw < 0.5 if machine == "C" else sick[side] == (machine == "A"))
            deep = depth_draw < (INFORMATIVE_DEPTH_RATE if sick[side] else 1 - INFORMATIVE_DEPTH_RATE)
            position = DEEP if deep else SHALLOW, *position[1:]
        elif design == "one_view":
            visible_in = (random_view,) if sick[side] else ()
        elif np.isnan(labels[side]):
            visible_in = ()
        contrast = BRIGHT if bright else FAINT
        finding = Lesion("round_mass", position, RADIUS_MM, contrast, derive_seed("finding", seed, side))
        bare = replace(body, seed=derive_seed("tissue", seed, side))
        breasts |= {(side, view): replace(bare, lesions=(finding,) if view in visible_in else ()) for view in VIEWS}
    return ExamPhantom(seed, machine, style, labels, breasts)


def plan_exams(
    design: ExamDesign, patients: Mapping[str, int], seed: int = 0
) -> Iterator[tuple[str, str, ExamPhantom]]:
    """Yield the split, patient id and exam of each patient.

    Half of the breasts have a cancer, assigned breast by breast. In the design `asymmetry` half of the patients have
    one.

    Args:
        design: What reveals the label, see the module's docstring.
        patients: Number of patients by split.
        seed: Seed of all exams.
    """
    for split, count in patients.items():
        rng = np.random.default_rng(derive_seed(seed, split))
        sick = rng.permutation(2 * count).reshape(count, 2) % 2 == 1
        if design == "asymmetry":
            sick = (rng.permutation(count)[:, None] % 2 == 1) & np.eye(2, dtype=bool)[rng.integers(2, size=count)]
        machines = SPLIT_MACHINES[split] if design == "vendors" else "A"
        for number, sides in enumerate(sick.tolist()):
            patient = f"{split}-{number}"
            sick_sides = dict(zip(SIDES, sides, strict=True))
            machine = machines[number % len(machines)]
            yield split, patient, sample_exam(design, derive_seed(seed, patient), sick_sides, machine)


def write_exams(folder: Path, design: ExamDesign, patients: Mapping[str, int], size: Size, seed: int = 0) -> Path:
    """Write the crops of `plan_exams` and a manifest. The same arguments give the same bytes.

    Args:
        folder: Where the files are written.
        design: What reveals the label, see the module's docstring.
        patients: Number of patients by split.
        size: Height and width of the crops in pixels.
        seed: Seed of all exams.

    Returns:
        Path of the manifest, FOLDER/manifest.csv, which is written last.
    """
    rows = []
    exams = plan_exams(design, patients, seed)
    for split, patient, exam in progress(exams, design, total=sum(patients.values()), unit="patient"):
        for (side, view), crop in exam.crops(size).items():
            path = folder / "images" / patient / f"{side}-{view}.png"
            write_atomic(path, cv2.imencode(".png", crop)[1].tobytes())
            rows.append(
                {
                    "image_id": f"{patient}-{side}-{view}",
                    "patient_id": patient,
                    "laterality": side,
                    "view": view,
                    "path": str(path.absolute()),
                    "dataset": f"phantoms-{design}",
                    "split": split,
                    "cancer": exam.labels[side],
                    "machine_id": exam.machine,
                    "status": "ok",
                    "preprocessing": Preprocessing(size=size).to_json(),
                }
            )
    manifest = folder / "manifest.csv"
    write_manifest(as_manifest(pd.DataFrame(rows), design), manifest)
    return manifest
