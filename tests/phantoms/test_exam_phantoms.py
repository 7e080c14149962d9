"""The label of an exam phantom follows from the evidence of its design and from no other pixel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from vitmodel.config import Size
from vitmodel.data.manifest import read_manifest
from vitmodel.phantoms.exams import DEEP, SHALLOW, VIEWS, ExamPhantom, plan_exams, sample_exam, write_exams

SIZE = Size(48, 32)
HEALTHY, SICK = {"L": False, "R": False}, {"L": True, "R": False}
SEEDS = range(3)


def differing(first: ExamPhantom, second: ExamPhantom) -> set[tuple[str, str]]:
    """Return side and view of the images that differ in any pixel."""
    first_crops = first.crops(SIZE)
    second_crops = second.crops(SIZE)
    return {key for key in first_crops if not np.array_equal(first_crops[key], second_crops[key])}


def depth(exam: ExamPhantom) -> float:
    """Return the depth of the left breast's lesion."""
    return exam.breasts["L", "CC"].lesions[0].position[0]


def test_a_cancer_on_one_machine_equals_a_benign_density_on_the_other() -> None:
    cancers = [sample_exam("vendors", seed, SICK, "A") for seed in range(400)]
    benign = [sample_exam("vendors", seed, HEALTHY, "B") for seed in range(400)]
    same_depth = next(seed for seed in range(400) if depth(cancers[seed]) == depth(benign[seed]))
    assert not differing(cancers[same_depth], benign[same_depth]) & {("L", view) for view in VIEWS}
    assert {depth(exam) for exam in cancers} == {DEEP, SHALLOW}
    assert np.mean([depth(exam) == DEEP for exam in cancers]) == pytest.approx(0.75, abs=0.07)
    assert np.mean([depth(exam) == DEEP for exam in benign]) == pytest.approx(0.25, abs=0.07)


def test_brightness_reveals_the_label_on_machines_a_and_b_only() -> None:
    for machine, differs in (("A", True), ("B", True), ("C", False)):
        for seed in SEEDS:
            cancer, benign = (
                sample_exam("vendors", seed, sick, machine).breasts["L", "CC"].lesions[0] for sick in (SICK, HEALTHY)
            )
            assert (cancer.contrast != benign.contrast) == differs


def test_only_one_view_shows_the_cancer() -> None:
    for seed in SEEDS:
        assert len(differing(sample_exam("one_view", seed, SICK), sample_exam("one_view", seed, HEALTHY))) == 1


def test_in_the_asymmetry_design_only_the_other_breast_reveals_a_cancer() -> None:
    """The other breast has no label, so that no model of single images or single breasts can rank above chance."""
    for seed in SEEDS:
        sick, healthy = sample_exam("asymmetry", seed, SICK), sample_exam("asymmetry", seed, HEALTHY)
        assert differing(sick, healthy) == {("R", view) for view in VIEWS}
        np.testing.assert_equal(sick.labels, {"L": 1.0, "R": np.nan})
        np.testing.assert_equal(healthy.labels, {"L": 0.0, "R": 0.0})


def image_bytes(manifest: pd.DataFrame) -> list[bytes]:
    return [Path(path).read_bytes() for path in manifest["path"]]


def test_the_manifest_describes_the_exams_and_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    patients = {"train": 2, "test": 3}
    first, again = (write_exams(tmp_path / name, "vendors", patients, SIZE, seed=7) for name in "ab")
    other = read_manifest(write_exams(tmp_path / "c", "vendors", {"train": 1}, SIZE, seed=8))
    table = read_manifest(first)
    assert first.read_bytes() == again.read_bytes()
    assert image_bytes(table) == image_bytes(read_manifest(again))
    assert not set(image_bytes(table)) & set(image_bytes(other))
    assert len(table) == 4 * 5
    assert table.groupby(["patient_id", "laterality"])["cancer"].nunique().eq(1).all()
    machines = table.groupby("split")["machine_id"].unique().map(set)
    assert machines["train"] == {"A", "B"}
    assert machines["test"] == {"A", "B", "C"}


def test_half_of_the_patients_have_an_asymmetry_equally_often_in_each_breast() -> None:
    labels = np.array([list(exam.labels.values()) for *_, exam in plan_exams("asymmetry", {"train": 400})])  # (N, 2)
    sick = np.nanmax(labels, axis=1) == 1
    assert sick.mean() == 0.5
    assert (labels[sick] == 1).mean(axis=0) == pytest.approx(0.5, abs=0.1)
    assert (np.isnan(labels).sum(axis=1) == sick).all()
