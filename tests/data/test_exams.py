"""Several exams of one patient stay apart wherever images are grouped, except in splits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from vitmodel.data.dataset import CropDataset, ExamDataset
from vitmodel.data.exams import find_mixed_exams
from vitmodel.data.manifest import as_manifest, breast_ids, exam_ids, is_repeated_file, merge_manifests, prediction_ids
from vitmodel.data.splits import assign_splits
from vitmodel.pixels.identity import ImageIdentity
from vitmodel.releases import dicom_folder
from vitmodel.results.score_files import write_score_files
from vitmodel.scoring.evaluation import Evaluation
from vitmodel.scoring.tables import breast_table, patient_table


def two_exams(patients: int = 1, dataset: str = "a") -> pd.DataFrame:
    """Return a manifest with the exams 2018 and 2024 of each patient, with a CC and an MLO view of both breasts."""
    rows = [
        {"patient_id": f"p{patient}", "exam_id": exam, "laterality": side, "view": view, "age": age, "status": "ok"}
        for patient in range(patients)
        for exam, age in (("2018", 50), ("2024", 56))
        for side in "LR"
        for view in ("CC", "MLO")
    ]
    table = pd.DataFrame(rows).assign(dataset=dataset, cancer=0)
    table["image_id"] = [f"i{number}" for number in range(len(table))]
    return as_manifest(table.assign(path=dataset + "/" + table.image_id + ".png"), dataset)


def image_scores(table: pd.DataFrame) -> pd.DataFrame:
    """Return image scores whose breast probability is 0.9 in 2018, 0.2 in 2024, and half of it at the left."""
    probability = np.where(table.exam_id == "2018", 0.9, 0.2) * np.where(table.laterality == "L", 0.5, 1.0)
    scores = table[["image_id", "patient_id", "exam_id", "laterality", "view", "status", "reason"]]
    columns = ("score", "probability", "breast_score", "breast_probability")
    return scores.assign(**dict.fromkeys(columns, probability))


def test_a_breast_and_an_exam_have_one_key_per_exam() -> None:
    table = two_exams()
    assert breast_ids(table).nunique() == 4
    assert exam_ids(table).nunique() == 2
    without = table.assign(exam_id="")
    assert breast_ids(without).equals(prediction_ids(without))
    assert exam_ids(without).equals(without.patient_id)


def test_the_key_of_an_exam_is_no_other_patients_id() -> None:
    pairs = [("a", "b"), ("a exam b", ""), ("a exam exam", "b"), ("a", "exam exam b"), ("a  exam", "exam b")]
    table = pd.DataFrame(pairs, columns=["patient_id", "exam_id"]).assign(laterality="")
    assert exam_ids(table).nunique() == len(pairs)


def test_each_exam_of_a_breast_has_its_own_score() -> None:
    breasts = breast_table(image_scores(two_exams()), 0.5)
    assert breasts.prediction_id.tolist() == ["p0_L", "p0_R", "p0_L", "p0_R"]
    assert breasts.exam_id.tolist() == ["2018", "2018", "2024", "2024"]
    assert breasts.probability.tolist() == [0.45, 0.9, 0.1, 0.2]
    assert (breasts.n_images == 2).all()


@pytest.mark.parametrize(("aggregation", "expected"), [("max", 0.9), ("noisy_or", 1 - 0.55 * 0.1)])
def test_a_patient_has_the_largest_score_of_her_exams(aggregation: str, expected: float) -> None:
    patients = patient_table(breast_table(image_scores(two_exams()), 0.5), 0.5, aggregation)
    assert patients.probability.tolist() == pytest.approx([expected])
    assert patients.n_breasts.tolist() == [4]


def test_the_submission_has_one_row_per_breast_with_its_largest_probability(tmp_path: Path) -> None:
    images = image_scores(two_exams())
    breasts = breast_table(images, 0.5)
    write_score_files(images, breasts, patient_table(breasts, 0.5, "max"), tmp_path)
    submission = pd.read_csv(tmp_path / "submission.csv")
    assert submission.to_dict("list") == {"prediction_id": ["p0_L", "p0_R"], "cancer": [0.45, 0.9]}


def test_evaluation_counts_the_breasts_of_each_exam_and_the_patient_once() -> None:
    table = two_exams(patients=2)
    table["cancer"] = ((table.exam_id == "2024") & (table.laterality == "L") & (table.patient_id == "p1")).astype(float)
    scores = image_scores(table).probability.to_numpy()
    evaluation = Evaluation(
        table=table,
        probability=scores,
        label="cancer",
        aggregate="max",
        patient_aggregate="noisy_or",
        threshold=0.5,
        replicates=10,
        seed=0,
    )
    breasts = evaluation.scored_units("breast")
    assert (len(breasts.labels), breasts.labels.sum()) == (8, 1)
    patients = evaluation.scored_units("patient")
    assert patients.labels.tolist() == [0, 1]
    assert patients.scores == pytest.approx([1 - 0.55 * 0.1] * 2)


def test_fusion_gets_each_exam_by_itself_and_splits_keep_them_together() -> None:
    table = two_exams(patients=8).assign(cancer=np.nan)
    crops = CropDataset(table.path.tolist(), table.cancer.tolist())
    exams = ExamDataset(crops, exam_ids(table).tolist(), breast_ids(table).tolist())
    assert [len(rows) for rows in exams.exams] == [4] * 16
    assert (assign_splits(table).groupby("patient_id").split.nunique() == 1).all()


def test_a_copy_counts_once_per_exam_and_ages_may_differ_between_exams() -> None:
    table = two_exams().assign(source_sha256="same")
    assert is_repeated_file(table).sum() == 4
    assert find_mixed_exams(table).empty
    assert len(find_mixed_exams(table.assign(exam_id=""))) == len(table)


def test_merged_releases_keep_their_exams_apart() -> None:
    merged = merge_manifests([two_exams(), two_exams(dataset="b")])
    assert exam_ids(merged).nunique() == 4
    assert breast_ids(merged).nunique() == 8


def test_a_dicom_folder_names_the_exams_of_a_patient_with_several_studies(monkeypatch: pytest.MonkeyPatch) -> None:
    headers = {"a": ("p", "1.2"), "b": ("p", "1.3"), "c": ("q", "1.4"), "d": ("q", "1.4")}
    values = {name: ImageIdentity(patient_id=patient, study_id=study) for name, (patient, study) in headers.items()}
    monkeypatch.setattr(dicom_folder, "read_identity", lambda file: values[Path(file).stem])
    table = dicom_folder.read_files([f"/x/{name}.dcm" for name in headers], Path("/x"))
    assert table.exam_id.tolist() == ["1.2", "1.3", "", ""]
