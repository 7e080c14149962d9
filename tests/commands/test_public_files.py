"""The public test files of other image libraries: each is scored, or refused with a reason, and none ends a run."""

from __future__ import annotations

import os
from pathlib import Path

import pandas as pd
import pydicom.data
import pytest

from vitmodel.cli import main
from vitmodel.data.manifest import read_manifest
from vitmodel.pixels.verdict import REFUSAL_REASONS

ENVIRONMENT = "VITMODEL_TEST_FILES"
"""Variable that names a folder of further files, such as Tests/images of Pillow's source distribution."""


def check_every_file_ends_in_a_verdict(source: Path, run: Path, folder: Path) -> None:
    """Run etl and predict on a folder and check each row; warnings of decoders may appear on standard error."""
    main(["etl", str(source), str(folder / "crops"), "--size", "64x32", "--jobs", "1", "--dataset", "dicom_folder"])
    manifest = read_manifest(folder / "crops" / "manifest.csv")
    refused = manifest[manifest["status"] == "refused"]
    assert set(refused["reason"]) <= REFUSAL_REASONS.keys() - {"failed"}, refused[refused["reason"] == "failed"]
    assert refused["remark"].notna().all()
    assert (refused.groupby("reason").size() > 0).sum() > 3, "files of several kinds are expected"
    main(["predict", str(run / "package"), str(source), str(folder / "scores"), "--jobs", "1"])
    scores = pd.read_csv(folder / "scores" / "scores.csv")
    assert len(scores) == len(manifest)
    assert not scores["reason"].fillna("").str.contains("failed").any()
    is_refused = scores["status"] == "refused"
    assert (scores["probability"].isna() == is_refused).all()
    assert scores.loc[is_refused, "remark"].notna().all()


@pytest.mark.filterwarnings("ignore")
def test_each_test_file_of_pydicom_is_scored_or_refused(run: Path, tmp_path: Path) -> None:
    source = Path(pydicom.data.get_testdata_file("CT_small.dcm")).parent
    check_every_file_ends_in_a_verdict(source, run, tmp_path)


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore")
def test_each_file_of_a_given_folder_is_scored_or_refused(run: Path, tmp_path: Path) -> None:
    """pip download --no-deps --no-binary pillow pillow; unpack it; VITMODEL_TEST_FILES=pillow-*/Tests/images."""
    folder = os.environ.get(ENVIRONMENT, "")
    if not folder:
        pytest.skip(f"{ENVIRONMENT} names no folder of test files")
    check_every_file_ends_in_a_verdict(Path(folder), run, tmp_path)
