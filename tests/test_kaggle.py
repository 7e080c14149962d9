"""The notebook for Kaggle writes a submission from attached data alone, in a folder laid out as Kaggle's."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[1]
TARGETS = ["cancer", "biopsy", "invasive", "BIRADS", "density", "difficult_negative_case"]
"""Columns of train.csv that test.csv lacks."""


def write_wheel(folder: Path) -> None:
    """Build the wheel of this checkout into `folder`."""
    source = folder.parent / "source"
    source.mkdir(parents=True)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "vitmodel", source / "vitmodel", ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def write_competition(release: Path, folder: Path) -> pd.DataFrame:
    """Write test.csv and test_images as in the competition, from a synthetic release; return the table."""
    train = pd.read_csv(release / "train.csv")
    train = train[train["patient_id"].isin(train["patient_id"].unique()[:5])]
    test = train.drop(columns=[column for column in TARGETS if column in train])
    test["prediction_id"] = test["patient_id"].astype(str) + "_" + test["laterality"]
    folder.mkdir(parents=True)
    test.to_csv(folder / "test.csv", index=False)
    test[["prediction_id"]].drop_duplicates().assign(cancer=0.02).to_csv(folder / "sample_submission.csv", index=False)
    shutil.copytree(release / "train_images", folder / "test_images")
    train.to_csv(folder / "train.csv", index=False)
    return test


def state(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.slow
def test_the_notebook_writes_a_submission_without_internet(release: Path, run: Path, tmp_path: Path) -> None:
    """Kaggle attaches data sets at the top or in folders of their owners; here one of each."""
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    inputs = tmp_path / "kaggle" / "input"
    working = tmp_path / "kaggle" / "working"
    working.mkdir(parents=True)
    test = write_competition(release, inputs / "rsna-breast-cancer-detection")
    shutil.copytree(run / "package", inputs / "vitmodel-package")
    write_wheel(tmp_path / "wheel" / "dist")
    shutil.copytree(tmp_path / "wheel" / "dist", inputs / "datasets" / "ann" / "vitmodel-wheels")
    before = state(inputs)

    notebook = nbformat.read(ROOT / "examples" / "kaggle.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "commit the notebook without outputs"
    site = tmp_path / "site"  # instead of the environment that runs the tests
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {
        "KAGGLE_ROOT": str(tmp_path / "kaggle"),
        "PYTHONPATH": str(site),
        "http_proxy": "http://127.0.0.1:9",
    }
    environment |= {"https_proxy": "http://127.0.0.1:9", "PIP_TARGET": str(site), "PIP_NO_DEPS": "1"}
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(working)}})
    client.execute(env=environment)

    assert (site / "vitmodel" / "cli.py").is_file()
    submission = pd.read_csv(working / "submission.csv")
    assert list(submission.columns) == ["prediction_id", "cancer"]
    assert sorted(submission["prediction_id"]) == sorted(test["prediction_id"].unique())
    assert submission["cancer"].between(0, 1).all()
    assert state(inputs) == before, "the notebook wrote to its read-only inputs"
    shown = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert f"{len(submission)} breasts" in shown
