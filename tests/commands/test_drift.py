"""The command `drift`, and the distributions that predict and evaluate write."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import cv2
import pandas as pd
import pytest

import vitmodel
from vitmodel.cli import main
from vitmodel.commands.drift import run_names
from vitmodel.errors import UsageError


@pytest.fixture(scope="module")
def scores(run: Path, crops: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the scores.csv of a prediction."""
    out = tmp_path_factory.mktemp("drift") / "monday"
    main(["predict", str(run / "package"), str(crops / "manifest.csv"), str(out)])
    return out / "scores.csv"


def test_runs_are_compared_in_a_page_a_picture_and_a_table(run: Path, scores: Path, tmp_path: Path) -> None:
    table = pd.read_csv(scores)
    later = tmp_path / "tuesday"
    later.mkdir()
    table.assign(grey_mean=table["grey_mean"] + 0.4).to_csv(later / "scores.csv", index=False)
    out = tmp_path / "out"
    assert main(["drift", str(run / "package"), str(scores), str(later / "scores.csv"), "--out", str(out)]) == 0
    found = pd.read_csv(out / "drift.csv").set_index(["run", "column"])["index"]
    assert found["tuesday", "grey_mean"] > 1 > found["monday", "grey_mean"]
    assert found["tuesday", "view"] == found["monday", "view"]
    page = (out / "drift.html").read_text()
    assert "Research software, not a medical device" in page
    assert page.count("<img") == 1 + table.columns.isin(found.index.get_level_values("column")).sum()
    assert cv2.imread(str(out / "drift.png")) is not None
    result = vitmodel.drift(run / "package", scores, tmp_path / "api")
    assert set(result["run"]) == {"monday"}


def test_predict_and_evaluate_write_the_distributions(run: Path, scores: Path, crops: Path, tmp_path: Path) -> None:
    table = pd.read_csv(scores.parent / "distributions.csv")
    counts = table[table["column"] == "view"].groupby("column")[["training_images", "images"]].sum()
    assert counts["images"].item() == pd.read_csv(scores)["grey_mean"].notna().sum()
    flags = ["--split", "all", "--replicates", "100", "--no-audit", "--no-card"]
    assert main(["evaluate", str(run / "package"), str(crops / "manifest.csv"), str(tmp_path), *flags]) == 0
    assert (tmp_path / "distributions.csv").is_file()
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert {column["column"] for column in metrics["drift"]} == set(table["column"])
    page = (tmp_path / "report.html").read_text()
    assert "The typicality of" in page
    assert page.index("<h2>Refused images</h2>") < page.index("<h2>Evaluated units</h2>")
    assert "compared with those of the training" in page


def test_the_how_to_page_runs_as_printed(
    run: Path, crops: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = pd.read_csv(crops / "manifest.csv", dtype=str)
    sources = table.loc[table["status"] == "ok", "source_path"]
    for month, paths in (("march", sources[:4]), ("april", sources[4:8])):
        (tmp_path / month).mkdir()
        for path in paths:
            (tmp_path / month / Path(path).name).symlink_to((crops / path).resolve())
    (tmp_path / "run").symlink_to(run)
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).resolve().parents[2] / "docs" / "how-to" / "drift.md").read_text()
    for line in re.findall(r"^vitmodel .*", page, re.MULTILINE):
        assert main(shlex.split(line)[1:]) == 0, line
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(compile(code, "drift.md", "exec"), {})
    assert {path.name for path in (tmp_path / "drift").iterdir()} == {"drift.csv", "drift.html", "drift.png"}


def test_a_table_of_an_earlier_version_is_refused(
    run: Path, scores: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = tmp_path / "scores.csv"
    pd.read_csv(scores).drop(columns=["typicality"]).to_csv(old, index=False)
    assert main(["drift", str(run / "package"), str(old), "--out", str(tmp_path / "out")]) == 2
    assert "column typicality is missing" in capsys.readouterr().err


def test_runs_are_named_by_what_distinguishes_their_paths() -> None:
    assert run_names([Path("/a/monday/scores.csv"), Path("/a/tuesday/scores.csv")]) == ["monday", "tuesday"]
    assert run_names([Path("/a/x/scores.csv"), Path("/b/x/scores.csv")]) == ["a/x", "b/x"]
    assert run_names([Path("/a/march.csv"), Path("/a/april.csv")]) == ["march.csv", "april.csv"]
    with pytest.raises(UsageError, match="named twice"):
        run_names([Path("/a/scores.csv"), Path("/a/scores.csv")])
