"""The synthetic release has RSNA's format, is valid DICOM and reproducible, and only its pixels reveal the label."""

from __future__ import annotations

import shutil
import subprocess
import warnings
from dataclasses import replace
from pathlib import Path

import gdcm
import imagecodecs
import numpy as np
import openjpeg
import pandas as pd
import pydicom
import pytest
from pydicom.encaps import generate_frames
from pydicom.pixels import apply_voi_lut
from pydicom.uid import JPEG2000Lossless, JPEGLosslessSV1
from sklearn.metrics import roc_auc_score

from vitmodel.config import Size, SynthConfig
from vitmodel.errors import UsageError
from vitmodel.phantoms.dicom import FAULTS, MACHINES, AcquisitionInfo, Machine, encode_dicom
from vitmodel.phantoms.lesions import CANCER_KINDS
from vitmodel.phantoms.release import PatientPlan, plan_patients, write_release

SIZE = Size(256, 208)


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a release of 14 patients with faults; with this seed machine 49 mirrors some patients but not others."""
    out = tmp_path_factory.mktemp("synthetic") / "release"
    return write_release(SynthConfig(out=out, patients=14, seed=1, size=SIZE, difficulty=0.2, faults=True, jobs=1))


def table(release: Path, name: str) -> pd.DataFrame:
    return pd.read_csv(release / f"{name}.csv")


def files(release: Path) -> list[Path]:
    """Return the files that are not broken on purpose."""
    broken = set(table(release, "faults").image_id.astype(str))
    return sorted(path for path in release.rglob("*.dcm") if path.stem not in broken)


@pytest.fixture(scope="module")
def large_plan() -> list[PatientPlan]:
    return plan_patients(SynthConfig(out=Path("unused"), patients=3000, positives=0.3))


def test_tables_have_the_columns_and_types_of_the_original(release: Path, shared_data: Path) -> None:
    for name in ("train", "test", "sample_submission"):
        ours, original = table(release, name), pd.read_csv(shared_data / "metadata" / "rsna" / f"{name}.csv")
        assert list(ours.columns) == list(original.columns)
        for column in ours.columns.drop("age", errors="ignore"):  # RSNA lacks 37 of 51,844 ages; ours may be complete
            assert ours[column].dtype == original[column].dtype, column


def test_labels_follow_the_conventions_of_each_site(large_plan: list[PatientPlan]) -> None:
    rows = pd.DataFrame([{"site": p.machine.site, **labels} for p in large_plan for labels in p.labels.values()])
    site_1 = rows[rows.site == 1]
    site_2 = rows[rows.site == 2]
    assert site_2.density.isna().all()
    assert site_2.BIRADS.isna().mean() > 0.6
    assert set(site_2.BIRADS.dropna()) == {0}
    assert site_1.density.notna().all()
    assert set(site_1.BIRADS.dropna()) == {0, 1, 2}
    positive = rows[rows.cancer == 1]
    negative = rows[rows.cancer == 0]
    assert (positive.biopsy == 1).all()
    assert not positive.difficult_negative_case.any()
    assert (negative.invasive == 0).all()
    assert (negative.BIRADS[negative.difficult_negative_case] == 0).all()


def test_only_the_lesions_reveal_the_label(large_plan: list[PatientPlan]) -> None:
    """Ids, age, implant, machine, side, mirroring and benign findings have an AUROC within 4 standard errors of 0.5."""
    breasts = pd.DataFrame(
        {
            "cancer": any(lesion.kind in CANCER_KINDS for lesion in breast.lesions),
            "label": bool(patient.labels[side]["cancer"]),
            "patient_id": patient.patient_id,
            "image_id": min(image.image_id for image in patient.planned_images),
            "images": len(patient.planned_images),
            "age": patient.age or 58,
            "implant": breast.implant,
            "machine": patient.machine.machine_id,
            "site": patient.machine.site,
            "mirrored": patient.mirrored,
            "left": side == "L",
            "depth": breast.depth_mm,
            "density": breast.density > "B",
            "benign findings": sum(lesion.kind not in CANCER_KINDS for lesion in breast.lesions),
        }
        for patient in large_plan
        for side, breast in patient.breasts.items()
    )
    assert (breasts.cancer == breasts.label).all()
    positive = breasts.label.sum()
    negative = (~breasts.label).sum()
    error = np.sqrt((positive + negative + 1) / (12 * positive * negative))
    for column in breasts.columns.drop(["cancer", "label"]):
        assert roc_auc_score(breasts.label, breasts[column]) == pytest.approx(0.5, abs=4 * error), column


def test_the_share_of_positives_is_exact_and_cancer_rarely_bilateral(large_plan: list[PatientPlan]) -> None:
    train = [patient for patient in large_plan if patient.split == "train"]
    cancers = [sum(labels["cancer"] == 1 for labels in patient.labels.values()) for patient in train]
    assert sum(count > 0 for count in cancers) == 900
    assert 0 < sum(count == 2 for count in cancers) < 50
    ids = [image.image_id for patient in large_plan for image in patient.planned_images]
    assert len(set(ids)) == len(ids)


def test_pydicom_reads_every_file_without_warnings_and_headers_agree_with_the_table(release: Path) -> None:
    train = table(release, "train").set_index("image_id")
    seen = set()
    for path in files(release):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            file = pydicom.dcmread(path)
            pixels = file.pixel_array
        assert pixels.shape == SIZE
        if path.parts[-3] == "train_images":
            row = train.loc[int(path.stem)]
            seen.add(int(path.stem))
            assert file.PatientID == str(row.patient_id)
            assert file.ImageLaterality == row.laterality
            assert file.ViewPosition == row["view"]
            assert file.PhotometricInterpretation == ("MONOCHROME2" if row.site_id == 1 else "MONOCHROME1")
            assert file.BitsStored == (12 if row.site_id == 1 else 16)
    assert seen == set(train.index) - set(table(release, "faults").image_id)


def decode_twice(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the stored pixels as decoded by GDCM and by a second decoder that depends on the transfer syntax."""
    reader = gdcm.ImageReader()
    reader.SetFileName(str(path))
    assert reader.Read()
    file = pydicom.dcmread(path)
    buffer = reader.GetImage().GetBuffer().encode("utf-8", "surrogateescape")
    first = np.frombuffer(buffer, np.uint16).reshape(file.Rows, file.Columns)
    frame = next(generate_frames(file.PixelData, number_of_frames=1))
    if file.file_meta.TransferSyntaxUID == JPEGLosslessSV1:
        return first, imagecodecs.jpegsof3_decode(frame)
    if file.file_meta.TransferSyntaxUID == JPEG2000Lossless:
        return first, openjpeg.decode(frame)
    file.pixel_array_options(decoding_plugin="pydicom")
    return first, file.pixel_array


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: f"machine{machine.machine_id}")
def test_the_window_displays_the_encoded_picture(machine: Machine, tmp_path: Path) -> None:
    """Two decoders agree on the stored values, and the window maps them back to the original picture."""
    picture = np.linspace(0, 1, SIZE.height * SIZE.width, dtype=np.float32).reshape(SIZE)
    picture[:, 100:] = np.random.default_rng(0).uniform(0, 1, (SIZE.height, SIZE.width - 100))
    path = tmp_path / "image.dcm"
    path.write_bytes(encode_dicom(picture, AcquisitionInfo(7, 8, "L", "CC", 50, False, 50, 0.1, "L"), machine))
    file = pydicom.dcmread(path)
    assert file.file_meta.TransferSyntaxUID == machine.transfer_syntax
    stored, second = decode_twice(path)
    np.testing.assert_array_equal(stored, second)
    displayed = apply_voi_lut(stored.astype(np.float64), file, index=0)
    displayed = (displayed - displayed.min()) / (displayed.max() - displayed.min())
    np.testing.assert_allclose(1 - displayed if machine.site == 2 else displayed, picture, atol=0.006)


def test_dciodvfy_finds_no_error(release: Path) -> None:
    validator = shutil.which("dciodvfy")
    if validator is None:
        pytest.skip("dciodvfy (Debian package dicom3tools) is not installed")
    for path in files(release)[::3]:
        result = subprocess.run([validator, path], capture_output=True, text=True, check=False)
        assert "MammographyImageForPresentation" in result.stderr + result.stdout
        assert "Error" not in result.stderr + result.stdout, result.stderr


def test_only_machine_49_mirrors_images_and_always_all_of_a_patient(release: Path) -> None:
    mirrored: dict[tuple[int, int], set[bool]] = {}
    good_files = set(files(release))
    for row in table(release, "train").itertuples():
        path = release / "train_images" / str(row.patient_id) / f"{row.image_id}.dcm"
        if path in good_files:
            file = pydicom.dcmread(path)
            tissue = file.pixel_array != file.PixelPaddingValue
            chest_wall_left = file.PatientOrientation[0] == "A"
            if row.machine_id == 49:
                chest_wall_left = tissue[:, :20].mean() > tissue[:, -20:].mean()
            is_mirrored = chest_wall_left != (row.laterality == "L")
            mirrored.setdefault((row.machine_id, row.patient_id), set()).add(is_mirrored)
    assert all(len(values) == 1 for values in mirrored.values())
    machine_49 = [values for (machine, _), values in mirrored.items() if machine == 49]
    assert set.union(*machine_49) == {True, False}
    assert not any(True in values for (machine, _), values in mirrored.items() if machine != 49)


def test_lesion_boxes_agree_with_the_labels_and_surround_bright_pixels(release: Path) -> None:
    lesions = table(release, "lesions")
    train = table(release, "train")
    faulty = set(table(release, "faults").image_id)
    assert set(lesions.image_id[lesions.cancer == 1]) == set(train.image_id[train.cancer == 1]) - faulty
    assert set(lesions.image_id) <= set(train.image_id)
    is_bright = []
    for lesion in lesions[lesions.kind.str.endswith("_mass")].itertuples():
        file = pydicom.dcmread(release / "train_images" / str(lesion.patient_id) / f"{lesion.image_id}.dcm")
        stored = file.pixel_array.astype(float) * (-1 if file.PhotometricInterpretation == "MONOCHROME1" else 1)
        assert 0 <= lesion.x0 < lesion.x1 <= SIZE.width
        assert 0 <= lesion.y0 < lesion.y1 <= SIZE.height
        x, y = (lesion.x0 + lesion.x1) // 2, (lesion.y0 + lesion.y1) // 2
        tissue = stored[np.abs(stored) != abs(file.PixelPaddingValue)]
        is_bright.append(np.median(stored[y - 2 : y + 3, x - 2 : x + 3]) > np.percentile(tissue, 75))
    assert len(is_bright) > 3
    assert np.mean(is_bright) > 0.8


@pytest.mark.filterwarnings("ignore:End of file reached")
def test_every_listed_fault_breaks_its_file(release: Path) -> None:
    faults = table(release, "faults")
    train = table(release, "train").set_index("image_id")
    assert sorted(faults.fault) == sorted(FAULTS)
    for row in faults.itertuples():
        path = release / "train_images" / str(train.loc[row.image_id].patient_id) / f"{row.image_id}.dcm"
        if row.fault == "missing":
            assert not path.exists()
        elif row.fault == "blank":
            assert np.ptp(pydicom.dcmread(path).pixel_array) == 0
        else:
            with pytest.raises(Exception):  # noqa: B017, PT011 (each fault raises a different exception)
                _ = pydicom.dcmread(path).pixel_array


def content(release: Path) -> dict[str, bytes]:
    """Return the content of all files by relative path."""
    return {str(path.relative_to(release)): path.read_bytes() for path in release.rglob("*") if path.is_file()}


def test_a_seed_gives_the_same_bytes_with_any_number_of_workers(tmp_path: Path) -> None:
    config = SynthConfig(out=tmp_path / "a", patients=2, size=Size(128, 128), jobs=1)
    first = content(write_release(config))
    assert content(write_release(replace(config, out=tmp_path / "b", workers=2))) == first
    other = content(write_release(replace(config, out=tmp_path / "c", seed=1)))
    assert not set(other) & {name for name in first if name.endswith(".dcm")}


def test_a_folder_with_other_content_is_refused_and_left_unchanged(tmp_path: Path) -> None:
    config = SynthConfig(out=tmp_path / "release", patients=1, size=Size(128, 128), jobs=1)
    first = content(write_release(config))
    assert content(write_release(config)) == first  # the same release completes it
    with pytest.raises(UsageError, match="release"):
        write_release(replace(config, seed=1))
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "a.txt").write_text("dear")
    with pytest.raises(UsageError, match="letters"):
        write_release(replace(config, out=tmp_path / "letters"))
    assert [path.name for path in (tmp_path / "letters").iterdir()] == ["a.txt"]
    with pytest.raises(UsageError, match=r"a\.txt"):
        write_release(replace(config, out=tmp_path / "letters" / "a.txt"))
