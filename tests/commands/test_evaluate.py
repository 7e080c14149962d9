"""Subgroups add up, leaks are found, models are compared on the same units, and undefined metrics are reported."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit, logit

from vitmodel.cli import main
from vitmodel.commands.compare import aggregate_scores
from vitmodel.config import CompareConfig, EvaluateConfig, to_command
from vitmodel.data.audit import find_links, fit_baseline
from vitmodel.data.manifest import as_manifest, breast_ids, read_manifest, write_manifest
from vitmodel.data.splits import hold_out_group
from vitmodel.data.subgroups import subgroups
from vitmodel.model.package_check import seal
from vitmodel.scoring.evaluation import Evaluation
from vitmodel.utils import sha256_file


def screening(patients: int = 120, seed: int = 0) -> pd.DataFrame:
    """Return a manifest with two views of both breasts of each patient; ids carry no information about the label."""
    rng = np.random.default_rng(seed)
    has_cancer = rng.random((patients, 2)) < 0.25
    names = rng.permutation(patients)
    rows = []
    for patient, side, view in itertools.product(range(patients), "LR", ("CC", "MLO")):
        cancer = bool(has_cancer[patient, int(side == "R")])
        name = f"{names[patient]}{side}{view}"
        row = {
            "image_id": name,
            "patient_id": str(names[patient]),
            "laterality": side,
            "view": view,
            "path": f"{name}.png",
            "cancer": int(cancer),
            "age": 45 + patient % 40,
            "invasive": int(cancer and patient % 2),
            "machine_id": str(patient % 3),
            "site_id": "1",
            "difficult_negative_case": int(not cancer and patient % 5 == 0),
            "density": "ABCD"[patient % 4],
        }
        rows.append(row)
    return as_manifest(pd.DataFrame(rows), "the test's table")


def evaluation(table: pd.DataFrame, seed: int = 0) -> Evaluation:
    """Return the table with scores that are higher for positives."""
    rng = np.random.default_rng(seed)
    probability = 1 / (1 + np.exp(-rng.normal(1.2 * table["cancer"].fillna(0) - 1)))
    settings = {"aggregate": "mean", "patient_aggregate": "max", "threshold": 0.5, "replicates": 100, "seed": 0}
    return Evaluation(table=table, probability=np.asarray(probability), label="cancer", **settings)


def test_the_subgroups_of_an_attribute_add_up_to_all() -> None:
    table = screening()
    table.loc[:7, "machine_id"] = np.nan
    groups, skipped = subgroups(table, "cancer")
    one_class = {"Positives, against all negatives", "Negatives, against all positives"}
    for attribute in {group.attribute for group in groups} - one_class:
        members = sum(group.mask.astype(int) for group in groups if group.attribute == attribute)
        assert members.tolist() == [1] * len(table)
    assert [g.value for g in groups if g.attribute == "Machine"] == ["0", "1", "2", "unknown"]
    assert [g.value for g in groups if g.attribute == "Age"] == ["40 to 49", "50 to 59", "60 to 69", "70 and above"]
    assert {"Site: 1 for all images", "BI-RADS: unknown for all images"} <= set(skipped)


def test_invasive_cancers_are_compared_with_all_negatives() -> None:
    table = screening()
    groups = {(g.attribute, g.value): g.mask for g in subgroups(table, "cancer")[0]}
    invasive = groups["Positives, against all negatives", "invasive"]
    np.testing.assert_array_equal(invasive, (table["cancer"] == 0) | (table["invasive"] == 1))
    hard = groups["Negatives, against all positives", "difficult to tell"]
    np.testing.assert_array_equal(hard, (table["cancer"] == 1) | (table["difficult_negative_case"] == 1))


def test_a_subgroup_without_a_label_or_with_one_class_is_reported_not_fatal() -> None:
    table = screening()
    table.loc[table["machine_id"] == "1", "cancer"] = np.nan
    table.loc[table["machine_id"] == "2", "cancer"] = 0
    groups = {(g.attribute, g.value): g.metrics for g in evaluation(table).subgroups()[0]}
    assert groups["Machine", "1"] is None
    assert np.isnan(groups["Machine", "2"].intervals["auroc"].value)
    assert groups["Machine", "0"].intervals["auroc"].value > 0.5


def test_a_view_has_one_unit_per_breast() -> None:
    table = screening()
    groups = {(g.attribute, g.value): g.metrics for g in evaluation(table).subgroups()[0]}
    assert groups["View", "CC"].units == breast_ids(table).nunique()


@pytest.mark.parametrize("method", ["mean", "mean_logit", "max", "noisy_or"])
def test_the_images_of_a_breast_are_aggregated_by_the_chosen_method(method: str) -> None:
    table = screening(3)
    evaluated = replace(evaluation(table), aggregate=method)
    pairs = evaluated.probability.reshape(-1, 2)  # the two views of a breast are adjacent rows
    pooled = expit(logit(pairs).mean(axis=1))
    expected = {
        "mean": pairs.mean(axis=1),
        "mean_logit": pooled,
        "max": pairs.max(axis=1),
        "noisy_or": 1 - (1 - pairs).prod(axis=1),
    }[method]
    order = np.argsort(breast_ids(table)[::2].to_numpy())
    np.testing.assert_allclose(evaluated.scored_units("breast").scores, expected[order])


@pytest.mark.parametrize(("positives", "folds"), [(1, 0), (3, 3), (9, 5)])
def test_the_number_of_folds_is_limited_by_the_patients_of_each_class(positives: int, folds: int) -> None:
    table = screening(30)
    positive = table["patient_id"].isin(table["patient_id"].unique()[:positives])
    evaluated = evaluation(table.assign(cancer=positive.astype(float)))
    assert evaluated.folds() == folds
    assert len(evaluated.thresholds(0.9)) == (3 if folds else 0)


def test_errors_are_the_most_confident_ones_of_both_kinds() -> None:
    evaluated = evaluation(screening())
    rows = evaluated.errors(24)
    truth = evaluated.table["cancer"].to_numpy()[rows]
    p = evaluated.probability[rows]
    assert len(rows) == len(set(rows)) == 24
    assert ((p >= 0.5) != (truth == 1)).all()
    assert (truth == 1).sum() == 12
    missed = evaluated.probability[(evaluated.table["cancer"] == 1) & (evaluated.probability < 0.5)]
    assert p[truth == 1].tolist() == sorted(missed)[:12]


def baseline_aurocs(table: pd.DataFrame) -> dict[str, float]:
    """Return the AUROC of each baseline of the audit of `table`."""
    baselines = evaluation(table).audit(table).baselines
    return {baseline.name: baseline.metrics.intervals["auroc"].value for baseline in baselines}


def test_the_audit_finds_a_leak_by_metadata_or_id_and_none_in_a_clean_table() -> None:
    clean = screening()
    for name in ("Ids alone", "Metadata alone"):
        assert not np.isnan(fit_baseline(clean, "cancer", name)[0]).any()
    audited = evaluation(clean).audit(clean)
    assert all(baseline.metrics.intervals["auroc"].value < 0.65 for baseline in audited.baselines)
    assert audited.links == {"patients": 0, "source files": 0, "crops of the same pixels": 0}
    by_machine = clean.assign(machine_id=np.where(clean["cancer"] == 1, "9", clean["machine_id"]))
    assert fit_baseline(by_machine, "cancer", "Metadata alone")[1] == "machine_id"
    aurocs = baseline_aurocs(by_machine)
    assert aurocs["Metadata alone"] > 0.9 > aurocs["Ids alone"]
    ordered = clean.sort_values("cancer", kind="stable").reset_index(drop=True)
    assert baseline_aurocs(ordered)["Ids alone"] > 0.9


def test_a_column_without_two_values_is_never_the_most_important(monkeypatch: pytest.MonkeyPatch) -> None:
    """Permuting it changes nothing, but neither does permuting a column that the trees do not use."""
    table = screening()
    constant = {"age": np.nan, "implant": 0.0, "site_id": np.nan, "view": "CC", "laterality": "L", "dataset": "a"}
    only_machine = table.assign(**constant, machine_id=[str(row % 3) for row in range(len(table))])
    only_machine = only_machine.astype(
        dict.fromkeys(("site_id", "view", "laterality", "dataset", "machine_id"), object)
    )
    for column in ("source_height", "source_width", "spacing_row", "photometric", "transfer_syntax"):
        only_machine[column] = np.nan
    monkeypatch.setattr("vitmodel.data.audit.breast_ids", lambda rows: rows["image_id"])  # one image for each breast
    assert fit_baseline(only_machine, "cancer", "Metadata alone")[1] == "machine_id"
    scores, strongest = fit_baseline(only_machine.assign(machine_id="1"), "cancer", "Metadata alone")
    assert strongest == ""
    assert np.isnan(scores).all()


def test_patients_files_and_pixels_in_two_splits_are_reported(tmp_path: Path) -> None:
    table = screening(6).assign(status="ok", preprocessing="{}", split=np.where(np.arange(24) < 12, "train", "test"))
    for row, name in enumerate(table["path"]):
        (tmp_path / name).write_bytes(b"the same pixels" if row in (0, 23) else str(row).encode() * 7)
    table["path"] = [str(tmp_path / name) for name in table["path"]]
    table["source_sha256"] = [f"{row:064x}" for row in range(23)] + [f"{1:064x}"]
    table.loc[4:7, "split"] = ["train", "train", "test", "test"]
    links = find_links(table)
    assert links["kind"].tolist() == ["patient_id", "source_sha256", "crop"]
    assert links["parts"].eq("test, train").all()


def test_all_images_of_a_patient_with_an_image_from_the_held_out_machine_are_held_out() -> None:
    table = screening(9)
    table.loc[0, "machine_id"] = "1"  # an image of a patient whose other images are from machine 0
    split = hold_out_group(table, "machine_id", "1")["split"]
    held_out = table.loc[table["machine_id"] == "1", "patient_id"].unique()
    assert len(held_out) == 4
    assert (split == "test").equals(table["patient_id"].isin(held_out))
    assert set(split) == {"test", "train"}


def test_the_report_shows_the_command_that_ran() -> None:
    config = EvaluateConfig(package=Path("a b"), manifest=Path("m.csv"), out=Path("o"), audit=False, prevalence=0.021)
    assert to_command("evaluate", config) == "vitmodel evaluate 'a b' m.csv o --prevalence 0.021 --no-audit"
    both = CompareConfig(models=[Path("a"), Path("b")], manifest=Path("m.csv"))
    assert to_command("compare", both) == "vitmodel compare a b m.csv"


@pytest.fixture
def scored(tmp_path: Path) -> Path:
    """Return a folder with a manifest, the image scores of a good and a poor model, and a submission."""
    table = screening().assign(status="ok")
    write_manifest(table, tmp_path / "manifest.csv")
    rng = np.random.default_rng(1)
    for name, gain in (("good", 2.5), ("poor", 0.3)):
        values = 1 / (1 + np.exp(-rng.normal(gain * table["cancer"] - 1)))
        pd.DataFrame({"image_id": table["image_id"], "probability": values}).to_csv(
            tmp_path / f"{name}.csv", index=False
        )
    breasts = expit(pd.Series(logit(values)).groupby(breast_ids(table)).mean())
    breasts.rename_axis("prediction_id").rename("cancer").to_csv(tmp_path / "submission.csv")
    return tmp_path


def test_score_files_are_compared_on_their_common_units(scored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = pd.read_csv(scored / "good.csv").astype({"image_id": str})
    unscored = good["image_id"].str.contains("0L")
    good.assign(probability=good["probability"].mask(unscored)).to_csv(scored / "good.csv", index=False)
    poor = pd.read_csv(scored / "poor.csv", dtype={"image_id": str}).rename(columns={"probability": "score"})
    # like out_of_fold.csv, which holds the label in the column cancer; it must not be read as a score
    poor.assign(cancer=screening()["cancer"]).to_csv(scored / "poor.csv", index=False)
    files = [str(scored / name) for name in ("poor.csv", "good.csv", "submission.csv")]
    options = ["--manifest", str(scored / "manifest.csv"), "--out", str(scored / "out"), "--replicates", "100"]
    assert main(["compare", *files, *options]) == 0
    printed = capsys.readouterr().out
    assert f"{240 - unscored.sum() // 2} of 240 labelled breast units are scored by all" in printed
    comparison = json.loads((scored / "out" / "comparison.json").read_text())
    better, same = (comparison["differences"][file] for file in files[1:])
    assert better["delong"]["low"] > 0.1
    assert better["p_value"] < 0.001
    assert better["differences"]["auroc"]["low"] > 0.1
    assert same["delong"]["value"] == pytest.approx(0, abs=1e-9)


def test_scores_of_breasts_are_compared_per_patient_but_not_per_image(
    scored: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = [str(scored / "poor.csv"), str(scored / "submission.csv")]  # one model, per image and per breast
    command = ["compare", *models, "--manifest", str(scored / "manifest.csv"), "--replicates", "100"]
    assert main([*command, "--level", "patient", "--out", str(scored)]) == 0
    assert "120 of 120 labelled patient units" in capsys.readouterr().out
    (difference,) = json.loads((scored / "comparison.json").read_text())["differences"].values()
    assert difference["delong"]["value"] == pytest.approx(0, abs=1e-9)
    assert main([*command, "--level", "image"]) == 2
    assert "submission.csv: has a score per breast" in capsys.readouterr().err


def test_the_score_of_a_patient_is_that_of_her_worse_breast() -> None:
    table = screening(3)
    scores = pd.Series(np.random.default_rng(0).random(len(table)), table.index)
    pooled = expit(logit(scores).groupby(breast_ids(table)).mean())
    worse = pooled.groupby(table.groupby(breast_ids(table))["patient_id"].first()).max()
    models = [Path("a"), Path("b")]
    for level, expected in (("image", scores.set_axis(table["image_id"])), ("breast", pooled), ("patient", worse)):
        config = CompareConfig(models=models, manifest=Path("m.csv"), level=level)
        pd.testing.assert_series_equal(aggregate_scores(scores, table, config), expected, check_names=False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("image_id,probability\n1,0.5\n2,1.7\n", "row 2: '1.7' lies outside"),
        ("image_id,probability\n1,0.5\n2,high\n", "row 2: 'high' is not a number"),
        ("image_id,probability\n1,0.5\n1,0.6\n", "row 2: .* second score"),
        ("image,p\n1,0.5\n", "no columns of scores; a score file has image_id"),
        ("image_id,cancer\n1,1\n", "no columns of scores; a score file has image_id"),
    ],
)
def test_an_invalid_score_file_is_named(
    content: str, message: str, scored: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (scored / "bad.csv").write_text(content)
    files = [str(scored / "good.csv"), str(scored / "bad.csv")]
    assert main(["compare", *files, "--manifest", str(scored / "manifest.csv")]) == 2
    printed = capsys.readouterr().err
    assert "bad.csv" in printed
    assert re.search(message, printed)


def test_a_comparison_reports_which_package_was_trained_on_its_images(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = read_manifest(run / "manifest.csv").query("split == 'train'")
    scores = tmp_path / "scores.csv"
    table[["image_id"]].assign(score=np.linspace(0, 1, len(table))).to_csv(scores, index=False)
    models = [str(run / "package"), str(scores)]
    command = ["compare", *models, "--manifest", str(run / "manifest.csv"), "--replicates", "100"]
    assert main([*command, "--split", "train", "--out", str(tmp_path)]) == 0
    assert f"{len(table)} of {len(table)} images were seen by {run / 'package'} in" in capsys.readouterr().out
    results = json.loads((tmp_path / "comparison.json").read_text())["models"]
    assert [result["seen_images"] for result in results.values()] == [len(table), None]


def test_evaluating_an_ensemble_counts_seen_images_of_all_packages_and_keeps_their_model_cards(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    package = tmp_path / "package"
    shutil.copytree(run / "package", package)
    document = json.loads((package / "config.json").read_text())
    document["data"]["seen_images"] = ""
    seal(package, document)
    cards = [(folder / "MODEL_CARD.md").read_bytes() for folder in (package, run / "package")]
    table = read_manifest(run / "manifest.csv")
    paths = [str(package), str(run / "manifest.csv"), str(tmp_path / "out")]
    command = ["evaluate", *paths, "--replicates", "100", "--no-audit"]
    assert main([*command, "--split", "all", "--ensemble", str(run / "package")]) == 0
    printed = capsys.readouterr().out
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["seen_images"] == (table["split"] != "test").sum()
    assert f"{metrics['seen_images']} of {len(table)} images were seen" in printed
    assert "no model card is written" in printed
    assert cards == [(folder / "MODEL_CARD.md").read_bytes() for folder in (package, run / "package")]
    for number, folder in enumerate((package, run / "package"), 1):
        assert metrics["model"][f"Package {number}: Folder"] == str(folder)
        assert metrics["model"][f"Package {number}: Weights (SHA-256)"] == sha256_file(folder / "model.safetensors")


@pytest.fixture
def two_sites(crops: Path, tmp_path: Path) -> Path:
    """Return a manifest of the crops in which each of two sites has patients with and without cancer."""
    table = read_manifest(crops / "manifest.csv")
    patients = sorted(table["patient_id"].unique())
    has_cancer = table.groupby("patient_id")["cancer"].max()
    ranked = sorted(patients, key=lambda patient: (has_cancer[patient], patient))
    table["site_id"] = table["patient_id"].map({patient: str(place % 2) for place, patient in enumerate(ranked)})
    write_manifest(table, tmp_path / "manifest.csv")
    return tmp_path / "manifest.csv"


def leave_out_command(manifest: Path, flags: list[str]) -> list[str]:
    """Return arguments of `vitmodel leave-out` by site, training for one epoch; OUT is `out` next to the manifest."""
    training = " ".join([*flags, "--epochs", "1", "--device", "cpu"])
    command = ["leave-out", str(manifest), str(manifest.parent / "out"), "--by", "site_id"]
    return [*command, "--train", training, "--evaluate", "--replicates 100 --no-audit"]


def test_each_site_is_left_out_once_and_finished_trainings_are_kept(
    two_sites: Path, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], steps_in_process: None
) -> None:
    command = leave_out_command(two_sites, flags)
    assert main(command) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())["left_out"]
    assert set(summary) == {"0", "1"}
    for value in "01":
        used = read_manifest(tmp_path / "out" / f"site_id-{value}" / "run" / "manifest.csv")
        assert set(used.loc[used["split"] == "test", "site_id"]) == {value}
        assert value not in set(used.loc[used["split"] != "test", "site_id"])
    capsys.readouterr()
    assert main(command) == 0
    assert "$ vitmodel train" not in capsys.readouterr().out


@pytest.mark.nightly
def test_each_step_of_leave_out_may_train_on_two_devices(two_sites: Path, flags: list[str], tmp_path: Path) -> None:
    """Each step runs in its own process, which starts further processes."""
    assert main(leave_out_command(two_sites, [*flags, "--epochs", "1", "--devices", "2"])) == 0
    assert set(json.loads((tmp_path / "out" / "summary.json").read_text())["left_out"]) == {"0", "1"}
