"""Phantoms of whole exams, for what one image alone cannot tell: two breasts, each in CC and MLO, as crops and a manifest. Knows no model.

The only finding is a round density, the same in every design, so that nothing but what is listed here tells the label of a breast:

vendors    Every breast shows one. Machine A shows a cancer bright and a benign density faint, machine B the other way round: one's cancer
           is the other's decoy, to the pixel. On any machine a cancer lies deep in 3 of 4 breasts and a benign density in 1 of 4; on
           machine C, which the split `test` alone has, that is all there is to tell, for brightness is drawn at random.
one_view   A breast with a cancer shows it in one of its two views, any other breast shows nothing.
asymmetry  Every labelled breast shows one. It is a cancer where the other breast shows none (that one's label is unknown), and benign
           where both do: an image of a cancer and one of a benign density are drawn from the same distribution.

Looks are drawn per exam and not per machine, so that no other pixel tells the machine. All breasts are fatty: the question is where the
evidence lies, not how hard it is to see.
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
"""Of the design `vendors`, dealt out in turn; all other exams are of machine A."""
RADIUS_MM = 13.0
FAINT, BRIGHT = 0.75, 1.5  # log attenuation
DEEP, SHALLOW = 0.3, 0.7  # from the chest wall to the nipple
INFORMATIVE_DEPTH_RATE = 0.75  # how often the depth is the one that goes with the label


@dataclass(frozen=True)
class ExamPhantom:
    """One patient: what each of her four images shows, and what is known of each breast."""

    seed: int
    machine: str
    style: VendorStyle
    labels: dict[str, float]
    """By side: 1 = cancer, 0 = none, NaN = unknown."""
    breasts: dict[tuple[str, ViewName], BreastPhantom]
    """By side and view: the breast with what this view shows of it."""

    def crops(self, size: Size) -> dict[tuple[str, ViewName], np.ndarray]:
        """The images as `vitmodel etl` would crop them, H W uint8 each: all with the chest wall at the left."""
        drawn_at = Size(
            round(size.height * 1.5), size.height
        )  # 240 x 160 mm, of which the breast fills some two thirds
        views = {key: render(breast, key[1], drawn_at) for key, breast in self.breasts.items()}
        return {
            key: crop_phantom(style_view(view, self.style, derive_seed(self.seed, *key)), size)
            for key, view in views.items()
        }


def sample_exam(design: ExamDesign, seed: int, sick: Mapping[str, bool], machine: str = "A") -> ExamPhantom:
    """The exam of a patient who is `sick` in these sides; only one of them in the design `asymmetry`.

    Whatever chance decides is drawn alike for sick and healthy, so that exams of one seed differ in what tells them apart alone.
    """
    rng = np.random.default_rng(derive_seed("exam", seed))
    body, style = replace(sample_breast(rng), density="A"), sample_style(rng)
    place = rng.uniform(0.4, 0.65), *rng.uniform(-0.4, 0.4, 2)
    labels = {side: float(sick[side]) for side in SIDES}
    if design == "asymmetry" and any(sick.values()):
        labels = {side: 1.0 if sick[side] else np.nan for side in SIDES}
    breasts: dict[tuple[str, ViewName], BreastPhantom] = {}
    for side in SIDES:
        chance = np.random.default_rng(derive_seed("breast", seed, side))
        coin, one = chance.random(2), VIEWS[chance.integers(2)]
        bright, seen_in = True, VIEWS
        if design == "vendors":
            bright = bool(coin[0] < 0.5 if machine == "C" else sick[side] == (machine == "A"))
            deep = coin[1] < (INFORMATIVE_DEPTH_RATE if sick[side] else 1 - INFORMATIVE_DEPTH_RATE)
            place = DEEP if deep else SHALLOW, *place[1:]
        elif design == "one_view":
            seen_in = (one,) if sick[side] else ()
        elif np.isnan(labels[side]):
            seen_in = ()
        finding = Lesion(
            "round_mass", place, RADIUS_MM, BRIGHT if bright else FAINT, derive_seed("finding", seed, side)
        )
        bare = replace(body, seed=derive_seed("tissue", seed, side))
        breasts |= {(side, view): replace(bare, lesions=(finding,) if view in seen_in else ()) for view in VIEWS}
    return ExamPhantom(seed, machine, style, labels, breasts)


def plan_exams(
    design: ExamDesign, patients: Mapping[str, int], seed: int = 0
) -> Iterator[tuple[str, str, ExamPhantom]]:
    """Split, patient's id and exam of so many `patients` of each split.

    Half of the breasts have a cancer, drawn breast by breast; in the design `asymmetry` half of the patients have one.
    """
    for split, count in patients.items():
        rng = np.random.default_rng(derive_seed(seed, split))
        sick = rng.permutation(2 * count).reshape(count, 2) % 2 == 1
        if design == "asymmetry":
            sick = (rng.permutation(count)[:, None] % 2 == 1) & np.eye(2, dtype=bool)[rng.integers(2, size=count)]
        machines = SPLIT_MACHINES[split] if design == "vendors" else "A"
        for number, sides in enumerate(sick.tolist()):
            patient = f"{split}-{number}"
            exam = sample_exam(
                design,
                derive_seed(seed, patient),
                dict(zip(SIDES, sides, strict=True)),
                machines[number % len(machines)],
            )
            yield split, patient, exam


def write_exams(folder: Path, design: ExamDesign, patients: Mapping[str, int], size: Size, seed: int = 0) -> Path:
    """Write the crops of `plan_exams` and, last, FOLDER/manifest.csv, whose path is returned; same arguments, same bytes."""
    rows = []
    for split, patient, exam in progress(
        plan_exams(design, patients, seed), design, total=sum(patients.values()), unit="patient"
    ):
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
