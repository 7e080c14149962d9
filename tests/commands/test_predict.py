"""Prediction and evaluation: every caller gets the same scores, refused images get none, tables keep their order."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
import weakref
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from pydicom import Dataset, dcmread
from pydicom.fileset import FileSet
from scipy.special import logit

from vitmodel.cli import main
from vitmodel.config import ETLConfig, PredictConfig, PredictorConfig, Preprocessing, TrainConfig
from vitmodel.data.cropping import SourceImage, crop_image
from vitmodel.data.fingerprint import seen_in_training
from vitmodel.data.manifest import breast_ids, read_manifest, usable_rows, write_manifest
from vitmodel.data.rows import ManifestRow
from vitmodel.errors import UsageError
from vitmodel.model.package_check import seal
from vitmodel.model.packed_batch import ImageMetadata, PackedBatch
from vitmodel.releases.inputs import read_inputs
from vitmodel.releases.registry import read_release
from vitmodel.scoring import stream
from vitmodel.scoring.ensemble import Ensemble
from vitmodel.scoring.predictor import Predictor
from vitmodel.scoring.stream import GROUP_IMAGES, LoadedImage, ScoringStream, Timings
from vitmodel.scoring.tables import fallback_messages, has_code
from vitmodel.training.crops import labelled_crops
from vitmodel.utils import sha256_file


@pytest.fixture(scope="module")
def predictor(run: Path) -> Predictor:
    return Predictor(PredictorConfig(package=run / "package", jobs=1))


def test_batched_scores_equal_single_scores(run: Path, predictor: Predictor, crops: Path) -> None:
    table = read_manifest(crops / "manifest.csv").head(12)
    alone = Predictor(replace(predictor.config, tokens=9))
    np.testing.assert_allclose(predictor.score_images(table)["score"], alone.score_images(table)["score"], atol=1e-6)


def test_a_crop_of_etl_and_its_source_get_the_same_score(predictor: Predictor, release: Path, crops: Path) -> None:
    """The package crops as training did, also if it starts from the source file."""
    cropped = read_manifest(crops / "manifest.csv")
    sources = read_release(release)
    pd.testing.assert_frame_equal(predictor.score_images(cropped), predictor.score_images(sources))
    other = cropped.assign(preprocessing=cropped["preprocessing"].str.replace("64x32", "128x64"), path="unread")
    pd.testing.assert_frame_equal(predictor.score_images(cropped), predictor.score_images(other))


def test_a_run_attaches_rows_and_metadata_once(
    run: Path, release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def counted(name: str) -> Callable[..., object]:
        function = getattr(stream, name)
        return lambda *arguments: (calls.append(name), function(*arguments))[1]

    for name in ("to_manifest_rows", "image_metadata"):
        monkeypatch.setattr(stream, name, counted(name))
    command = ["predict", str(run / "package"), str(release / "test.csv"), str(tmp_path)]
    assert main([*command, "--explain", "rollout"]) == 0
    assert sorted(calls) == ["image_metadata", "to_manifest_rows"]


def test_memory_holds_a_bounded_number_of_crops(predictor: Predictor, crops: Path) -> None:
    """At most two groups of images and those in the threads are held, so that memory use is bounded."""
    crop_references: list[weakref.ref[np.ndarray]] = []
    held: list[int] = []

    class CountingStream(ScoringStream):
        def load(self, row: ManifestRow, metadata: ImageMetadata = ImageMetadata()) -> LoadedImage:  # noqa: B008
            loaded = super().load(row, metadata)
            if loaded.cropped.crop is not None:
                crop_references.append(weakref.ref(loaded.cropped.crop))
            held.append(sum(crop() is not None for crop in crop_references))
            return loaded

    stream = CountingStream(predictor.ensemble, predictor.config, Timings())
    assert sum(1 for _ in stream.scores(predictor.attach(read_manifest(crops / "manifest.csv")))) > 0
    limit = 2 * GROUP_IMAGES + 4
    assert len(crop_references) > limit
    assert max(held) <= limit


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_image_whose_output_is_not_finite_is_refused_and_costs_no_other_its_score(
    value: float, predictor: Predictor, crops: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = read_manifest(crops / "manifest.csv")
    expected = predictor.score_images(table)
    judge = Ensemble.judge

    def spoil_first(self: Ensemble, packs: Sequence[PackedBatch]) -> tuple[np.ndarray, np.ndarray]:
        logits, typicality = judge(self, packs)
        logits[:1, 0] = value
        return logits, typicality

    monkeypatch.setattr(Ensemble, "judge", spoil_first)
    images = predictor.score_images(table)
    spoiled = images["reason"] == "not_finite"
    assert spoiled.any()
    assert (images.loc[spoiled, "status"] == "refused").all()
    assert images.loc[spoiled, ["score", "probability", "decision"]].isna().all(axis=None)
    np.testing.assert_array_equal(images.loc[~spoiled, "score"], expected.loc[~spoiled, "score"])


def test_a_refused_image_is_never_scored(predictor: Predictor, crops: Path) -> None:
    images = predictor.score_images(read_manifest(crops / "manifest.csv"))
    refused = images["status"] == "refused"
    assert refused.any()
    assert images.loc[refused, ["score", "probability", "decision"]].isna().all(axis=None)
    assert images.loc[~refused, ["score", "probability", "decision"]].notna().all(axis=None)
    assert images.loc[refused, ["reason", "remark"]].notna().all(axis=None)


def test_a_breast_is_the_mean_logit_of_its_usable_images(predictor: Predictor, crops: Path) -> None:
    images = predictor.score_images(read_manifest(crops / "manifest.csv"))
    breasts = predictor.score_breasts(images)
    assert breasts["prediction_id"].tolist() == list(dict.fromkeys(breast_ids(images)))
    expected = logit(images["probability"]).groupby(breast_ids(images), sort=False).mean()  # skips NaN
    np.testing.assert_allclose(logit(breasts["probability"]), expected)
    assert (breasts["n_images"].to_numpy() == images.groupby(breast_ids(images), sort=False).size().to_numpy()).all()


def test_a_breast_without_a_usable_image_is_refused(predictor: Predictor, crops: Path) -> None:
    table = read_manifest(crops / "manifest.csv")
    first_breast = breast_ids(table) == breast_ids(table).iloc[0]
    refused = table.assign(status=table["status"].mask(first_breast, "refused"))
    breasts = predictor.score_breasts(predictor.score_images(refused))
    assert breasts["status"].iloc[0] == "refused"
    assert np.isnan(breasts["probability"].iloc[0])
    assert breasts["probability"].iloc[1:].notna().all()


def test_submission_has_the_breasts_of_the_test_table_in_order(run: Path, release: Path, tmp_path: Path) -> None:
    assert main(["predict", str(run / "package"), str(release / "test.csv"), str(tmp_path)]) == 0
    submission = pd.read_csv(tmp_path / "submission.csv")
    expected = pd.read_csv(release / "sample_submission.csv")
    assert submission["prediction_id"].tolist() == expected["prediction_id"].tolist()
    assert submission["cancer"].between(0, 1).all()
    assert len(pd.read_csv(tmp_path / "scores.csv")) == len(pd.read_csv(release / "test.csv"))


def test_refused_inputs_set_the_exit_status_to_1(
    run: Path, release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", str(run / "package"), str(release), str(tmp_path)]) == 1
    assert "refused: image" in capsys.readouterr().err
    assert len(pd.read_csv(tmp_path / "scores.csv")) == len(pd.read_csv(release / "train.csv"))


def score(run: Path, out: Path, *arguments: str | Path) -> tuple[int, pd.DataFrame]:
    """Run `vitmodel predict SOURCE OUT OPTIONS` and return its exit status and its table of images."""
    status = main(["predict", str(run / "package"), *map(str, arguments[:1]), str(out), *map(str, arguments[1:])])
    return status, pd.read_csv(out / "scores.csv", dtype={"image_id": str, "patient_id": str})


@pytest.fixture(scope="module")
def files(release: Path) -> list[Path]:
    """Return the images, five or more, of two patients without faulty images."""
    faulty = set(pd.read_csv(release / "faults.csv", dtype=str)["image_id"])
    folders = sorted({path.parent for path in (release / "train_images").rglob("*.dcm")})
    faultless = [folder for folder in folders if not faulty & {path.stem for path in folder.iterdir()}]
    return [path for folder in faultless[-2:] for path in sorted(folder.iterdir())]


def test_any_mix_of_inputs_gives_one_row_each(
    run: Path,
    files: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Inputs: a file, a folder, a zip, a DICOMDIR, paths on standard input, and missing, empty, damaged or repeated."""
    one, in_folder, in_zip, in_set, listed, *_ = files
    (tmp_path / "folder" / "empty").mkdir(parents=True)
    shutil.copy(in_folder, tmp_path / "folder")
    with zipfile.ZipFile(tmp_path / "archive.zip", "w") as archive:
        archive.write(in_zip, "deep/inside.dcm")
    (tmp_path / "broken.zip").write_bytes((tmp_path / "archive.zip").read_bytes()[:-40])
    disc, dated = FileSet(), dcmread(in_set)
    dated.StudyDate, dated.StudyTime = "20200101", "120000"  # a DICOMDIR requires both
    disc.add(dated)
    disc.write(tmp_path / "disc")
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{listed}\n\n{one}\n{tmp_path / 'nosuch.dcm'}\n"))
    (tmp_path / "disc" / "DICOMDIR").rename(tmp_path / "disc" / "dicomdir")  # some file systems show lower case
    sources = [
        *(one, tmp_path / "folder", tmp_path / "archive.zip", tmp_path / "disc" / "dicomdir", "-"),
        *(tmp_path / "broken.zip", tmp_path / "folder" / "empty"),
    ]
    assert main(["predict", str(run / "package"), *map(str, sources), str(tmp_path / "out")]) == 1
    table = pd.read_csv(tmp_path / "out" / "scores.csv", dtype=str)
    assert len(table) == 8
    scored = table[table["status"] != "refused"]
    assert set(scored["image_id"]) == {
        str(dcmread(path).SOPInstanceUID) for path in (one, in_folder, in_zip, in_set, listed)
    }
    refused = table[table["status"] == "refused"].set_index("reason")["remark"]
    assert "nosuch.dcm" in refused["missing_file"]
    assert sorted(refused.index) == ["missing_file", "not_an_image", "unreadable"]
    expected = Predictor(PredictorConfig(package=run / "package", jobs=1)).score_images(read_release(one)).iloc[0]
    probability = float(scored.set_index("image_id").loc[expected["image_id"], "probability"])
    assert probability == pytest.approx(expected["probability"], abs=1e-6)
    assert "3 refused" in capsys.readouterr().out
    assert "repeat an earlier file: 1;" in caplog.text


def test_an_empty_standard_input_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    with pytest.raises(UsageError, match="standard input names nothing"):
        read_inputs(["-"], "auto")


def test_the_output_folder_must_not_be_a_source(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--out must differ"):
        PredictConfig(package=tmp_path, source=[f"{tmp_path}/."], out=tmp_path)
    with pytest.raises(UsageError, match="--out must differ"):
        ETLConfig(source=tmp_path, out=tmp_path)


def test_an_encrypted_zip_gives_a_refused_row(files: list[Path], tmp_path: Path) -> None:
    archive = tmp_path / "archive.zip"
    with zipfile.ZipFile(archive, "w") as content:
        content.write(files[0], "inside.dcm")
    raw = bytearray(archive.read_bytes())
    raw[raw.rindex(b"PK\1\2") + 8] |= 1  # the flag of the central directory (APPNOTE 4.4.4)
    archive.write_bytes(raw)
    table = read_inputs([str(archive)], "auto")
    assert (table["status"].tolist(), table["reason"].tolist()) == (["refused"], ["unreadable"])
    assert "encrypted" in table["remark"].iloc[0]


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_damaged_member_of_a_zip_is_refused(method: int, tmp_path: Path) -> None:
    """Each compression method raises a different exception for damaged data."""
    archive = tmp_path / "archive.zip"
    with zipfile.ZipFile(archive, "w", method) as content:
        content.writestr("image.dcm", np.random.default_rng(0).bytes(5000))
    damaged = bytearray(archive.read_bytes())
    damaged[60:120] = bytes(60)
    archive.write_bytes(damaged)
    (path,) = read_inputs([str(archive)], "auto")["path"]
    record = crop_image(SourceImage(Path(path)), Preprocessing()).record
    assert (record["status"], record["reason"]) == ("refused", "unreadable")
    assert str(record["remark"]).startswith(f"{archive}/image.dcm is damaged in its archive")


def test_a_zip_without_an_image_is_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "archive.zip", "w") as content:
        content.writestr("readme.txt", "no image")
    (remark,) = read_inputs([str(tmp_path / "archive.zip")], "auto")["remark"]
    assert remark.startswith(f"{tmp_path / 'archive.zip'} contains no image")


def test_an_error_in_a_table_within_a_zip_names_zip_and_member(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "archive.zip", "w") as content:
        content.writestr("manifest.csv", "image_id,patient_id,laterality,view,path,status\n1,p,L,CC,,perhaps\n")
    with pytest.raises(UsageError) as caught:
        read_inputs([str(tmp_path / "archive.zip")], "auto")
    assert str(caught.value).startswith(f"{tmp_path / 'archive.zip'}/manifest.csv")


def test_a_refused_input_given_twice_counts_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "empty").mkdir()
    assert len(read_inputs([str(tmp_path / "empty")] * 2, "auto")) == 1
    assert "repeat an earlier file: 1;" in caplog.text


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_a_second_run_over_an_archive_scores_only_what_changed(
    kind: str, run: Path, files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "exam"
    folder.mkdir()
    for file in files[:2]:
        shutil.copy(file, folder)
    status, expected = score(run, tmp_path / "expected", folder)
    assert status == 0
    archive = shutil.make_archive(str(tmp_path / "exam"), kind, folder)
    status, table = score(run, tmp_path / "out", archive)
    assert status == 0
    columns = ["image_id", "patient_id", "laterality", "view", "probability", "source_sha256"]
    pd.testing.assert_frame_equal(table[columns], expected[columns])
    capsys.readouterr()
    assert main(["predict", str(run / "package"), archive, str(tmp_path / "out"), "--resume"]) == 0
    assert "2 of 2 images are scored already" in capsys.readouterr().out


def test_inputs_without_any_usable_image_give_rows_and_exit_status_1(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.dcm").write_text("no image")
    status, table = score(run, tmp_path / "out", tmp_path / "text.dcm")
    assert status == 1
    assert table["reason"].tolist() == ["not_an_image"]
    assert table["probability"].isna().all()
    assert "no input could be scored" in capsys.readouterr().err


def test_refused_rows_without_a_path_keep_their_own_verdicts(run: Path, tmp_path: Path) -> None:
    refused = pd.DataFrame(
        {"image_id": ["1", "2"], "patient_id": "p", "laterality": "", "view": "", "path": "", "status": "refused"}
    )
    refused.assign(reason=["blank", "colour"], remark=["first", "second"]).to_csv(
        tmp_path / "manifest.csv", index=False
    )
    _, table = score(run, tmp_path / "out", tmp_path / "manifest.csv")
    assert table["reason"].tolist() == ["blank", "colour"]


def test_a_killed_run_resumes_to_the_same_tables(
    run: Path, files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    for path in files:
        (folder / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / path.parent.name)
    _, whole = score(run, out, folder)
    journal = (out / "journal.jsonl").read_bytes().splitlines(keepends=True)
    (out / "journal.jsonl").write_bytes(
        b"".join(journal[:3]) + journal[3][:50]
    )  # killed while it wrote the fourth line
    capsys.readouterr()
    _, resumed = score(run, out, folder, "--resume")
    assert f"3 of {len(files)} images are scored already" in capsys.readouterr().out
    pd.testing.assert_frame_equal(resumed, whole)
    changed = next(folder.rglob("*.dcm"))
    changed.write_bytes(b"damaged")
    _, again = score(run, out, folder, "--resume")
    assert f"{len(files) - 1} of {len(files)} images are scored already" in capsys.readouterr().out
    assert (again["status"] == "refused").sum() == 1
    score(run, out, folder, "--resume", "--flip")  # other options: no result is kept
    assert "scored already" not in capsys.readouterr().out


def test_an_ensemble_is_the_mean_of_its_packages(run: Path, crops: Path, tmp_path: Path) -> None:
    table = read_manifest(crops / "manifest.csv").head(6)
    shutil.copytree(run / "package", tmp_path / "other")
    document = json.loads((tmp_path / "other" / "config.json").read_text())
    document["calibration"]["intercept"] = document["calibration"].get("intercept", 0.0) + 1
    document["decision"]["threshold"] = 0.9
    seal(tmp_path / "other", document)
    single = [Predictor(PredictorConfig(package=package, jobs=1)) for package in (run / "package", tmp_path / "other")]
    both = Predictor(PredictorConfig(package=run / "package", ensemble=[tmp_path / "other"], jobs=1))
    separate = [predictor.score_images(table)["probability"].to_numpy() for predictor in single]
    assert np.nanmax(np.abs(separate[0] - separate[1])) > 0.01
    np.testing.assert_allclose(both.score_images(table)["probability"], np.mean(separate, axis=0))
    assert both.ensemble.threshold == pytest.approx((single[0].ensemble.threshold + 0.9) / 2)
    document["preprocessing"] = document["preprocessing"].replace('"bits": 8', '"bits": 16')
    seal(tmp_path / "other", document)
    with pytest.raises(UsageError, match="preprocessing"):
        Predictor(both.config)


def test_with_flip_averaging_an_image_and_its_flip_score_alike(
    predictor: Predictor, crops: Path, tmp_path: Path
) -> None:
    table = usable_rows(read_manifest(crops / "manifest.csv")).head(4)
    upside_down = table.assign(path=[str(tmp_path / f"{name}.png") for name in table["image_id"]])
    for old, new in zip(table["path"], upside_down["path"], strict=True):
        cv2.imwrite(new, cv2.imread(old, cv2.IMREAD_UNCHANGED)[::-1])
    flip = Predictor(replace(predictor.config, flip=True))
    plain = [predictor.score_images(rows)["score"].to_numpy() for rows in (table, upside_down)]
    averaged = [flip.score_images(rows)["score"].to_numpy() for rows in (table, upside_down)]
    assert np.abs(plain[0] - plain[1]).max() > 1e-4
    np.testing.assert_allclose(averaged[0], averaged[1], atol=1e-6)
    np.testing.assert_allclose(logit(averaged[0]), (logit(plain[0]) + logit(plain[1])) / 2, atol=1e-5)


def test_a_copy_counts_once_and_a_single_view_is_reported(predictor: Predictor, crops: Path) -> None:
    table = usable_rows(read_manifest(crops / "manifest.csv"))
    breast = table[breast_ids(table) == breast_ids(table).iloc[0]].head(2)
    copied = pd.concat([breast, breast.head(1).assign(image_id="copy")], ignore_index=True)
    images = predictor.score_images(copied)
    assert images["reason"].fillna("").str.contains("duplicate").tolist() == [False, False, True]
    (scored,) = predictor.score_breasts(images).itertuples()
    (expected,) = predictor.score_breasts(predictor.score_images(breast)).itertuples()
    assert scored.probability == expected.probability
    assert (expected.status, scored.status) == ("ok", "warned")
    (one_view,) = predictor.score_breasts(predictor.score_images(breast.head(1))).itertuples()
    assert (one_view.status, one_view.reason) == ("warned", "one_view")


def test_images_without_laterality_are_reported(predictor: Predictor, crops: Path) -> None:
    table = usable_rows(read_manifest(crops / "manifest.csv")).head(3).assign(laterality="", patient_id=["a", "a", "b"])
    images = predictor.score_images(table)
    assert has_code(images, "no_laterality").tolist() == [True, True, False]
    assert fallback_messages(images)[0].startswith("2 of 3 images have no laterality")
    assert predictor.score_breasts(images)["status"].iloc[0] == "warned"


def test_a_breasts_probability_is_calibrated_on_the_breasts_of_validation(run: Path, predictor: Predictor) -> None:
    """The package gives the scores of validation images that training wrote, calibrated as its config.json says."""
    images = pd.read_csv(run / "validation.csv", dtype={"patient_id": str})
    images["logit"] = logit(images["score"])
    breasts = images.groupby(["patient_id", "laterality"], sort=False).agg({"cancer": "max", "logit": "mean"})
    fitted = predictor.ensemble.packages[0].calibration
    table = read_manifest(run / "manifest.csv").query("split == 'val'")
    scored = predictor.score_breasts(predictor.score_images(table))
    scored = scored.set_index(["patient_id", "laterality"]).loc[breasts.index]
    np.testing.assert_allclose(scored["probability"], fitted.apply(breasts["logit"]), rtol=1e-4)
    assert predictor.ensemble.package["calibration"]["prevalence"] == breasts["cancer"].mean()


def test_a_package_calibrated_per_image_keeps_its_calibration(run: Path, crops: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "package", tmp_path / "package")
    document = json.loads((tmp_path / "package" / "config.json").read_text())
    del document["calibration"]["level"]
    document["decision"]["aggregate"] = "mean"
    seal(tmp_path / "package", document)
    predictor = Predictor(PredictorConfig(package=tmp_path / "package", jobs=1))
    images = predictor.score_images(read_manifest(crops / "manifest.csv"))
    assert predictor.ensemble.calibration_level == "image"
    expected = images["probability"].groupby(breast_ids(images), sort=False).mean()
    np.testing.assert_allclose(predictor.score_breasts(images)["probability"], expected)


def test_copies_are_left_out_of_training_evaluation_and_comparison(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    table = read_manifest(run / "manifest.csv")
    copied = table[table["split"] == "test"].head(1).assign(image_id="copy")
    for column in ("path", "source_path"):
        copied[column] = str(shutil.copy(copied[column].item(), tmp_path / f"copied_{column}"))
    write_manifest(pd.concat([table, copied], ignore_index=True), tmp_path / "manifest.csv")
    metrics = []
    for name, manifest in (("with", tmp_path / "manifest.csv"), ("without", run / "manifest.csv")):
        command = ["evaluate", str(run / "package"), str(manifest), str(tmp_path / name)]
        assert main([*command, "--replicates", "100", "--no-audit", "--no-card"]) == 0
        metrics.append(json.loads((tmp_path / name / "metrics.json").read_text()))
    assert [document["method"]["Left out"][0] for document in metrics] == ["1", "0"]
    assert all(metrics[0][level] == metrics[1][level] for level in ("image", "breast", "patient"))
    capsys.readouterr()
    command = ["compare", *[str(run / "package")] * 2, "--manifest", str(tmp_path / "manifest.csv")]
    assert main([*command, "--replicates", "100", "--split", "all"]) == 0
    printed = capsys.readouterr().out
    assert "copies of another image of their breast: 1" in printed
    assert "difference from A 0.000 (0.000 to 0.000)" in printed
    rows = labelled_crops(TrainConfig(manifest=tmp_path / "manifest.csv", run=tmp_path / "run"))
    assert set(rows["image_id"]) == set(table["image_id"])
    assert "1 copies of another image of the same breast are left out" in caplog.text


def test_the_probability_of_a_patient_is_that_of_her_worse_breast(predictor: Predictor, crops: Path) -> None:
    breasts = predictor.score_breasts(predictor.score_images(read_manifest(crops / "manifest.csv")))
    patients = predictor.score_patients(breasts)
    assert patients["patient_id"].tolist() == list(dict.fromkeys(breasts["patient_id"]))
    np.testing.assert_allclose(patients["probability"], breasts.groupby("patient_id", sort=False)["probability"].max())


def test_csv_parquet_and_json_lines_hold_the_same_tables(run: Path, files: list[Path], tmp_path: Path) -> None:
    _, images = score(run, tmp_path, files[0].parent, "--parquet", "--jsonl")
    for name in ("scores", "breast_scores", "patient_scores"):
        table = pd.read_csv(tmp_path / f"{name}.csv")
        assert pd.read_parquet(tmp_path / f"{name}.parquet").columns.tolist() == table.columns.tolist()
        lines = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        assert [line["probability"] for line in lines] == pytest.approx(table["probability"].tolist())
    assert len(images) == len(list(files[0].parent.iterdir()))


def test_heat_maps_and_reports_are_written_for_each_image_of_a_folder(
    run: Path, files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: sha256_file(path) for path in files}
    status, images = score(run, tmp_path, files[0].parent, "--explain", "gradient", "--dicom")
    assert status == 0
    assert {path.stem for path in (tmp_path / "overlays").iterdir()} == set(images["image_id"])
    results = [dcmread(path) for path in (tmp_path / "dicom").iterdir()]
    assert sorted(result.Modality for result in results) == ["OT"] * len(images) + ["SR"] * (len(images) + 1)
    assert not any(result.file_meta.TransferSyntaxUID.is_compressed for result in results)
    assert {path: sha256_file(path) for path in files} == before
    capsys.readouterr()
    deleted = next((tmp_path / "overlays").iterdir())
    deleted.unlink()
    score(run, tmp_path, files[0].parent, "--explain", "gradient", "--dicom", "--resume")
    assert f"{len(images) - 1} of {len(images)} images are scored already" in capsys.readouterr().out
    assert deleted.exists(), "a deleted heat map was not drawn again"


def test_heat_maps_of_crops_made_by_etl_equal_those_of_their_sources(
    run: Path, release: Path, crops: Path, tmp_path: Path
) -> None:
    pictures = []
    for name, place in (("crops", crops / "manifest.csv"), ("sources", release)):
        _, images = score(run, tmp_path / name, place, "--explain", "rollout")
        folder = tmp_path / name / "overlays"
        assert {path.stem for path in folder.iterdir()} == set(images.loc[images["score"].notna(), "image_id"].map(str))
        pictures.append({path.name: path.read_bytes() for path in folder.iterdir()})
    shared = pictures[0].keys() & pictures[1].keys()
    assert shared
    assert all(pictures[0][name] == pictures[1][name] for name in shared)


@pytest.mark.parametrize(("key", "named"), [("calibration", "calibration"), ("preprocessing", "newer")])
def test_a_package_of_another_version_is_named(
    key: str, named: str, run: Path, files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run / "package", tmp_path / "package")
    document = json.loads((tmp_path / "package" / "config.json").read_text())
    if key == "preprocessing":  # a field that this version does not know
        document[key] = document[key].replace("{", '{"sharpen": 2, ')
    else:
        del document[key]
    seal(tmp_path / "package", document)
    assert main(["predict", str(tmp_path / "package"), str(files[0]), str(tmp_path / "out")]) == 1
    message = capsys.readouterr().err
    assert str(tmp_path / "package" / "config.json") in message
    assert named in message


def test_evaluation_measures_the_test_patients_at_three_levels(run: Path, tmp_path: Path) -> None:
    arguments = [str(run / "package"), str(run / "manifest.csv"), str(tmp_path), "--replicates", "100", "--no-card"]
    assert main(["evaluate", *arguments]) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    table = read_manifest(run / "manifest.csv").query("split == 'test'")
    assert (metrics["split"], metrics["seen_images"]) == ("test", 0)
    assert metrics["image"]["units"] == len(table)
    assert metrics["breast"]["units"] == breast_ids(table).nunique()
    assert metrics["patient"]["units"] == table["patient_id"].nunique()
    report = (tmp_path / "report.html").read_text()
    assert "not a medical device" in report
    assert f"{metrics['breast']['intervals']['auroc']['value']:.3f}" in report


def test_an_evaluation_reports_undefined_metrics(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Missing positives, unknown labels and crops with other preprocessing are reported, and all other metrics too."""
    table = read_manifest(run / "manifest.csv").query("split == 'test'").copy()
    table["cancer"] = table["cancer"].where(table["cancer"] == 0)
    first = table.index[0]
    table["preprocessing"] = table["preprocessing"].mask(table.index == first, "{}")
    write_manifest(table, tmp_path / "manifest.csv")
    package = tmp_path / "package"
    shutil.copytree(run / "package", package)
    command = ["evaluate", str(package), str(tmp_path / "manifest.csv"), str(tmp_path / "out")]
    assert main([*command, "--replicates", "100", "--prevalence", "0.02"]) == 0
    printed = capsys.readouterr().out
    assert "has cancer: ranking, sensitivity and pF1 are not defined" in printed
    assert f"1 of {len(table)} crops have another preprocessing than the model" in printed
    assert "AUROC per patient: not defined, " in printed
    section = (package / "MODEL_CARD.md").read_text().partition("## Evaluation")[2]
    assert "nan" not in re.findall(r"\w+", printed + section)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["breast"]["unknown"] > 0 == metrics["breast"]["positives"]
    assert metrics["breast"]["intervals"]["auroc"]["value"] is None
    assert metrics["breast"]["intervals"]["specificity"]["value"] is not None
    assert metrics["elsewhere"] is None
    assert metrics["method"]["Prevalence"].endswith("not corrected")
    assert metrics["cross_fitted"] == metrics["audit"]["baselines"] == []
    report = (tmp_path / "out" / "report.html").read_text()
    for message in (
        "No cross-fitted thresholds:",
        "No cross-fitted calibration:",
        "No baselines without pixels:",
    ):
        assert printed.count(message) == report.count(message) == 1


def test_the_model_card_holds_the_latest_evaluation_once(run: Path, tmp_path: Path) -> None:
    package = tmp_path / "package"
    shutil.copytree(run / "package", package)
    for replicates in ("100", "101"):
        command = ["evaluate", str(package), str(run / "manifest.csv"), str(tmp_path / "out"), "--no-audit"]
        assert main([*command, "--replicates", replicates]) == 0
    card = (package / "MODEL_CARD.md").read_text()
    assert card.startswith((run / "package" / "MODEL_CARD.md").read_text().partition("\n## Evaluation")[0].rstrip())
    assert card.count("## Evaluation") == 1
    assert "--replicates 101" in card
    assert "--replicates 100 " not in card
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert f"{metrics['breast']['intervals']['auroc']['value']:.3f}" in card


def test_evaluation_reports_how_many_images_the_training_has_seen(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", str(run / "package"), str(run / "manifest.csv"), str(tmp_path), "--split", "train"]
    assert main([*command, "--replicates", "100", "--no-audit", "--no-card"]) == 0
    images = len(read_manifest(run / "manifest.csv").query("split == 'train'"))
    assert f"{images} of {images} images were seen" in capsys.readouterr().out


def test_evaluation_hashes_the_sources_it_reads_and_reports_images_without_a_hash_as_unknown(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = read_manifest(run / "manifest.csv").query("split == 'train'").assign(source_sha256=None)
    recropped = np.arange(len(table)) < 3  # these have another preprocessing, so that their sources are read
    write_manifest(table.assign(preprocessing=table["preprocessing"].mask(recropped, "{}")), tmp_path / "manifest.csv")
    command = ["evaluate", str(run / "package"), str(tmp_path / "manifest.csv"), str(tmp_path), "--split", "all"]
    assert main([*command, "--replicates", "100", "--no-audit", "--no-card"]) == 0
    printed = capsys.readouterr().out
    assert f"3 of {len(table)} images were seen" in printed
    assert f"{len(table) - 3} of {len(table)} images have no hash" in printed
    assert "images have no hash: whether" in (tmp_path / "report.html").read_text()


def test_seen_images_are_recognised_by_their_hash(run: Path, predictor: Predictor) -> None:
    table = read_manifest(run / "manifest.csv")
    assert seen_in_training(table, predictor.ensemble.package["data"]).sum() == (table["split"] != "test").sum()


@pytest.mark.parametrize(
    ("change", "status", "named"),
    [
        (lambda table: table.assign(cancer=np.nan), 2, "cancer"),
        (lambda table: table.assign(split="train"), 2, "test"),
        (lambda table: table.assign(status="refused"), 2, "refused"),
    ],
)
def test_a_manifest_without_measurable_images_is_refused(
    change, status: int, named: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_manifest(change(read_manifest(run / "manifest.csv")), tmp_path / "manifest.csv")
    arguments = [str(run / "package"), str(tmp_path / "manifest.csv"), str(tmp_path / "out"), "--split", "test"]
    assert main(["evaluate", *arguments]) == status
    assert named in capsys.readouterr().err


def test_loading_a_package_imports_neither_compiler_nor_trainer(run: Path) -> None:
    """Each of these libraries takes seconds to import."""
    code = (
        "import sys, vitmodel.commands.predict, vitmodel.model.package as p; "
        f"p.load_models({str(run / 'package')!r}); print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "torch" in loaded
    assert not loaded & {"torch._dynamo", "sympy", "lightning", "sklearn", "matplotlib", "highdicom", "captum"}


def rewrite(package: Path, old: str, new: str) -> None:
    """Replace a text in the package's config.json."""
    text = (package / "config.json").read_text()
    assert old in text
    seal(package, json.loads(text.replace(old, new, 1)))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda package: shutil.rmtree(package), "package"),
        (lambda package: (package / "model.safetensors").write_bytes(b"torn"), "model.safetensors"),
        (
            lambda package: rewrite(package, '"format_version": 1,', '"format_version": 99,'),
            "99, this vitmodel reads 1; a newer vitmodel wrote it",
        ),
        (
            lambda package: rewrite(package, '"format_version": 1,', '"format_version": 0,'),
            "0, this vitmodel reads 1; use the vitmodel that wrote it",
        ),
        (
            lambda package: rewrite(package, '"decision": {', '"verdict": {'),
            "'decision' is missing; use the version of vitmodel that wrote",
        ),
    ],
)
def test_a_damaged_package_is_named(
    damage, named: str, run: Path, crops: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    package = tmp_path / "package"
    shutil.copytree(run / "package", package)
    damage(package)
    assert main(["predict", str(package), str(crops / "manifest.csv"), str(tmp_path / "out")]) in (1, 2)
    assert named in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_info_describes_a_package_and_a_manifest(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(run / "package")]) == 0
    assert "not a medical device" in capsys.readouterr().out
    assert main(["info", str(run / "manifest.csv")]) == 0
    assert f"{len(usable_rows(read_manifest(run / 'manifest.csv')))} images" in capsys.readouterr().out
    assert main(["info", str(run)]) == 2


def test_kaggles_test_images_become_a_valid_submission(run: Path, shared_data: Path, tmp_path: Path) -> None:
    """Kaggle's own test.csv is used; the submission has all its ids in order, also if a view of a breast is missing."""
    shutil.copy(shared_data / "metadata" / "rsna" / "test.csv", tmp_path)
    (tmp_path / "test_images").mkdir()
    (tmp_path / "test_images" / "10008").symlink_to(shared_data / "rsna_dicom" / "dicom" / "10008")
    status, images = score(run, tmp_path / "out", tmp_path / "test.csv")
    assert status == int((images["status"] == "refused").any())
    assert images["image_id"].tolist() == pd.read_csv(tmp_path / "test.csv", dtype=str)["image_id"].tolist()
    submission = pd.read_csv(tmp_path / "out" / "submission.csv")
    expected = pd.read_csv(shared_data / "metadata" / "rsna" / "sample_submission.csv")
    assert submission.columns.tolist() == expected.columns.tolist()
    assert submission["prediction_id"].tolist() == expected["prediction_id"].tolist()
    assert submission["cancer"].between(0, 1).all()


def test_real_files_of_the_challenge_are_all_scored(run: Path, shared_data: Path, tmp_path: Path) -> None:
    assert main(["predict", str(run / "package"), str(shared_data / "rsna_dicom"), str(tmp_path)]) == 0
    assert pd.read_csv(tmp_path / "scores.csv")["status"].tolist() == ["ok"] * 8


def test_a_study_of_two_patients_is_a_warning_in_the_tables(run: Path, files: list[Path], tmp_path: Path) -> None:
    for number, patient in enumerate(("A", "A", "B")):
        image = dcmread(files[number])
        image.PatientID, image.StudyInstanceUID = patient, "1.2.3" if number else "1.2.4"
        image.save_as(tmp_path / f"{number}.dcm")
    _, images = score(run, tmp_path / "out", tmp_path)
    shared = images["reason"].fillna("").str.contains("shared_study")
    assert shared.tolist() == [False, True, True]
    assert images["remark"][shared].str.contains("correct the headers").all()
    assert images["probability"].notna().all()
    breasts = pd.read_csv(tmp_path / "out" / "breast_scores.csv", dtype={"patient_id": str})
    assert set(breasts.loc[breasts["reason"].fillna("").str.contains("shared_study"), "patient_id"]) == {"A", "B"}


CREATION = re.compile(r"(Creation|Content|Contribution)(Date|Time|DateTime)|Series(Date|Time)|Observation.*DateTime")


def without_times(dataset: Dataset) -> Dataset:
    """Return the data set without the times at which it was made, at any depth."""
    for element in list(dataset.iterall()):
        if CREATION.search(element.keyword) or element.VR in ("DT", "TM", "DA"):
            element.value = None
    return dataset


def dicom_results(run: Path, out: Path, image: Path, *arguments: str) -> dict[str, Dataset]:
    assert score(run, out, image, "--dicom", *arguments)[0] == 0
    return {path.name: dcmread(path) for path in sorted((out / "dicom").iterdir())}


def test_the_same_question_gives_the_same_bytes_and_another_method_or_version_other_uids(
    run: Path, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradient = ["--explain", "gradient"]
    first = dicom_results(run, tmp_path / "first", files[0], *gradient)
    again = dicom_results(run, tmp_path / "again", files[0], *gradient)
    assert first.keys() == again.keys()
    for name, result in first.items():
        contents = []
        for dataset in (result, again[name]):
            buffer = io.BytesIO()
            without_times(dataset).save_as(buffer)
            contents.append(buffer.getvalue())
        assert contents[0] == contents[1], name
    others = [dicom_results(run, tmp_path / "method", files[0], "--explain", "occlusion")]
    monkeypatch.setattr("vitmodel.scoring.sources.__version__", "9.9")
    others.append(dicom_results(run, tmp_path / "version", files[0], *gradient))
    for other in others:
        assert len(other) == len(first)
        assert not other.keys() & first.keys()


def test_reports_of_another_precision_have_other_uids(exported: Path, files: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    names = []
    for precision in ("fp32", "int8", "fp32"):
        out = tmp_path / f"{len(names)}"
        runtime = ["--runtime", "onnx", "--precision", precision]
        assert main(["predict", str(exported), str(files[0]), str(out), "--dicom", "sr", *runtime]) == 0
        names.append({path.name for path in (out / "dicom").iterdir()})
    assert names[0] == names[2]
    assert not names[0] & names[1]


@pytest.mark.parametrize("size", ["150k", "1500k"])
def test_a_full_disk_ends_with_a_message_and_loses_nothing(
    size: str, run: Path, files: list[Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The first size is too small for the first image's results, the second one for those of all images."""
    options = ["--explain", "gradient", "--dicom"]
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        command = ["predict", str(run / "package"), str(files[0].parent), str(small), *options]
        assert main(command) == 1
        errors = capfd.readouterr().err
        assert "No space left on device" in errors.splitlines()[-1]
        assert "Traceback" not in errors
        written = list(small.rglob("*.dcm"))
        assert all(dcmread(path).SOPInstanceUID in path.name for path in written)
        subprocess.run(["mount", "-o", "remount,size=64m", str(small)], check=True)
        assert main([*command, "--resume"]) == 0
        score(run, tmp_path / "large", files[0].parent, *options)
        names = [{path.name for path in folder.rglob("*.dcm")} for folder in (small, tmp_path / "large")]
        assert names[0] == names[1]
        assert {path.name for path in written} <= names[0]
        resumed, undisturbed = (pd.read_csv(folder / "scores.csv") for folder in (small, tmp_path / "large"))
        np.testing.assert_allclose(resumed["probability"], undisturbed["probability"], atol=1e-6)
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)
