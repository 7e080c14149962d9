"""A model of BI-RADS: every verb follows its label rule, and nothing that it writes calls a score a cancer."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import MakeOnce

from vitmodel.cli import main
from vitmodel.data.manifest import breast_ids, read_manifest, write_manifest
from vitmodel.model.package_check import seal

RULE = "birads>=4"
DOCS = Path(__file__).resolve().parents[2] / "docs"


def documented_command() -> list[str]:
    """Return the arguments of the command in the section on BI-RADS."""
    page = (DOCS / "how-to" / "train.md").read_text()
    section = page.partition("## Train on BI-RADS")[2]
    command = re.search(r"^vitmodel (train vindr/.*)$", section, re.MULTILINE)
    assert command
    return shlex.split(command[1])


def without_pathology(table: pd.DataFrame) -> pd.DataFrame:
    """Return a manifest as of VinDr-Mammo: BI-RADS 4 or 5 in breasts with cancer, else 0 to 2, and no pathology."""
    other = np.arange(len(table)) % 3
    birads = np.where(table["cancer"] == 1, 4 + np.arange(len(table)) % 2, other)
    return table.assign(cancer=np.nan, invasive=np.nan, biopsy=np.nan, birads=birads, reader=birads)


@pytest.fixture(scope="module")
def reading(crops: Path, flags: list[str], make_once: MakeOnce) -> Path:
    """Return a folder with vindr/manifest.csv, and the run that the documented command makes of it."""

    def make(folder: Path) -> None:
        write_manifest(without_pathology(read_manifest(crops / "manifest.csv")), folder / "vindr" / "manifest.csv")
        verb, manifest, run, *options = documented_command()
        paths = [str(folder / manifest), str(folder / run)]
        assert main([verb, *paths, *options, *flags, "--epochs", "1", "--auxiliary", "density"]) == 0

    return make_once("reading", make)


def test_the_documented_command_trains_on_known_assessments_only(reading: Path) -> None:
    package = json.loads((reading / "run" / "package" / "config.json").read_text())
    assert package["label"] == RULE
    used = read_manifest(reading / "run" / "manifest.csv")
    assert (used["birads"] > 0).all()
    assert RULE not in used
    scores = pd.read_csv(reading / "run" / "validation.csv", dtype={"image_id": str}).set_index("image_id")
    expected = used.set_index("image_id")["birads"].loc[scores.index] >= 4
    assert (scores[RULE] == expected).all()
    positives = {name: counts["positive_images"] for name, counts in package["data"]["splits"].items()}
    assert positives == (used["birads"] >= 4).groupby(used["split"]).sum().to_dict()
    card = (reading / "run" / "package" / "MODEL_CARD.md").read_text()
    assert RULE in card
    assert "cancer" not in card.partition("```yaml")[0].lower()


def test_evaluation_follows_the_rule_of_the_package_or_the_one_given(
    reading: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    package, manifest = str(reading / "run" / "package"), str(reading / "run" / "manifest.csv")
    options = ["--split", "all", "--replicates", "100", "--no-card"]
    assert main(["evaluate", package, manifest, str(tmp_path / "own"), *options]) == 0
    metrics: dict[str, Any] = json.loads((tmp_path / "own" / "metrics.json").read_text())
    table = read_manifest(Path(manifest))
    assert metrics["label"] == metrics["method"]["Label"] == RULE
    assert metrics["breast"]["positives"] == breast_ids(table[table["birads"] >= 4]).nunique()
    page = (tmp_path / "own" / "report.html").read_text()
    text = re.sub(r"<[^>]*>|data:[^\"]*", "", page)
    assert f"{RULE.replace('>', '&gt;')} scores of" in text
    assert "finds cancer" in text
    assert text.lower().count("cancer") == 1, "only the limit that says what the label is not"
    capsys.readouterr()
    options += ["--no-audit", "--label", "birads>=5"]
    assert main(["evaluate", package, manifest, str(tmp_path / "other"), *options]) == 0
    assert "trained on birads>=4" in capsys.readouterr().out
    assert json.loads((tmp_path / "other" / "metrics.json").read_text())["label"] == "birads>=5"
    assert main(["evaluate", package, manifest, str(tmp_path / "none"), "--label", "cancer"]) == 2
    assert "--label 'birads>=4'" in capsys.readouterr().err


def test_a_comparison_follows_the_rule_of_the_first_package(
    reading: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = read_manifest(reading / "run" / "manifest.csv")
    scores = table[["image_id"]].assign(probability=np.where(table["birads"] >= 4, 0.9, 0.1))
    scores.to_csv(tmp_path / "perfect.csv", index=False)
    command = ["compare", str(reading / "run" / "package"), str(tmp_path / "perfect.csv"), "--replicates", "100"]
    command += ["--manifest", str(reading / "run" / "manifest.csv"), "--split", "all", "--out", str(tmp_path)]
    assert main(command) == 0
    comparison = json.loads((tmp_path / "comparison.json").read_text())
    assert comparison["label"] == RULE
    assert comparison["models"][str(tmp_path / "perfect.csv")]["intervals"]["auroc"]["value"] == 1
    capsys.readouterr()
    assert main([*command, "--label", "cancer"]) == 2
    out, error = capsys.readouterr()
    assert "was trained on birads>=4" in out
    assert "known label" in error


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ([], "--label 'birads>=4'"),
        (["--label", "reader>=4", "--sources", "reader"], "reveals the label"),
        (["--label", "difficult_negative_case", "--auxiliary", "difficult_negative_case"], "is the label already"),
        (["--label", "birds>=4"], "did you mean birads"),
        (["--label", "birads>>4"], "write a column of 0 and 1"),
    ],
)
def test_a_training_without_a_usable_label_is_refused_with_a_way_out(
    options: list[str], named: str, reading: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = read_manifest(reading / "vindr" / "manifest.csv")
    table["difficult_negative_case"] = (table["birads"] == 2).astype(float)
    write_manifest(table, tmp_path / "manifest.csv")
    assert main(["train", str(tmp_path / "manifest.csv"), str(tmp_path / "run"), *options]) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_package_without_the_key_predicts_cancer(run: Path, tmp_path: Path) -> None:
    from vitmodel import load

    package = tmp_path / "package"
    shutil.copytree(run / "package", package)
    config = json.loads((package / "config.json").read_text())
    del config["label"]
    seal(package, config)
    assert load(package, progress=False).label == "cancer"


def test_leave_out_passes_the_rule_on_and_does_not_mix_it_with_results_of_another(
    reading: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = read_manifest(reading / "vindr" / "manifest.csv")
    write_manifest(table.assign(site_id=(table["patient_id"].rank(method="dense") % 2).astype(str)), tmp_path / "m.csv")
    command = ["leave-out", str(tmp_path / "m.csv"), str(tmp_path / "out"), "--by", "site_id"]
    assert main(command) == 2
    assert "--label 'birads>=4'" in capsys.readouterr().err
    assert main([*command, "--train", "--label cancer"]) == 2
    assert "give --label to leave-out" in capsys.readouterr().err
    report = tmp_path / "out" / "site_id-0.0" / "report"
    report.mkdir(parents=True)
    (report / "metrics.json").write_text('{"label": "cancer"}')
    assert main([*command, "--label", RULE]) == 2
    assert "was measured with --label cancer" in capsys.readouterr().err
