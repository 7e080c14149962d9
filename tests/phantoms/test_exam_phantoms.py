"""Phantoms of exams: what tells the label is what the design says, and nothing else, to the pixel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from vitmodel.config import Size
from vitmodel.data.manifest import read_manifest
from vitmodel.phantoms.exams import DEEP, SHALLOW, VIEWS, ExamPhantom, plan_exams, sample_exam, write_exams

SIZE = Size(48, 32)
HEALTHY, SICK = {"L": False, "R": False}, {"L": True, "R": False}
SEEDS = range(3)


def differing(first: ExamPhantom, second: ExamPhantom) -> set[tuple[str, str]]:
    """Side and view of the images that are not the same, pixel by pixel."""
    images, others = first.crops(SIZE), second.crops(SIZE)
    return {key for key in images if not np.array_equal(images[key], others[key])}


def depth(exam: ExamPhantom) -> float:
    return exam.breasts["L", "CC"].lesions[0].position[0]


def test_a_cancer_of_one_machine_is_the_decoy_of_the_other() -> None:
    cancers = [sample_exam("vendors", seed, SICK, "A") for seed in range(400)]
    decoys = [sample_exam("vendors", seed, HEALTHY, "B") for seed in range(400)]
    alike = next(seed for seed in range(400) if depth(cancers[seed]) == depth(decoys[seed]))
    assert not differing(cancers[alike], decoys[alike]) & {("L", view) for view in VIEWS}
    assert {depth(cancer) for cancer in cancers} == {DEEP, SHALLOW}
    assert np.mean([depth(cancer) == DEEP for cancer in cancers]) == pytest.approx(0.75, abs=0.07)
    assert np.mean([depth(decoy) == DEEP for decoy in decoys]) == pytest.approx(0.25, abs=0.07)


def test_brightness_tells_on_the_known_machines_alone() -> None:
    for machine, differs in (("A", True), ("B", True), ("C", False)):
        for seed in SEEDS:
            cancer, decoy = (
                sample_exam("vendors", seed, sick, machine).breasts["L", "CC"].lesions[0] for sick in (SICK, HEALTHY)
            )
            assert (cancer.contrast != decoy.contrast) == differs


def test_one_view_alone_shows_the_cancer() -> None:
    for seed in SEEDS:
        assert len(differing(sample_exam("one_view", seed, SICK), sample_exam("one_view", seed, HEALTHY))) == 1


def test_the_breast_with_the_cancer_looks_as_if_there_were_none() -> None:
    """Only the other breast, whose label is unknown, differs: so no model of single images, or of one breast, can rank above chance."""
    for seed in SEEDS:
        sick, healthy = sample_exam("asymmetry", seed, SICK), sample_exam("asymmetry", seed, HEALTHY)
        assert differing(sick, healthy) == {("R", view) for view in VIEWS}
        np.testing.assert_equal(sick.labels, {"L": 1.0, "R": np.nan})
        np.testing.assert_equal(healthy.labels, {"L": 0.0, "R": 0.0})


def test_the_manifest_says_what_was_drawn_and_a_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    patients = {"train": 2, "test": 3}
    first, again = (write_exams(tmp_path / name, "vendors", patients, SIZE, seed=7) for name in "ab")
    other = read_manifest(write_exams(tmp_path / "c", "vendors", {"train": 1}, SIZE, seed=8))
    table = read_manifest(first)
    assert first.read_bytes() == again.read_bytes()
    pixels, same, others = (
        [Path(path).read_bytes() for path in each["path"]] for each in (table, read_manifest(again), other)
    )
    assert pixels == same
    assert not set(pixels) & set(others)
    assert len(table) == 4 * 5
    assert table.groupby(["patient_id", "laterality"])["cancer"].nunique().eq(1).all()
    machines = table.groupby("split")["machine_id"].unique().map(set)
    assert machines["train"] == {"A", "B"}
    assert machines["test"] == {"A", "B", "C"}


def test_half_of_the_patients_have_an_asymmetry_in_either_breast() -> None:
    labels = np.array([list(exam.labels.values()) for *_, exam in plan_exams("asymmetry", {"train": 400})])  # N 2
    sick = np.nanmax(labels, axis=1) == 1
    assert sick.mean() == 0.5
    assert (labels[sick] == 1).mean(axis=0) == pytest.approx(0.5, abs=0.1)
    assert (np.isnan(labels).sum(axis=1) == sick).all()
