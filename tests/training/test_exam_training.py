"""Training and scoring with exam fusion and source adapters.

Scores do not depend on other exams or their order, runs can be resumed, and invalid input is refused.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from fixture_types import MakeOnce
from safetensors.torch import load_file
from scipy.special import expit

from vitmodel.cli import main
from vitmodel.commands.evaluate import evaluate
from vitmodel.config import EvaluateConfig, PredictorConfig, TrainConfig
from vitmodel.data.dataset import CropDataset, ExamDataset, read_crop, to_tensor
from vitmodel.data.exams import build_vocabulary, describe_unseen_sources, image_metadata
from vitmodel.data.manifest import breast_ids, read_manifest, usable_rows, write_manifest
from vitmodel.data.samplers import SampleRequest, SequentialSampler
from vitmodel.model.architecture import PRESETS, ExamConfig, NetworkConfig, SourcesConfig, Vocabulary
from vitmodel.model.fusion import noisy_or_logits
from vitmodel.model.network import Network
from vitmodel.model.package import load_package
from vitmodel.model.packed_batch import pack_images
from vitmodel.scoring.predictor import Predictor
from vitmodel.training.batching import Batch, BatchLoader
from vitmodel.training.crops import labelled_crops
from vitmodel.training.module import ClassificationModule

EXAMS = ["--fusion", "--sources", "view,machine_id", "--source-images", "4"]


@pytest.fixture(scope="module")
def exam_run(crops: Path, flags: list[str], make_once: MakeOnce) -> Path:
    """A finished run with exam fusion and adapters by view and machine. Read only."""

    def make(folder: Path) -> None:
        assert main(["train", str(crops / "manifest.csv"), str(folder), *flags, *EXAMS]) == 0

    return make_once("exam_run", make)


@pytest.fixture(scope="module")
def fused(exam_run: Path) -> Predictor:
    """A predictor of `exam_run` whose fusion changes the scores noticeably."""
    predictor = Predictor(PredictorConfig(package=exam_run / "package", jobs=1))
    exam = predictor.ensemble.model.exam
    assert exam is not None
    # After three epochs the head has hardly any effect, and mistakes would not be seen.
    torch.nn.init.trunc_normal_(exam.head.weight, std=0.05)
    return predictor


@pytest.fixture(scope="module")
def table(crops: Path) -> pd.DataFrame:
    return read_manifest(crops / "manifest.csv")


def image_and_breast_scores(predictor: Predictor, table: pd.DataFrame) -> pd.DataFrame:
    """Return the score and the breast score of each image, indexed by image_id."""
    return predictor.score_images(table).set_index("image_id")[["score", "breast_score"]].astype(float)


def test_scores_of_an_exam_do_not_depend_on_other_exams_order_or_token_budget(
    fused: Predictor, table: pd.DataFrame
) -> None:
    together = image_and_breast_scores(fused, table)
    assert together["breast_score"].notna().sum() > 20
    assert (together["score"] - together["breast_score"]).abs().max() > 0.01
    shuffled = image_and_breast_scores(fused, table.sample(frac=1, random_state=0)).loc[together.index]
    exams = [image_and_breast_scores(fused, rows) for _, rows in table.groupby("patient_id")]
    alone = pd.concat(exams).loc[together.index]
    fused.ensemble.packages[0].tokens = 12  # an exam has 36
    small_budget = image_and_breast_scores(fused, table)
    fused.ensemble.packages[0].tokens = fused.config.tokens
    for other in (shuffled, alone, small_budget):
        np.testing.assert_allclose(together, other, atol=1e-5)


def test_breast_and_patient_scores_are_those_of_the_network(fused: Predictor, table: pd.DataFrame) -> None:
    rows = next(
        rows
        for _, rows in table.groupby("patient_id")
        if (rows["status"] == "ok").all() and rows["laterality"].nunique() == 2
    )
    metadata = image_metadata(rows, fused.ensemble.model.config)
    images = pack_images([to_tensor(read_crop(path)) for path in rows["path"]], 16, metadata=metadata)
    with torch.no_grad():
        logits = fused.ensemble.model(images)
    breasts = fused.score_breasts(fused.score_images(rows))
    np.testing.assert_allclose(breasts["score"], expit(logits.breasts.numpy()), atol=1e-6)
    np.testing.assert_allclose(fused.score_patients(breasts)["score"], expit(logits.patients.numpy()), atol=1e-6)


def test_an_exam_is_scored_without_its_refused_images_and_copies(fused: Predictor, table: pd.DataFrame) -> None:
    rows = next(rows for _, rows in table.groupby("patient_id") if (rows["status"] == "ok").all() and len(rows) == 4)
    fewer = image_and_breast_scores(fused, rows.iloc[1:])
    whole = image_and_breast_scores(fused, rows)
    refused = fused.score_images(
        rows.assign(status=["refused", "ok", "ok", "ok"], reason=["unreadable", None, None, None])
    )
    assert np.isnan(refused["breast_score"].iloc[0])
    np.testing.assert_allclose(refused["breast_score"].iloc[1:], fewer["breast_score"], atol=1e-5)
    assert not np.allclose(fewer["breast_score"], whole["breast_score"].iloc[1:], atol=1e-5)
    copy = rows.iloc[:1].assign(image_id="again", view="ML")
    copied = image_and_breast_scores(fused, pd.concat([rows, copy], ignore_index=True))
    np.testing.assert_allclose(copied["breast_score"].iloc[:4], whole["breast_score"], atol=1e-5)


def test_an_atypical_image_does_not_contribute_to_its_breast(fused: Predictor, table: pd.DataFrame) -> None:
    exams = [rows for _, rows in table.groupby("patient_id") if (rows["status"] == "ok").all() and len(rows) == 4]
    judged = [fused.score_images(rows)["typicality"].to_numpy() for rows in exams]
    rows, typicality = next(pair for pair in zip(exams, judged, strict=True) if np.ptp(np.sort(pair[1])[:2]) > 0)
    fused.stream.atypical = float(np.sort(typicality)[:2].mean())  # between the least typical image and the next
    images = fused.score_images(rows)
    fused.stream.atypical = fused.config.atypical
    least = int(typicality.argmin())
    assert images["reason"].iloc[least] == "atypical"
    fewer = image_and_breast_scores(fused, rows.drop(rows.index[least]))
    assert np.isnan(images["breast_score"].iloc[least])
    others = images["breast_score"].drop(images.index[least]).astype(float)
    np.testing.assert_allclose(others, fewer["breast_score"], atol=1e-5)


def test_an_unseen_machine_is_treated_as_unknown_and_reported(fused: Predictor, table: pd.DataFrame) -> None:
    new, unknown = (fused.score_images(table.assign(machine_id=value)) for value in ("never seen", np.nan))
    pd.testing.assert_series_equal(new["score"], unknown["score"])
    scored = new["score"].notna()
    assert new.loc[scored, "reason"].str.contains("unseen_source").all()
    assert new.loc[scored, "remark"].str.contains("machine_id never seen has no parameters of its own").all()
    assert not new.loc[~scored, "reason"].str.contains("unseen_source").any()


def test_the_report_lists_the_images_of_unseen_machines(exam_run: Path, table: pd.DataFrame, tmp_path: Path) -> None:
    rows = usable_rows(table)
    rows = rows[rows["cancer"].notna() & (rows["view"] != "")]
    new = rows["patient_id"] == rows["patient_id"].iloc[0]
    write_manifest(rows.assign(machine_id=rows["machine_id"].mask(new, "never seen")), tmp_path / "manifest.csv")
    options = ["--split", "all", "--replicates", "100", "--no-audit", "--no-card"]
    paths = [str(path) for path in (exam_run / "package", tmp_path / "manifest.csv", tmp_path / "out")]
    assert main(["evaluate", *paths, *options]) == 0
    sentence = "machine_id never seen has no parameters of its own"
    fell_back = json.loads((tmp_path / "out" / "metrics.json").read_text())["fell_back"]
    assert fell_back[sentence] == rows["image_id"][new].tolist()
    assert f"{sentence}: {new.sum()} images" in (tmp_path / "out" / "report.html").read_text()


def test_a_changed_image_has_its_exam_scored_again(
    exam_run: Path, crops: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = usable_rows(read_manifest(crops / "manifest.csv"))
    table = table[table["patient_id"].isin(table["patient_id"].unique()[:3])]
    (tmp_path / "in").mkdir()
    for row, path in zip(table.index, table["source_path"], strict=True):
        link = tmp_path / "in" / f"{row}{Path(path).suffix}"
        os.link(path, link)
        table.loc[row, "source_path"] = str(link)
    write_manifest(table, tmp_path / "manifest.csv")
    command = ["predict", str(exam_run / "package"), str(tmp_path / "manifest.csv"), str(tmp_path / "out"), "--resume"]
    assert main(command) == 0
    first = (tmp_path / "out" / "breast_scores.csv").read_text()
    changed = Path(table["source_path"].iloc[0])
    content = changed.read_bytes()
    changed.unlink()
    changed.write_bytes(content)
    others = int((table["patient_id"] != table["patient_id"].iloc[0]).sum())
    capsys.readouterr()
    assert main(command) == 0
    assert f"{others} of {len(table)} images are scored already" in capsys.readouterr().out
    assert (tmp_path / "out" / "breast_scores.csv").read_text() == first


@pytest.mark.nightly
def test_a_killed_and_resumed_run_of_exams_ends_with_the_same_weights(
    crops: Path, exam_run: Path, tmp_path: Path, flags: list[str], kill_and_resume: Callable[[list[str], Path], None]
) -> None:
    folder = tmp_path / "run"
    command = ["train", str(crops / "manifest.csv"), str(folder), *flags, *EXAMS]
    kill_and_resume(command, folder)
    resumed, undisturbed = (load_file(run / "package" / "model.safetensors") for run in (folder, exam_run))
    assert all(torch.equal(resumed[name], tensor) for name, tensor in undisturbed.items())


def test_the_package_is_calibrated_and_measured_on_the_networks_breasts(exam_run: Path, tmp_path: Path) -> None:
    package = load_package(exam_run / "package")[1]
    assert package["decision"]["aggregate"] == "fusion"
    validation = pd.read_csv(exam_run / "validation.csv")
    assert (validation.groupby(["patient_id", "laterality"])["score"].nunique() == 1).all()
    config = EvaluateConfig(
        package=exam_run / "package",
        manifest=exam_run / "manifest.csv",
        out=tmp_path,
        replicates=100,
        card=False,
        audit=False,
    )
    evaluate(config)
    images, breasts = (
        pd.read_csv(tmp_path / name, dtype={"patient_id": str}) for name in ("scores.csv", "breast_scores.csv")
    )
    expected = images.groupby(breast_ids(images), sort=False)["breast_probability"].first()
    np.testing.assert_allclose(breasts.set_index("prediction_id")["probability"], expected)
    report = (tmp_path / "report.html").read_text()
    assert "fusion of all images" in report
    assert "noisy-or of her breasts" in report


def test_view_dropout_keeps_labelled_breasts_and_exams_without_readable_images_are_logged(
    crops: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = usable_rows(read_manifest(crops / "manifest.csv")).reset_index(drop=True)
    is_first = rows["patient_id"] == rows["patient_id"].iloc[0]
    rows.loc[is_first, "path"] = [f"lost {number}" for number in range(is_first.sum())]
    labels = rows["cancer"].where(rows["laterality"] == "L")
    images = CropDataset(rows["path"].tolist(), labels.tolist())
    exams = ExamDataset(images, rows["patient_id"].tolist(), breast_ids(rows).tolist(), dropout=0.99)
    for number in range(len(exams)):
        sampled = [example.row for example in exams[SampleRequest(number, 7)]]
        assert set(breast_ids(rows.iloc[sampled])) >= set(breast_ids(rows.iloc[exams.exams[number]])[labels.notna()])
    config = TrainConfig(manifest=Path(), run=Path(), workers=0)
    exams.dropout = 0.0
    batches = BatchLoader(exams, SequentialSampler(len(exams)), config, [])
    with caplog.at_level(logging.WARNING):
        loaded = sorted(row for batch in batches for row in batch.row.tolist())
    assert "exam without a readable image is left out: lost 0" in caplog.text
    assert loaded == [row for row, path in enumerate(rows["path"]) if not path.startswith("lost")]


def test_the_loss_sums_the_levels_with_a_known_label() -> None:
    """Compare with the formula: mean over images plus mean over breasts plus patient; unknown labels have no loss."""
    vit = replace(PRESETS["vit_micro"], depth=1)
    exam = ExamConfig(views=Vocabulary("view", ("CC", "MLO")), depth=1)
    sources = SourcesConfig(columns=(Vocabulary("machine_id", ("1",)),))
    network = Network(NetworkConfig(vit=vit, exam=exam, sources=sources)).eval()
    table = pd.DataFrame(
        {
            "patient_id": ["a"] * 4 + ["b"] * 2,
            "laterality": list("LLRRLR"),
            "view": ["CC", "MLO"] * 2 + ["CC", "CC"],
            "machine_id": ["1", "1", "2", "2", "1", "1"],
        }
    )
    labels = torch.tensor([1, 1, torch.nan, torch.nan, 0, torch.nan])
    crops = [torch.rand(1, 32, 32) for _ in range(6)]
    batch = Batch(
        pack_images(crops, 16, metadata=image_metadata(table, network.config)),
        labels,
        torch.empty(6, 0),
        torch.arange(6),
        (),
    )
    learner = ClassificationModule(network, TrainConfig(manifest=Path(), run=Path()), images_per_epoch=2, history={})
    with torch.no_grad():
        logits = network(batch.pack)
        losses = learner._losses("val", batch, logits, torch.zeros(6))
    image = logits.images[:, 0]
    breast = logits.breasts
    patient = noisy_or_logits(breast, [[0, 1]])[0]
    loss_a = (F.softplus(-image[0]) + F.softplus(-image[1])) / 4 + F.softplus(-breast[0]) / 2 + F.softplus(-patient)
    loss_b = F.softplus(image[4]) / 2 + F.softplus(breast[2]) / 2
    torch.testing.assert_close(losses, torch.stack([loss_a, loss_b]))


def test_a_value_gets_its_own_adapter_if_every_fold_has_enough_images(capsys: pytest.CaptureFixture[str]) -> None:
    first = pd.DataFrame({"machine_id": ["1"] * 5 + ["2"] * 5 + ["3"]})
    second = pd.DataFrame({"machine_id": ["1"] * 4 + ["2"] + [np.nan]})
    assert build_vocabulary("machine_id", [first], 5).values == ("1", "2")
    assert build_vocabulary("machine_id", [first, second], 4).values == ("1",)
    assert "own parameters for 1 (4 images)" in capsys.readouterr().out


def test_ages_are_grouped_by_decade() -> None:
    table = pd.DataFrame({"age": [39.0, 40.0, 49.0, np.nan]})
    vocabulary = build_vocabulary("age", [table], 1)
    assert vocabulary.values == ("40 to 49", "below 40")
    config = NetworkConfig(vit=PRESETS["vit_micro"], sources=SourcesConfig(columns=(vocabulary,)))
    assert [metadata.sources[0] for metadata in image_metadata(table, config)] == [2, 1, 1, 0]
    assert describe_unseen_sources(table, config) == ["", "", "", "age is unknown"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sources", "vendor"], "sources: vendor is not a column of"),
        (["--sources", "density"], "sources: density reveals the label"),
        (["--sources", "patient_id"], "patient_id reveals the label or the patient"),
        (["--no-asymmetry"], "asymmetry: has no effect here: it needs --fusion"),
        (["--fusion", "--tokens", "20"], "the exam of patient"),
    ],
)
def test_invalid_options_are_refused(
    crops: Path,
    tmp_path: Path,
    flags: list[str],
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    assert main(["train", str(crops / "manifest.csv"), str(tmp_path / "run"), *flags, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_fusion_refuses_breasts_without_a_side(
    crops: Path, tmp_path: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    table = read_manifest(crops / "manifest.csv")
    row = usable_rows(table).index[0]
    table.loc[row, "laterality"] = ""
    write_manifest(table, tmp_path / "manifest.csv")
    assert main(["train", str(tmp_path / "manifest.csv"), str(tmp_path / "run"), *flags, "--fusion"]) == 2
    assert f"column laterality is empty for image {table.loc[row, 'image_id']}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("column", "value", "sentence"),
    [
        ("laterality", "L", "laterality may give both breasts the same side"),
        ("patient_id", "", "two patients, or two exams, the same id"),
    ],
)
def test_images_mixed_up_between_breasts_or_patients_are_named(
    fused: Predictor,
    table: pd.DataFrame,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    column: str,
    value: str,
    sentence: str,
) -> None:
    """Either both breasts of a patient have one laterality, or an image of another patient has her id."""
    mixed = table.copy()
    first = table["patient_id"].iloc[0]
    other = mixed.index[mixed["age"] != mixed["age"].iloc[0]][0]
    changed = (mixed["patient_id"] == first) if column == "laterality" else mixed.index == other
    mixed.loc[changed, column] = value or first
    affected = mixed["patient_id"] == first
    write_manifest(mixed, tmp_path / "manifest.csv")
    labelled_crops(TrainConfig(manifest=tmp_path / "manifest.csv", run=tmp_path / "run", fusion=True))
    assert sentence in caplog.text
    scores = fused.score_images(mixed)
    usable = scores["status"] != "refused"
    assert ", ".join(mixed.loc[affected & usable, "image_id"]) in caplog.text
    assert scores.loc[usable, "remark"].str.contains(sentence).eq(True).equals(affected[usable])


def test_missing_crops_of_an_exam_are_created_again_or_the_exam_is_refused(
    fused: Predictor, table: pd.DataFrame, tmp_path: Path
) -> None:
    rows = next(rows for _, rows in table.groupby("patient_id") if (rows["status"] == "ok").all())
    rows = rows.assign(path=str(tmp_path / "lost.png"))
    expected = image_and_breast_scores(fused, table.loc[rows.index])
    pd.testing.assert_frame_equal(image_and_breast_scores(fused, rows), expected)
    gone = fused.score_images(rows.assign(source_path=str(tmp_path / "lost.dcm")))
    assert (gone["reason"] == "missing_file").all()
    patients = fused.score_patients(fused.score_breasts(gone))
    assert patients["status"].tolist() == ["refused"]
    assert patients["score"].isna().all()
